"""What ``rob gpu-check`` found best on a device, kept for the runs that follow there."""

from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .errors import FailureError
from .files import cache_folder, replacing
from .records import DamagedError, read_record, sealed, typed


@dataclass(frozen=True)
class DeviceSettings:
    """``loss`` names the implementation by size ("65536x256": K by D); ``loader`` is gpu, or ffcv (older
    files: auto) where the CPU's views are faster; ``compile`` how the student is compiled (older files: whether). What is None,
    or not named, was not measured.
    """

    loss: dict[str, str] = field(default_factory=dict)
    loader: str | None = None
    compile: str | bool | None = None

    @property
    def compile_mode(self) -> str:
        """``off`` where nothing is known."""
        return self.compile if isinstance(self.compile, str) else "default" if self.compile else "off"


def settings_path() -> Path:
    """The file of all devices, in the user's cache."""
    return cache_folder() / "devices.json"


def store_settings(device: torch.device, settings: DeviceSettings) -> Path:
    """Keep them for ``device``, in place of what was known; where."""
    path = settings_path()
    known = _known(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(sealed(known | {_key(device): asdict(settings)}, indent=1))
    stored_settings.cache_clear()
    return path


@cache
def stored_settings(device: torch.device) -> DeviceSettings:
    """What is known of ``device``; nothing of a CPU, and nothing where the file cannot be read."""
    if device.type != "cuda":
        return DeviceSettings()
    try:
        return typed(DeviceSettings, _known(settings_path()).get(_key(device), {}))
    except DamagedError:  # written by another version
        return DeviceSettings()


def _key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}"


def _known(path: Path) -> dict[str, Any]:
    """Nothing of a file that is not there, is damaged, or has no checksum: what was measured is only faster, never needed."""
    try:
        return read_record(path, dict[str, Any], "")
    except (OSError, FailureError):
        return {}
