"""LiteRT's .tflite, by litert-torch; of 8 bits by ai-edge-quantizer."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .graph import Graph, Runner, quiet

SIGNATURE, INPUT = "serving_default", "args_0"
"""litert-torch's names."""
INT8 = 9
"""TFLite's number of the type."""
LAYERS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")


@contextmanager
def silent() -> Iterator[None]:
    """It prints every step that it takes."""
    with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def write_litert(graph: Graph, path: Path) -> None:
    with silent():
        import litert_torch  # type: ignore

        litert_torch.convert(graph.network, (graph.example[:1],)).export(str(path))


def write_litert_int8(graph: Graph, full: Path, out: Path, batches: Sequence[np.ndarray], calibrate: str) -> float:
    """Write ``out``, calibrated on ``batches``; the share of weights that are 8-bit now. Of a transformer only the layers are."""
    with silent():
        from ai_edge_quantizer import calibrator, quantizer  # type: ignore
        from ai_edge_quantizer.recipe_manager import RecipeManager  # type: ignore
        from ai_edge_quantizer.utils.qsv_utils import min_max_update  # type: ignore

        recipes = RecipeManager()
        transformer = any(isinstance(module, nn.LayerNorm) for module in graph.network.modules())
        for operation in LAYERS if transformer else ("*",):
            recipes.add_static_config(
                regex=".*",
                operation_name=operation,
                activation_num_bits=8,
                weight_num_bits=8,
                algorithm_key="min_max_uniform_quantize",
            )
        # Else features come out as int8 with an offset, whose cosines say nothing.
        recipes.add_quantization_config(regex=".*", operation_name="OUTPUT", algorithm_key="no_quantize")
        work = quantizer.Quantizer(str(full), recipes.get_quantization_recipe())
        images = [{INPUT: one[None]} for batch in batches for one in batch]
        # The quantiser's own is a moving average of each image's range, beyond which strong images saturate: to a fortieth of
        # their features' length with EfficientNet-B0 (benchmarks/README.md).
        ranges = calibrator.Calibrator(str(full), num_threads=1, qsv_update_func=min_max_update)
        ranges.calibrate({SIGNATURE: images}, recipes)
        work.quantize(ranges.get_model_qsvs()).export_model(str(out))
        return _share_of_int8(out)


def _share_of_int8(path: Path) -> float:
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils  # type: ignore

    model: Any = tfl_flatbuffer_utils.read_model(str(path))
    quantised = total = 0
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if data is None or len(data) == 0 or tensor.shape is None or len(tensor.shape) < 2:
            continue
        size = int(np.prod(tensor.shape))
        total += size
        quantised += size if tensor.type == INT8 else 0
    return quantised / max(1, total)


def load_litert(path: Path) -> Runner:
    """On one thread."""
    with silent():
        from ai_edge_litert.interpreter import Interpreter  # type: ignore

        interpreter = Interpreter(model_path=str(path), num_threads=1)
        run_one = interpreter.get_signature_runner(SIGNATURE)

    def run(images: np.ndarray) -> np.ndarray:
        return np.concatenate([next(iter(run_one(**{INPUT: one[None]}).values())) for one in images])

    return run
