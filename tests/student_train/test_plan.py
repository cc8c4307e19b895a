"""The plan of a run: what is left open is chosen for images and machine, what is given stays, what will not work is said."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rob.common.errors import MisuseError
from rob.common.views.loader import LoaderConfig
from rob.student_train import plan as plan_module
from rob.student_train import plan_warnings
from rob.student_train import planner as planner_module
from rob.student_train import trial as trial_module
from rob.student_train.config import PUBLISHED_LR, ObjectiveConfig, OptimiserConfig, PairingChoice
from rob.student_train.plan import make_plan, opened
from rob.student_train.plan_warnings import LEAST_STEPS, LEAST_STEPS_VIT
from rob.student_train.students import StudentConfig
from rob.student_train.targets.momentum import Momentum
from rob.student_train.targets.with_copy import WithCopy
from rob.student_train.train import train_student
from rob.student_train.train_config import LoaderByPlan, TrainConfig, seconds_of
from rob.student_train.trial import Trial, try_steps
from support.tiny import tiny_beton
from support.training import CPU


@pytest.fixture
def open_config(config) -> TrainConfig:
    """With everything left open that may be."""
    return replace(
        config, epochs=None, optimiser=OptimiserConfig(), pairing=None, loader=LoaderByPlan("torch", 256, 1)
    )  # fmt: skip


@pytest.fixture
def steps_take(monkeypatch):
    """``steps_take(seconds, small=...)``: without trying any, of 24 images; one of the form for small images takes ``small``."""

    def take(seconds: float, small: float | None = None, memory: int = 1 << 20) -> None:
        def tried(config, run, _, tuned=False, saving=None):
            is_small = config.student.small_images and small is not None
            return Trial((small if is_small else seconds) * config.loader.batch_size / 24, memory, 1000)

        monkeypatch.setattr(planner_module, "try_steps", tried)
        monkeypatch.setattr(plan_module, "WORTH_MEASURING", 1)

    return take


def chosen(plan) -> dict:
    return {choice.setting: choice.value for choice in plan.choices}


def test_a_run_with_epochs_and_batch_is_as_published(config):
    plan = make_plan(replace(config, optimiser=OptimiserConfig()))
    assert chosen(plan) == {"small_images": True}
    assert plan.config.optimiser.peak == plan.config.optimiser.lr == PUBLISHED_LR
    assert (plan.config.epochs, plan.config.loader, plan.steps) == (config.epochs, config.loader, 12)


def test_what_is_open_is_chosen_and_what_is_given_stays(open_config, steps_take):
    steps_take(0.01)
    plan = make_plan(open_config)
    assert chosen(plan).keys() == {"batch_size", "lr", "small_images", "epochs", "warmup_epochs"}
    assert plan.steps >= LEAST_STEPS
    assert plan.config.loader.batch_size <= plan.num_images == 24
    given = replace(
        open_config,
        epochs=7,
        optimiser=OptimiserConfig(lr=0.1),
        student=replace(open_config.student, small_images=False),
        pairing=PairingChoice(num_local=3, pairing="cross"),
    )
    kept = make_plan(given)
    assert chosen(kept).keys() == {"batch_size"}
    assert (kept.config.epochs, kept.config.optimiser.lr, kept.config.pairing.num_local) == (7, 0.1, 3)
    assert make_plan(replace(open_config, loader=LoaderConfig("torch", 12, 1))).config.loader.batch_size == 12


def test_a_small_batch_keeps_its_rate_and_a_cpu_makes_no_local_crops(open_config, steps_take):
    steps_take(0.01)
    plan = make_plan(replace(open_config, pairing=PairingChoice(pairing="cross"), loader=LoaderConfig("torch", 8, 1)))
    assert chosen(plan)["num_local"] == 0
    assert plan.config.optimiser.peak * 8 / 256 >= 5e-4


@pytest.mark.parametrize(("name", "rate"), [("mobilenetv2_050", 5e-3), ("test_resnet", 2e-3), ("test_vit", 4e-3)])
def test_a_short_run_has_the_rate_of_its_family(open_config, steps_take, name, rate):
    steps_take(0.01)
    optimiser = make_plan(replace(open_config, student=StudentConfig(name, 32))).config.optimiser
    assert optimiser.peak * 24 / 256 == pytest.approx(rate, 1e-3)


def test_a_large_batch_of_a_vit_has_no_higher_rate(open_config, steps_take, monkeypatch):
    steps_take(0.01)
    monkeypatch.setattr(planner_module, "CPU_BATCH", 16)
    loader = LoaderConfig("torch", 24, 1)
    plan = make_plan(replace(open_config, student=StudentConfig("test_vit", 32), loader=loader))
    assert plan.config.student.conv_stem
    assert plan.config.optimiser.peak * 24 / 256 == pytest.approx(1e-3, 1e-3)


@pytest.mark.parametrize(("budget", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("2 hours", 7200)])
def test_a_budget_is_filled_and_not_overrun(open_config, steps_take, budget, seconds):
    assert seconds_of(budget) == seconds
    steps_take(0.5)
    plan = make_plan(replace(open_config, budget=budget))
    assert 0.9 * seconds < plan.seconds <= seconds
    (warmup,) = (choice for choice in plan.choices if choice.setting == "warmup_epochs")
    is_short = warmup.value * plan.steps_per_epoch < 50
    assert warmup.reason.startswith("a quarter of the epochs" if is_short else "a tenth, but 50 steps")


def test_a_batch_is_halved_only_where_that_buys_steps(open_config, monkeypatch):
    """A small network takes nearly as long for 16 images as for 24: half of one step's time is not what the other takes."""
    for of_16, batch in ((0.9, 24), (0.6, 16)):
        monkeypatch.setattr(
            planner_module,
            "try_steps",
            lambda config, run, seconds, tuned=False, saving=None, of_16=of_16: Trial(
                of_16 if config.loader.batch_size == 16 else 1.0, 1, 1, waited=0.4
            ),
        )
        plan = make_plan(replace(open_config, budget="20m"))
        assert (plan.config.loader.batch_size, chosen(plan)["batch_size"]) == (batch, batch)
        assert "took 40% of the time of the steps" in plan.warnings[0]
        assert plan.trial.seconds == (of_16 if batch == 16 else 1.0)
        assert plan.config.optimiser.peak * batch / 256 == pytest.approx(2e-3, 1e-3)


