"""The command of stage 2."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rob import cli_branches as b
from rob import cli_options as o
from rob.cli import app
from rob.cli_preset import PresetCommand, use_preset
from rob.common.screen import bar, note, note_slow_loader


@app.command("train-student", cls=PresetCommand)
def train_student(
    data: o.Data,
    targets: Annotated[
        str,
        typer.Option(
            help="A store made by rob cache-teacher; or online: run the teacher in every step (a baseline); or momentum: no "
            "teacher, the targets come from a momentum copy of the student (dino, ibot, msn, moco) or from itself (swav)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run folder. A run that was killed goes on from its checkpoint there.")],
    preset: Annotated[
        str | None,
        typer.Option(
            is_eager=True,
            callback=use_preset,
            help="A paper's settings in one word, printed at the start: dino-cnn, dino-vit, sslight-cnn, sslight-vit, swav-cnn, "
            "sslight-swav-cnn, moco-cnn, sslight-moco-cnn, moco-v2, msn-vit, disco. What else is given beats it. They are made "
            "for ImageNet on 8 GPUs: fewer images want fewer --prototypes and a smaller --batch-size.",
        ),
    ] = None,
    student: Annotated[
        str,
        typer.Option(
            help="Any timm model: vit_tiny_patch16_224, resnet18, mobilenetv2_100 ... Without a teacher, on few small images, a "
            "MobileNetV2 did best with --objective swav --teacher-temp 0.01 --sinkhorn batch --recipe sslight --num-local 0 "
            "--prototypes 512 --hidden-dim 512 --optimiser lars --trust 0.02 --lr 0.15 --weight-decay 1e-6."
        ),
    ] = "vit_tiny_patch16_224",
    image_size: Annotated[int, typer.Option(min=8, help="Side in pixels of the student's global crops.")] = 224,
    small_images: Annotated[
        bool | None, typer.Option(help="A stem that reduces less, for up to 64 px; default: by --image-size.")
    ] = None,
    drop_path: Annotated[
        float, typer.Option(min=0, max=0.9, help="Stochastic depth; 0.1 for ViTs trained long.")
    ] = 0.0,
    objective: Annotated[
        str | None,
        typer.Option(
            help="embedding: regress the teacher's embedding. disco: that and InfoNCE. moco: InfoNCE alone. Over prototypes: "
            "dino, ibot (class token), swav (Sinkhorn codes), msn (uses all prototypes). Default dino where the targets have "
            "prototypes, else embedding; rob cache-teacher --prototypes K fits some to embeddings that are cached already."
        ),
    ] = None,
    pairing: Annotated[
        str | None,
        typer.Option(
            help="same, cross or all: which views meet; default same for embedding and disco, cross for the others."
        ),
    ] = None,
    step_targets: Annotated[
        int | None,
        typer.Option(
            min=1, help="Target views of an image in a step; default 2, or the 1 there is; 1 for msn with fresh crops."
        ),
    ] = None,
    num_local: Annotated[
        int | None,
        typer.Option(min=0, help="Local crops of an image in a step; default the recipe's (none with same)."),
    ] = None,
    local_size: Annotated[
        int | None, typer.Option(min=8, help="Side in pixels of a local crop; default in the recipe's proportion.")
    ] = None,
    fresh: Annotated[
        bool | None,
        typer.Option("--fresh/--replay", help="With cross: new global crops every epoch, or the cached ones."),
    ] = None,
    global_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="SSLight's alpha, 0.4 there: weight of the pairs of a target with a global crop, those with a local one have "
            "the rest. Default the recipe's: 0.4 for sslight and sslight-swav, all pairs alike for the others.",
        ),
    ] = None,
    student_temp: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="0.05 to 0.2; lower is sharper. Default 0.1; for moco and disco 0.2, on all their keys."
        ),
    ] = None,
    teacher_temp: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="0.025 to 0.1; default the teacher's. Lower, even 0.02, when targets are near uniform. swav: Sinkhorn's "
            "epsilon.",
        ),
    ] = None,
    centre_targets: Annotated[
        str | None,
        typer.Option(
            help="What to take off the targets, where few prototypes get most images or features share a large part: "
            "calibration (the mean over the cached views), checkpoint (DINO's centre, if the teacher's file has it), running "
            "(the mean of this run's targets), none. Default none, and running for dino and ibot with --targets momentum. With "
            "embeddings: calibration or none."
        ),
    ] = None,
    sinkhorn: Annotated[
        str | None,
        typer.Option(
            help="Even out the targets' use of the prototypes over the batch, or over a queue too (batch much smaller than "
            "K), in the centre's place: none, batch, queue. Default queue for swav, batch for msn, none for dino and "
            "ibot. Needs all logits: not a topk store."
        ),
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows of the queue. moco and disco: negatives, default 65536; sinkhorn: 3840, of swav without a teacher "
            "from epoch 15 on (refused in a run that ends before); both at most an eighth of the images. More rows than "
            "images are refused: an image would be its own negative.",
        ),
    ] = None,
    mean_entropy: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Weight of MSN's term for using all prototypes; default 1 for msn, else 0. Raise it on collapse.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="The student's prototypes: fresh, teacher (start from the teacher's; dino and ibot do), frozen (and keep them)."
        ),
    ] = None,
    prototypes: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --targets momentum: K; default 4096 for dino, 8192 ibot, 3000 swav, 1024 msn. Fewer for small data.",
        ),
    ] = None,
    freeze_prototypes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Epochs at the start in which the student's prototypes stay. Default 1 with --targets momentum and "
            "dino, ibot or swav, else 0. A loss that stays at log K: one more.",
        ),
    ] = None,
    copy_momentum: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --targets momentum: of the copy, at the start; a cosine takes it to 1 (moco: it stays; msn: four fifths "
            "of the way, in a line). Default 0.996 (moco 0.999). Runs of a few thousand steps want 0.99, with "
            "--sinkhorn batch 0.9; with less the targets move on faster than their centre or queue, and the loss stays high.",
        ),
    ] = None,
    warmup_teacher_temp_epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --targets momentum and dino or ibot: epochs in which the teacher's temperature rises from 0.04 to "
            "--teacher-temp (one below 0.04 holds from the start). Default 50 (ibot 30): a shorter run ends below, since at 0.07 "
            "a head that is still fresh tends to nearly uniform targets.",
        ),
    ] = None,
    only_consistency: Annotated[bool | None, typer.Option("--only-consistency", help="disco without InfoNCE.")] = None,
    consistency_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="disco: weight of the squared distance, a mean over the batch (default 1). The published code sums over the "
            "32 images of a GPU: that is 32.",
        ),
    ] = None,
    hidden_dim: Annotated[int, typer.Option(min=1, help="Width of the head's hidden layers.")] = 2048,
    head_norm: Annotated[
        bool | None,
        typer.Option(help="BatchNorm in the head; default yes, and no for moco and disco. DINO's and iBOT's ViTs: no."),
    ] = None,
    norm_last_layer: Annotated[
        bool | None,
        typer.Option(
            "--norm-last-layer/--no-norm-last-layer",
            help="dino and ibot: the prototypes keep their length (default), or it is learned, as in DINO's smaller ViTs: said "
            "to be better and less stable.",
        ),
    ] = None,
    optimiser: Annotated[
        str,
        typer.Option(
            help="adamw, sgd or lars. Without a teacher SSLight has lars for CNNs and adamw for ViTs, MoCo-v2 sgd."
        ),
    ] = "adamw",
    lr: Annotated[
        float,
        typer.Option(min=0, help="Peak rate for a batch of 256, scaled linearly. NaN or a rising loss: halve it."),
    ] = 5e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="0.04 for AdamW, 1e-4 for SGD, 1e-6 for LARS.")] = 0.04,
    min_lr: Annotated[
        float, typer.Option(min=0, help="Where the rate's cosine ends; not scaled with the batch.")
    ] = 1e-6,
    weight_decay_end: Annotated[
        float | None, typer.Option(min=0, help="Where a cosine takes the weight decay to, 0.4 for DINO's ViTs.")
    ] = None,
    warmup_epochs: Annotated[
        float | None, typer.Option(min=0, help="Default a tenth of the epochs, at most 10.")
    ] = None,
    trust: Annotated[
        float | None,
        typer.Option(
            help="lars: a step moves a layer by --lr x this of its weights' norm (default 0.001), its biases and norms by --lr "
            "alone. 0.02 with a twentieth of the rate slows the latter, as recipes for small images do."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 100,
    batch_size: Annotated[int, typer.Option(min=2, help="Images a step. Lower it when memory runs out.")] = 256,
    clip_grad: Annotated[float, typer.Option(min=0, help="Largest gradient norm; 0: no limit.")] = 3.0,
    average: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Decay of a moving average of the student, exported beside it (0.99 to 0.9999)."
        ),
    ] = None,
    precision: o.Precision = "fp32",
    device: o.Device = "auto",
    loader: o.LoaderPath = "auto",
    workers: o.Workers = 0,
    seed: o.Seed = 0,
    log_every: Annotated[int, typer.Option(min=1, help="Steps per log line.")] = 10,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            min=1, help="Epochs per checkpoint. Ctrl-C and SIGTERM write one too; a kill or a crash does not."
        ),
    ] = 1,
    window_mib: Annotated[
        float, typer.Option(min=1, help="Memory for targets read ahead. More shuffles better where a row is large.")
    ] = 256,
    cache_in_memory: Annotated[
        bool, typer.Option("--cache-in-memory", help="Keep all targets in memory from epoch to epoch.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="With --targets online: the teacher, as for rob cache-teacher.")
    ] = None,
    checkpoint: o.Checkpoint = None,
    view_size: o.ViewSize = None,
    views: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --targets online: views of an image that the teacher would have cached (default 4)."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="With --targets online or momentum: the views' recipe (default dino). A store has its own."),
    ] = None,
    global_scale: o.GlobalScale = None,
    local_scale: o.LocalScale = None,
    centre: o.Centre = None,
    colour: o.Colour = None,
    flip: o.Flip = None,
    grey: o.Grey = None,
    blur: o.Blur = None,
    solarise: o.Solarise = None,
) -> None:
    """Stage 2: train a student from cached targets, from the live teacher, or without one."""
    from rob.common.images.beton import Beton
    from rob.common.ranks import leave_ranks
    from rob.common.run import pick_device
    from rob.common.signals import stopped_by_signals
    from rob.common.views.loader import LoaderConfig
    from rob.common.views.recipes import RecipeOverrides
    from rob.student_train.bottleneck import describe_shares, worst_share
    from rob.student_train.objectives import ObjectiveConfig, usual_objective
    from rob.student_train.optimiser import OptimiserConfig
    from rob.student_train.pairing import choose_pairing
    from rob.student_train.presets import get_preset
    from rob.student_train.students import StudentConfig
    from rob.student_train.train import TrainConfig, TrainProgress
    from rob.student_train.train import train_student as run

    # ==== the targets ====
    packed, where = Beton(data), pick_device(device)

    def configured(name: str) -> ObjectiveConfig:
        return ObjectiveConfig(
            name,
            student_temp,
            teacher_temp,
            centre_targets,
            sinkhorn,
            queue,
            mean_entropy,
            head,
            hidden_dim,
            head_norm,
            norm_last_layer=norm_last_layer,
            only_consistency=only_consistency,
            consistency_weight=consistency_weight,
        )

    overrides = RecipeOverrides(None, None, global_scale, local_scale, centre, colour, flip, grey, blur, solarise)
    of_a_teacher = {"--teacher": teacher, "--checkpoint": checkpoint, "--view-size": view_size, "--views": views}
    of_the_copy = {
        "--prototypes": prototypes,
        "--copy-momentum": copy_momentum,
        "--warmup-teacher-temp-epochs": warmup_teacher_temp_epochs,
    }
    if targets == "momentum":
        o.refuse(of_a_teacher, "is for --targets online; with momentum there is no teacher")
        matched = configured(objective or "dino")
        momentum = b.momentum_config(matched, prototypes, copy_momentum, warmup_teacher_temp_epochs)
        branch = b.momentum_branch(matched, momentum, recipe or "dino", overrides, seed, where, precision)
        fresh = False if fresh is None and pairing in (None, "cross") else fresh
    else:
        o.refuse(of_the_copy, "is for --targets momentum; a teacher has its own")
        if targets == "online":
            branch = b.online_branch(
                teacher, checkpoint, view_size, views or 4, recipe or "dino", overrides, precision, where, seed
            )
        else:
            store_has = f"is for --targets online; the store {targets} has its own"
            o.refuse(of_a_teacher | {"--recipe": recipe}, store_has)
            preferred = b.preset_recipe(get_preset(preset)) if preset else None
            branch = b.cached_branch(Path(targets), packed, where, window_mib, cache_in_memory, overrides, preferred)
        matched = configured(objective or usual_objective(branch.space))
        if objective is None:
            found = "" if branch.space.num_prototypes else "no "
            note(f"--objective {matched.name}, since the targets have {found}prototypes")

    paired = choose_pairing(
        matched.name, branch.recipe, branch.views, pairing, step_targets, num_local, fresh, global_weight
    )
    if not paired.num_local:
        of_local_crops = {"--local-size": local_size, "--local-scale": local_scale}
        o.refuse(of_local_crops, "is for local crops, and this run has none (--num-local)")
    if targets in ("momentum", "online"):
        in_memory = {"--cache-in-memory": cache_in_memory or None}
        o.refuse(in_memory, f"is for a store of targets, and these are made on the spot (--targets {targets})")

    # ==== the run ====
    small = image_size <= 64 if small_images is None else small_images
    if small and small_images is None:
        note(f"the small-image form of {student}, for --image-size up to 64; --no-small-images keeps timm's")
    warmup = min(10.0, epochs / 10) if warmup_epochs is None else warmup_epochs
    config = TrainConfig(
        data=data,
        out=out,
        student=StudentConfig(student, image_size, small, drop_path),
        targets=None if targets in ("online", "momentum") else Path(targets),
        objective=matched,
        pairing=paired,
        optimiser=OptimiserConfig(optimiser, lr, min_lr, warmup, weight_decay, weight_decay_end, trust=trust),
        epochs=epochs,
        local_size=local_size,
        clip_grad=clip_grad,
        freeze_prototypes=freeze_prototypes,
        average=average,
        seed=seed,
        precision=precision,
        device=device,
        loader=LoaderConfig(loader, batch_size, workers),
        window_mib=window_mib,
        cache_in_memory=cache_in_memory,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
    )
    note_slow_loader(config.loader)
    with bar("training", "steps") as update:

        def log(line: dict[str, Any], total: int) -> None:
            speed = f"{line['images_per_second']:,.0f} images/s"
            update(line["step"], total, f"loss {line['loss']:.4f}  {speed}  {worst_share(line['shares'])}")

        with stopped_by_signals():
            result = run(config, branch, TrainProgress(log=log, note=note))
        leave_ranks()
    note(f"{result.weights}: loss {result.loss:.4f}, {result.images_per_second:,.0f} images/s")
    if result.shares:
        note(f"{describe_shares(result.shares)}. {result.advice}")
