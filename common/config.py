"""Settings that several configurations have."""

from pathlib import Path
from typing import Annotated

from .settings import Setting

Data = Annotated[Path, Setting("Images packed by rob pack.", argument="DATA.beton")]
Workers = Annotated[
    int,
    Setting(
        "Decoding threads (processes with --loader torch); 0: one a core, of which the ranks of a machine have a share each.",
        low=0,
    ),
]
Device = Annotated[str, Setting("auto (CUDA where there is one), cpu, cuda, cuda:1, mps.")]
Precision = Annotated[
    str,
    Setting(
        "auto (bf16 on GPUs from compute capability 8 on, which A100 has, and on a CPU where train-student's plan finds the time "
        "short and bf16 faster; else fp32), fp32, bf16 or fp16 (on GPUs only). Where fp16 gives NaN losses, take bf16."
    ),
]
Overwrite = Annotated[bool, Setting("Replace what is there already.", option="--overwrite")]
Seed = Annotated[int, Setting("Same seed, same views and same run.", low=0, high=2**40)]

TeacherName = Annotated[
    str,
    Setting(
        "A name that rob teachers lists, any timm model, efficientnet_lite0 (offline stand-in, supervised), or "
        "package.module:factory, a function of yours, without arguments, that returns a torch.nn.Module with its weights loaded: "
        "images (B, 3, S, S) to features (B, F), or a map, whose mean is taken.",
        option="--teacher",
    ),
]
Checkpoint = Annotated[
    Path | None,
    Setting(
        "The teacher's weights: .safetensors, or .pth (read without running code). Default: timm's pretrained ones; a "
        "published teacher with a head needs its file (rob teachers NAME)."
    ),
]
ViewSize = Annotated[
    int | None,
    Setting(
        "Side in pixels at which the teacher sees a view; default its own. Half the size is four times as fast.", low=8
    ),
]
LocalDir = Annotated[
    Path | None,
    Setting(
        "Where a DATA.beton of s3://, gs:// or az:// is copied to, once; default $ROB_LOCAL_DIR, else ~/.cache/rob/copied. A "
        "fast disk with room for all of it."
    ),
]
RecipeName = Annotated[
    str,
    Setting(
        "How views are drawn: mild (large crops and flips), weak (the middle, and flips), or a paper's: dino, swav, moco-v2, "
        "msn, sslight, sslight-swav, rob-dino, rob-dino-b16, rob-swav, rob-msn or rob-ibot.",
        option="--recipe",
        group="Views",
    ),
]
