"""Where images with masks lie: folders of masks, COCO's polygons, VOC's lists, ADE20K's folders. One path says which part."""

from collections.abc import Sequence
from pathlib import Path

from ....common.errors import MisuseError
from ....common.files import read_regular
from ....common.images.reading import EXTENSIONS
from ..detection.data import DetectionData, open_detection
from ..detection.voc import is_inside
from .data import IGNORED, Drawn, SegmentationData, read_mask

LAYOUTS = (
    "a folder with images/ and masks/ (PNG of one number a pixel, named as the image); images/PART beside masks/PART; "
    "COCO's annotations/instances_PART.json; VOC's ImageSets/Segmentation/PART.txt; ADE20K's images/PART beside annotations/PART"
)
CLASSES = "classes.txt"
"""One name a line, the first of value 0; beside ``images``, or above it."""
ADE_NAMES = "objectInfo150.txt"
MOST_CLASSES = 255
"""255 is what is ignored."""
VOC_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
LARGEST = 1 << 26
"""Bytes of a list."""


def open_segmentation(path: Path) -> SegmentationData:
    """The images and masks that ``path`` names, in one of ``LAYOUTS``; masks are looked at by ``SegmentationData.counts``.

    MisuseError: no such layout, no image, an image without a mask, a list or an annotation file that is none.
    """
    if path.suffix.lower() == ".json":
        return _coco(path)
    if path.suffix.lower() == ".txt":
        return _voc(path)
    if not path.is_dir():
        raise MisuseError(f"{path}: {'no folder' if path.exists() else 'no such folder'}; segmentation wants {LAYOUTS}")
    if (path / "images").is_dir() and (path / "masks").is_dir():
        return _folders(path, path / "images", path / "masks", path)
    root = path.parent.parent
    if path.parent.name == "images" and (root / "masks" / path.name).is_dir():
        return _folders(path, path, root / "masks" / path.name, root)
    if path.parent.name == "images" and (root / "annotations" / path.name).is_dir():
        return _ade(path, root)
    raise MisuseError(f"{path} has no layout that rob reads: give {LAYOUTS}")


# ==== folders of masks ====


