"""What a GPU would be asked to launch, counted on a CPU under Triton's interpreter."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from rob.student_train.kernels import products

WITHOUT = {
    *(
        "view",
        "reshape",
        "expand",
        "slice",
        "select",
        "transpose",
        "permute",
        "t",
        "squeeze",
        "unsqueeze",
        "detach",
        "alias",
    ),
    *("split", "as_strided", "unbind", "_unsafe_view"),
    *("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "promote_types"),
}
"""Operations that launch nothing."""


class Operations(TorchDispatchMode):
    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in WITHOUT:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch, processors: int = 132):
    """Yields a counter (name of an operation or kernel) -> launches, of what runs inside."""
    found: Counter = Counter()

    def counted(name: str, work):
        found[name] += 1
        with _disable_current_modes():
            return work()

    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *a, **k: counted(self.fn.__name__, lambda: run(self, *a, **k)),
    )

    def widening(name: str):
        product = getattr(torch, name)
        return lambda a, b, out_dtype: counted(name, lambda: product(a.float(), b.float()))

    library = SimpleNamespace(mm=widening("mm"), bmm=widening("bmm"), float32=torch.float32, Tensor=torch.Tensor)
    monkeypatch.setattr(products, "torch", library)  # CPUs have no product of halves with float32 sums
    monkeypatch.setattr(products, "_widens", lambda device, dtype: dtype.itemsize == 2)
    for module in ("products", "triton_kernels"):
        monkeypatch.setattr(f"rob.student_train.kernels.{module}.processors", lambda device: processors)
    with Operations(found):
        yield found
