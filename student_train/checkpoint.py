"""What a run leaves on disk: a checkpoint to resume from, and weights that timm loads.

Both are written under a temporary name and renamed, so that a run killed while writing keeps the file it had. Both are
read without unpickling code: ``torch.load(weights_only=True)`` and safetensors. Both have checksums: torch writes one for each
part of a checkpoint, and never looks at it.
"""

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import FailureError, MisuseError
from ..common.exported import StudentInfo, described_in
from ..common.factories import name_factory
from ..common.files import first_difference, open_regular, replacing
from ..common.own_network import whole_of
from ..common.records import DamagedError, NoChecksumError
from ..common.run import versions
from ..common.signals import uninterrupted
from ..common.weights import hash_weights, read_tensor_file, tensor_file
from .students import create_student

FORMAT_VERSION = 1
"""Raised whenever an older checkpoint can no longer be resumed."""

WEIGHTS_NAME, AVERAGE_NAME = "student.safetensors", "student_average.safetensors"
BEST_NAME = "student_best.safetensors"
"""The student's weights in a run folder."""


# ==== checkpoints ====


def save_checkpoint(path: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write ``state`` (state dicts, tensors, numbers, strings and containers of them) and the run's ``config``.

    FailureError: the disk is full or the folder cannot be written; the earlier checkpoint is then still there. A Ctrl-C waits
    until it is written: torch would take it for a file that cannot be.
    """
    payload = {"format_version": FORMAT_VERSION, "config": _as_json(config), "state": dict(state)}
    with uninterrupted(), replacing(path) as file:
        torch.save(payload, file)


def load_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    otherwise: str = "choose another output folder",
) -> dict[str, Any]:
    """The ``state`` of a checkpoint that a run of the same ``config`` wrote. Best on the CPU: ``load_state_dict`` puts each
    tensor where it belongs, and an optimiser whose count of steps came to a GPU would wait for it, tensor by tensor, in every
    step.

    MisuseError: as ``read_checkpoint``, or another configuration: the first field that differs is named, and ``otherwise`` says
    what else to do. FailureError as there.
    """
    payload = read_checkpoint(path, device)
    difference = first_difference(payload["config"], _as_json(config))
    if difference:
        name, was, now = difference
        raise MisuseError(
            f"{path} was made with {name} = {was}, this run has {name} = {now}: resume with the same, or {otherwise}"
        )
    return payload["state"]


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The ``state`` of a checkpoint and the ``config`` of the run that wrote it.

    MisuseError: no such file, or another format version. FailureError: truncated, damaged, or no checkpoint at all.
    """
    if not path.is_file():
        raise MisuseError(f"{path}: no such checkpoint")
    unreadable = f"{path} is truncated or no checkpoint of rob: delete it to start afresh"
    whole = is_whole_archive(path)
    if whole is None:  # torch.load would try the format of old versions, which we never wrote
        raise FailureError(unreadable)
    if not whole:
        raise FailureError(f"{path} is damaged, a checksum in it does not match: delete it to start afresh")
    try:
        payload = torch.load(path, map_location=device, weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise FailureError(unreadable) from error
    if not isinstance(payload, dict) or not {"format_version", "config", "state"} <= payload.keys():
        raise FailureError(unreadable)
    if not isinstance(payload["state"], dict) or not isinstance(payload["config"], dict):
        raise FailureError(unreadable)
    if payload["format_version"] != FORMAT_VERSION:
        raise MisuseError(
            f"{path} has checkpoint format {payload['format_version']}, this version of rob reads {FORMAT_VERSION}"
        )
    return payload


def is_whole_archive(path: Path) -> bool | None:
    """Whether all parts of a file that ``torch.save`` wrote have their checksums; None: it is no such file."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > os.fstat(file.fileno()).st_size:
                return None  # torch compresses nothing
            return archive.testzip() is None
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return None


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, in a form a checkpoint can hold."""
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), *rest),  # pyright: ignore
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what ``random_state`` returned. CUDA's is skipped where the number of devices is another."""
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])


