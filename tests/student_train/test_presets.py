"""``--preset``: its values are options, an option that is given beats it, and a store keeps its own views."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from rob.cli import app
from rob.common.errors import MisuseError
from rob.common.views.recipes import get_recipe
from rob.student_train.presets import PRESETS, get_preset
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint

SMALL = ("--student", "test_resnet", "--image-size", 32, "--hidden-dim", 16, "--batch-size", 8, "--epochs", 4)
SMALL = (*SMALL, "--warmup-epochs", 0, "--loader", "torch", "--workers", 1, "--device", "cpu")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_options_and_values_that_train_student_takes(name, tmp_path):
    known = {parameter.name for parameter in typer.main.get_command(app).commands["train-student"].params}
    assert PRESETS[name].options().keys() - known == set()
    assert "recipe" in PRESETS[name].options()
    arguments = ["train-student", "nowhere.beton", "--out", str(tmp_path / "run"), "--preset", name]
    outcome = CliRunner().invoke(app, arguments + (["--targets", "t.zarr"] if PRESETS[name].momentum is None else []))
    assert isinstance(outcome.exception, MisuseError), outcome.output  # and so all values could be read
    assert "nowhere.beton" in str(outcome.exception)
    for option in PRESETS[name].options():
        assert f"--{option.replace('_', '-')} " in outcome.output


def test_sslight_changes_the_views_and_their_weight_and_nothing_else():
    # The recipe dino has the scales of the ViTs' baseline; those of the CNNs' are options.
    areas = {"global_scale", "local_scale"}
    for ours, usual, scales in (
        ("sslight-cnn", "dino-cnn", areas),
        ("sslight-vit", "dino-vit", set()),
        ("sslight-swav-cnn", "swav-cnn", {"interpolation"}),  # of its baseline, whose scales the recipe swav has
        ("sslight-moco-cnn", "moco-cnn", areas),
    ):
        ours, usual = PRESETS[ours].options(), PRESETS[usual].options()
        changed = {name for name in ours.keys() | usual.keys() if ours.get(name) != usual.get(name)}
        assert changed == {"recipe", "global_weight"} | scales


def test_what_papers_set_beside_the_usual_options():
    """DINO's limit for each gradient, DisCo's copy, MoCo's shuffled keys, MSN's dropped patches, its warm-up and its head's
    BatchNorm, SGD's decay of all."""
    assert {name for name, preset in PRESETS.items() if preset.with_copy} == {"disco"}
    assert {name for name, preset in PRESETS.items() if preset.clip_each} == {"dino"}
    assert PRESETS["moco-v2"].momentum.split_batchnorm == 8
    assert PRESETS["msn-vit"].student.patch_drop == 0.15
    assert PRESETS["msn-vit"].objective.norm_by_size
    others = {name: preset for name, preset in PRESETS.items() if not name.startswith("rob-")}
    rising = {name: lr for name, preset in others.items() if (lr := preset.optimiser.warmup_lr)}
    assert rising == {"msn-vit": 2e-4, "swav-cnn": 0.075, "sslight-swav-cnn": 0.075}
    all_decay = {name for name, preset in others.items() if preset.optimiser.decay_all}
    assert all_decay == {name for name, preset in others.items() if preset.optimiser.name == "sgd"}
    assert {PRESETS[name].drawn().interpolation for name in ("swav-cnn", "dino-cnn", "sslight-vit")} == {"bicubic"}
    assert {get_recipe(name).interpolation for name in ("swav", "msn", "moco-v2", "rob-swav")} == {"bilinear"}


def test_names_are_whole_in_a_narrow_terminal(tmp_path):
    arguments = ["train-student", "nowhere.beton", "--out", str(tmp_path / "run"), "--preset", "dino-vit"]
    outcome = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*arguments, "--objective", "swav"])
    assert "--warmup-teacher-temp-epochs " in outcome.output


def test_an_unknown_preset_offers_the_nearest():
    with pytest.raises(MisuseError, match="unknown preset 'sslite-cnn': did you mean sslight-cnn"):
        get_preset("sslite-cnn")


