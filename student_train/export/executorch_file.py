"""ExecuTorch's .pte with XNNPACK's kernels, float32 or of 8 bits by torchao's PT2E quantisation."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .graph import Graph, Runner, quiet


def write_executorch(graph: Graph, path: Path) -> None:
    with quiet():
        path.write_bytes(_lowered(graph.of_one_image()).buffer)


def write_executorch_int8(graph: Graph, full: Path, out: Path, batches: Sequence[np.ndarray], calibrate: str) -> float:
    """Write ``out``, weights per channel, activations calibrated on ``batches``; the share of weights that are 8-bit now.

    Of a transformer only the layers are 8-bit, as in ``int8.quantise``.
    """
    with quiet():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (  # type: ignore
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # type: ignore

        quantizer, settings = XNNPACKQuantizer(), get_symmetric_quantization_config(is_per_channel=True)
        if any(isinstance(module, nn.LayerNorm) for module in graph.network.modules()):
            for kind in (nn.Linear, nn.Conv2d):
                quantizer.set_module_type(kind, settings)
        else:
            quantizer.set_global(settings)
        prepared = prepare_pt2e(graph.of_one_image().module(), quantizer)
        with torch.no_grad():
            for one in (image for images in batches for image in images):
                prepared(torch.from_numpy(one[None]))
        converted = convert_pt2e(prepared)
        lowered = _lowered(torch.export.export(converted, (graph.example[:1],)))
        out.write_bytes(lowered.buffer)
        weights = [tensor for tensor in _constants(lowered.exported_program()) if tensor.ndim >= 2]
    total = sum(tensor.numel() for tensor in weights)
    return sum(tensor.numel() for tensor in weights if tensor.dtype == torch.int8) / max(1, total)


def _lowered(program: torch.export.ExportedProgram) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # type: ignore
    from executorch.exir import to_edge_transform_and_lower  # type: ignore

    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()


def _constants(program: torch.export.ExportedProgram) -> Iterator[Tensor]:
    """What the file holds: of the program and of each part of it that went to XNNPACK. A module that PT2E made still has the
    float weights beside their copies of 8 bits, of which nothing is written."""
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            held = program.state_dict.get(spec.target, program.constants.get(spec.target))
            if isinstance(held, Tensor):
                yield held
    for part in program.graph_module.modules():
        lowered = getattr(part, "original_module", None)
        if lowered is not None:
            yield from _constants(lowered)


def load_executorch(path: Path) -> Runner:
    with quiet():
        from executorch.runtime import Runtime  # type: ignore

        method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None

    def run(images: np.ndarray) -> np.ndarray:
        with quiet():
            return np.concatenate([method.execute([torch.from_numpy(one[None])])[0].numpy() for one in images])

    return run