# ==== weights ====


def export_weights(backbone: nn.Module, info: StudentInfo, path: Path) -> None:
    """Write the backbone as safetensors, with ``info`` in the metadata; ``students.py`` says how timm alone loads it. Of a
    network that is not timm's the whole, by its own names.

    FailureError as ``save_checkpoint``.
    """
    tensors = apart(whole_of(backbone).state_dict())
    for_timm = {"timm_name": info.name, "timm_kwargs": json.dumps(dict(info.timm_kwargs), sort_keys=True)}
    metadata = {
        "format": "pt",
        "student": json.dumps(info.to_dict(), sort_keys=True),
        **({} if info.is_own else for_timm),
        "rob_version": versions("rob")["rob"],
    }
    with replacing(path) as file:
        file.write(tensor_file(tensors, metadata))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with a memory of its own, as safetensors wants them: some networks have one tensor under two names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        found[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return found


def load_student(
    run_or_weights: Path | str,
    device: torch.device | str = "cpu",
    student: str | Callable[[], nn.Module] | nn.Module | None = None,
) -> tuple[nn.Module, StudentInfo]:
    """The trained student of a run folder or of a weights file, in eval mode, and its description.

    ``student`` builds a network of the user's own code: nothing is imported because a file names it. MisuseError: nothing
    there, a file rob did not write, a damaged one, or tensors that are not the described student's.
    """
    if student is not None:
        name_factory(student)
    tensors, info, path = read_student(Path(run_or_weights))
    try:
        backbone = create_student(info)
    except MisuseError as problem:
        raise MisuseError(f"{path}: {problem}") if info.is_own else problem from None
    try:
        whole_of(backbone).load_state_dict(tensors)
    except RuntimeError as error:
        raise MisuseError(f"the tensors of {path} are not those of the student {info.name!r} it names") from error
    return backbone.to(device).eval(), info


def hash_student(run_or_weights: Path) -> str:
    """What ``hash_weights`` says of ``load_student``'s network, whose code need not be there. MisuseError as ``load_student``."""
    tensors, info, _ = read_student(run_or_weights)
    return hash_weights({f"model.{name}" if info.is_own else name: tensor for name, tensor in tensors.items()})


def read_student(run_or_weights: Path) -> tuple[dict[str, Tensor], StudentInfo, Path]:
    """The tensors by their names in the file, the description, and the file. MisuseError as ``load_student``."""
    path = run_or_weights / WEIGHTS_NAME if run_or_weights.is_dir() else run_or_weights
    if not path.exists():
        expected = f"no {WEIGHTS_NAME} in {run_or_weights}" if run_or_weights.is_dir() else f"{path}: no such file"
        raise MisuseError(f"{expected}: give a finished run's folder or a weights file")
    if path.suffix == ".beton":
        raise MisuseError(f"{path}: packed images, in the place of a finished run's folder or a weights file")
    try:
        tensors, metadata = read_tensor_file(path)
    except NoChecksumError as problem:
        raise MisuseError(
            f"{path} {problem}; give weights written by rob train-student: run it again in the same folder, and from its "
            "checkpoint it writes them anew"
        ) from None
    except DamagedError as problem:
        raise MisuseError(
            f"{path} {problem}: copy it again, or run rob train-student again in its folder, which writes it anew"
        ) from None
    except OSError as error:
        raise MisuseError(
            f"{path} cannot be read ({error.strerror}): give a finished run's folder or a weights file"
        ) from None
    info = described_in(metadata, path)
    if info is None:
        raise MisuseError(f"{path} does not say which student it holds: give weights written by rob train-student")
    return tensors, info, path


# ==== configurations ====


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as it would come back from a JSON file: tuples are lists, paths are strings."""
    return json.loads(json.dumps(config, default=str))
