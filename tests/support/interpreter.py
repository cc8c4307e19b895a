"""Triton's interpreter, repaired where a version of it is wrong. Import only under TRITON_INTERPRET=1."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 3.8 it keeps bfloat16 as 16-bit patterns and multiplies the patterns; up to 3.6 it takes int() of arrays of one
    element, which NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def floats(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(floats(a), floats(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
