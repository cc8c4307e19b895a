"""Ranks that help with extraction: the first one asks for rows of a data set, and each of them, itself included, makes its share.

Only the first goes through an evaluation, and writes; what it has kept already it asks nobody for.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from ...common.ranks import Ranks, from_main

Asked = tuple[Path, int, int]
"""A data set, and the first image and the one behind the last."""
Extract = Callable[[Path, int, int], Tensor]
"""Features (stop - start, D) on the CPU of what is asked for."""


def ask(extract: Extract, data: Path, start: int, stop: int, batch_size: int, ranks: Ranks) -> Tensor:
    """On the first rank: the features of those images, a share by each rank."""
    from_main(lambda: (data, start, stop))
    shares = _shares(extract, data, start, stop, batch_size, ranks)
    return torch.cat(shares)[: stop - start]


def let_go() -> None:
    """On the first rank: there is nothing more to ask for."""
    from_main(lambda: None)


def help_out(extract: Extract, batch_size: int, ranks: Ranks) -> None:
    """On any other rank: make shares until it is let go."""
    while (asked := from_main(_what_the_first_says)) is not None:
        _shares(extract, *asked, batch_size, ranks)


def _what_the_first_says() -> Asked | None:
    """Not called on other ranks."""
    return None


def _shares(extract: Extract, data: Path, start: int, stop: int, batch_size: int, ranks: Ranks) -> list[Tensor]:
    """What all ranks have made, on the first one; nothing on the others. A share is of whole batches, the ones that one process
    sees: a network's last bit goes by who else is in a batch."""
    batches = -(-(stop - start) // batch_size)
    most = -(-batches // ranks.world_size) * batch_size
    # Who comes behind the last batch makes that one again, to know how wide a row is; it is cut off.
    first = start + min(ranks.rank * most, (batches - 1) * batch_size)
    rows = extract(data, first, min(first + most, stop))
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(ranks.world_size)] if ranks.is_main else []
    dist.gather(padded, shares or None)
    return shares
