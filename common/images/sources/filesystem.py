"""Files wherever fsspec reaches (``hf://``, ``sftp://``, ``hdfs://`` ...), for reading: what obstore does not speak.

What a library says of an error may hold an address with a key, so that of every error only its kind is told.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

from ...errors import FailureError, MisuseError
from ...places import ADDRESS
from .source import LARGEST


class Filesystem:
    """What lies below an address. MisuseError: no such kind of address, or what speaks it is not installed."""

    at_once = 8

    def __init__(self, address: str) -> None:
        import fsspec

        self.address, scheme = address.rstrip("/"), address.partition(":")[0]
        found = ADDRESS.fullmatch(address)
        if found is not None and "@" in found[2].partition("/")[0] and scheme != "hf":
            raise MisuseError(f"an address of {scheme}:// must hold no key or password: it is shown and logged")
        try:
            fs, self._root = fsspec.url_to_fs(address)
        except ImportError as error:
            raise MisuseError(f"{address} cannot be read, a package is missing: {error}") from None
        except ValueError:
            raise MisuseError(f"{scheme}:// is no kind of address that fsspec knows") from None
        except Exception as error:  # a server's, which may hold anything
            raise FailureError(f"{address} cannot be read ({type(error).__name__})") from None
        self._fs: Any = fs
        self._root = self._root.rstrip("/")

    def __str__(self) -> str:
        return self.address

    def names(self, under: str = "") -> Set[str]:
        root = f"{self._root}/{under}".rstrip("/")
        with self._errors():
            return {name[len(root) + 1 :] for name in self._fs.find(root) if len(name) > len(root)}

    def size_of(self, name: str) -> int:
        with self._errors():
            return self._fs.size(f"{self._root}/{name}")

    def read(self, name: str, largest: int = LARGEST) -> bytes:
        with self._errors():
            return self._fs.cat_file(f"{self._root}/{name}")

    def read_part(self, name: str, start: int, length: int) -> bytes:
        with self._errors():
            return self._fs.cat_file(f"{self._root}/{name}", start=start, end=start + length)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """FileNotFoundError as it is; MisuseError: no rights; FailureError: anything else."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(2, "there is no such file", self.address) from None
        except PermissionError:
            raise MisuseError(f"{self.address} cannot be read: no rights") from None
        except Exception as error:
            raise FailureError(f"{self.address} cannot be read ({type(error).__name__})") from None
