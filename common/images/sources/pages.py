"""Files that hold several pictures (a TIFF's pages, a DICOM's frames): each is an image of its own, ``FILE/PAGE``."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import chain

from PIL import Image

from ...cores import usable_cores
from ..reading import PAGED, BadImage, count_pages, open_image
from .source import Source, item_names

KEPT = 4
"""Files whose bytes are kept for their next page."""


def by_page(source: Source) -> Source:
    """``source`` with a name for every page of those files that have several. Every such file is read once to be counted."""
    whole = lru_cache(KEPT)(source.read)
    several = [path for path in source.paths if path.lower().endswith(PAGED)]
    with ThreadPoolExecutor(max(usable_cores(), source.at_once)) as pool:
        counts = dict(zip(several, pool.map(_counting(source.read), several), strict=True))
    where = {
        name: (path, page)
        for path, count in counts.items()
        if count > 1
        for page, name in enumerate(item_names(path, count))
    }
    names = (item_names(path, counts[path]) if counts.get(path, 1) > 1 else (path,) for path in source.paths)

    def read(name: str) -> tuple[bytes | Image.Image, int]:
        if name not in where:
            return source.read(name)
        path, page = where[name]
        data, label = whole(path)
        assert isinstance(data, bytes)
        return open_image(data, page=page), label

    return replace(source, paths=tuple(chain.from_iterable(names)), read=read)


def _counting(read: Callable[[str], tuple[bytes | Image.Image, int]]) -> Callable[[str], int]:
    """1 where it cannot be told: whoever packs it says why."""

    def count(path: str) -> int:
        try:
            data, _ = read(path)
            return count_pages(data) if isinstance(data, bytes) else 1
        except (BadImage, OSError):
            return 1

    return count
