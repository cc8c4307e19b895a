"""What a run waited for, and what to do about it."""

from collections.abc import Mapping

WORTH_TELLING = {"data": 0.05, "target": 0.05, "prepare": 0.15}
"""Shares of a step from which a part is worth the user's time; the student's own work is what a step is for."""

REMEDIES = {
    "data": "the loader does not keep up: give it more cores (`workers`), fewer or smaller crops, or pack the images "
    "again with `max_resolution`",
    "prepare": "copying views to the device and their colours take long: fewer or smaller crops, or a recipe without blur",
    "cached target": "targets are read too late: a larger `window_mib`, a faster disk, or `cache_in_memory`",
    "online target": "that is the teacher: run it once with rob cache-teacher, and train from its targets",
}


def shares_of_step(seconds: Mapping[str, float], passed: float) -> dict[str, float]:
    """Shares of ``passed`` seconds: ``data`` (waiting for views), ``prepare`` (copy and colours), ``target``, and
    ``student`` (forward, loss, backward, step), which is all the rest: a GPU's work is waited for outside of any part.
    """
    shares = {name: seconds.get(name, 0.0) / passed for name in WORTH_TELLING}
    shares["student"] = max(0.0, 1 - sum(shares.values()))
    return {name: round(share, 4) for name, share in shares.items()}


NAMES = {"data": "waiting for views", "prepare": "copy and colour", "target": "targets", "student": "student"}


def describe_shares(shares: Mapping[str, float]) -> str:
    """``waiting for views 0.3%, copy and colour 4.1%, targets 0.2%, student 95.4%``."""
    return ", ".join(f"{text} {shares[name]:.1%}" for name, text in NAMES.items())


def worst_share(shares: Mapping[str, float]) -> str:
    """The largest part beside the student's own, by its name in the log, for where there is room for one: ``prepare 4%``."""
    name = max(WORTH_TELLING, key=lambda name: shares[name])
    return f"{name} {shares[name]:.0%}"


def advise(shares: Mapping[str, float], targets: str) -> str:
    """One sentence on the largest part that is worth changing; ``targets`` is "cached", "online" or "momentum"."""
    worth = {name: shares[name] for name, least in WORTH_TELLING.items() if shares[name] >= least}
    worth = {name: share for name, share in worth.items() if name != "target" or f"{targets} target" in REMEDIES}
    if not worth:
        return "The student itself is the limit: `precision` bf16, a smaller student or smaller crops are what is left."
    name = max(worth, key=worth.__getitem__)
    remedy = REMEDIES[f"{targets} target" if name == "target" else name]
    return f"{shares[name]:.0%} of the time went into {'targets' if name == 'target' else 'views'}: {remedy}."
