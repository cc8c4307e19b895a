"""The options that several commands share, with their help; and the refusal of one that a command would not use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rob.common.errors import MisuseError

Data = Annotated[Path, typer.Argument(metavar="DATA.beton", help="Images packed by rob pack.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Decoding threads (processes with --loader torch); 0 takes every core.")
]
LoaderPath = Annotated[
    str,
    typer.Option(
        "--loader",
        help="auto, ffcv, torch or gpu. torch is Pillow in a torch DataLoader: slower, runs where ffcv cannot be built. gpu "
        "leaves only decoding to the CPU: for when a run waits for views; new, and not yet run on a GPU by us. "
        "Use one and the same for caching and for training with --pairing same: their pixels differ by about 1/255.",
    ),
]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1, mps.")]
Precision = Annotated[
    str,
    typer.Option(
        help="fp32, bf16 or fp16 (fp16 on GPUs only). bf16 is faster on recent GPUs; NaN losses with fp16 end with bf16."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same views and same run.")]

TeacherName = Annotated[
    str,
    typer.Option(
        "--teacher",
        help="A name that rob teachers lists, any timm model, or efficientnet_lite0 (offline stand-in, supervised).",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="The teacher's weights: .safetensors, or .pth (read without running code). Default: timm's pretrained ones."
    ),
]
ViewSize = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Side in pixels at which the teacher sees a view; default its own. Half the size is four times as fast.",
    ),
]

RecipeName = Annotated[
    str, typer.Option("--recipe", help="dino, swav, moco-v2, msn, sslight, sslight-swav or weak: how views are drawn.")
]
Scale = tuple[float, float] | None
GlobalScale = Annotated[
    Scale,
    typer.Option(
        help="Area of a global crop as a fraction of the image, LOW HIGH; default the recipe's. Small objects want a high LOW."
    ),
]
LocalScale = Annotated[Scale, typer.Option(help="Area of a local crop, LOW HIGH; default the recipe's.")]
Centre = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Centred square of this share of the shorter side instead of a random crop."),
]
Colour = Annotated[
    float | None,
    typer.Option(min=0, help="Factor on the recipe's colour jitter; 0 where colour is the signal (stains, dyes)."),
]
Flip = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Probability of a mirrored view; 0 where left and right differ (text, digits)."),
]
Grey = Annotated[float | None, typer.Option(min=0, max=1, help="Probability of a grey view.")]
Blur = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Probability of blur in every kind of view; 0 where detail is the signal."),
]
Solarise = Annotated[float | None, typer.Option(min=0, max=1, help="Probability of solarising in every kind of view.")]


def refuse(options: Mapping[str, Any], reason: str) -> None:
    """MisuseError naming the first of ``options`` that has a value."""
    for option, value in options.items():
        if value is not None:
            raise MisuseError(f"{option} {reason}: leave {option} out")
