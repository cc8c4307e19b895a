"""8-bit ONNX: static quantisation in QDQ form, weights per channel, and a look at whether it took."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import FailureError
from .graph import quiet

MIN_SHARE = 0.9
"""Of the weights that must be 8-bit: converters leave what they do not know as it is, and say nothing."""
LAYERS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def quantise(source: Path, out: Path, batches: Sequence[np.ndarray]) -> float:
    """Write ``out``, calibrated on ``batches`` of images in the file's input form; the share of weights that are 8-bit now.

    Activations are unsigned: x86's and ARM's kernels of 8-bit products are fastest so. FailureError: too few weights took it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            images = next(self.left, None)
            return None if images is None else {"image": images}

    with quiet():
        quantize_static(
            str(source),
            str(out),
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    share = share_of_int8(onnx.load(out))
    if share < MIN_SHARE:
        raise FailureError(
            f"only {share:.0%} of the weights became int8, expected {MIN_SHARE:.0%} or more: use float32"
        )
    return share


def share_of_int8(model: Any) -> float:
    """Of all weights of layers, the constant matrices and kernels that they multiply by, the share that is stored as int8."""
    import onnx

    constants = {constant.name: constant for constant in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    quantised = total = 0
    for node in model.graph.node:
        if node.op_type not in LAYERS:
            continue
        for name in node.input[:2]:
            maker = makers.get(name)
            stored = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else name
            constant = constants.get(stored)
            if constant is not None and len(constant.dims) >= 2:
                size = int(np.prod(constant.dims))
                total += size
                quantised += size if constant.data_type == onnx.TensorProto.INT8 else 0
    return quantised / total if total else 0.0
