"""Files in a bucket, by obstore: S3 and what speaks like it, Google's and Azure's, a web server's for reading, and for tests the
memory of this process.

Where the key, the region and the server come from is obstore's to say, which reads the environment as their own tools do. What it
says of an error may hold a signed address or a part of a key, so that of every error only its kind is told.
"""

import os
import re
import socket
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from typing import Any
from urllib.parse import urlsplit

from .errors import FailureError, MisuseError, not_installed
from .files import LARGEST_FILE

AT_ONCE = 32
"""Parts read side by side: 50 ms of latency are then 640 parts a second."""
PATIENCE = timedelta(minutes=2)
"""For which a request is sent again, after 0.1 s first and 15 s last."""
KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL for a server that is not Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_KEY",
}
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")


S3_KEYS = (
    *("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
)
"""Where obstore has keys from, or is told that none are needed."""
NO_KEYS = ("/latest/api/token", "/latest/meta-data", "computeMetadata", "/metadata/identity")
"""Where a machine of the cloud would be asked what it may do: in an error, there were no keys before that."""
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
NO_RIGHTS = "AccessDenied"
"""Also of what S3 answers as done, when it is several objects that are to go."""
LISTED = "listed"
GO_ON = "what is written is safe: run the same command again to go on"


def bucket_at(scheme: str, rest: str, advice: str = GO_ON) -> "Bucket":
    """The place at ``scheme://rest``, and what to do when it fails. MisuseError: obstore is missing, the address is no bucket's
    or holds a password, or there are no keys."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise not_installed(f"{scheme}://", "obstore", "buckets") from None
    if not rest:
        raise MisuseError(f"{scheme}:// names no bucket: write {scheme}://BUCKET/targets.zarr")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise MisuseError(
            f"an address of {scheme}:// must hold no key or password: it is written into manifests and logs; give them in the "
            f"environment ({KEYS.get(scheme, 'it needs none')})"
        )
    if scheme == "s3" and not any(map(os.environ.get, S3_KEYS)) and not _has_role():
        raise MisuseError(f"s3://{rest} cannot be opened: there are no keys in the environment ({KEYS['s3']})")
    return Bucket(scheme, rest, advice)


def _has_role() -> bool:
    """Whether somebody is there who says what this machine of Amazon's may do: obstore would ask for minutes."""
    found = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT", "http://169.254.169.254"))
    try:
        socket.create_connection((found.hostname or "", found.port or 80), timeout=2).close()
    except OSError:
        return False
    return True


@cache
def _memory() -> Any:
    from obstore.store import MemoryStore

    return MemoryStore()


@cache
def _opened(address: str) -> Any:
    """One for all who read there: it keeps its connections."""
    from obstore import store

    from_url: Any = store.from_url  # whose options are of the kind of address
    plain = any(url.startswith("http://") for url in (address, *(os.environ.get(name, "") for name in ENDPOINTS)))
    options: dict[str, Any] = {"client_options": {"allow_http": plain, "connect_timeout": "5s", "timeout": "60s"}}
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2}
    return from_url(
        address, **options, retry_config={"max_retries": 100, "retry_timeout": PATIENCE, "backoff": backoff}
    )