@pytest.mark.parametrize(
    ("seconds_of", "batch"),
    [
        ({24: 10.0, 12: 6.0, 6: 4.0, 3: 2.9}, 6),  # 1.7 and 1.5 times as many steps, then 1.4 less a little
        ({24: 10.0, 12: 9.0, 6: 2.0, 3: 1.0}, 24),  # what a quarter would buy plays no part
        ({24: 1.0, 12: 0.2, 6: 0.1, 3: 0.05}, 12),  # then the steps are enough
    ],
)
def test_a_large_batch_is_halved_as_long_as_each_halving_buys_steps(open_config, monkeypatch, seconds_of, batch):
    monkeypatch.setattr(planner_module, "FEWEST", 3)
    monkeypatch.setattr(planner_module, "EFFORTS", {"minutes": planner_module.Effort(900, 4_000, 1, "")})
    tried = lambda config, run, _, tuned=False, saving=None: Trial(seconds_of[config.loader.batch_size], 1, 1)  # noqa: E731
    monkeypatch.setattr(planner_module, "try_steps", tried)
    plan = make_plan(open_config)
    assert (plan.config.loader.batch_size, chosen(plan)["batch_size"]) == (batch, batch)
    assert plan.trial.seconds == seconds_of[batch]
    assert plan.config.optimiser.peak * batch / 256 == pytest.approx(2e-3, 1e-3)
    if batch == 6:
        assert "2.5 times as many steps" in next(c.reason for c in plan.choices if c.setting == "batch_size")


