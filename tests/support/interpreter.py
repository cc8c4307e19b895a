"""Triton's interpreter as the tests need it."""

from triton.runtime import interpreter


def scalars_index(monkeypatch) -> None:
    """Triton 3.6's interpreter calls ``int()`` of arrays of one element, which NumPy refuses from 2.4 on; later ones do not."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