@pytest.fixture
def train(tmp_path) -> Callable[..., tuple[dict[str, Any], str]]:
    """``train(*options)``: the configuration of a tiny run, and what it printed."""
    data = tiny_beton(tmp_path, 16).path

    def run(*options: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        outcome = CliRunner().invoke(app, [*map(str, ("train-student", data, "--out", out, *SMALL, *options))])
        if outcome.exception and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        assert outcome.exit_code == 0, outcome.output
        return json.loads((out / "config.json").read_text()), " ".join(outcome.output.split())

    return run


def test_what_is_given_beats_the_preset_which_beats_the_defaults(train):
    config, text = train("--preset", "sslight-cnn", "--prototypes", 12, "--copy-momentum", 0.9, "--lr", 0.1)
    assert config["objective"]["name"] == "dino"
    assert config["branch"]["kind"] == "momentum"
    assert (config["branch"]["prototypes"], config["branch"]["copy_momentum"]) == (12, 0.9)
    assert config["branch"]["warmup_teacher_temp_epochs"] == 50
    optimiser = config["optimiser"]
    assert (optimiser["name"], optimiser["lr"], optimiser["weight_decay"]) == ("lars", 0.1, 1e-6)
    assert (optimiser["min_lr"], config["clip_grad"], config["freeze_prototypes"]) == (0.0048, 0.0, 1)
    assert (config["pairing"]["global_weight"], config["pairing"]["num_local"]) == (0.4, 6)
    assert config["recipe"]["name"] == "sslight"
    assert "--lr │ 0.48 │ given: 0.1 x 8/256 = 0.003125" in text
    assert "--prototypes │ 4096 │ given: 12" in text
    assert "--global-weight │ 0.4 │ │" in text


def test_an_option_beats_the_preset_on_either_side_of_it(train):
    for options in (("--num-local", 1, "--preset", "moco-v2"), ("--preset", "moco-v2", "--num-local", 1)):
        # moco-v2's crops are global alone: dino's are asked for with them
        config, _ = train(*options, "--recipe", "dino")
        assert config["pairing"]["num_local"] == 1
        assert config["optimiser"]["name"] == "sgd"


def test_what_a_preset_sets_for_its_objective_or_its_limit_goes_with_them(tmp_path):
    arguments = ["train-student", "nowhere.beton", "--out", str(tmp_path / "run"), "--preset"]
    for words, gone in (
        (["moco-v2", "--objective", "dino"], ("--step-targets │ 1 │ not used", "--fresh │ yes │ not used")),
        (["dino", "--clip-grad", "0"], ("--clip-each │ yes │ not used",)),
    ):
        outcome = CliRunner().invoke(app, [*arguments, *words])
        assert "nowhere.beton" in str(outcome.exception)
        assert all(text in " ".join(outcome.output.split()) for text in gone), outcome.output


def test_a_warm_up_as_long_as_the_run_gives_way_to_a_tenth_of_it(tmp_path):
    arguments = ["train-student", "nowhere.beton", "--out", str(tmp_path / "run"), "--preset", "msn-vit"]
    for epochs, told in (("15", "15 │ not used"), ("16", "15 │ │")):
        output = CliRunner().invoke(app, [*arguments, "--epochs", epochs]).output
        assert f"--warmup-epochs │ {told}" in " ".join(output.split())


def test_another_recipe_is_not_changed_by_the_presets_scales(train):
    config, text = train("--preset", "dino-cnn", "--recipe", "sslight", "--prototypes", 12, "--num-local", 1)
    assert config["recipe"] == json.loads(json.dumps(get_recipe("sslight").to_dict()))
    assert config["pairing"]["global_weight"] == 0.4
    assert "--global-scale │ 0.14 1 │ not used: recipe sslight has" in text
    usual, _ = train("--preset", "sslight-cnn", "--recipe", "dino", "--prototypes", 12, "--num-local", 1)
    assert usual["pairing"]["global_weight"] is None


def test_a_store_keeps_its_views_and_gets_the_presets_local_crops(train, tmp_path):
    data = tiny_beton(tmp_path, 16)
    teacher = tiny_teacher_checkpoint(tmp_path, prototypes=12)
    store = tiny_store(tmp_path / "targets.zarr", data, teacher, recipe=get_recipe("dino"))
    config, text = train("--preset", "sslight-cnn", "--targets", store.path)
    assert config["branch"]["kind"] == "cached"
    dino, sslight = (json.loads(json.dumps(get_recipe(name).to_dict())) for name in ("dino", "sslight"))
    assert config["recipe"]["global_crops"] == dino["global_crops"]
    assert config["recipe"]["local_crop"] == sslight["local_crop"]
    assert (config["pairing"]["num_local"], config["pairing"]["global_weight"]) == (6, 0.4)
    assert (
        "was cached with recipe dino (global crops of 0.25 to 1 of the image) and the preset has recipe sslight" in text
    )
    for row in ("--prototypes │ 4096", "--copy-momentum │ 0.996", "--warmup-teacher-temp-epochs │ 50"):
        assert f"{row} │ not used: there is no copy" in text
    assert "--recipe │ sslight │ not used: the store has its own" in text
    assert text.count("not used") == 4

    ours = tiny_store(tmp_path / "ours.zarr", data, teacher, recipe=get_recipe("sslight"))
    config, _ = train("--preset", "dino-cnn", "--targets", ours.path)
    assert config["pairing"]["global_weight"] is None
    assert config["recipe"]["local_crop"]["size"] == 96

    config, text = train("--preset", "dino-vit", "--targets", store.path, "--local-scale", 0.1, 0.2)
    assert config["recipe"]["local_crop"] == dino["local_crop"] | {"scale": [0.1, 0.2]}
    assert "was cached with" not in text

    for option, value in (("--global-scale", (0.5, 1)), ("--colour", (0.5,)), ("--solarise", (0,))):
        message = f"{option} is for --targets online or momentum; the store .*targets.zarr has targets of its own views"
        with pytest.raises(MisuseError, match=message):
            train("--targets", store.path, option, *value)


def test_another_objective_leaves_out_what_it_does_not_read_of_the_preset(train, tmp_path):
    swav, text = train("--preset", "dino-cnn", "--objective", "swav", "--prototypes", 12, "--epochs", 1)
    assert (swav["objective"]["name"], swav["branch"]["copy_momentum"]) == ("swav", None)
    assert swav["branch"]["warmup_teacher_temp_epochs"] == 0
    assert "--copy-momentum │ 0.996 │ not used: swav does not read it" in text
    assert "--warmup-teacher-temp-epochs │ 50 │ not used: swav does not read it" in text
    assert text.count("not used") == 2

    moco, text = train("--preset", "dino-cnn", "--objective", "moco", "--epochs", 1)
    assert (moco["objective"]["name"], moco["branch"]["prototypes"], moco["freeze_prototypes"]) == ("moco", 0, 0)
    assert moco["branch"]["copy_momentum"] == 0.996  # what it can read is the preset's
    assert "--prototypes │ 4096 │ not used: moco does not read it" in text

    teacher = tiny_teacher_checkpoint(tmp_path, prototypes=12)
    store = tiny_store(tmp_path / "targets.zarr", tiny_beton(tmp_path, 16), teacher)
    same, text = train("--preset", "sslight-cnn", "--targets", store.path, "--objective", "embedding", "--epochs", 1)
    assert (same["pairing"]["num_local"], same["pairing"]["global_weight"]) == (0, None)
    assert "--num-local │ 6 │ not used: there are no local crops" in text
    assert "--global-weight │ 0.4 │ not used: there are no local crops" in text
    train("--preset", "dino-cnn", "--recipe", "moco-v2", "--prototypes", 12, "--epochs", 1)

    # what is typed is refused as ever
    with pytest.raises(MisuseError, match="--copy-momentum: --objective swav makes its targets without a copy"):
        train("--preset", "dino-cnn", "--objective", "swav", "--copy-momentum", 0.996)
    with pytest.raises(MisuseError, match="--prototypes is for --targets momentum; a teacher has its own"):
        train("--preset", "dino-cnn", "--targets", store.path, "--prototypes", 4096)


@pytest.mark.parametrize(("name", "learned"), [("sslight-cnn", False), ("dino-vit", True), ("sslight-vit", True)])
def test_dinos_vits_learn_the_length_of_a_prototype(train, tmp_path, name, learned):
    train("--preset", name, "--prototypes", 12, "--num-local", 1, "--epochs", 2, "--lr", 0.1, "--copy-momentum", 0.5)
    state = torch.load(tmp_path / "run0" / "checkpoint.pt", weights_only=True)["state"]
    for branch in ("model", "momentum"):  # the copy follows the student
        lengths = state[branch]["objective.prototypes.weight_g"]
        assert torch.equal(lengths, torch.ones(12, 1)) != learned
    for objective in ("msn", "moco"):
        with pytest.raises(MisuseError, match=f"--norm-last-layer means nothing to --objective {objective}: it is for"):
            train("--targets", "momentum", "--objective", objective, "--no-norm-last-layer")


def test_a_view_is_changed_by_its_options(train):
    momentum = ("--targets", "momentum", "--objective", "moco")
    config, _ = train(*momentum, "--recipe", "sslight", "--local-scale", 0.1, 0.2, "--num-local", 1, "--flip", 0)
    assert config["recipe"]["local_crop"]["scale"] == [0.1, 0.2]
    assert config["recipe"]["local_crop"]["flip"] == 0
    assert [crop["scale"] for crop in config["recipe"]["global_crops"]] == [[0.3, 1.0]] * 2
    with pytest.raises(MisuseError, match="--local-scale: recipe moco-v2 has no local crops"):
        train(*momentum, "--recipe", "moco-v2", "--local-scale", 0.1, 0.2)
    with pytest.raises(MisuseError, match="--copy-momentum: --objective swav makes its targets without a copy"):
        train("--targets", "momentum", "--objective", "swav", "--copy-momentum", 0.9)
    with pytest.raises(MisuseError, match="--warmup-teacher-temp-epochs: --objective moco has no warm-up"):
        train(*momentum, "--warmup-teacher-temp-epochs", 2)


def test_the_help_names_every_preset():
    text = re.sub(r"\s", "", CliRunner().invoke(app, ["train-student", "--help"]).output)
    for name in PRESETS:
        assert re.search(rf"[:,]{name}[,.]", text), name