def test_a_cpu_computes_in_bfloat16_where_that_buys_steps(open_config, monkeypatch):
    def steps_take(fp32: float, bf16: float, has: bool = True) -> None:
        def tried(config, run, _, tuned=False, saving=None):
            return Trial({"fp32": fp32, "bf16": bf16}[config.precision], 1, 1)

        monkeypatch.setattr(planner_module, "try_steps", tried)
        monkeypatch.setattr(planner_module, "has_bfloat16", lambda device: has)

    config = replace(open_config, precision="auto", budget="20m")
    for machine, precision in (
        ((1.0, 0.6), "bf16"),
        ((1.0, 0.9), "fp32"),  # within what a trial can tell
        ((0.1, 0.06), "fp32"),  # there is time enough
        ((1.0, 0.6, False), "fp32"),
    ):
        steps_take(*machine)
        plan = make_plan(config)
        assert (plan.config.precision, plan.trial.seconds) == (precision, machine[precision == "bf16"]), machine
        assert chosen(plan).get("precision", "fp32") == precision
    steps_take(1.0, 0.6)
    assert make_plan(replace(config, precision="fp32")).config.precision == "fp32"
    steps_take(100.0, 60.0)
    train_student(config)
    steps_take(100.0, 60.0, has=False)  # it goes on as it began
    assert make_plan(config).config.precision == "bf16"
    assert opened(config, CPU)[1].precision == "bf16"

    steps_take(1.0, 0.6)
    with_copy = WithCopy(config.targets)
    disco = replace(config, targets=with_copy, objective=ObjectiveConfig("disco"), out=config.out / "copy")
    assert make_plan(disco).config.precision == "fp32"


def test_one_view_of_an_image_where_that_buys_steps(open_config, monkeypatch):
    def steps_take(two: float, one: float) -> None:
        def tried(config, run, _, tuned=False, saving=None):
            return Trial({2: two, 1: one}[config.pairing.step_targets], 1, 1)

        monkeypatch.setattr(planner_module, "try_steps", tried)

    student = StudentConfig("mobilenetv3_small_050", 32)
    asked = replace(open_config, student=student, objective=ObjectiveConfig("embedding"), budget="20m")
    for seconds, views in (((1.0, 0.6), 1), ((1.0, 0.8), 2), ((0.1, 0.05), 1), ((0.05, 0.02), 2)):
        steps_take(*seconds)
        plan = make_plan(asked)
        assert (plan.config.pairing.step_targets, plan.trial.seconds) == (views, seconds[views == 1])
        assert chosen(plan).get("step_targets", 2) == views
    steps_take(1.0, 0.6)
    assert make_plan(replace(asked, student=StudentConfig("test_vit", 32))).config.pairing.step_targets == 1
    steps_take(1.0, 0.01)
    assert make_plan(replace(asked, budget=None, effort="minutes")).steps >= 20_000  # for as many views as in two
    steps_take(1.0, 0.6)
    for other in (
        replace(asked, pairing=PairingChoice(step_targets=2)),
        replace(asked, pairing=PairingChoice(num_local=2)),
        replace(asked, objective=ObjectiveConfig("dino")),  # whose views meet each other
    ):
        assert make_plan(other).config.pairing.step_targets == 2
    steps_take(100.0, 60.0)
    train_student(asked)
    steps_take(100.0, 99.0)  # it goes on as it began
    assert make_plan(asked).config.pairing.step_targets == 1


def test_a_gpu_tunes_the_last_of_the_trials_alone(open_config, monkeypatch):
    """Each of them has another batch or form, and cuDNN would try its algorithms for all of their shapes."""
    seen = []

    def tried(config, run, _, tuned=False, saving=None):
        seen.append((config.loader.batch_size, config.student.small_images, tuned))
        return Trial(1.0, 1, 1)

    monkeypatch.setattr(planner_module, "try_steps", tried)
    plan = make_plan(replace(open_config, budget="20m"))
    assert len(seen) > 2
    assert [tuned for *_, tuned in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1][:2] == (plan.config.loader.batch_size, plan.config.student.small_images)


