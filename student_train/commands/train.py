"""``rob train-student``."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...common.errors import MisuseError
from ...common.options import given, refuse
from ...common.places import local_path
from ...common.screen import bar, note, note_slow_loader, say, say_waiting, waiting
from ...common.settings import Setting
from ...common.views.recipes import Recipe, RecipeOverrides
from ..config import ObjectiveConfig, PairingChoice
from ..student_config import StudentConfig
from ..train_config import USUAL_BATCH, LoaderByPlan, TrainConfig
from .extend import as_parent
from .preset import use_preset
from .show_plan import show_outcome, show_plan
from .subject import LoadTeacher
from .target_options import TargetOptions


def train_student(
    context: typer.Context,
    *,
    targets: TargetOptions,
    student: StudentConfig,
    objective: Annotated[
        str | None,
        Setting(
            "embedding: regress the teacher's embedding. simreg: the same behind a deeper head. disco: embedding and InfoNCE. "
            "moco: InfoNCE alone. seed: similarities to other images. patch: embedding, and patch tokens (a cache with --patches "
            "grid). Over prototypes: dino, ibot (its patches too, with --patches prototypes), swav (Sinkhorn codes), msn "
            "(sharpened). Default dino where the targets have prototypes, else patch where they have a grid of patches that "
            "the student can learn, else embedding; rob cache-teacher --prototypes K fits some to embeddings that are cached "
            "already.",
            group="Objective",
        ),
    ] = None,
    matched: partial[ObjectiveConfig],
    choice: PairingChoice,
    preset: Annotated[
        str | None,
        typer.Option(
            is_eager=True,
            callback=use_preset,
            rich_help_panel="Run",
            help="A paper's settings in one word, printed at the start: dino, dino-cnn, dino-vit, sslight-cnn, sslight-vit, "
            "swav-cnn, sslight-swav-cnn, moco-cnn, sslight-moco-cnn, moco-v2, msn-vit, disco, seed, simreg, dinov3-distilled, "
            "rob-dino, rob-dino-b16, rob-swav, rob-swav-teacher-prototypes, rob-msn, rob-ibot. What else is given beats it. "
            "They are made for ImageNet on 8 GPUs: fewer images want fewer --prototypes and a smaller --batch-size.",
        ),
    ] = None,
    plan_only: Annotated[bool, Setting("Print the plan and leave.", option="--plan-only", group="Run")] = False,
    config: Annotated[partial[TrainConfig], {"student": None}],
    batch_size: Annotated[
        int | None,
        Setting("Images a step; default by the plan. Lower it when memory runs out.", low=2, group="Run"),
    ] = None,
    overrides: Annotated[RecipeOverrides, {"num_global": None, "num_local": None}],
    load_teacher: LoadTeacher,
) -> None:
    """Stage 2: train a student on cached targets."""
    from ...common.ranks import current_ranks, leave_ranks
    from ...common.run import pick_device
    from ...common.signals import answered, stopped_by_signals
    from ...common.views.config import LoaderConfig
    from ..bottleneck import describe_shares, worst_share
    from ..mirror import Mirror
    from ..plan import make_plan, opened
    from ..presets import get_preset
    from ..targets.pairing import choose_pairing
    from ..train import TrainProgress, train_student

    mirror = Mirror.of(out := config.keywords["out"], config.keywords["local_dir"])
    if mirror is not None and os.environ.get("RANK", "0") == "0":
        mirror.pull()
    config = partial(config, out=local_path(out) if mirror is None else mirror.folder)
    if config.keywords["extend"]:
        student, objective, matched, choice, config = as_parent(
            given(context), student, objective, matched, choice, config
        )

    # ==== the targets ====
    paper = get_preset(preset) if preset else None
    preferred = paper.drawn() if paper else None
    if paper is not None and paper.momentum is None and targets.kind == "momentum":
        raise MisuseError(f"--preset {preset} has a frozen teacher: give --targets a store, or online")
    targets.refuse_what_does_not_fit(context)
    source = targets.config(overrides, preferred, load_teacher, config.keywords["device"])

    # ==== the objective, and the views that meet ====
    loader = config.keywords["loader"]
    made = LoaderByPlan if batch_size is None else LoaderConfig
    run = config(
        student=student, targets=source, loader=made(loader.backend, batch_size or USUAL_BATCH, loader.workers)
    )
    asked = None if objective is None else matched(name=objective)
    settled, _, branch = opened(replace(run, objective=asked, pairing=choice), pick_device(run.device))
    if source.stores and preferred is not None:
        replays = paper is not None and paper.pairing.pairing == choice.pairing == "same"
        note_other_global_crops(source.stores[0], branch.recipe, preferred, preset if replays else None)
    if asked is None:
        assert settled.objective is not None
        asked = matched(name=settled.objective.name)
        has_prototypes = f"the targets have {'' if branch.space.num_prototypes else 'no '}prototypes"
        if asked.name == "dino" and branch.space.has_embedding and not branch.from_student:
            has_prototypes += "; in short runs --objective embedding did as well or better"
        reasons = {"disco": "it has a use for the copy", "patch": "the targets have a grid of patches"}
        note(f"--objective {asked.name}, since {reasons.get(asked.name, has_prototypes)}")
    pairing = choose_pairing(asked.name, branch.recipe, branch.views, choice, branch.from_student)
    if choice.num_local is None and {"local_size", "local_scale"} & given(context):
        choice = replace(choice, num_local=pairing.num_local)  # who shapes local crops wants some
    if not pairing.num_local:
        refuse(context, ("local_size", "local_scale"), "is for local crops, and this run has none (--num-local)")

    # ==== the run ====
    note_slow_loader(run.loader)
    run = replace(run, objective=asked, pairing=choice)
    if plan_only:
        show_plan(make_plan(run))
        return
    with bar("training", "steps") as update:
        latest = ""

        def log(line: dict[str, Any], total: int) -> None:
            nonlocal latest
            speed = f"{line['images_per_second']:,.0f} images/s"
            latest = f"loss {line['loss']:.4f}  {speed}  {worst_share(line['shares'])}"
            update(line["step"], total, latest)

        def step(done: int, total: int) -> None:
            update(done, total, latest)

        with stopped_by_signals(), answered(note):
            progress = TrainProgress(log, note, step, say_waiting, show_plan)
            result = train_student(run, progress if mirror is None else replace(progress, saved=mirror.push))
        is_main = current_ranks().is_main
        leave_ranks()
    if is_main:
        note(f"{result.weights}: loss {result.loss:.4f}, {result.images_per_second:,.0f} images/s")
        if result.shares:
            say(f"{describe_shares(result.shares)}. {result.advice}")
        measure(run, result.steps)
        if mirror is not None:
            mirror.push()
            note(f"{mirror} has all of it")


def measure(run: TrainConfig, steps: int) -> None:
    """Show whether the run worked, as far as its images can tell."""
    from ...common.images.beton import Beton
    from ...common.run import pick_device
    from ..begun import as_begun, read_begun
    from ..checkpoint import load_student
    from ..evaluate.yardstick import FEWEST_IMAGES, Yardstick, verdict, write_outcome
    from ..optimiser import LR_BATCH_SIZE
    from ..plan_warnings import LEAST_RATE, LEAST_STEPS
    from ..start import with_start

    made = read_begun(run.out)
    if made is None:
        return
    device = pick_device(run.device)
    student = with_start(as_begun(run, made).student, made)
    yardstick = Yardstick.of(Beton(run.data, run.local_dir), student, run.targets, run.seed, device, run.loader)
    if yardstick is None:
        note(f"whether it worked cannot be told: that wants {FEWEST_IMAGES} images, with labels or a store of targets")
        return
    with waiting("measuring the student beside its random start"):
        outcome = yardstick.measure(load_student(run.out, device)[0])
    write_outcome(run.out, outcome)
    rate = made["optimiser"]["lr"] * made["loader"]["batch_size"] / LR_BATCH_SIZE
    least = LEAST_RATE["vit"] / 2 if made["optimiser"]["name"] == "adamw" else 0.0
    show_outcome(outcome, verdict(outcome, run.out, steps, LEAST_STEPS, rate, least))


def note_other_global_crops(path: Path, stored: Recipe, preferred: Recipe, replayed_by: str | None) -> None:
    """Where a preset has other global crops than the store's. MisuseError: the student is to see those of the preset."""
    if (preferred.global_crops, preferred.interpolation) != (stored.global_crops, stored.interpolation):
        if replayed_by:
            raise MisuseError(
                f"{path} was cached with {_areas(stored)}, and preset {replayed_by} replays those of {_areas(preferred)}: cache "
                f"again with rob cache-teacher --preset {replayed_by}, or train without the preset"
            )
        note(
            f"{path} was cached with {_areas(stored)} and the preset has {_areas(preferred)}: the store's global crops are "
            f"used, and the preset's local ones; rob cache-teacher with the preset's --recipe and --global-scale makes them"
        )


def _areas(recipe: Recipe) -> str:
    low, high = recipe.global_crops[0].scale
    return f"recipe {recipe.name} (global crops of {low:g} to {high:g} of the image)"
