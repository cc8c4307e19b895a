"""What can be set of packing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..config import Workers
from ..errors import MisuseError
from ..settings import Setting, check

ALL_PARTS = "all"
"""The ``split`` that is every part of a data set."""
USUAL_QUALITY = 95
USUAL_PART = "train"
"""The ``split`` where none is given."""


@dataclass(frozen=True)
class PackConfig:
    """What ``rob pack`` takes. The result does not depend on ``workers``: Pillow decodes outside the GIL."""

    source: Annotated[
        str,
        Setting(
            "A folder of images (flat, or one sub-folder a class); a list of them (.txt, .csv, .jsonl); a .tar, .parquet or "
            ".arrow, a folder of these, or a pattern in quotes ('shards/{000..099}.tar'); any of them at s3://, gs://, az://, "
            "https:// or hf://; or fashion-mnist, cifar10, cifar100 ...",
            argument="SOURCE",
        ),
    ]
    out: Annotated[Path, Setting("The packed file; a manifest goes beside it.", argument="OUT.beton")]
    max_resolution: Annotated[
        int | None, Setting("Longest side in pixels; 2 to 2.5 times the crop size loses nothing.", low=1)
    ] = None
    jpeg_quality: Annotated[
        int, Setting("For images that must be encoded anew; JPEG files that need no change are kept.", low=1, high=100)
    ] = USUAL_QUALITY
    raw: Annotated[
        bool, Setting("Store pixels: fastest to read, 3 bytes a pixel. Best up to about 64 px.", option="--raw")
    ] = False
    workers: Workers = 0
    skip_bad: Annotated[
        bool,
        Setting(
            "Leave broken and missing images out and list them, instead of stopping; of a cut tar, take what comes before.",
            option="--skip-bad",
        ),
    ] = False
    split: Annotated[
        str,
        Setting(
            "Of a named data set, or of a folder of Parquet files whose names say it: train, val or test. all: of a folder that "
            "has train/ and test/, all images, without classes."
        ),
    ] = USUAL_PART
    recursive: Annotated[
        bool,
        Setting(
            "All images below a folder or in a tar, at whatever depth, without classes: where the folders are none.",
            option="--recursive",
        ),
    ] = False
    image_column: Annotated[
        str | None, Setting("Of a list or a table: the column of paths or images, where its name is not a usual one.")
    ] = None
    label_column: Annotated[
        str | None, Setting("The column of classes: whole numbers stay what they are, names are numbered.")
    ] = None
    pages: Annotated[
        bool,
        Setting(
            "Every page of a TIFF and frame of a DICOM is an image, named FILE/PAGE; else only the first is. Of a single such "
            "file as SOURCE all are.",
            option="--pages",
        ),
    ] = False
    every: Annotated[
        float | None,
        Setting(
            "Of videos: seconds from one image to the next. Closer than a scene changes, the images are nearly alike and teach "
            "little more; each costs the decoding from the key frame before it.",
            low=0.001,
        ),
    ] = None
    window: Annotated[
        tuple[float, float] | None,
        Setting(
            "LOW,HIGH of 16-bit and floating-point images: the values that become black and white. Without it 16 bits are "
            "divided by 257, which leaves a scan of 12 bits nearly black, floats are refused, and a DICOM has its own."
        ),
    ] = None
    percentiles: Annotated[
        tuple[float, float] | None,
        Setting(
            "LOW,HIGH such as 1,99: the same by each image's own values, where their scale differs from image to image. "
            "Brightness then says nothing any more.",
            low=0,
            high=100,
        ),
    ] = None
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
            "Add to the OUT.beton that is there, behind its rows, what of SOURCE it does not have. Give --max-resolution, "
            "--jpeg-quality, --raw, --window and --percentiles as before: others are refused. Then rob cache-teacher adds the "
            "targets of the new rows to its store.",
            option="--append",
        ),
    ] = False

    def __post_init__(self) -> None:
        check(self)
        for name in ("window", "percentiles"):
            value = getattr(self, name)
            if value is not None and not value[0] < value[1]:
                raise MisuseError(f"`{name}` is {value[0]:g},{value[1]:g}: LOW must be below HIGH")
        if self.raw and self.jpeg_quality != USUAL_QUALITY:
            raise MisuseError(
                f"`jpeg_quality` {self.jpeg_quality} is of JPEGs, and `raw` stores pixels: leave one of them out"
            )
        if self.window is not None and self.percentiles is not None:
            raise MisuseError("`window` is for all images and `percentiles` for each its own: leave one of them out")