def test_minutes_are_as_many_steps_as_a_vit_needs(open_config, steps_take):
    steps_take(0.001)
    assert LEAST_STEPS_VIT <= make_plan(replace(open_config, effort="minutes")).steps < LEAST_STEPS_VIT + 100


def test_effort_never_takes_fewer_steps_than_a_student_needs(open_config, steps_take):
    steps_take(10.0)
    assert LEAST_STEPS <= make_plan(open_config).steps < 2 * LEAST_STEPS
    assert make_plan(replace(open_config, budget="10m")).seconds <= 600


def test_a_budget_that_is_no_time_or_beside_epochs_is_refused(open_config):
    for budget in ("soon", "20", "20x", "0m"):
        with pytest.raises(MisuseError, match=r"`budget` is .*, expected a time such as 20m"):
            replace(open_config, budget=budget)
    with pytest.raises(MisuseError, match="`budget` and `epochs` both say how long"):
        replace(open_config, budget="20m", epochs=3)
    with pytest.raises(MisuseError, match="unknown effort 'hour': did you mean hours"):
        replace(open_config, effort="hour")


def test_fewer_images_than_a_step_takes(open_config, tmp_path):
    one = replace(open_config, data=tiny_beton(tmp_path, 1).path, targets=Momentum(), objective=ObjectiveConfig("dino"))
    for config, least in (
        (one, "2 of them at least"),
        (replace(one, accumulate=4), "4 of them at least and `accumulate` 4"),
    ):
        with pytest.raises(MisuseError, match=f"has 1 images, and a step takes {least}"):
            make_plan(config)


def test_a_stem_that_leaves_too_few_steps_is_given_up(open_config, steps_take):
    steps_take(0.1, small=0.2)
    assert chosen(make_plan(open_config))["small_images"] is True
    steps_take(0.1, small=5.0)
    plan = make_plan(open_config)
    assert chosen(plan)["small_images"] is False
    assert "50 times as many steps" in next(c.reason for c in plan.choices if c.setting == "small_images")


def test_a_small_vit_begins_with_convolutions(open_config, steps_take, tmp_path):
    steps_take(0.1, small=0.2)
    vit = replace(open_config, student=StudentConfig("test_vit", 32))
    found = make_plan(vit)
    assert (chosen(found)["conv_stem"], found.config.student.conv_stem) == (True, True)
    for asked in (
        replace(vit, student=StudentConfig("test_vit", 32, conv_stem=False)),
        replace(vit, student=StudentConfig("test_vit", 224)),
        replace(vit, objective=ObjectiveConfig("ibot")),  # hides patches
    ):
        plan = make_plan(asked)
        assert "conv_stem" not in chosen(plan)
        assert plan.config.student.conv_stem is None
        assert plan.config.optimiser.peak * plan.config.loader.batch_size / 256 == pytest.approx(1e-3, 1e-3)
    assert chosen(make_plan(replace(vit, epochs=3, loader=LoaderConfig("torch", 8, 1)))) == {"small_images": True}


def test_convolutions_go_with_the_form_that_is_given_up(open_config, steps_take):
    steps_take(0.1, small=5.0)
    vit = replace(open_config, student=StudentConfig("test_vit", 32))
    plan = make_plan(vit)
    assert chosen(plan)["small_images"] is False
    assert "conv_stem" not in chosen(plan)
    assert plan.config.optimiser.peak * plan.config.loader.batch_size / 256 == pytest.approx(1e-3, 1e-3)
    asked = make_plan(replace(vit, student=replace(vit.student, conv_stem=True)))
    assert (asked.config.student.small_images, asked.config.student.conv_stem) == (True, True)


