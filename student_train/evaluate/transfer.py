"""The transfer tasks of RoB's paper, and any two folders of classes, as images to pack: one ``Source`` to learn from and one
to test on.

Clevr/Count and Clevr/Dist are VTAB's (Zhai et al. 2019): the number of objects, and the depth of the nearest object in six
intervals, from the scene files; its test images are Clevr's validation split.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np

from ...common.errors import MisuseError, first_line, unknown_name
from ...common.files import is_inside, read_regular
from ...common.images.beton import Beton
from ...common.images.pack import PackConfig, pack
from ...common.images.sources import LARGEST, Source, open_folder, open_torchvision
from ...common.records import read_foreign

CLEVR_COUNTS = range(3, 11)
"""Objects in a scene: the eight classes of Clevr/Count."""
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
"""Bounds of Clevr/Dist's six classes: class i is above the i-th and at most the next."""

LARGEST_LIST = 1 << 32
"""Bytes of an annotation file."""

Sources = tuple[Source, Source]


class Listed(TypedDict):
    """An image of iNaturalist's annotations."""

    file_name: str


class Listing(TypedDict):
    images: list[Listed]


class Thing(TypedDict):
    pixel_coords: tuple[float, float, float]


class Scene(TypedDict):
    """What is read of a scene of Clevr."""

    image_filename: str
    objects: list[Thing]


class Scenes(TypedDict):
    scenes: list[Scene]


@dataclass(frozen=True)
class TransferTask:
    """``open(root, download)`` gives the images to learn from and to test on; ``download`` as torchvision's."""

    name: str
    open: Callable[[Path, bool], Sources]
    needs: str
    """What is needed, from where, and how it lies below the root."""
    can_download: bool = True


def open_task(name: str, root: Path, download: bool = False) -> Sources:
    """The two sources of a task whose data lie below ``root``.

    MisuseError: an unknown task; data that are not there (it says what to fetch and where to put it), or not as they
    should be.
    """
    if name not in TASKS:
        raise unknown_name("transfer task", name, TASKS)
    task = TASKS[name]
    if download and not task.can_download:
        raise MisuseError(f"{name} has no download that rob could make. {task.needs}")
    try:
        return task.open(root, download)
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # absent, or not as it should be
        remedy = "; or pass `download`" if task.can_download and not download else ""
        raise MisuseError(f"{name} is not in {root} ({first_line(error)}). {task.needs}{remedy}") from None


def packed_task(
    name: str,
    root: Path,
    packed: Path,
    *,
    download: bool = False,
    limit: int | None = None,
    max_resolution: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path]:
    """The ``.beton`` files of a task in the folder ``packed``, to learn from and to test on; packed where missing.

    ``limit`` takes so many training images, spread evenly. MisuseError as ``open_task``; FailureError as ``pack``.
    """
    if name not in TASKS:
        raise unknown_name("transfer task", name, TASKS)
    some = f"-{limit}" if limit else ""
    sources = open_task(name, root, download) if name == "folder" else None
    whose = f"{name}-{_digest(root, sources)}" if sources else name  # each root is another data set, and changes
    paths = packed / f"{whose}-train{some}-{max_resolution}px.beton", packed / f"{whose}-test-{max_resolution}px.beton"
    if not all(path.exists() for path in paths):
        sources = sources or open_task(name, root, download)
        for path, source in zip(paths, (sources[0].take(limit), sources[1]), strict=True):
            if not path.exists():
                pack(PackConfig(str(root), path, max_resolution), progress, source)
    for path in paths:
        Beton(path)
    return paths


