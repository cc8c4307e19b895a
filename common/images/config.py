"""What can be set of packing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..config import Workers
from ..settings import Setting, check


@dataclass(frozen=True)
class PackConfig:
    """What ``rob pack`` takes. The result does not depend on ``workers``: Pillow decodes outside the GIL."""

    source: Annotated[
        str,
        Setting(
            "A folder of images (flat, or one sub-folder a class), or fashion-mnist, cifar10, cifar100 ...",
            argument="source",
        ),
    ]
    out: Annotated[Path, Setting("The packed file; a manifest goes beside it.", argument="OUT.beton")]
    max_resolution: Annotated[
        int | None, Setting("Longest side in pixels; 2 to 2.5 times the crop size loses nothing.", low=1)
    ] = None
    jpeg_quality: Annotated[
        int, Setting("For images that must be encoded anew; JPEG files that need no change are kept.", low=1, high=100)
    ] = 95
    raw: Annotated[
        bool, Setting("Store pixels: fastest to read, 3 bytes a pixel. Best up to about 64 px.", option="--raw")
    ] = False
    workers: Workers = 0
    skip_bad: Annotated[
        bool, Setting("Leave broken images out and list them, instead of stopping.", option="--skip-bad")
    ] = False
    split: Annotated[
        str,
        Setting(
            "Of a named data set: train or test. all: of a folder that has train/ and test/, all images, without classes."
        ),
    ] = "train"
    limit: Annotated[int | None, Setting("At most so many images, spread evenly over the source.", low=1)] = None
    shuffle: Annotated[
        bool,
        Setting(
            "Rows in an order of their own, always the same. Keep the source's only if it is shuffled already: training "
            "shuffles inside windows of neighbouring rows, and batches of one class or day teach less.",
            option="--shuffle/--keep-order",
        ),
    ] = True
    append: Annotated[
        bool,
        Setting(
            "Add to the OUT.beton that is there, behind its rows, what of SOURCE it does not have; with the settings that it was "
            "packed with. Then rob cache-teacher adds the targets of the new rows to its store.",
            option="--append",
        ),
    ] = False

    def __post_init__(self) -> None:
        check(self)
