"""ONNX: written by torch.onnx from torch.export's program, simplified by onnxslim, run by onnxruntime."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import FailureError, MisuseError, first_line
from ...common.files import read_regular
from ...common.records import DamagedError, NoChecksumError, crc32c
from .config import INPUTS
from .graph import Graph, Runner, quiet
from .input_form import prepare, to_pixels

LARGEST = 1 << 31
"""Bytes: protobuf's own limit."""
FACTS = "rob"
"""The property of the file that says what it takes, as JSON."""


def write_onnx(graph: Graph, path: Path) -> None:
    """FailureError: the opset lacks an operator of the network."""
    import onnxslim

    with quiet():
        try:
            program = torch.onnx.export(
                graph.program,
                dynamo=True,
                input_names=["image"],
                output_names=[graph.output],
                dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
                opset_version=graph.opset,
                verbose=False,
            )
        except Exception as error:  # the exporter has errors of its own, about this and that
            first: BaseException = error  # which names the operator; what is around it is advice to torch's own people
            while first.__cause__ is not None:
                first = first.__cause__
            reason = next(iter(str(first).strip().splitlines()), type(first).__name__)
            raise FailureError(f"{graph.info.name} does not become ONNX of `opset` {graph.opset}: {reason}") from error
        assert program is not None
        model: Any = onnxslim.slim(program.model_proto)
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found.pop("ai.onnx", None) != graph.opset or found:
        raise FailureError(f"{graph.info.name} has operators that `opset` {graph.opset} lacks: use 20")
    save_onnx(model, graph.facts, path)


# ==== its checksum ====

_SEAL = re.compile(rb"\x0a\x06crc32c\x12\x08([0-9a-f]{8})")
"""A property of an ONNX file, as protobuf writes it: its name, and the checksum of the file in which it is eight zeros."""


def save_onnx(model: Any, facts: Mapping[str, str], path: Path) -> None:
    """Write ``model``, with ``facts`` and a checksum of the file among its properties."""
    del model.metadata_props[:]
    for key, value in {**facts, "crc32c": "0" * 8}.items():
        model.metadata_props.add(key=key, value=value)
    data = bytearray(model.SerializeToString(deterministic=True))
    *_, seal = _SEAL.finditer(data)
    start, end = seal.span(1)
    data[start:end] = crc32c(bytes(data)).encode()
    path.write_bytes(data)


def check_onnx(path: Path) -> bytes:
    """The content of a file that ``save_onnx`` wrote. DamagedError: it is another, or none. OSError."""
    data = bytearray(read_regular(path, LARGEST))
    seals = list(_SEAL.finditer(data))
    if not seals:
        raise NoChecksumError("is no ONNX file of rob export, damaged, or of a rob from before checksums")
    start, end = seals[-1].span(1)
    said = bytes(data[start:end])
    data[start:end] = b"0" * 8
    if crc32c(bytes(data)) != said.decode():
        raise DamagedError("is damaged or was edited: its checksum does not match")
    data[start:end] = said
    return bytes(data)


def load_onnx(path: Path) -> Runner:
    """On one thread of the CPU."""
    session = open_session(str(path), threads=1)
    return lambda images: session.run(None, {"image": images})[0]


def open_session(source: str | bytes, threads: int) -> Any:
    """onnxruntime's, of a file or its content, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class OnnxBackbone:
    """An ONNX file of ours as a backbone: normalised images (N, 3, size, size) to features (N, D) float32, on the CPU."""

    session: Any
    name: str
    size: int
    form: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    """sha256 (hex) of the file."""

    @classmethod
    def open(cls, path: Path) -> "OnnxBackbone":
        """MisuseError: no such file, none that onnxruntime reads, or none that rob export wrote."""
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            raise MisuseError(f"{path} needs onnxruntime, which is not installed: pip install onnxruntime") from None
        if not path.is_file():
            raise MisuseError(f"{path}: no such file; rob export writes it")
        try:
            content = check_onnx(path)
            session = open_session(content, threads=torch.get_num_threads())
        except DamagedError as problem:
            raise MisuseError(f"{path} {problem}: export it again") from None
        except Exception as error:  # onnxruntime has a class of its own for each reason
            raise MisuseError(f"{path} is damaged or no ONNX file ({first_line(error)}): export it again") from None
        told = session.get_modelmeta().custom_metadata_map.get(FACTS)
        try:
            facts = json.loads(told or "")
            if facts.get("task"):
                raise MisuseError(f"{path} is made to {facts['task']}: it gives no features; give a student's")
            mean, std = (tuple(map(float, facts[name])) for name in ("mean", "std"))
            form, size, student = facts["input"], int(facts["size"]), str(facts["student"])
            if form not in INPUTS or len(mean) != 3 or len(std) != 3:
                raise ValueError(form)
        except (ValueError, TypeError, KeyError):
            raise MisuseError(f"{path} does not say what it takes: give a file that rob export wrote") from None
        digest = hashlib.sha256(content).hexdigest()
        return cls(session, f"{student} ({path.name})", size, form, mean, std, digest)

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        images = images.cpu()
        if self.form != "normalised":
            images = prepare(to_pixels(images, self.mean, self.std), self.form, mean, std)
        return torch.from_numpy(self.session.run(["features"], {"image": np.ascontiguousarray(images.numpy())})[0])
