"""``export.json``: what is known of each exported file beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...common.errors import FailureError, MisuseError
from ...common.files import replacing
from ...common.records import DamagedError, read_record, sealed, typed
from .agreement import Agreement
from .boxes import BoxAgreement

NAME = "export.json"


@dataclass(frozen=True)
class ExportedFile:
    """One file. ``agreement`` and ``latency_ms`` are None where nothing here runs the format (Core ML, but on a Mac); a detector
    has ``boxes`` instead of ``agreement``.

    ``latency_ms`` is the median of one image on one thread of the CPU in ``runtime``.
    """

    file: str
    format: str
    precision: str
    """``float32``, ``float16`` (Core ML) or ``int8``."""
    bytes: int
    student: str
    weights: str
    """What ``hash_weights`` says of the network that was exported."""
    input: dict[str, Any]
    output: dict[str, Any]
    runtime: str
    agreement: Agreement | None
    checked_on: str
    """The fingerprint of the packed images, or ``drawn pictures``."""
    latency_ms: float | None
    int8_share: float | None
    calibration_images: int | None
    versions: dict[str, str]
    boxes: BoxAgreement | None = None

    @property
    def score(self) -> float | None:
        """What ``min_agreement`` was held against, 1 at best."""
        found = self.agreement or self.boxes
        return found and found.score(self.precision == "int8")


def read_exports(folder: Path) -> dict[str, ExportedFile]:
    """By file; nothing where nothing was exported. MisuseError: damaged."""
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        files = read_record(path, dict[str, Any], "delete it and export again").get("files")
        return {entry.file: entry for entry in typed(list[ExportedFile], files)}
    except FailureError as problem:
        raise MisuseError(str(problem)) from None
    except DamagedError as problem:
        raise MisuseError(f"{path} {problem}: delete it and export again") from None


def write_exports(folder: Path, files: Sequence[ExportedFile]) -> None:
    """Adds these to what is there of files that are still there."""
    entries: Mapping[str, ExportedFile] = {
        name: entry for name, entry in read_exports(folder).items() if (folder / name).exists()
    } | {entry.file: entry for entry in files}
    with replacing(folder / NAME) as file:
        file.write(sealed({"files": [asdict(entry) for entry in entries.values()]}, indent=2))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
