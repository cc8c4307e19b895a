"""A setting is described once: its check, its option and its name in an error follow."""

from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from typer.testing import CliRunner

from rob.common.config import Seed
from rob.common.errors import MisuseError, unknown_name
from rob.common.options import command, given, spelled
from rob.common.settings import Setting, check, described


@dataclass(frozen=True)
class Inner:
    backend: Annotated[str, Setting("Which.", choices=("fast", "plain"), option="--engine")] = "fast"
    size: Annotated[int, Setting("Inner size.", low=1)] = 64

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Outer:
    epochs: Annotated[int, Setting("Passes.", low=1, high=9)]
    rates: Annotated[tuple[float, ...], Setting("Several.", low=0)] = (0.5, 1.0)
    share: Annotated[float | None, Setting("A part.", low=0, high=1)] = None
    kept: Annotated[bool, Setting("Keep it.", option="--keep/--drop")] = True
    not_a_setting: str = "as it is"
    inner: Annotated[Inner, {"size": Setting("Outer words.", low=2)}] = field(default_factory=lambda: Inner(size=8))

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "`epochs` is 0, expected at least 1"),
        ({"epochs": 10}, "`epochs` is 10, expected at most 9"),
        ({"epochs": 1, "rates": (0.1, -1)}, "`rates` is -1, expected at least 0"),
        ({"epochs": 1, "share": nan}, "`share` is nan"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_the_fields_name(values, message):
    with pytest.raises(MisuseError, match=message):
        Outer(**values)


def test_an_unknown_choice_offers_the_nearest():
    with pytest.raises(MisuseError, match=r"unknown engine 'fats': did you mean fast\?"):
        Inner("fats")


def run(function, *words: str):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command(function))
    return CliRunner().invoke(app, [*words], catch_exceptions=True)


def test_options_become_the_configuration():
    seen = []

    def train(config: Outer) -> None:
        """Help."""
        seen.append(config)

    assert run(train, "--epochs", "3").exit_code == 0
    assert seen == [Outer(3)]  # the inner defaults are the outer field's
    words = (
        "--epochs",
        "2",
        "--rates",
        "1",
        "--rates",
        "2",
        "--share",
        "0.5",
        "--drop",
        "--engine",
        "plain",
        "--size",
        "4",
    )
    assert run(train, *words).exit_code == 0
    assert seen[1:] == [Outer(2, (1.0, 2.0), 0.5, False, inner=Inner("plain", 4))]


def test_what_a_command_completes_what_it_leaves_out_and_what_it_is_handed():
    seen = []

    def train(
        context: typer.Context,
        config: partial[Outer],
        inner: Annotated[Inner, {"size": None}],
        add: int,
        more: Annotated[tuple[int, ...], Setting("Own.")] = (7,),
    ) -> None:
        seen.extend([config(not_a_setting="set"), inner.size, add, more, given(context)])

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command(train, add=5))
    assert CliRunner().invoke(app, ["--epochs", "3", "--size", "9"]).exit_code == 0
    assert seen == [Outer(3, not_a_setting="set", inner=Inner(size=9)), 64, 5, (7,), {"epochs", "size"}]


def test_the_help_has_range_default_and_words():
    def train(config: Outer) -> None: ...

    text = " ".join(run(train, "--help").output.split())
    for expected in ("1<=x<=9; required", "Outer words. [default: 8; x>=2]", "--keep / --drop", "--engine", "Which."):
        assert expected in text
    assert "not-a-setting" not in text


def test_errors_name_the_option_on_the_command_line_and_the_field_in_python():
    def train(config: Outer) -> None:
        raise MisuseError("`backend` fast needs `size` 2, not `this_one`: see `a b`")

    outcome = run(train, "--epochs", "1")
    assert str(outcome.exception) == "--engine fast needs --size 2, not `this_one`: see `a b`"
    assert spelled("`backend`") == "--engine"


def test_errors_name_an_argument_as_the_command_does():
    """Though another command has an option of this name."""

    def train(out: Annotated[Path, Setting("Where to.")] = Path("x")) -> None: ...

    def save(
        out: Annotated[Path, Setting("Where to.", argument="OUT.npy")],
        size: Annotated[int, Setting("Side.", low=1)] = 3,
    ) -> None:
        raise MisuseError(f"`out` {out}: it is for `size` {size}")

    run(train)
    assert str(run(save, "a.npy").exception) == "OUT.npy a.npy: it is for --size 3"
    assert spelled("`out`") == "--out"


def test_every_setting_is_found_with_its_default():
    found = {what.name: what.default for what in described(Outer, Outer(4))}
    assert found == {"epochs": 4, "rates": (0.5, 1.0), "share": None, "keep": True, "engine": "fast", "size": 8}


def test_an_unknown_name_offers_the_near_ones_or_all():
    near = unknown_name("protocol", "usaul", ("usual", "msn"))
    assert str(near) == "unknown protocol 'usaul': did you mean usual? (known: msn, usual)"
    teachers = [f"efficientnet_lite{n}" for n in range(5)]
    assert "did you mean efficientnet_lite0 or" in str(
        unknown_name("teacher", "EfficientNet-lite", teachers, teachers[:1])
    )
    assert "did you mean swav_resnet50?" in str(unknown_name("teacher", "swav", [*teachers, "swav_resnet50"]))
    assert str(unknown_name("protocol", "foo", ("usual", "msn"))) == "unknown protocol 'foo' (known: msn, usual)"


def test_a_seed_fits_every_generator():
    """2^70 was a traceback in some commands."""

    @dataclass(frozen=True)
    class Seeded:
        seed: Seed = 0

    check(Seeded(2**40))
    with pytest.raises(MisuseError, match="`seed` is 1180591620717411303424, expected at most"):
        check(Seeded(2**70))
    torch.manual_seed(2**40 * 1_000_003 + 10_000)  # what evaluations make of it