def test_a_vit_goes_on_with_the_stem_that_it_began_with(open_config, steps_take):
    steps_take(20.0)
    vit = replace(open_config, student=StudentConfig("test_vit", 32), budget="1m")
    for began in (True, False):
        run = replace(vit, out=vit.out / str(began), student=replace(vit.student, conv_stem=began))
        train_student(run)
        again = make_plan(replace(run, student=vit.student))
        assert bool(again.config.student.conv_stem) is began
        further = replace(
            run, budget=None, out=vit.out / "further", extend=1, student=replace(run.student, init=str(run.out))
        )
        assert bool(make_plan(further).config.student.conv_stem) is began


def test_the_head_of_a_vit_has_no_batchnorm_but_in_a_run_that_began_with_it(open_config, steps_take):
    steps_take(20.0)
    vit = replace(open_config, student=StudentConfig("test_vit", 32), budget="1m", objective=ObjectiveConfig("dino"))
    assert chosen(plan := make_plan(vit))["head_norm"] is False
    assert plan.config.objective is not None and plan.config.objective.head_norm is False
    for other in (
        open_config,
        replace(vit, objective=ObjectiveConfig("dino", head_norm=True)),
        replace(vit, objective=ObjectiveConfig("swav", sinkhorn="batch")),
        replace(vit, objective=ObjectiveConfig("dino", norm_by_size=True)),
    ):
        assert "head_norm" not in chosen(make_plan(other))
    assert vit.objective is not None
    for began in (None, True):  # None: of a rob from before it was chosen
        run = replace(vit, out=vit.out / str(began), objective=replace(vit.objective, head_norm=True))
        train_student(run)
        settings = json.loads((run.out / "config.json").read_text())
        settings["objective"]["head_norm"] = began
        del settings["crc32c"]
        (run.out / "config.json").write_text(json.dumps(settings))
        again = make_plan(replace(run, objective=vit.objective))
        assert again.config.objective is not None and again.config.objective.head_norm is began


def test_a_checkpoint_is_timed_once_for_a_plan(open_config, monkeypatch):
    timed = []
    real = trial_module._seconds_of_a_checkpoint
    monkeypatch.setattr(trial_module, "_seconds_of_a_checkpoint", lambda *given: timed.append(given) or real(*given))
    monkeypatch.setattr(planner_module, "SECONDS_TO_CHOOSE", 0.01)
    plan = make_plan(replace(open_config, budget="3s"))
    assert len(timed) == 1
    assert plan.trial is not None and plan.trial.checkpoint_seconds > 0


def test_a_stem_that_bfloat16_leaves_enough_steps_is_kept(open_config, monkeypatch):
    def tried(config, run, _, tuned=False, saving=None):
        of_small = {"fp32": 2.0, "bf16": 1.0}[config.precision]
        return Trial(of_small if config.student.small_images else 0.2, 1, 1)

    monkeypatch.setattr(planner_module, "try_steps", tried)
    monkeypatch.setattr(planner_module, "has_bfloat16", lambda device: True)
    config = replace(open_config, precision="auto", budget="20m")
    found = chosen(make_plan(config))
    assert (found["small_images"], found["precision"]) == (True, "bf16")
    assert chosen(make_plan(replace(config, precision="fp32")))["small_images"] is False


def test_what_will_not_work_is_said(config, steps_take, monkeypatch):
    steps_take(0.1, memory=1 << 50)
    config = replace(config, pairing=PairingChoice("cross", num_local=2), optimiser=OptimiserConfig())
    plain = replace(config, student=replace(config.student, small_images=False))
    said = " ".join(make_plan(replace(plain, local_size=16)).warnings)
    for expected in ("12 steps are few", "rate is scaled down", "GB are free", "local crops are below the 32-fold"):
        assert expected in said
    large = replace(config, student=replace(config.student, image_size=96, small_images=True))
    (told,) = (warning for warning in make_plan(large).warnings if "small_images" in warning)
    assert told.startswith("the form for images up to 64 px, at 96 px, takes two to four times the time and the memory")
    assert "1.56e-05" not in said  # two digits are enough
    steps_take(0.1)
    fine = replace(config, epochs=400, optimiser=OptimiserConfig(lr=0.02), pairing=PairingChoice("cross", num_local=0))
    assert make_plan(fine).warnings == ()
    (told,) = make_plan(replace(fine, student=replace(fine.student, name="test_vit", small_images=True))).warnings
    assert told.startswith("1,200 steps are few for a ViT: a CNN, such as `student` mobilenetv3_small_100, learns")
    monkeypatch.setattr(plan_warnings, "LEAST_IMAGES_VIT", 1_200 * 8)
    assert make_plan(replace(fine, student=replace(fine.student, name="test_vit", small_images=True))).warnings == ()


