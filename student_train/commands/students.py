"""``rob students``."""

from rich.table import Table

from ...common.screen import console, say

WITH_A_TEACHER = {
    "ViT": ("vit_tiny_patch16_224", "5.5", "rob-dino, rob-ibot, rob-msn, dinov3-distilled"),
    "MobileViT": ("mobilevit_xxs", "1.0", ""),
    "ResNet": ("resnet18", "11.2", "rob-swav, disco, seed, simreg"),
    "MobileNet": ("mobilenetv3_small_100", "1.5", "disco, simreg"),
    "EfficientNet": ("efficientnet_lite0", "3.4", "disco, simreg"),
}
"""Family -> a small one of it, its weights in millions without a classifier, presets for a store of targets."""
ALONE = {
    "ViT": "dino, dino-vit, sslight-vit, msn-vit",
    "MobileViT": "",
    "ResNet": "dino-cnn, sslight-cnn, moco-v2",
    "MobileNet": "swav-cnn, sslight-swav-cnn, moco-cnn, sslight-moco-cnn",
    "EfficientNet": "sslight-swav-cnn, sslight-moco-cnn",
}
"""Presets without a teacher."""
FEW_SMALL_IMAGES = (
    "--targets momentum --objective swav --teacher-temp 0.01 --sinkhorn batch --recipe sslight --num-local 0 --prototypes 512 "
    "--hidden-dim 512 --optimiser lars --trust 0.02 --lr 0.15 --weight-decay 1e-6"
)


def students() -> None:
    """Families of students, and the presets that suit them."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("family", "--student", "M weights"):
        table.add_column(title, no_wrap=title != "M weights")
    for title in ("--preset, with a store", "--preset, without a teacher"):
        table.add_column(title, min_width=len("sslight-swav-cnn,"))
    for family, (names, weights, presets) in WITH_A_TEACHER.items():
        table.add_row(family, names, weights, presets, ALONE[family])
    console.print(table, highlight=False)
    say("Without a preset the plan chooses: begin so. A preset is a paper's, for 1.3 million images on 8 GPUs.")
    say("Any other timm model will do; ViTs and the last three have a form for images up to 64 px (--small-images).")
    say("A ViT wants more steps than a CNN: for some minutes take a CNN.")
    say("So will torchvision/NAME, and a network of your own: package.module:factory (docs/own.md).")
    say(f"Without a teacher, on few small images, a MobileNetV2 did best with {FEW_SMALL_IMAGES}.")
