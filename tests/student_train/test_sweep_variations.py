"""What ``rob sweep`` may vary: options with their values, and flags."""

from pathlib import Path

import pytest
import typer

from rob.cli import app
from rob.common.errors import MisuseError
from rob.student_train.commands.sweep import options_of, training_flags
from rob.student_train.sweep import (
    SweepConfig,
    Variation,
)

SIZES, SCALES = Variation.parse("local-size=16,24"), Variation.parse("--local-scale=0.05 0.14, 0.05 0.3")
OPTIONS = options_of(typer.main.get_group(app).commands["train-student"].params)


@pytest.mark.parametrize(
    ("words", "stores"),
    [
        (("--targets", "a.zarr"), ["a.zarr"]),
        (("--targets=a.zarr",), ["a.zarr"]),
        (("--targets", "a.zarr", "--targets", "b.zarr"), ["a.zarr", "b.zarr"]),
        (("--targets", "momentum"), []),
        (("--targets=online",), []),
        ((), []),
    ],
)
def test_the_stores_of_a_run(tmp_path, words, stores):
    config = SweepConfig(tmp_path, ("data.beton", *words), (SIZES,))
    assert config.stores(("16",)) == [Path(store) for store in stores]
    varied = SweepConfig(tmp_path, ("data.beton",), (Variation.parse("targets=a.zarr,online"),))
    assert [varied.stores(cell) for cell in varied.cells()] == [[Path("a.zarr")], []]


def test_a_network_of_the_users_own_is_named_to_the_command_that_measures_it(tmp_path):
    config = SweepConfig(tmp_path, ("data.beton",), (Variation.parse("student=mynets:small,resnet18"),))
    measured = [config.commands(cell)[1] for cell in config.cells()]
    assert [words[words.index("--student") + 1] if "--student" in words else None for words in measured] == [
        "mynets:small",
        None,
    ]


@pytest.mark.parametrize(
    ("arguments", "variations", "sentence"),
    [
        (("data.beton",), (), "nothing to sweep"),
        (("data.beton", "--local-size", "16"), (SIZES,), "both varied and fixed"),
        (("data.beton", "--local-size=16"), (SIZES,), "both varied and fixed"),
        (("data.beton", "--out", "x"), (SIZES,), "--out belongs to the sweep"),
        (("data.beton", "--out=x"), (SIZES,), "--out belongs to the sweep"),
        (("data.beton", "--plan-only"), (SIZES,), "--plan-only trains nothing"),
        (("data.beton", "--device", "cuda:1"), (SIZES,), "--device belongs to the sweep"),
        (("data.beton",), (Variation("device", ("cpu", "cuda")),), "--device belongs to the sweep"),
        (("--epochs", "2"), (SIZES,), "DATA.beton"),
        (("data.beton",), (SIZES, SIZES), "given twice"),
        (
            ("data.beton",),
            (Variation("lr", tuple(map(str, range(30)))), Variation("seed", tuple(map(str, range(30))))),
            "900",
        ),
    ],
)
def test_grids_that_cannot_be(tmp_path, arguments, variations, sentence):
    with pytest.raises(MisuseError, match=sentence):
        SweepConfig(tmp_path, arguments, variations)


@pytest.mark.parametrize("text", ["local-size", "local-size=", "=1,2", "a=1,,2", "a=1,1", "out=x,y"])
def test_variations_that_cannot_be(text):
    with pytest.raises(MisuseError, match="--vary"):
        Variation.parse(text)


def test_the_flags_of_training_are_found():
    flags = training_flags(OPTIONS)
    assert flags["head-norm"] == ("--head-norm", "--no-head-norm")
    assert flags["no-head-norm"] == ("--no-head-norm", "--head-norm")
    assert flags["replay"] == ("--replay", "--fresh")
    assert flags["only-consistency"] == ("--only-consistency", None)
    assert not {"local-size", "local-scale", "targets", "epochs"} & flags.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head-norm=yes,no", ["--head-norm", "--no-head-norm"]),
        ("no-head-norm=True,false", ["--no-head-norm", "--head-norm"]),
        ("--only-consistency=no,yes", ["", "--only-consistency"]),
    ],
)
def test_a_flag_takes_no_value(tmp_path, text, words):
    config = SweepConfig(tmp_path, ("data.beton",), (SIZES, Variation.parse(text, training_flags(OPTIONS))))
    assert [" ".join(config.varied(cell)) for cell in config.cells()] == [
        f"--local-size {size} {word}".strip() for size in (16, 24) for word in words
    ]
    assert [config.folder(cell).name.partition(",")[2] for cell in config.cells()[:2]] == [
        f"{text.partition('=')[0].removeprefix('--')}={value}" for value in config.variations[1].values
    ]
    assert set(config.variations[1].values) == {"yes", "no"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("head-norm=yes,maybe", "--head-norm is a flag, 'maybe' is neither yes nor no"),
        ("head-norm=1,0", "--head-norm is a flag, '1' is neither"),
        ("head-norm=yes,true", "names a value twice"),
    ],
)
def test_values_that_a_flag_cannot_have(text, sentence):
    with pytest.raises(MisuseError, match=sentence):
        Variation.parse(text, training_flags(OPTIONS))


def test_a_flag_is_one_option_under_both_its_names(tmp_path):
    head_norm, replay, fresh = (
        Variation.parse(f"{name}=yes,no", training_flags(OPTIONS)) for name in ("head-norm", "replay", "fresh")
    )
    with pytest.raises(MisuseError, match="--no-head-norm is both varied and fixed"):
        SweepConfig(tmp_path, ("data.beton", "--no-head-norm"), (head_norm,))
    with pytest.raises(MisuseError, match="--vary replay is given twice"):
        SweepConfig(tmp_path, ("data.beton",), (replay, fresh))
