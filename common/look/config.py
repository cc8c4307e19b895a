"""What can be set of contact sheets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..config import Seed
from ..errors import MisuseError
from ..settings import Setting, check
from ..views.recipes import USUAL_RECIPE, Recipe, get_recipe

Images = Annotated[int, Setting("Images on the sheet, at most 64.", low=1, high=64)]
"""A picture of more is too tall to be drawn or looked at."""
ImageSize = Annotated[
    int | None,
    Setting(
        "Side in pixels of the global crops, as you will train; local ones in the recipe's proportion. Default the recipe's.",
        low=8,
    ),
]
Count = Annotated[int, Setting(low=1)]
ALIKE = 0.94
Alike = Annotated[
    float,
    Setting(
        "Correlation of small grey pictures from which two images are alike, if their hashes are. 0.94: the same picture in "
        "another size, quality, brightness or a slightly other crop. 0.85 finds more such crops, and different pictures of the "
        "same pose; raise it where all pictures show much the same.",
        low=0,
        high=1,
    ),
]


@dataclass(frozen=True)
class SheetConfig:
    """What to show. Without ``store``, the views that ``recipe`` and ``seed`` draw of ``data``; with it, the store's own views.

    ``images`` are the first of the data set, or ``spread`` evenly over it. ``views`` bounds those shown of a store;
    ``neighbours`` are searched among its first ``search`` rows, or as many spread over it.
    """

    data: Path
    out: Path
    store: Path | None = None
    images: Images = 4
    spread: bool = False
    recipe: Recipe = field(default_factory=lambda: get_recipe(USUAL_RECIPE))
    seed: Seed = 0
    views: Count = 2
    neighbours: Count = 6
    search: Count = 10_000
    image_size: ImageSize = None
    ratios: bool = False
    """Whether to add histograms of how much the paired views differ in scale, beside those of recipe dino."""

    def __post_init__(self) -> None:
        check(self)
        if self.out.suffix.lower() != ".png":
            raise MisuseError(
                f"{self.out}: expected a name that ends with .png, such as {self.out.with_suffix('.png')}"
            )
