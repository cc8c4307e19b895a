"""Core ML's .mlpackage, in float16, or with 8-bit weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .graph import Graph, quiet
from .input_form import WithInput

LEAST_WEIGHTS = 512
"""Fewer in one tensor are not worth 8 bits."""


def write_coreml(graph: Graph, path: Path) -> None:
    """An .mlpackage for iOS 16 on, in float16, which the Neural Engine computes in. Where ``uint8`` pixels come in, they are an
    image as Core ML has them, not an array."""
    with quiet():
        import coremltools as ct  # type: ignore

        form, size = graph.network.form, graph.network.size
        network = WithInput(graph.network.backbone, "unit", size, graph.info.mean, graph.info.std).eval()
        if form == "normalised":
            network = graph.network
        shape = (1, 3, size, size)
        program = torch.export.export(network, (torch.zeros(shape),)).run_decompositions({})
        pixels = ct.ImageType("image", shape, scale=1 / 255, color_layout=ct.colorlayout.RGB)
        model = ct.convert(
            program,
            inputs=[pixels if form == "uint8" else ct.TensorType("image", shape)],
            outputs=[ct.TensorType(graph.output)],
            minimum_deployment_target=ct.target.iOS16,
        )
        model.user_defined_metadata.update(graph.facts)  # type: ignore
        model.save(str(path))  # type: ignore


def write_coreml_int8(graph: Graph, full: Path, out: Path, batches: Sequence[np.ndarray], calibrate: str) -> float:
    """Weights in 8 bits, per channel; the share of them that took it. Activations stay float16: coremltools calibrates them by
    running the model, which only a Mac does, or by a part of torch that is gone from torch 2.14.
    """
    with quiet():
        import coremltools as ct  # type: ignore
        from coremltools.optimize.coreml import (  # type: ignore
            OpLinearQuantizerConfig,
            OptimizationConfig,
            linear_quantize_weights,
        )

        each = OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=LEAST_WEIGHTS)
        model: Any = linear_quantize_weights(
            ct.models.MLModel(str(full), skip_model_load=True), OptimizationConfig(global_config=each)
        )
        model.save(str(out))
        program = model._mil_program
    quantised = total = 0
    for operation in program.functions["main"].operations:
        if operation.op_type == "constexpr_affine_dequantize":
            quantised += int(np.prod(operation.quantized_data.val.shape))
        elif operation.op_type == "const" and getattr(operation.val.val, "dtype", None) in (np.float16, np.float32):
            total += operation.val.val.size if operation.val.val.ndim >= 2 else 0
    return quantised / max(1, quantised + total)
