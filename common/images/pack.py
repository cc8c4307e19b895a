"""``pack``: the images of a source become one ``.beton`` of 8-bit RGB images with stable row ids.

Every image ends as what a viewer would show: turned upright by its EXIF orientation, transparency laid on white,
16-bit grey scaled to 8 bits, everything else converted to RGB by Pillow.
"""

import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Self, TypeVar

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from ..cores import usable_cores
from ..errors import FailureError, MisuseError
from .append import Earlier
from .beton import JPEG, MAX_IMAGE_BYTES, MAX_SIDE, RAW, BetonWriter, PackManifest, StoredImage
from .config import PackConfig
from .reading import BadImage, open_image, quiet_pillow, to_rgb, upright
from .resume import Journal, PartialPack, key_of
from .sources import Source, open_source
from .window import windowed

Item = TypeVar("Item")
Result = TypeVar("Result")
WORTH_A_TASK, MOST_OF_A_TASK = 0.004, 16
"""Seconds of work that are worth a thread's waking, which takes 0.1 ms, as long as a small image; and images at most."""


def pack(
    config: PackConfig,
    progress: Callable[[int, int], None] | None = None,
    source: Source | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> PackManifest:
    """Writes ``config.out`` and its manifest. The same source gives the same bytes, for any number of workers.

    ``source`` takes the place of what ``config.source`` names.

    With ``append`` the rows that ``config.out`` has come first, as they are, then those of the source that it lacks: byte for
    byte the file that one pack of both in this order writes, but for what its manifest says it has ``grown`` from.

    Images stream through: memory does not grow with their number, but for paths and 48 bytes a row. ``progress`` is
    called with (images done, all images) after each image, ``note`` with a sentence on files that were left out.

    Broken off or killed behind some ten thousand images, the same pack goes on from there (``resume.py``), but for ``append``.

    Raises MisuseError for a wrong option or source, FailureError for a broken image (unless ``skip_bad``), when a
    data set cannot be downloaded and when the file cannot be written.
    """
    _check(config)
    source = source or open_source(config)
    source = replace(source, where=source.where or config.source)
    for sentence in source.left_out:
        note(sentence)
    earlier = Earlier.of(config, source) if config.append else None
    again: tuple[str, ...] = ()  # held against what is there
    if earlier is not None:
        again = tuple(path for path in source.paths if path in earlier.rows)
        source = earlier.lacks(source)
    source = source.take(config.limit)
    source = source.shuffled() if config.shuffle else source
    new, source = len(source.paths), replace(source, paths=source.paths + again)
    total = len(source.paths)
    workers = config.workers or max(usable_cores(), source.at_once)

    def encode(path: str) -> tuple[StoredImage | BadImage, int]:
        try:
            image, label = source.read(path)
            return encode_image(image, config), label if earlier is None else earlier.label(label)
        except BadImage as problem:
            return problem, -1
        except OSError as error:
            return BadImage(error.strerror or str(error)), -1

    key = key_of(config, source)
    rows = _Rows() if earlier is None else _Rows.of(earlier.data.manifest, source)
    before = len(rows.paths)
    try:
        partial = PartialPack.of(config.out, key) if earlier is None else None
        with (
            quiet_pillow(),
            BetonWriter(config.out, before + new) as writer,
            Journal(writer, key, partial, note) as journal,
            ThreadPoolExecutor(workers) as pool,
        ):
            start = 0
            if earlier is not None:
                earlier.copy_to(writer)
            if partial is not None:
                start = _copy_partial(partial, source, config.skip_bad, writer, journal, rows)
            if start:
                note(f"{start:,} of {total:,} images were packed before: goes on from there")
            rest = source.paths[start:]
            results = _map_in_order(pool, encode, rest, window=4 * workers)
            for done, (path, (image, label)) in enumerate(zip(rest, results, strict=True), start + 1):
                if isinstance(image, StoredImage) and earlier is not None and path in earlier.rows:
                    earlier.refuse_other(path, image)
                elif isinstance(image, StoredImage):
                    writer.append(image, label)
                    if earlier is None:
                        journal.add(done - 1)
                    rows.add(path, label)
                elif config.skip_bad:
                    rows.skipped.append(path)
                else:
                    raise FailureError(
                        f"broken image {source.at(path)}: {image}; repair or remove it, or set `skip_bad`"
                    )
                if progress:
                    progress(done, total)
            if len(rows.paths) == before:
                raise FailureError(f"{config.source}: each of the {new} images is broken, nothing to pack")
            return writer.finish(
                encoding="raw" if config.raw else "jpeg",
                jpeg_quality=None if config.raw else config.jpeg_quality,
                max_resolution=config.max_resolution,
                paths=tuple(rows.paths),
                labels=tuple(rows.labels) if max(rows.labels) >= 0 else None,
                classes=source.classes if earlier is None else earlier.classes,
                skipped=tuple(rows.skipped),
                grown=() if earlier is None else earlier.grown,
                window=config.window,
                percentiles=config.percentiles,
            )
    except OSError as error:
        raise FailureError(f"could not write {config.out}: {error.strerror or error}; nothing was kept") from error


@dataclass
class _Rows:
    """The rows of the file so far: path and label (-1: none) of each; and the paths of the images that were left out."""

    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, there: PackManifest, source: Source) -> Self:
        """Those of the file that is appended to. What it has skipped may be in ``source`` again, and whole by now."""
        labels, again = there.labels or [-1] * there.num_images, set(source.paths)
        return cls(list(there.paths), list(labels), [path for path in there.skipped if path not in again])

    def add(self, path: str, label: int) -> None:
        self.paths.append(path)
        self.labels.append(label)


