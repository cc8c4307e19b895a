"""8-bit ONNX: static quantisation in QDQ form, weights per channel, and a look at whether it took."""

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from .graph import Graph, quiet
from .onnx_file import save_onnx

LAYERS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def quantise(
    exported: Graph, source: Path, out: Path, batches: Sequence[np.ndarray], calibrate: str = "minmax"
) -> float:
    """Write ``out``, calibrated on ``batches`` of images in the file's input form; the share of weights that are 8-bit now.

    Activations are unsigned: x86's kernels of 8-bit products are fastest so. Of a transformer only the layers are 8-bit, and not
    the sums between them, whose outliers 8 bits do not hold (``benchmarks/README.md``).
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            images = next(self.left, None)
            return None if images is None else {"image": images}

    graph = onnx.load(source).graph
    transformer = any(node.op_type == "LayerNormalization" for node in graph.node)
    constants = {constant.name for constant in graph.initializer}
    products = [node.name for node in graph.node if node.op_type in LAYERS and not constants & set(node.input)]
    methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    with quiet(), redirect_stdout(io.StringIO()):
        quantize_static(
            str(source),
            str(out),
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(LAYERS) if transformer else None,
            nodes_to_exclude=products if transformer else None,
            calibrate_method=methods[calibrate],
        )
    quantised = onnx.load(out)
    save_onnx(quantised, {entry.key: entry.value for entry in quantised.metadata_props}, out)
    return share_of_int8(quantised)


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
