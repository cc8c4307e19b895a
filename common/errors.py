"""The two ways a command ends badly, and the one place that words an unknown name."""

from collections.abc import Iterable
from difflib import get_close_matches


class MisuseError(Exception):
    """The user asked for something that cannot be: a missing file, an unknown name, a store of another data set. Exit code 2."""


class FailureError(Exception):
    """The request was fine but the run broke: disk full, NaN loss, corrupt chunk. Exit code 1."""


def printable(text: str) -> str:
    """``text`` for a terminal or a picture: what would move the cursor, or is no text in any encoding, as ``\\x1b``."""
    return "".join(
        c if c.isprintable() or c == " " else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether NumPy, a GPU or torch's CPU allocator (which says so in words only) had none left."""
    of_its_kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return of_its_kind or "can't allocate memory" in str(error)


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> MisuseError:
    """The error for a name that is not among ``choices``: offers the nearest ones, and lists all when they are few."""
    known = sorted(set(choices))
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(near)}?" if near else ""
    listing = f"known: {', '.join(known)}" if len(known) <= 20 else f"{len(known)} are known"
    return MisuseError(f"unknown {kind} {name!r}{f': {offer}' if offer else ''} ({listing})")