def test_a_run_goes_on_as_it_was_planned_on_a_slower_machine(open_config, steps_take):
    steps_take(100.0)
    train_student(replace(open_config, budget="7m"))
    begun = json.loads((open_config.out / "config.json").read_text())
    assert begun["epochs"] * 100 * 16 / 24 <= 420
    steps_take(1000.0)
    again = make_plan(replace(open_config, budget="7m"))
    assert (again.config.epochs, again.config.loader.batch_size) == (begun["epochs"], begun["loader"]["batch_size"])
    assert again.config.optimiser.lr == begun["optimiser"]["lr"]
    train_student(replace(open_config, budget="7m"))  # is complete, not of other settings


def test_a_tried_step_leaves_the_run_as_it_would_have_been(config, tmp_path, monkeypatch):
    from rob.student_train.train import TrainProgress
    from support.training import curve

    train_student(config)
    plans = []
    monkeypatch.setattr(plan_module, "WORTH_MEASURING", 1)
    other = replace(config, out=tmp_path / "measured")
    train_student(other, TrainProgress(plan=plans.append))
    assert curve(config.out) == curve(other.out)
    (plan,) = plans
    assert plan.trial.seconds > 0
    assert plan.seconds > 12 * plan.trial.seconds + 4 * plan.trial.checkpoint_seconds > 12 * plan.trial.seconds


def test_a_long_warm_up_can_be_tried(config):
    optimiser = OptimiserConfig(warmup_epochs=250)
    plan = make_plan(replace(config, epochs=1000, optimiser=optimiser))  # of more epochs than a trial has
    assert plan.trial is not None and plan.config.optimiser == replace(optimiser, lr=plan.config.optimiser.lr)


def test_memory_grows_with_the_batch_and_the_weights_are_the_students(config, data):
    from rob.student_train.plan import make_plan
    from rob.student_train.students import build_student, num_parameters
    from rob.student_train.targets.branch import RunContext

    full = make_plan(config).config
    small, large = (
        try_steps(replace(full, loader=replace(full.loader, batch_size=size)), RunContext(data, CPU), 0.1)
        for size in (8, 24)
    )
    assert small.parameters == num_parameters(build_student(full.student))
    assert small.memory_bytes < large.memory_bytes < 3 * small.memory_bytes + 1


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the system does not say")
def test_a_thread_whose_core_others_have_is_seen_to_wait():
    """Beside another process on the same core about half of the time."""
    script = """
import os, subprocess, sys, time
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
from rob.student_train.trial import seconds_queued
other = subprocess.Popen([sys.executable, "-c", "print(flush=True)\\nwhile True: pass"], stdout=subprocess.PIPE)
other.stdout.read(1)
before, began = seconds_queued(), time.perf_counter()
while time.perf_counter() < began + 1: pass
print((seconds_queued() - before) / (time.perf_counter() - began))
other.kill()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.25 < float(done.stdout) <= 1


def test_python_and_the_command_choose_the_same_stem():
    from rob.student_train.students import describe_student

    assert describe_student(StudentConfig("test_resnet", 32)).small_images
    assert not describe_student(StudentConfig("test_resnet", 65)).small_images
    assert not describe_student(StudentConfig("convnext_atto", 64)).small_images
    with pytest.raises(MisuseError, match="has no small-image form"):
        describe_student(StudentConfig("convnext_atto", 64, small_images=True))
