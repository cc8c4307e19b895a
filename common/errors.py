"""The two ways a command ends badly, and words that their sentences share."""

import re
from collections.abc import Iterable, Sequence, Set
from difflib import SequenceMatcher, get_close_matches


class MisuseError(Exception):
    """The user asked for something that cannot be: a missing file, an unknown name, a store of another data set. Exit code 2."""


class FailureError(Exception):
    """The request was fine but the run broke: disk full, NaN loss, corrupt chunk. Exit code 1."""


def printable(text: str) -> str:
    """``text`` for a terminal or a picture: what would move the cursor, or is no text in any encoding, as ``\\x1b``."""
    return "".join(
        c if c.isprintable() or c == " " else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shortened(text: str, most: int, tail: bool = False) -> str:
    """To ``most`` letters: its beginning, or its ``tail``."""
    if len(text) <= most:
        return text
    return f"...{text[-most + 3 :]}" if tail else f"{text[: most - 2]}..."


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


BRINGS = "in rob's folder, pip install -c constraints.txt -e '.[{}]'"
"""What installs an extra. ffcv wants more than pip: g++, pkg-config, OpenCV's and libjpeg-turbo's headers, which ``make venv``
brings on Debian and Ubuntu."""


def not_installed(what: str, package: str, extra: str) -> MisuseError:
    """The error for ``what`` needs a package that only one of rob's extras brings."""
    return MisuseError(f"{what} needs the package {package}, which is not installed: {BRINGS.format(extra)}")


def first_line(error: BaseException) -> str:
    """What an error says, in a line: its first that is not empty, after a heading the one below it; else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def named_line(error: BaseException) -> str:
    """The same behind its class: ``ValueError: expected 3 channels``."""
    line, kind = first_line(error).rstrip("."), type(error).__name__
    return kind if line == kind else f"{kind}: {line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether NumPy, a GPU or torch's CPU allocator (which says so in words only) had none left."""
    of_its_kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return of_its_kind or "can't allocate memory" in str(error)


def unknown_name(kind: str, name: str, choices: Iterable[str], usual: Iterable[str] = ()) -> MisuseError:
    """The error for a name that is not among ``choices``: offers the nearest ones, rather the ``usual`` ones, and lists all when
    they are few."""
    known = sorted(set(choices))
    near = _nearest(name, known, set(usual))
    offer = f"did you mean {' or '.join(near)}?" if near else ""
    listing = f"known: {', '.join(known)}" if len(known) <= 20 else f"{len(known)} are known"
    return MisuseError(f"unknown {kind} {name!r}{f': {offer}' if offer else ''} ({listing})")


def _nearest(name: str, known: Sequence[str], usual: Set[str]) -> list[str]:
    """At most three: those spelled alike, whatever their capitals and hyphens, or that have it as their beginning or a part."""
    plain, word = {_plain(other): other for other in reversed(known)}, _plain(name)
    alike = get_close_matches(word, plain, n=10, cutoff=0.5) + get_close_matches(word, map(_plain, usual), cutoff=0.5)
    part_of = [other for other in plain if len(word) > 2 and (other.startswith(word) or word in other.split("_"))]

    def likeness(other: str) -> float:
        return SequenceMatcher(None, word, other).ratio() + 0.2 * (other in part_of) + 0.15 * (plain[other] in usual)

    likely = sorted(dict.fromkeys([*alike, *sorted(part_of, key=len)[:10]]), key=likeness, reverse=True)
    return [plain[other] for other in likely[:3]]


def _plain(name: str) -> str:
    return re.sub(r"[-. ]", "_", name.lower())
