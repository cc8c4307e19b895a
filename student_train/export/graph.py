"""What is written, whatever the format: the network behind its input, and torch.export's program of it."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ...common.errors import FailureError, MisuseError, first_line
from ...common.exported import StudentInfo
from .input_form import WithInput

Runner = Callable[[np.ndarray], np.ndarray]
"""Images in the file's input form to features (N, D) float32."""


@dataclass(frozen=True)
class Graph:
    """What is written: the network in eval mode with its input, and what the file says of itself."""

    network: WithInput
    info: StudentInfo
    opset: int
    facts: Mapping[str, str]
    output: str = "features"
    """The name of what comes out: features, or logits of ``classes``."""
    classes: tuple[str, ...] | None = None
    crop: float | None = None
    """As ``Subject.crop``."""

    @property
    def example(self) -> Tensor:
        """Two images: of one torch.export would take the batch for constant."""
        return self.network.prepare(torch.zeros(2, self.network.size, self.network.size, 3, dtype=torch.uint8))

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """torch.export's, of any number of images."""
        with quiet():
            return torch.export.export(
                self.network, (self.example,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}
            )

    def of_one_image(self) -> torch.export.ExportedProgram:
        """The same of exactly one image, as devices run it."""
        with quiet():
            return torch.export.export(self.network, (self.example[:1],))


@contextmanager
def quiet() -> Iterator[None]:
    """Converters talk of their own affairs: nothing below an error is heard."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def in_a_sentence(network: str, file: str, runtime: str) -> Iterator[None]:
    """FailureError: what a converter says in its own words, which are many, and of its own classes."""
    try:
        yield
    except (MisuseError, FailureError, MemoryError):
        raise
    except OSError as error:
        raise FailureError(f"cannot write {file}: {error.strerror or error}") from error
    except Exception as error:
        raise FailureError(f"{network} does not become {file} by {runtime}: {first_line(error)}") from error


def run_module(module: nn.Module) -> Runner:
    """A module in eval mode, on one thread."""

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return module(torch.from_numpy(images)).numpy()
        finally:
            torch.set_num_threads(threads)

    return run