def _folders(path: Path, images: Path, masks: Path, root: Path) -> SegmentationData:
    """Classes are those that ``classes.txt`` lists, else the values that the masks have."""
    pairs = _pairs(images, masks)
    listed = next((folder / CLASSES for folder in (path, root) if (folder / CLASSES).is_file()), None)
    if listed is None:
        values = sorted({value for _, mask in pairs for value in set(read_mask(mask).ravel().tolist())} - {IGNORED})
        if len(values) > MOST_CLASSES or (values and not 0 <= values[0] <= values[-1] < IGNORED):
            raise MisuseError(
                f"{masks} has masks with values of {values[0]} to {values[-1]}: classes are 0 to {IGNORED - 1}, and {IGNORED} is "
                "ignored"
            )
        names, source = tuple(map(str, values)), f"{masks}"
        numbers = {value: label for label, value in enumerate(values)}
    else:
        names, source = _names(listed), str(listed)
        numbers = {value: value for value in range(len(names))}
    named = listed is not None
    return SegmentationData(str(path), *_columns(pairs), names, numbers | {IGNORED: IGNORED}, source, named)


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Every image below ``images``, by name, with the mask of the same name. MisuseError: there is none, or it is missing."""
    found = sorted(p for p in images.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise MisuseError(f"{images} has no image: looked for {' '.join(EXTENSIONS)}")
    pairs = [(image, (masks / image.relative_to(images)).with_suffix(".png")) for image in found]
    missing = [(image, mask) for image, mask in pairs if not mask.is_file()]
    if missing:
        raise MisuseError(
            f"{missing[0][0]} has no mask: there is no {missing[0][1]} ({len(missing)} of {len(found)} images have none)"
        )
    return pairs


def _names(path: Path) -> tuple[str, ...]:
    try:
        names = [line.strip() for line in read_regular(path, LARGEST).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"{path} is no list of classes: {error}") from None
    while names and not names[-1]:
        names.pop()
    if not names or not all(names) or len(set(names)) < len(names) or len(names) > MOST_CLASSES:
        raise MisuseError(f"{path} is no list of classes: expected 1 to {MOST_CLASSES} names, one a line, none twice")
    return tuple(names)


def _columns(pairs: Sequence[tuple[Path, Path]]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    return tuple(image for image, _ in pairs), tuple(mask for _, mask in pairs)


# ==== published layouts ====


def _coco(path: Path) -> SegmentationData:
    """Polygons and run lengths, the smaller over the larger; a crowd is ignored, and what no object covers is background."""
    if not path.is_file() or path.parent.name != "annotations" or not path.stem.startswith("instances_"):
        raise MisuseError(f"{path}: no annotation file where COCO has it; give ROOT/annotations/instances_PART.json")
    data = open_detection(path.parents[1], path.stem.removeprefix("instances_"))
    if not data.has_masks:
        raise MisuseError(
            f"{path} has objects without polygons: segmentation needs the outline of each, boxes will not do"
        )
    classes = ("background", *data.classes)
    if len(classes) > MOST_CLASSES:
        raise MisuseError(f"{path} has {len(data.classes)} classes: at most {MOST_CLASSES - 1} are read")
    masks = tuple(Drawn(image["height"], image["width"], _objects(data, image["id"])) for image in data.images)
    numbers = {label: label for label in (*range(len(classes)), IGNORED)}
    images = tuple(data.folder / image["file_name"] for image in data.images)
    return SegmentationData(str(path), images, masks, classes, numbers, str(path), left_out=data.left_out)


def _objects(data: DetectionData, image: int) -> tuple[tuple[int, object], ...]:
    things = sorted(data.annotations[image], key=lambda thing: -thing["area"])
    return tuple(
        (IGNORED if thing["iscrowd"] else data.label(thing["category_id"]), thing["segmentation"]) for thing in things
    )


def _voc(path: Path) -> SegmentationData:
    """The list's images with their masks of ``SegmentationClass``; the outlines of objects, 255, are ignored."""
    if path.parent.name != "Segmentation" or not path.is_file():
        raise MisuseError(f"{path}: no list where VOC has it; give ROOT/ImageSets/Segmentation/PART.txt")
    root = path.parents[2]
    names = read_regular(path, LARGEST).decode("utf-8-sig", "surrogateescape").split()
    outside = [name for name in names if not is_inside(name)]
    if outside or not names:
        raise MisuseError(f"{path} {f'names {outside[0]}, which is outside of {root}' if names else 'names no image'}")
    pairs = [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names]
    _are_there(pairs, path)
    listed = root / CLASSES
    classes = _names(listed) if listed.is_file() else VOC_NAMES
    numbers = {value: value for value in range(len(classes))} | {IGNORED: IGNORED}
    return SegmentationData(
        str(path), *_columns(pairs), classes, numbers, str(listed) if listed.is_file() else "VOC's list of classes"
    )


def _ade(path: Path, root: Path) -> SegmentationData:
    """ADE20K's scene parsing: values 1 to 150 are its classes, 0 is everything else and is ignored, as its benchmark does."""
    pairs = _pairs(path, root / "annotations" / path.name)
    info, classes = root / ADE_NAMES, tuple(map(str, range(1, 151)))
    if info.is_file():
        lines = read_regular(info, LARGEST).decode("utf-8", "replace").splitlines()[1:]
        named = [line.split("\t")[-1].strip() for line in lines if line.strip()]
        classes = tuple(named) if len(set(named)) == len(named) == 150 else classes
    numbers = {value: value - 1 for value in range(1, 151)} | {0: IGNORED}
    return SegmentationData(str(path), *_columns(pairs), classes, numbers, "ADE20K's list of classes")


def _are_there(pairs: Sequence[tuple[Path, Path]], path: Path) -> None:
    for file in (file for pair in pairs for file in pair):
        if not file.is_file():
            raise MisuseError(f"{path} names {file.stem}, and {file} is missing")
