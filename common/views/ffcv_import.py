"""ffcv, imported without what that does to a process. ImportError: it is not installed.

Its import sets torch's threads to one for everybody; asks for CUDA, and a process that was asked leaves its forked children
without; puts two numbers into a typed dictionary of numba's, which numba compiles for three seconds, where a plain one serves;
and starts numba's threads, of which none is ever used here: with TBB a process on a single core then waits for them at its end,
for ever.
"""

from typing import Any

import numba
import numba.typed
import torch

_typed: Any = numba.typed  # which has its contents at run time alone
_threads, _is_available = torch.get_num_threads(), torch.cuda.is_available
_typed_dict, _start_threads = _typed.Dict, numba.set_num_threads
torch.cuda.is_available, _typed.Dict, numba.set_num_threads = lambda: False, dict, lambda n: None
try:
    import ffcv._libffcv as library
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.compiler import Compiler
finally:
    torch.set_num_threads(_threads)
    torch.cuda.is_available, _typed.Dict, numba.set_num_threads = _is_available, _typed_dict, _start_threads

__all__ = ["Compiler", "Loader", "OSCacheContext", "OSCacheManager", "OrderOption", "SimpleRGBImageDecoder", "library"]
