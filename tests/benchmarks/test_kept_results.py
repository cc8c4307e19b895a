"""Benchmarks that go on where they stopped take no result of other settings for their own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rob.benchmarks import claims, momentum
from rob.benchmarks.claims_config import ClaimsConfig
from rob.benchmarks.kept import keep_settings
from rob.benchmarks.momentum import MomentumBenchConfig
from rob.common.errors import MisuseError
from support.tiny import tiny_beton


def test_settings_are_written_once_and_compared(tmp_path):
    out = tmp_path / "new" / "out"
    keep_settings(out, {"epochs": 2, "schedules": {"CNN": {"lr": 0.1}}, "sizes": (16, 32)})
    written = (out / "settings.json").read_bytes()
    assert json.loads(written) == {"epochs": 2, "schedules": {"CNN": {"lr": 0.1}}, "sizes": [16, 32]}
    keep_settings(out, {"epochs": 2, "schedules": {"CNN": {"lr": 0.1}}, "sizes": (16, 32)})
    for other, sentence in (
        ({"epochs": 3, "schedules": {"CNN": {"lr": 0.1}}, "sizes": (16, 32)}, "epochs = 2, this run has epochs = 3: "),
        ({"epochs": 2, "schedules": {"CNN": {"lr": 0.2}}, "sizes": (16, 32)}, r"schedules.CNN.lr = 0.1, .* = 0.2: "),
        ({"epochs": 2, "schedules": {"CNN": {"lr": 0.1}}}, r"sizes = \[16, 32\], this run has sizes = None"),
    ):
        with pytest.raises(MisuseError, match=f"out has results with {sentence}.*another OUT"):
            keep_settings(out, other)
    assert (out / "settings.json").read_bytes() == written


def test_results_from_before_the_file_are_taken_over(tmp_path):
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "result.json").write_text("{}")
    keep_settings(tmp_path, {"epochs": 2})
    with pytest.raises(MisuseError, match="epochs = 2"):
        keep_settings(tmp_path, {"epochs": 3})


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    return tiny_beton(folder, 4).path, tiny_beton(folder, 4, seed=1).path


@pytest.mark.parametrize(
    ("benchmark", "config", "changes"),
    [
        (claims, ClaimsConfig, {"epochs": 1, "views": 2, "prototypes": 64, "teacher_size": 32}),
        (
            momentum,
            MomentumBenchConfig,
            {"epochs": 1, "image_size": 16, "num_local": 2, "views": 2, "teacher_size": 32},
        ),
    ],
    ids=["claims", "momentum"],
)
def test_another_setting_or_data_set_is_refused(tmp_path, images, monkeypatch, benchmark, config, changes):
    class Begun(Exception):
        pass

    def begin(*arguments: Any) -> None:
        raise Begun

    for name in ("prepare", "top1", "measured"):  # whichever comes first
        monkeypatch.setattr(benchmark, name, begin, raising=False)
    train, test = images
    first = config(train, test, tmp_path, device="cpu")
    for same in (first, replace(first, students=("test_vit",), seeds=(5,))):
        with pytest.raises(Begun):
            benchmark.run(same)
    for name, value in {**changes, "train": test, "test": train}.items():
        with pytest.raises(MisuseError, match=rf"has results with {name} = .*, this run has {name} = .*another OUT"):
            benchmark.run(replace(first, **{name: value}))
