"""How far the host may run ahead of a GPU."""

from collections import deque

import torch

STEPS = 3
"""Enough that the GPU never waits for the host; more would only hold more memory, and take longer to stop."""


class Pace:
    """``step_done()``, after each step that was launched, waits until the GPU has at most ``STEPS`` left to do; on a CPU it does
    nothing."""

    def __init__(self, device: torch.device) -> None:
        self._launched: deque[torch.Event] | None = deque() if device.type == "cuda" else None

    def step_done(self) -> None:
        if self._launched is None:
            return
        if len(self._launched) == STEPS:
            self._launched.popleft().synchronize()
        event = torch.cuda.Event(blocking=True)  # asleep, not spinning: the loader's threads want the core
        event.record()
        self._launched.append(event)
