"""Triton's interpreter as the tests need it. Import only under TRITON_INTERPRET=1."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def scalars_index(monkeypatch) -> None:
    """Triton 3.6's interpreter calls ``int()`` of arrays of one element, which NumPy refuses from 2.4 on; later ones do not."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def bfloat16_dots(monkeypatch) -> None:
    """Up to 3.8 the interpreter keeps bfloat16 as 16-bit patterns, and multiplies the patterns."""

    def floats(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(floats(a), floats(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