def _copy_partial(
    partial: PartialPack, source: Source, skip_bad: bool, writer: BetonWriter, journal: Journal, rows: _Rows
) -> int:
    """Copy what an earlier pack had done. Returns how many of the source's images that accounts for."""
    start = 0
    for place, image, label in partial.images():
        if place != start and not skip_bad:
            break  # one was left out, which is wanted now
        rows.skipped += source.paths[start:place]
        writer.append(image, label)
        journal.add(place)
        rows.add(source.paths[place], label)
        start = place + 1
    return start


def _check(config: PackConfig) -> None:
    if config.out.is_dir():
        raise MisuseError(f"{config.out}: a folder; name the file to write, such as {config.out / 'data.beton'}")
    if config.out.suffix != ".beton":
        raise MisuseError(
            f"{config.out}: expected a name that ends with .beton, such as {config.out.with_suffix('.beton')}"
        )


def _map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[Result]:
    """``map`` with at most ``window`` tasks under way or waiting, so that memory stays bounded. A task is one item, or as many as
    are worth handing over where they take little time."""

    def results(some: list[Item]) -> tuple[list[Result], float]:
        began = time.perf_counter()
        return [function(item) for item in some], time.perf_counter() - began

    remaining, size = iter(items), 1
    pending: deque[Future[tuple[list[Result], float]]] = deque()
    while True:
        while len(pending) < window and (some := list(islice(remaining, size))):
            pending.append(pool.submit(results, some))
        if not pending:
            return
        done, seconds = pending.popleft().result()
        yield from done
        size = min(MOST_OF_A_TASK, max(1, int(len(done) * WORTH_A_TASK / max(seconds, 1e-9))))


def encode_image(source: bytes | Image.Image, config: PackConfig) -> StoredImage:
    """One image, from a file's bytes or from memory, in the form that ``config`` asks for. Raises BadImage."""
    try:
        if isinstance(source, bytes):
            image = open_image(source, config.max_resolution)
        else:
            image = source
            image.load()
        turned = windowed(upright(image), config.window, config.percentiles)
        longest = config.max_resolution or max(image.size)
        unchanged = turned is image and max(image.size) <= longest and not config.raw
        if unchanged and isinstance(source, bytes) and _is_plain_jpeg(source, image):
            return StoredImage(source, image.height, image.width, JPEG)
        return _store(shrink(to_rgb(turned), longest), config)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises about every kind on broken files
        raise BadImage(str(error) or type(error).__name__) from error


def _store(pixels: Image.Image, config: PackConfig) -> StoredImage:
    width, height = pixels.size
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width} x {height} pixels, the format holds {MAX_SIDE:,} a side: use `max_resolution`")
    if config.raw:
        data, mode = pixels.tobytes(), RAW
    else:
        buffer = io.BytesIO()
        pixels.save(buffer, "JPEG", quality=config.jpeg_quality, subsampling="4:2:0")
        data, mode = buffer.getvalue(), JPEG
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImage(f"{width} x {height} pixels are too many for one image: use `max_resolution`")
    return StoredImage(data, height, width, mode)


def shrink(image: Image.Image, longest: int) -> Image.Image:
    """The image with its longer side at most ``longest`` pixels and its aspect ratio kept."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _is_plain_jpeg(data: bytes, image: Image.Image) -> bool:
    """Whether libjpeg-turbo hands out the file's YCbCr planes: baseline or progressive, at 4:4:4, 4:2:2 or 4:2:0."""
    if not isinstance(image, JpegImageFile) or image.format != "JPEG":
        return False
    # libjpeg's rule: a JFIF file is YCbCr, else Adobe's marker says it, else the components' names.
    is_rgb = image.info.get("adobe_transform") == 0 or [component[0] for component in image.layer] == list(b"RGB")
    if get_sampling(image) < 0 or (is_rgb and "jfif" not in image.info):
        return False
    at = 2  # behind the start-of-image marker; from here on: 0xFF, marker, length of the segment, segment
    while at + 4 <= len(data) and data[at] == 0xFF:  # else stray bytes, which Pillow forgives and libjpeg-turbo reports
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header, of one of 13 processes
            return marker in (0xC0, 0xC1, 0xC2)
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False
