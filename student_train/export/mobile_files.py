"""Files for phones: ExecuTorch's .pte with XNNPACK's kernels, and Core ML's .mlpackage."""

from pathlib import Path

import numpy as np
import torch

from .graph import Graph, Runner, quiet
from .input_form import WithInput

# ==== ExecuTorch ====


def write_executorch(graph: Graph, path: Path) -> None:
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # type: ignore
        from executorch.exir import to_edge_transform_and_lower  # type: ignore

        program = to_edge_transform_and_lower(graph.of_one_image(), partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(program.buffer)


def load_executorch(path: Path) -> Runner:
    with quiet():
        from executorch.runtime import Runtime  # type: ignore

        method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None

    def run(images: np.ndarray) -> np.ndarray:
        with quiet():
            return np.concatenate([method.execute([torch.from_numpy(one[None])])[0].numpy() for one in images])

    return run


# ==== Core ML ====


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
