"""ffcv, imported without what that does to a process. ImportError: it is not installed.

Its import sets torch's threads to one for everybody; asks for CUDA, and a process that was asked leaves its forked children
without; and puts two numbers into a typed dictionary of numba's, which numba compiles for three seconds. A plain one serves.
"""

import numba.typed
import torch

_threads, _is_available, _typed_dict = torch.get_num_threads(), torch.cuda.is_available, numba.typed.Dict
torch.cuda.is_available, numba.typed.Dict = lambda: False, dict
try:
    import ffcv._libffcv as library
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.pipeline.compiler import Compiler
finally:
    torch.set_num_threads(_threads)
    torch.cuda.is_available, numba.typed.Dict = _is_available, _typed_dict

__all__ = ["Compiler", "Loader", "OSCacheManager", "OrderOption", "SimpleRGBImageDecoder", "library"]