class Bucket:
    """Objects whose names begin alike. Objects are written whole; nobody can hold one."""

    at_once, has_locks = AT_ONCE, False

    def __init__(self, scheme: str, rest: str, advice: str = GO_ON) -> None:
        self.scheme, self.address, self._advice = scheme, f"{scheme}://{rest}", advice
        self._prefix = f"{rest}/" if scheme == "memory" else ""  # the others' address is all that names begin with
        with self._errors():
            self._store = _memory() if scheme == "memory" else _opened(self.address)

    def __str__(self) -> str:
        return self.address

    def exists(self, name: str) -> bool:
        from obstore import head

        try:
            with self._errors():
                head(self._store, self._prefix + name)
        except FileNotFoundError:
            return False
        return True

    def names(self, under: str = "") -> Set[str]:
        return {name for name, _ in self._listed(under)}

    def size(self, under: str = "") -> int:
        return sum(size for _, size in self._listed(under))

    def size_of(self, name: str) -> int:
        from obstore import head

        with self._errors():
            return head(self._store, self._prefix + name)["size"]

    def missing(self, names: Iterable[str]) -> str | None:
        there = self.names()
        return next((name for name in names if name not in there), None)

    def _listed(self, under: str) -> Iterator[tuple[str, int]]:
        import obstore

        prefix = f"{self._prefix}{under}/".lstrip("/") if under else self._prefix
        try:
            with self._errors(LISTED):
                found = [entry for part in obstore.list(self._store, prefix or None) for entry in part]
        except FileNotFoundError:
            return
        sizes = {entry["path"].removeprefix(prefix.rstrip("/")).lstrip("/"): entry["size"] for entry in found}
        # A bucket's console makes a folder by an empty object of its name, which cannot be read by the name it is listed under.
        folders = {str(above) for name in sizes for above in PurePosixPath(name).parents} if 0 in sizes.values() else ()
        yield from ((name, size) for name, size in sizes.items() if name and (size or name not in folders))

    def read(self, name: str, largest: int = LARGEST_FILE) -> bytes:
        from obstore import get

        with self._errors():
            found = get(self._store, self._prefix + name)
            if found.meta["size"] > largest:
                raise OSError(f"{found.meta['size']:,} bytes, more than the {largest:,} that are read")
            return bytes(found.bytes())

    def read_part(self, name: str, start: int, length: int) -> bytes:
        from obstore import get_range

        with self._errors():
            return bytes(get_range(self._store, self._prefix + name, start=start, length=length))

    def read_end(self, name: str, length: int) -> bytes:
        from obstore import get, head

        with self._errors():
            if self.scheme == "az":  # which knows no last so many
                size = head(self._store, self._prefix + name)["size"]
                return self.read_part(name, max(0, size - length), length)
            return bytes(get(self._store, self._prefix + name, options={"range": {"suffix": length}}).bytes())

    def write(self, name: str, data: bytes) -> None:
        from obstore import put

        with self._errors("written to"):
            put(self._store, self._prefix + name, data)

    def remove(self, name: str) -> None:
        from obstore import delete

        try:
            with self._errors("written to"):
                delete(self._store, self._prefix + name)
        except FileNotFoundError:
            return

    def remove_all(self, under: str = "") -> None:
        """A store's manifest goes last: as long as it is there, others see what was begun."""
        above, names = f"{under}/" if under else "", self.names(under)
        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(self.remove, (above + name for name in names if name != "zarr.json")))
        if "zarr.json" in names:
            self.remove(above + "zarr.json")

    def copy_from(self, other: Any, name: str) -> None:
        """The file of that name of another place. Within a bucket the server does it."""
        from obstore import copy

        if not isinstance(other, Bucket) or other._whole != self._whole:
            self.write(name, other.read(name))
            return
        with self._errors("written to"):
            copy(_memory() if self.scheme == "memory" else _opened(self._whole), other._path(name), self._path(name))

    @property
    def _whole(self) -> str:
        """The address of all of the bucket, within which `_path` is."""
        name = self.address.partition("://")[2].partition("/")[0]
        return f"{self.scheme}://{'' if self.scheme == 'memory' else name}"

    def _path(self, name: str) -> str:
        return f"{self.address}/{name}".removeprefix(self._whole).lstrip("/")

    def holds_other(self, known: Set[str]) -> bool:
        return bool({name.partition("/")[0] for name in self.names()} - known)

    def lock(self, name: str, shared: bool = False) -> int | None:
        with TemporaryFile() as file:
            return os.dup(file.fileno())

    @contextmanager
    def _errors(self, what: str = "read") -> Iterator[None]:
        """FileNotFoundError as it is; MisuseError: no such bucket, no rights, an address that cannot be; FailureError: else."""
        from obstore import exceptions

        try:
            yield
        except (FileNotFoundError, exceptions.BaseError, ValueError) as error:
            raise self._told(error, what) from None

    def _told(self, error: Exception, what: str) -> Exception:
        from obstore import exceptions

        keys, text = f"the keys come from the environment ({KEYS.get(self.scheme, '')})", str(error)
        cannot = f"{self.address} cannot be {what}"
        if any(kind in text for kind in NO_BUCKET):
            return MisuseError(f"{cannot}: the server has no bucket of this name; make it, or put the address right")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(2, "there is no such object", self.address)
        kind = kind_of(error)
        refused = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        if refused or NO_RIGHTS in text or kind.endswith((" 401", " 403")):
            return MisuseError(f"{cannot}: no rights; {keys}")
        if isinstance(error, exceptions.InvalidPathError) and what == LISTED:
            return MisuseError(
                f"{cannot}: there is an object whose name is no path, with //, . or .. in it; rename it, or give what is below it"
            )
        if isinstance(error, exceptions.UnknownConfigurationKeyError | exceptions.InvalidPathError | ValueError):
            return MisuseError(f"{self.address} is no address of a bucket: write {self.scheme}://BUCKET/NAME")
        if isinstance(error, exceptions.NotSupportedError):
            return MisuseError(f"{cannot}: the server gives no parts of files; copy them here")
        if any(asked in text for asked in NO_KEYS):
            return MisuseError(f"{cannot}: there are no keys; {keys}")
        tried = "" if " 4" in kind else f", tried for up to {PATIENCE.seconds} s"  # what it refuses is not asked again
        return FailureError(f"{cannot}: {kind}{tried}; {self._advice}")


def kind_of(error: BaseException) -> str:
    """In words that are ours: those of the library hold addresses."""
    text = str(error)
    status = re.search(r"\b(?:status code|status|returned|code):? ?\"?(4\d\d|5\d\d)\b", text, re.IGNORECASE)
    if status:
        return f"the server answers {status[1]}"
    kinds = {
        "dns|resolve|lookup": "the server's name is not known",
        "refused|connecterror|connect error|connection": "there is no connection to the server",
        "timed out|timedout": "the server does not answer in time",
    }
    return next(
        (kind for pattern, kind in kinds.items() if re.search(pattern, text, re.IGNORECASE)), "the server fails"
    )
