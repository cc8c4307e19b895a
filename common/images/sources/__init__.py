"""Where images come from: what ``SOURCE`` of ``rob pack`` names, and which file of this package reads that."""

from collections.abc import Callable
from pathlib import Path

from ...errors import MisuseError, unknown_name
from ...places import is_address, local_path, shown
from ..config import ALL_PARTS, USUAL_PART, PackConfig
from ..reading import PAGED, endings
from . import files, lists, tables, videos, webdataset
from .files import Files
from .folder import open_folder, open_images
from .named import NAMED, open_named, open_torchvision
from .pages import by_page
from .source import LARGEST, Source

__all__ = ["LARGEST", "Source", "open_folder", "open_source", "open_torchvision"]

COMPRESSED = (".gz", ".tgz", ".xz", ".bz2", ".zst")
ARCHIVES = (".zip", ".7z", ".rar")
OPENERS: dict[str, Callable[[Files, PackConfig], Source]] = {
    ".tar": webdataset.open_tars,
    **dict.fromkeys(tables.ENDINGS, tables.open_tables),
    **dict.fromkeys(lists.ENDINGS, lists.open_list),
    **dict.fromkeys(videos.ENDINGS, videos.open_videos),
}
"""Ending of files that hold or name images -> what reads them."""
IN_FOLDERS = (".tar", *tables.ENDINGS, *videos.ENDINGS)
"""Those that a folder without image files is looked through for."""


def open_source(config: PackConfig) -> Source:
    """The images of ``config.source``: a folder, a named data set's ``split`` (a folder of that name comes first), or files that
    hold images or name them, at a path, an address or a pattern of either.

    Raises MisuseError for what is none of these, for what holds no image and for an unknown split; FailureError when a named data
    set cannot be downloaded, or a bucket not be read.
    """
    try:
        source = _opened(config)
        return by_page(source) if config.pages else source
    except FileNotFoundError:
        raise MisuseError(f"{config.source}: there is no such file") from None
    except OSError as error:
        raise MisuseError(f"{config.source}: cannot be read: {error.strerror or error}") from None


def _opened(config: PackConfig) -> Source:
    if not (name := config.source):
        raise MisuseError("SOURCE is empty: give a folder of images, or . for the one you are in")
    path = local_path(name).expanduser()
    if is_address(name) and "://" not in name:  # as a Path has it
        name = shown(name)
    if is_address(name) and not path.exists():
        one = files.is_pattern(name) or path.suffix.lower() in (*OPENERS, *endings(), *COMPRESSED, *ARCHIVES)
        return _of_files(files.files_named(name), config) if one else _of_folder(files.folder_at(name), config)
    if path.is_dir():
        return _of_folder(files.folder_of(path), config)
    if name in NAMED:
        return open_named(name, config.split)
    if path.exists():
        return _of_files(Files(files.place_at(str(path.parent)), (path.name,)), config)
    if files.is_pattern(name):
        return _of_files(files.files_named(str(path)), config)
    if "/" in name or "." in name:
        raise MisuseError(
            f"{path}: no such file or folder; SOURCE is a folder of images, a list, a .tar, a .parquet, or one of "
            f"{', '.join(NAMED)}"
        )
    raise unknown_name("folder or named data set", name, NAMED)


def _of_folder(found: Files, config: PackConfig) -> Source:
    """A folder is one of image files where it has any, and of videos where it is said how to take their images."""
    if config.every is not None:
        _refuse_part(config)
        return videos.open_videos(found, config)
    known = endings()
    if not any(name.lower().endswith(known) for name in found.names):
        for ending in IN_FOLDERS:
            if names := [name for name in found.names if name.lower().endswith(ending)]:
                _refuse_part(config, ending)
                return OPENERS[ending](found.of(names), config)
    _refuse_part(config)
    return open_images(found, config.split == ALL_PARTS or config.recursive, config.recursive)


def _refuse_part(config: PackConfig, ending: str = "") -> None:
    """MisuseError: a part is asked for of what has none that would be known."""
    if config.split not in (USUAL_PART, ALL_PARTS) and ending not in tables.ENDINGS:
        raise MisuseError(
            f"{config.source}: `split` {config.split} is for a named data set, or Parquet files whose names say it: give the "
            "folder or the files of that part alone"
        )


def _of_files(found: Files, config: PackConfig) -> Source:
    """Files of one kind, by their ending."""
    first, *others = found.names
    kind, *other_kinds = sorted({Path(name).suffix.lower() for name in found.names})
    _refuse_part(config, kind)
    if {kind, *other_kinds} <= set(endings()):
        if others:
            return open_images(found, whole=True, recursive=config.recursive)
        if kind in PAGED and len((pages := by_page(open_images(found))).paths) > 1:
            return pages
    if other_kinds:
        raise MisuseError(
            f"{config.source}: files of several kinds, {kind}, {', '.join(other_kinds)}; give those of one"
        )
    if kind in OPENERS:
        return OPENERS[kind](found, config)
    raise MisuseError(f"{found.at(first)}: {what_instead(first, kind, str(found.place))}")


def what_instead(name: str, ending: str, folder: str) -> str:
    """What to do with a single file that is no source, by what it looks like."""
    if ending in ARCHIVES:
        return f"an archive; unpack it ({'unzip' if ending == '.zip' else 'tar xf'} {name}) and give the folder"
    if ending in COMPRESSED:
        plain = name.removesuffix(ending) + (".tar" if ending == ".tgz" else "")
        tool = {".xz": "xz -dk", ".bz2": "bzip2 -dk", ".zst": "zstd -d"}.get(ending, "gzip -dk")
        return f"compressed as a whole, so that no image in it can be read alone; {tool} {name}, and give {plain}"
    if ending in endings():
        return f"a single image; give the folder that it is in, {folder}"
    if ending == ".json":
        return "a list as one JSON value; write one object a line, to a .jsonl"
    return "packed already: give it to rob cache-teacher" if ending == ".beton" else "a file, not a folder of images"
