"""Runs on a GPU: with each kind of targets, whichever loader makes the views."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is a Linux package")
pytest.importorskip("rob.common.views.decode", reason="ffcv is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and pytest -m gpu", allow_module_level=True)

from rob.common.views.loader import LoaderConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.momentum import Momentum
from rob.student_train.train import train_student
from support.tiny import tiny_store
from support.training import curve, online

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["gpu", "ffcv"])
def test_each_kind_of_targets(config, data, teacher, tmp_path, backend):
    loader = LoaderConfig(backend, batch_size=8, workers=1)
    store = tiny_store(tmp_path / "targets.zarr", data, teacher, loader=loader, device="cuda")
    dino = replace(config.objective, name="dino")
    on_gpu = replace(config, objective=dino, pairing=None, device="cuda", precision="fp32", loader=loader, epochs=2)
    losses = {}
    kinds = {"cached": Cached(store.path), "online": online(teacher, store), "momentum": Momentum(prototypes=16)}
    for name, targets in kinds.items():
        train_student(replace(on_gpu, out=tmp_path / name, targets=targets))
        losses[name] = torch.tensor(curve(tmp_path / name))[:, 2]
    assert all(loss.isfinite().all() for loss in losses.values())
    torch.testing.assert_close(losses["online"], losses["cached"], rtol=2e-2, atol=0)
