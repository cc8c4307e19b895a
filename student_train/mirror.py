"""A run's folder at an address: worked on in a folder of this machine, and copied there at each checkpoint and at the end.

Files go one by one, each whole, logs before the checkpoint that they belong to and the weights last: whenever a kill comes, what
is at the address is what a killed run leaves on a disk. The address is the run. Only while all there is as this machine left it
does the folder here count, which may be ahead of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..common.errors import MisuseError
from ..common.files import is_inside, locked, replacing
from ..common.images.copied import copies_of
from ..common.places import is_address, place_of, shown
from ..common.records import crc32c
from .checkpoint import AVERAGE_NAME, WEIGHTS_NAME

CHECKPOINT = "checkpoint.pt"
LAST = (CHECKPOINT, AVERAGE_NAME, WEIGHTS_NAME)
"""In this order, behind all others."""
RECORD = ".mirrored"
"""In the folder: name -> checksum of each file at the address, as it was last read or written from here."""


@dataclass(frozen=True)
class Mirror:
    """``address`` and the ``folder`` of this machine that stands for it."""

    address: Path
    folder: Path

    @classmethod
    def of(cls, run: Path | str, local_dir: Path | None = None, kind: str = "runs") -> Self | None:
        """None: ``run`` is no address. The folder lies below ``local_dir``, else where packed images are copied to, one for each
        ``kind`` of use."""
        if not is_address(run):
            return None
        place_of(run)  # refuses what is no address of a bucket, or holds a key
        return cls(Path(run), copies_of(shown(run), local_dir) / kind / Path(run).name)

    def __str__(self) -> str:
        return shown(self.address)

    def pull(self) -> None:
        """What is at the address comes here, unless it is what was here last. MisuseError: a process here trains this run."""
        place, taken = place_of(self.address), f"{self}: another rob is at this run, in {self.folder}; wait for it"
        with locked(self.folder / ".lock", taken):
            known, names = self._record(), sorted(filter(is_inside, place.names()))
            if known.keys() == set(names) and all(crc32c(place.read(name)) == known[name] for name in names):
                return
            for name in self._files():  # any may be ahead of what is there
                (self.folder / name).unlink()
            self._take(names)

    def pull_some(self, *but: str) -> None:
        """Copy the run here for reading, but for files of these names; may be called again."""
        place = place_of(self.address)
        names = {name for name in place.names() if is_inside(name) and Path(name).name not in but}
        if not names:
            raise MisuseError(f"there is no run at {self}: give the `out` of a rob train-student")
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", f"{self}: it is being read", wait=True):
            self._take(sorted(names))
            for name in set(self._files()) - names:
                (self.folder / name).unlink()

    def _take(self, names: list[str]) -> None:
        """Files come here, but those that are here already as they are there."""
        place, before, known = place_of(self.address), self._record(), {}
        for name in names:
            data = place.read(name)
            known[name] = crc32c(data)
            if before.get(name) != known[name] or not (self.folder / name).exists():
                with replacing(self.folder / name) as file:
                    file.write(data)
        self._keep(known)

    def push(self) -> int:
        """What has changed here goes to the address: so many files. MisuseError, FailureError: it cannot be written to."""
        place, known, changed = place_of(self.address), self._record(), 0
        for name in self._files():
            data = (self.folder / name).read_bytes()
            if known.get(name) != (checksum := crc32c(data)):
                place.write(name, data)
                known[name], changed = checksum, changed + 1
                self._keep(known)
        return changed

    def _files(self) -> list[str]:
        """Names of those that are mirrored, in the order in which they go."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        names = [str(name) for name in found if not name.name.startswith(".") and name.suffix != ".tmp"]
        return sorted(names, key=lambda name: (LAST.index(name) if name in LAST else -1, name))

    def _record(self) -> dict[str, str]:
        try:
            found = json.loads((self.folder / RECORD).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keep(self, known: dict[str, str]) -> None:
        with replacing(self.folder / RECORD) as file:
            file.write(json.dumps(known).encode())