def _digest(root: Path, sources: Sources) -> str:
    """Of where the images lie, which they are, and of the length and time of each file."""
    digest = hashlib.sha256(str(root.resolve()).encode())
    for source in sources:
        for file in source.paths:
            found = (source.folder / file).stat() if source.folder else None
            digest.update(f"{file}\0{found and (found.st_size, found.st_mtime_ns)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:8]


# ==== the tasks ====


def _open_named(name: str) -> Callable[[Path, bool], Sources]:
    """The splits train and test of one of ``sources.NAMED``."""

    def open_(root: Path, download: bool) -> Sources:
        return open_torchvision(name, "train", root, download), open_torchvision(name, "test", root, download)

    return open_


def _open_inaturalist_2021(train_version: str) -> Callable[[Path, bool], Sources]:
    def open_(root: Path, download: bool) -> Sources:
        from torchvision.datasets import INaturalist

        def source(version: str) -> Source:
            data = INaturalist(str(root), version, download=download)
            files = ((f"{data.all_categories[number]}/{file}", number) for number, file in data.index)
            return _of_files(Path(data.root), files, data.all_categories)

        return source(train_version), source("2021_valid")

    return open_


def _open_inaturalist_before_2021(year: str) -> Callable[[Path, bool], Sources]:
    """One folder of images holds both parts; the annotation files say which image is of which."""

    def open_(root: Path, download: bool) -> Sources:
        from torchvision.datasets import INaturalist

        data = INaturalist(str(root), year, download=download)
        number = {Path(name).as_posix(): index for index, name in enumerate(data.all_categories)}

        def source(part: str) -> Source:
            path = root / f"{part}{year}.json"
            listed = read_foreign(path, Listing, "an annotation file of iNaturalist", LARGEST_LIST)["images"]
            files = [image["file_name"].partition("/")[2] for image in listed]
            odd = next((file for file in files if not is_inside(file) or file.rpartition("/")[0] not in number), None)
            if odd is not None:
                raise MisuseError(f"{path} names {odd!r}, which is of no category in {data.root}")
            return _of_files(Path(data.root), ((f, number[f.rpartition("/")[0]]) for f in files), list(number))

        return source("train"), source("val")

    return open_


def _open_places(root: Path, download: bool) -> Sources:
    from torchvision.datasets import Places365

    def source(split: str) -> Source:
        data = Places365(str(root), split, small=True, download=download)
        folder = Path(data.images_dir)
        files = ((Path(file).relative_to(folder).as_posix(), int(label or 0)) for file, label in data.imgs)
        return _of_files(folder, files, data.classes)

    return source("train-standard"), source("val")


def _open_clevr(label: Callable[[Scene], int], classes: Sequence[str]) -> Callable[[Path, bool], Sources]:
    def open_(root: Path, download: bool) -> Sources:
        from torchvision.datasets import CLEVRClassification

        def source(split: str) -> Source:
            folder = root / "clevr" / "CLEVR_v1.0"
            path = folder / "scenes" / f"CLEVR_{split}_scenes.json"

            def read() -> dict[str, int]:
                scenes = read_foreign(path, Scenes, "a scene file of Clevr", LARGEST_LIST)["scenes"]
                return {scene["image_filename"]: label(scene) for scene in scenes}

            labels = read() if path.exists() else {}  # before torchvision, which believes what it reads
            data = CLEVRClassification(str(root), split, download=download)
            labels = labels or read()
            files = ((path.name, labels[path.name]) for path in data._image_files)
            return _of_files(folder / "images" / split, files, classes)

        return source("train"), source("val")

    return open_


def count_label(scene: Scene) -> int:
    """VTAB's ``count_all``: the number of objects, less three. MisuseError: a scene of fewer than 3 or more than 10."""
    count = len(scene["objects"])
    if count not in CLEVR_COUNTS:
        raise MisuseError(f"{scene['image_filename']} of Clevr has {count} objects, its scenes have 3 to 10")
    return count - CLEVR_COUNTS[0]


def distance_label(scene: Scene) -> int:
    """VTAB's ``closest_object_distance``: the interval of ``CLEVR_DISTANCES`` of the least depth, the third of an
    object's ``pixel_coords``. MisuseError: a depth outside them.
    """
    nearest = min((thing["pixel_coords"][2] for thing in scene["objects"]), default=float("nan"))
    label = int(np.searchsorted(CLEVR_DISTANCES, nearest, side="left")) - 1
    if not 0 <= label < len(CLEVR_DISTANCES) - 1:
        raise MisuseError(f"{scene['image_filename']} of Clevr has an object at depth {nearest:g}, expected 0 to 100")
    return label


def _open_folders(root: Path, download: bool) -> Sources:
    tested = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if tested is None or not (root / "train").is_dir():
        raise FileNotFoundError("no folders train and test, or train and val")
    sources = open_folder(root / "train"), open_folder(tested)
    for source, folder in zip(sources, (root / "train", tested), strict=True):
        if source.classes is None:
            raise MisuseError(f"{folder}: images must lie in one sub-folder a class")
    return sources


def _of_files(folder: Path, files: Iterable[tuple[str, int]], classes: Sequence[str]) -> Source:
    """Labelled files below ``folder``, in sorted order."""
    labels = dict(sorted(files))
    if not labels:
        raise FileNotFoundError(f"no image in {folder}")
    return Source(tuple(labels), lambda path: (read_regular(folder / path, LARGEST), labels[path]), tuple(classes))


_CLEVR = (
    "Fetch CLEVR_v1.0.zip (18 GB) from cs.stanford.edu/people/jcjohns/clevr and unpack it to ROOT/clevr/CLEVR_v1.0 "
    "(images/train, images/val, scenes/CLEVR_train_scenes.json, scenes/CLEVR_val_scenes.json)"
)
_INATURALIST = "github.com/visipedia/inat_comp links them"

TASKS = {
    task.name: task
    for task in (
        TransferTask(
            "cifar10",
            _open_named("cifar10"),
            "Fetch cifar-10-python.tar.gz (170 MB) from cs.toronto.edu/~kriz and unpack it to ROOT/cifar-10-batches-py",
        ),
        TransferTask(
            "cifar100",
            _open_named("cifar100"),
            "Fetch cifar-100-python.tar.gz (170 MB) from cs.toronto.edu/~kriz and unpack it to ROOT/cifar-100-python",
        ),
        TransferTask(
            "inaturalist2018",
            _open_inaturalist_before_2021("2018"),
            f"Fetch train_val2018.tar.gz (120 GB) and the annotations train2018.json and val2018.json ({_INATURALIST}); "
            "unpack the images to ROOT/2018/SUPERCATEGORY/NUMBER/*.jpg and put the two files into ROOT",
            can_download=False,
        ),
        TransferTask(
            "inaturalist2019",
            _open_inaturalist_before_2021("2019"),
            f"Fetch train_val2019.tar.gz (75 GB) and the annotations train2019.json and val2019.json ({_INATURALIST}); "
            "unpack the images to ROOT/2019/SUPERCATEGORY/NUMBER/*.jpg and put the two files into ROOT",
            can_download=False,
        ),
        TransferTask(
            "inaturalist2021",
            _open_inaturalist_2021("2021_train"),
            f"Fetch train.tar.gz (224 GB) and val.tar.gz (8.4 GB) of 2021 ({_INATURALIST}); unpack them to "
            "ROOT/2021_train/00000_Animalia_.../*.jpg and ROOT/2021_valid",
        ),
        TransferTask(
            "inaturalist2021-mini",
            _open_inaturalist_2021("2021_train_mini"),
            f"Fetch train_mini.tar.gz (42 GB) and val.tar.gz (8.4 GB) of 2021 ({_INATURALIST}); unpack them to "
            "ROOT/2021_train_mini/00000_Animalia_.../*.jpg and ROOT/2021_valid",
        ),
        TransferTask(
            "places365",
            _open_places,
            "Fetch train_256_places365standard.tar (24 GB), val_256.tar and filelist_places365-standard.tar from "
            "places2.csail.mit.edu; unpack them to ROOT/data_256_standard, ROOT/val_256 and ROOT",
        ),
        TransferTask("clevr-count", _open_clevr(count_label, [str(n) for n in CLEVR_COUNTS]), _CLEVR),
        TransferTask(
            "clevr-dist",
            _open_clevr(
                distance_label,
                [f"{low:g} to {high:g}" for low, high in pairwise(CLEVR_DISTANCES)],
            ),
            _CLEVR,
        ),
        TransferTask(
            "folder",
            _open_folders,
            "Put the images into ROOT/train/CLASS/ and ROOT/test/CLASS/ (or val)",
            can_download=False,
        ),
    )
}
"""By name."""
