"""The packed data file: FFCV's v2 ``.beton`` with one RGB image and one label a row, and its JSON manifest.

Little endian, as FFCV 1.0.2 lays it out in ``types.py`` and reads it in ``memory_managers``::

    header              version, number of fields, page size, number of rows, where the allocation table starts
    field descriptors   ``image`` (RGBImageField) and ``label`` (IntField)
    row table           mode, width, height, data pointer, label of each row
    image bytes         in row order; no image crosses a multiple of the page size
    allocation table    row, pointer, size of each image, up to the end of the file

FFCV ignores a field's arguments, so the image field's carry the data fingerprint, which ties the manifest to the file, and the
label field's the checksum of header and manifest. The three bytes of padding in a row are the lower ones of the crc32c of what
the fingerprint covers of that image.
"""

import glob
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from PIL import Image

from ..errors import FailureError, MisuseError
from ..files import flush_to_disk, lock, new_file, open_regular, whole_file
from .copied import at_hand
from .manifest import FORMAT_VERSION, PackManifest, earlier_path, manifest_of, manifest_path, read_manifest, seal

Image.MAX_IMAGE_PIXELS = None  # what was packed was held to a limit of ours

FFCV_VERSION = 2
JPEG, RAW = 0, 1
"""FFCV's ``IMAGE_MODES``: the row's bytes are a JPEG file, or ``height * width * 3`` RGB pixels."""
PAGE_BYTES = 1 << 23
"""FFCV's usual page, 8 MiB. A file with a larger image gets larger pages."""
MAX_IMAGE_BYTES = 1 << 31
"""FFCV keeps the page size in 32 bits."""
MAX_SIDE = 65_535
"""FFCV keeps width and height in 16 bits."""

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_rows", "<u8"), ("allocations_at", "<u8")]
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "S1024")])
# numpy's align=True layout of FFCV's (13-byte image record, int64): the label starts at the next multiple of 8, and the
# checksum lies in the padding before it.
ROW = np.dtype(
    {
        "names": ["mode", "width", "height", "pointer", "label", "checksum"],
        "formats": ["<u1", "<u2", "<u2", "<u8", "<i8", ("<u1", 3)],
        "offsets": [0, 1, 3, 5, 16, 13],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("row", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
FIELD_TYPES = ((2, b"image"), (1, b"label"))
"""FFCV's type ids of RGBImageField and IntField, under the names that ``ffcv.Loader`` pipelines use."""
ROWS_AT = HEADER.itemsize + len(FIELD_TYPES) * FIELD.itemsize


@dataclass(frozen=True)
class StoredImage:
    """One image as the file keeps it: ``data`` is a JPEG file (``mode`` JPEG) or uint8 RGB pixels (``mode`` RAW)."""

    data: bytes
    height: int
    width: int
    mode: int


class BetonWriter:
    """Writes a ``.beton`` and its manifest row by row; neither appears under its name before ``finish``.

    Bytes go to a locked ``.NAME.tmp-PID`` in the same folder, so that a killed pack leaves nothing that looks
    finished; the next writer of the same target removes what dead ones left. In memory: 48 bytes a row.

        with BetonWriter(Path("data.beton"), capacity=1000) as writer:
            writer.append(stored_image, label=3)
            manifest = writer.finish(paths=..., ...)

    Raises MisuseError when another writer is at work on ``path``. Leaves OSError (disk full) to the caller.
    """

    def __init__(self, path: Path, capacity: int):
        """``capacity``: the largest number of rows that may follow; the row table precedes the images in the file."""
        self.path = path
        self._rows = np.zeros(capacity, ROW)
        self._allocations = np.zeros(capacity, ALLOCATION)
        self._num_rows = 0
        self._page_bytes = PAGE_BYTES
        self._digest = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        self.temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._file = new_file(self.temporary)
        self._end = self._file.seek(ROWS_AT + self._rows.nbytes)

    def __enter__(self) -> "BetonWriter":
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._file.close()
        except OSError:
            if exception[0] is None:  # else the flush failed for the reason already on its way up
                raise
        finally:
            self.temporary.unlink(missing_ok=True)

    def append(self, image: StoredImage, label: int = -1) -> None:
        """Adds the next row. ``label`` is -1 where there is none."""
        size = len(image.data)
        assert 0 < size <= MAX_IMAGE_BYTES
        assert max(image.height, image.width) <= MAX_SIDE
        # FFCV's process cache reads whole pages. A larger image starts at a multiple of a larger power of two, so
        # that the boundaries of the largest page in the file cut none of the smaller images either.
        page = max(PAGE_BYTES, 1 << (size - 1).bit_length())
        self._page_bytes = max(self._page_bytes, page)
        room = page - self._end % page
        if size > room:
            self._end = self._file.seek(self._end + room)
        described = _described(image)
        row = (image.mode, image.width, image.height, self._end, label, _checksum(described, image.data))
        self._rows[self._num_rows] = row
        self._allocations[self._num_rows] = (self._num_rows, self._end, size)
        self._digest.update(described)
        self._digest.update(image.data)
        self._file.write(image.data)
        self._end += size
        self._num_rows += 1

    def written(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and allocations from ``first`` on, whose images are in the temporary file now."""
        self._file.flush()
        return self._rows[first : self._num_rows], self._allocations[first : self._num_rows]

    @property
    def fingerprint(self) -> str:
        """Of the rows so far."""
        return self._digest.hexdigest()

    def finish(
        self,
        *,
        encoding: str,
        jpeg_quality: int | None,
        max_resolution: int | None,
        paths: tuple[str, ...],
        labels: tuple[int, ...] | None,
        classes: tuple[str, ...] | None,
        skipped: tuple[str, ...] = (),
        grown: tuple[tuple[int, str], ...] = (),
        window: tuple[float, float] | None = None,
        percentiles: tuple[float, float] | None = None,
    ) -> PackManifest:
        """Completes both files, flushes them to the disk and gives them their names; the ``.beton`` comes last, and until it is
        there the manifest of an earlier one of the same name is kept beside it."""
        assert self._num_rows == len(paths) > 0
        fingerprint = self.fingerprint
        manifest = PackManifest(
            format_version=FORMAT_VERSION,
            num_images=self._num_rows,
            fingerprint=fingerprint,
            size_bytes=self._end + self._num_rows * ALLOCATION.itemsize,
            encoding=encoding,
            jpeg_quality=jpeg_quality,
            max_resolution=max_resolution,
            paths=paths,
            labels=labels,
            classes=classes,
            skipped=skipped,
            grown=grown,
            window=window,
            percentiles=percentiles,
        )
        header = np.array((FFCV_VERSION, len(FIELD_TYPES), self._page_bytes, self._num_rows, self._end), HEADER)
        descriptors = np.zeros(len(FIELD_TYPES), FIELD)
        for descriptor, (type_id, name) in zip(descriptors, FIELD_TYPES, strict=True):
            descriptor["type_id"], descriptor["name"] = type_id, name
        text = json.dumps(manifest.to_dict()).encode()
        descriptors[0]["arguments"] = fingerprint.encode()
        descriptors[1]["arguments"] = seal(header.tobytes(), text)

        self._file.write(self._allocations[: self._num_rows].tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes() + descriptors.tobytes() + self._rows[: self._num_rows].tobytes())
        flush_to_disk(self._file)
        earlier = earlier_path(self.path)
        if self.path.is_file() and _manifest_place(self.path) == manifest_path(self.path):
            os.replace(manifest_path(self.path), earlier)
        with whole_file(manifest_path(self.path), manifest_path(self.temporary)) as file:
            file.write(text)
        self.temporary.replace(self.path)
        earlier.unlink(missing_ok=True)
        return manifest


def _described(image: StoredImage) -> bytes:
    return np.array([image.mode, image.width, image.height, len(image.data)], "<u8").tobytes()


def checksum(image: StoredImage) -> list[int]:
    """What the row of an image has of it."""
    return _checksum(_described(image), image.data)


def _checksum(described: bytes, data: bytes | np.ndarray) -> list[int]:
    """The three lower bytes of the crc32c of a row's mode, width, height and size, each in 8 bytes, and of its image."""
    value = google_crc32c.extend(google_crc32c.value(described), data)
    return [value & 255, value >> 8 & 255, value >> 16 & 255]


def _manifest_place(path: Path) -> Path | None:
    """The manifest that belongs to the ``.beton`` that is at ``path``, None where it has none."""
    header, descriptors = _read_head(path)
    return None if header is None else manifest_of(path, header.tobytes(), descriptors[1]["arguments"])


def _remove_stale(path: Path) -> None:
    """Removes what killed writers of ``path`` left; the lock on a temporary file tells whether its writer lives."""
    for stale in sorted(path.parent.glob(f".{glob.escape(path.name)}.tmp-*")):
        with stale.open("r+b") as file:
            if not lock(file.fileno()):
                raise MisuseError(f"{path}: another rob pack is writing this file; wait for it to finish")
            stale.unlink()


class Beton:
    """Reads a ``.beton`` that ``rob pack`` wrote.

    Attributes, row = image id:
        path, manifest, num_images
        named               what it was opened by: the path, or the address that it was copied from
        heights, widths     (N,) int32, pixels
        modes               (N,) uint8, JPEG or RAW
        pointers, sizes     (N,) uint64, byte offset and length of the stored image in the file
        labels              (N,) int64, or None
        memory              uint8 memory map of the whole file, read-only

    Raises MisuseError for a file that is missing, of another kind or truncated, and for a manifest that is missing,
    unreadable or of another file.
    """

    def __init__(self, path: str | Path, local_dir: Path | None = None):
        self.named = Path(path)
        self.path = path = at_hand(self.named, local_dir, lambda copy: Beton(copy).damaged())
        if (path / "zarr.json").exists():
            raise MisuseError(f"{path}: a target store; give the packed images, a .beton")
        if path.is_dir():
            raise MisuseError(f"{path}: a folder; give packed images, made with: rob pack {path} {path}.beton")
        if not path.exists():
            raise MisuseError(f"{path}: no such file; make a packed data set with: rob pack SOURCE {path}")
        if not path.is_file():
            raise MisuseError(f"{path}: not a regular file; give packed images, made with: rob pack SOURCE {path}")
        size = path.stat().st_size
        header, descriptors = _read_head(path)
        if header is None or header["version"] != FFCV_VERSION:
            raise MisuseError(f"{path}: not a packed data set (no FFCV version {FFCV_VERSION} header); see: rob pack")
        if tuple((int(field["type_id"]), field["name"]) for field in descriptors) != FIELD_TYPES:
            raise MisuseError(f"{path}: a .beton with other fields than `image` and `label`; pack it with: rob pack")
        self.num_images = int(header["num_rows"])
        allocations_at = int(header["allocations_at"])
        expected = allocations_at + self.num_images * ALLOCATION.itemsize
        if size != expected:
            raise MisuseError(f"{path}: truncated or damaged: {size:,} bytes, not {expected:,}; copy or pack it again")

        if not descriptors[1]["arguments"]:
            raise MisuseError(f"{path}: packed by a rob from before checksums; pack it again")
        self.manifest = read_manifest(path, header.tobytes(), *(field["arguments"] for field in descriptors))
        if self.manifest.num_images != self.num_images or self.manifest.size_bytes != size:
            raise MisuseError(f"{path}: damaged: it is not of the size that its manifest says; pack the data again")

        self.memory = np.memmap(path, np.uint8, mode="r")
        rows = np.frombuffer(self.memory, ROW, self.num_images, ROWS_AT)
        allocations = np.frombuffer(self.memory, ALLOCATION, self.num_images, allocations_at)
        self.heights = rows["height"].astype(np.int32)
        self.widths = rows["width"].astype(np.int32)
        self.modes = rows["mode"].copy()
        self.pointers = rows["pointer"].copy()
        self.sizes = allocations["size"].copy()
        self.labels = None if self.manifest.labels is None else rows["label"].copy()
        self._checksums = rows["checksum"].copy()
        self._checked = np.zeros(self.num_images, bool)
        self._check_rows(rows["label"], allocations, allocations_at)

    def _check_rows(self, labels: np.ndarray, allocations: np.ndarray, end: int) -> None:
        """MisuseError: a row says what cannot be, and reading by it would leave its image, or the file."""
        first, starts, sizes = ROWS_AT + self.num_images * ROW.itemsize, self.pointers, self.sizes
        raw = self.modes == RAW
        pixels = 3 * self.heights.astype(np.uint64) * self.widths.astype(np.uint64)
        known = np.full(len(labels), -1) if self.manifest.labels is None else np.array(self.manifest.labels)
        if known.shape != labels.shape:
            raise MisuseError(
                f"{manifest_path(self.path)}: has {len(known)} labels of {len(labels)} images; pack it again"
            )
        wrong = {
            "mode": ~raw & (self.modes != JPEG),
            "area": pixels > MAX_IMAGE_BYTES,
            "side": (np.minimum(self.heights, self.widths) < 1) | (np.maximum(self.heights, self.widths) > MAX_SIDE),
            "place in the file": (starts < first) | (starts > end) | (sizes > MAX_IMAGE_BYTES) | (starts + sizes > end),
            "size": (raw & (sizes != pixels)) | (sizes < 1),
            "label": labels != known,
            "allocation": (allocations["row"] != np.arange(len(labels))) | (allocations["pointer"] != starts),
        }
        for what, rows in wrong.items():
            if rows.any():
                raise MisuseError(
                    f"{self.path}: damaged: the {what} of image {rows.argmax()} cannot be; pack the data again"
                )

    def __reduce__(self):
        return Beton, (self.path,)  # a pickled memory map would carry the whole file to every worker

    def check(self, image_ids: np.ndarray) -> None:
        """FailureError: the stored bytes of one of these images are not those that were packed. Each is looked at once in the
        life of this object: 9 us, and 6 us more for 40 KB."""
        for image_id in image_ids[~self._checked[image_ids]].tolist():
            if not self.is_whole(image_id):
                raise FailureError(
                    f"{self.path}: image {image_id} is damaged (its checksum does not match); pack the data again"
                )
            self._checked[image_id] = True

    def is_whole(self, image_id: int) -> bool:
        """Whether an image's bytes are those that were packed."""
        of_row = (self.modes, self.widths, self.heights, self.sizes)
        described = np.array([int(values[image_id]) for values in of_row], "<u8").tobytes()
        return _checksum(described, self.encoded(image_id)) == self._checksums[image_id].tolist()

    def damaged(self, progress: Callable[[int, int], None] | None = None) -> list[int]:
        """The ids of all images whose bytes are not those that were packed."""
        found = []
        for image_id in range(self.num_images):
            if not self.is_whole(image_id):
                found.append(image_id)
            if progress:
                progress(image_id + 1, self.num_images)
        return found

    @property
    def labels_hash(self) -> str | None:
        """sha256 (hex) of labels and class names, which the fingerprint leaves out; None: there are none."""
        if self.labels is None:
            return None
        return hashlib.sha256(self.labels.tobytes() + repr(self.manifest.classes).encode()).hexdigest()

    def class_of(self, image_id: int) -> str | None:
        """By name, or its number where classes have none; None: the image has no label."""
        return None if self.labels is None else self.manifest.class_name(int(self.labels[image_id]))

    def encoded(self, image_id: int) -> np.ndarray:
        """The stored bytes of an image, (size,) uint8: a view of ``memory``."""
        start = int(self.pointers[image_id])
        return self.memory[start : start + int(self.sizes[image_id])]

    def image(self, image_id: int) -> np.ndarray:
        """An image as (H, W, 3) uint8 RGB, a copy. Raises FailureError when its bytes are damaged."""
        return np.array(self.picture(image_id))

    def picture(self, image_id: int) -> Image.Image:
        """The same as Pillow has it, which saves two copies where Pillow goes on with it."""
        self.check(np.array([image_id]))
        stored = self.encoded(image_id)
        if self.modes[image_id] == RAW:
            return Image.fromarray(np.array(stored).reshape(self.heights[image_id], self.widths[image_id], 3))
        try:
            with Image.open(io.BytesIO(stored.tobytes()), formats=("JPEG", "MPO")) as image:
                if image.size != (self.widths[image_id], self.heights[image_id]):
                    raise OSError("it is of another size than its row says")
                image.load()
                return image
        except OSError as error:
            raise FailureError(f"{self.path}: image {image_id} is damaged ({error}); pack the data again") from error


def _read_head(path: Path) -> tuple[np.void | None, np.ndarray]:
    """Header and field descriptors, or None where the file is too short for them."""
    with open_regular(path) as file:
        head = file.read(ROWS_AT)
    if len(head) < ROWS_AT:
        return None, np.zeros(0, FIELD)
    return np.frombuffer(head, HEADER, 1)[0], np.frombuffer(head, FIELD, len(FIELD_TYPES), HEADER.itemsize)
