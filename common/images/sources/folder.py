"""Image files: of a folder with all that is below it, or those that a pattern names."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ...errors import MisuseError, some
from ..reading import endings
from .files import Files, folder_of
from .source import Source

PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
"""Names of folders that are parts of a data set."""
ODD_ONES = 0.05
"""At most this share of a folder's images lies beside its folders of classes by mistake."""


def open_folder(folder: Path, whole: bool = True) -> Source:
    """All images below a folder, in sorted order of their relative paths; hidden files and folders are left out, and those that
    a machine made for itself.

    Labels exist when every image lies in a folder of its class: exactly one level below ``folder``. A few that lie beside these
    folders are left out. MisuseError, unless the folder is wanted ``whole``: its folders are named as the parts of a data set.
    """
    return open_images(folder_of(folder), whole)


def open_images(files: Files, whole: bool = True, recursive: bool = False) -> Source:
    """The same of files anywhere. ``recursive``: all of them at whatever depth, and no labels."""
    known = endings()
    paths = tuple(path for path in files.names if path.lower().endswith(known))
    folder = str(files.place)
    if not paths:
        empty = "the folder is empty" if files.folder else "there is nothing at this address"
        listed = "no image in it or below" if files.names else empty
        raise MisuseError(f"{folder}: {listed}; looked for {' '.join(known)}")
    left_out = _other_files(folder, [path for path in files.names if not path.lower().endswith(known)])
    paths, classes, beside = (paths, None, ()) if recursive else by_folder(paths, folder, whole)
    label_of = label_by_folder(classes)

    def read(path: str) -> tuple[bytes, int]:
        return files.read(path), label_of(path)

    return Source(paths, read, classes, left_out + beside, files.folder, str(files.place), at_once=files.at_once)


def by_folder(
    paths: tuple[str, ...], where: str, whole: bool = True
) -> tuple[tuple[str, ...], tuple[str, ...] | None, tuple[str, ...]]:
    """Those of the paths that count, the classes that their folders are (None: they are none), and a sentence on the others."""
    parts = sorted({path.partition("/")[0] for path in paths if "/" in path})
    if not whole and parts and all("/" in path for path in paths) and {part.lower() for part in parts} <= PARTS:
        named = ", ".join(f"{part}/" for part in parts)
        raise MisuseError(
            f"{where} has {named}, named like parts of a data set, not like classes: give one of them as SOURCE "
            f"({where}/{parts[0]}), or `split` all for all their images in one file without classes"
        )
    left_out: tuple[str, ...] = ()
    beside = [path for path in paths if "/" not in path]
    parents = {path.rpartition("/")[0] for path in paths} - {""}
    if beside and len(parents) > 1 and len(beside) <= max(1, ODD_ONES * len(paths)):
        paths = tuple(path for path in paths if "/" in path)
        left_out = (f"left out {some(beside)}: beside the folders of classes in {where}",)
    elsewhere = next((path for path in paths if path.count("/") != 1), None)
    if elsewhere and parents and not {part.lower() for part in parts} <= PARTS:
        left_out += (f"no classes: they would be folders directly in {where}, and {elsewhere} lies elsewhere",)
    one_level = elsewhere is None and not {p.lower() for p in parents} <= PARTS
    return paths, tuple(sorted(parents)) if one_level else None, left_out


def label_by_folder(classes: tuple[str, ...] | None) -> Callable[[str], int]:
    """From a path to the number of the class that its folder is, -1 where that is none."""
    numbers = {name: number for number, name in enumerate(classes or ())}
    return lambda path: numbers.get(path.rpartition("/")[0], -1)


def _other_files(folder: str, paths: list[str]) -> tuple[str, ...]:
    """A sentence on what is no image, by its endings; none where there is nothing."""
    found = Counter(Path(path).suffix.lower() or "without an ending" for path in paths)
    if not found:
        return ()
    counted = ", ".join(f"{number:,} {ending}" for ending, number in found.most_common(6))
    rest = sum(found.values()) - sum(number for _, number in found.most_common(6))
    more = f", {rest:,} others" if rest else ""
    return (f"left out of {folder}, as no images by their names: {counted}{more}",)
