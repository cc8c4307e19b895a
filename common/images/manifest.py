"""The manifest beside a ``.beton``: ``NAME.beton.json``, which the ``.beton`` has the checksum of."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import MisuseError
from ..files import read_regular
from ..records import DamagedError, crc32c, parsed, typed

FORMAT_VERSION = 1
"""Of the manifest, and of what the fingerprint covers."""
LARGEST = 1 << 32
"""Bytes, of some 50 million images."""

OPTIONAL = ("grown", "window", "percentiles")


@dataclass(frozen=True)
class PackManifest:
    """What ``NAME.beton.json`` says about ``NAME.beton``. Image id = row = index into ``paths`` and ``labels``."""

    format_version: int
    num_images: int
    fingerprint: str
    """sha256 (hex) over mode, width, height, size and bytes of every stored image in row order."""
    size_bytes: int
    """Of the ``.beton``."""
    encoding: str
    """``jpeg`` or ``raw``."""
    jpeg_quality: int | None
    """Of the images that had to be encoded anew; None for raw."""
    max_resolution: int | None
    """Longest side in pixels, None when images keep their size."""
    paths: tuple[str, ...]
    """Relative to the source, ``/``-separated."""
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    skipped: tuple[str, ...]
    """Broken images that were left out."""
    grown: tuple[tuple[int, str], ...] = ()
    """``num_images`` and ``fingerprint`` of what the first rows were before others were appended, once for each time."""
    window: tuple[float, float] | None = None
    """The values of images of more than 8 bits that became black and white."""
    percentiles: tuple[float, float] | None = None
    """The same, of each image's own values."""

    def to_dict(self) -> dict[str, Any]:
        """Without what only some files have, where there is none, as ever."""
        return {name: value for name, value in asdict(self).items() if value or name not in OPTIONAL}

    def class_name(self, label: int) -> str | None:
        """Its number, where classes have no names; None: -1, an image without a label among others that have one."""
        if label < 0:
            return None
        return self.classes[label] if self.classes else str(label)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "PackManifest":
        """Raises DamagedError for a dictionary of another form."""
        return typed(cls, content)


def manifest_path(path: Path) -> Path:
    """``data.beton`` -> ``data.beton.json``."""
    return path.with_name(path.name + ".json")


def earlier_path(path: Path) -> Path:
    """Where the manifest of a ``.beton`` lies while another takes its place."""
    return path.with_name(f".{path.name}.json.earlier")


def seal(header: bytes, text: bytes) -> bytes:
    """What a ``.beton`` says of its manifest and itself: the checksum of its header and the manifest's text."""
    return crc32c(header, text).encode()


def manifest_of(path: Path, header: bytes, sealed: bytes) -> Path | None:
    """The manifest whose checksum the file has: usually the one beside it, else that of a pack that was killed at its end."""
    places = [place for place in (manifest_path(path), earlier_path(path)) if place.exists()]
    return next((place for place in places if seal(header, _text(place)) == sealed), None)


def read_manifest(path: Path, header: bytes, fingerprint: bytes, sealed: bytes) -> PackManifest:
    """The manifest of the ``.beton`` at ``path``, in whose head the other three are. MisuseError: missing, or of another file."""
    location = manifest_path(path)
    place = manifest_of(path, header, sealed)
    if place is None and not location.exists():
        raise MisuseError(f"{location}: missing; it belongs beside {path.name}: copy it there or pack again")
    manifest = _parse(place or location)
    if manifest.fingerprint.encode() != fingerprint:
        raise MisuseError(f"{location}: the manifest of another file than {path.name}; pack it again")
    if place is None:
        raise MisuseError(
            f"{location}: damaged or edited, as the checksum in {path.name} says; copy or pack both again"
        )
    return manifest


def _text(location: Path) -> bytes:
    try:
        return read_regular(location, LARGEST)
    except OSError as error:
        raise MisuseError(f"{location}: cannot be read ({error.strerror}); copy it there or pack again") from None


def _parse(location: Path) -> PackManifest:
    try:
        content = parsed(_text(location))
        version = content.get("format_version")
        if version not in (None, FORMAT_VERSION):
            raise MisuseError(f"{location}: format version {version}, this rob reads {FORMAT_VERSION}; pack it again")
        return PackManifest.from_dict(content)
    except DamagedError as problem:
        raise MisuseError(f"{location}: not a manifest of rob pack (it {problem}); pack the data again") from None
