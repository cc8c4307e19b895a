"""A view is a pure function of (recipe, seed, image id, view id).

Nothing about a view is ever stored: both stages draw its crop, flip and colour from a counter-based generator, so the
view that the teacher saw when its target was cached is the view that the student sees, on any machine, in any order,
with any number of workers.

View ids 0, 1, 2 ... are global crops, and the cached views are the first V of them; ids from ``LOCAL`` on are local
crops.
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from ..errors import MisuseError, unknown_name
from ..settings import Setting, check


@dataclass(frozen=True)
class Crop:
    """How one kind of view is drawn. Probabilities are in [0, 1]; colour strengths are those of torchvision's ColorJitter.

    ``scale`` is the area of the crop as a fraction of the image, ``ratio`` its width over height (drawn log-uniformly). With
    ``centre`` > 0 the crop is not random but the centred square of that fraction of the shorter side. ``size`` is the side in
    pixels to which the paper resizes the crop: blur radii refer to it, and it is the default output size.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    centre: float = 0.0
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarise", "centre"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise MisuseError(f"view option {name} is {getattr(self, name)}, expected a value from 0 to 1")
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise MisuseError(
                f"view option scale is {self.scale}, expected 0 < low <= high <= 1 (fractions of the image's area)"
            )
        if not 0.0 < self.ratio[0] <= self.ratio[1]:
            raise MisuseError(f"view option ratio is {self.ratio}, expected 0 < low <= high (width over height)")
        if not 0.0 <= self.hue <= 0.5 or min(self.brightness, self.contrast, self.saturation) < 0.0 or self.size < 1:
            raise MisuseError("view colour strengths must be at least 0 (hue at most 0.5) and sizes at least 1 px")


@dataclass(frozen=True)
class Recipe:
    """A named way of drawing views: global crops (cycled through by view id: DINO's two differ) and local ones.

    ``num_global`` and ``num_local`` are the crops of an image in one step of the paper, which ``rob views`` draws; of the
    global ones a training takes as many as its targets want. ``global_weight`` is what the pairs of two global crops weigh of
    all (None: all pairs alike). ``interpolation`` of the antialiased resize is "bilinear" or "bicubic".
    """

    name: str
    global_crops: tuple[Crop, ...]
    local_crop: Crop | None = None
    num_global: int = 2
    num_local: int = 0
    global_weight: float | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise unknown_name("interpolation", self.interpolation, INTERPOLATIONS)
        if self.num_global < 1 or self.num_local < 0:
            raise MisuseError(
                f"recipe {self.name}: needs at least 1 global and 0 local crops, got {self.num_global} and {self.num_local}"
            )
        if self.num_local and self.local_crop is None:
            raise MisuseError(
                f"recipe {self.name} has no local crop: leave out `num_local` or take a recipe that has (dino, swav ...)"
            )

    @property
    def cubic(self) -> bool:
        """Which of the two filters it is."""
        return self.interpolation == "bicubic"

    def to_dict(self) -> dict:
        """Plain values. The usual interpolation is left out, so that stores older than the choice stay what they are."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("interpolation", "bilinear")}

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """Undoes ``to_dict``, also after a way through JSON, which knows no tuples."""

        def crop(fields: dict[str, Any]) -> Crop:
            pairs: dict[str, Any] = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            return Crop(**(fields | pairs))

        local = values["local_crop"]
        return cls(
            values["name"],
            tuple(crop(c) for c in values["global_crops"]),
            crop(local) if local else None,
            values["num_global"],
            values["num_local"],
            values.get("global_weight"),
            values.get("interpolation", "bilinear"),
        )


INTERPOLATIONS = ("bilinear", "bicubic")


def _jitter(b: float, c: float, s: float, h: float) -> dict[str, Any]:
    return {"jitter": 0.8, "brightness": b, "contrast": c, "saturation": s, "hue": h, "grey": 0.2}


def _dino(
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    local_size: int,
    saturation: float = 0.2,
    **others: Any,
) -> dict[str, Any]:
    """DINO's augmentations (also SSLight's): blur 1 / .1 / .5, solarise .2 on the second global crop, bicubic."""
    colour = _jitter(0.4, 0.4, saturation, 0.1)
    return {
        "global_crops": (
            Crop(224, global_scale, blur=1.0, **colour),
            Crop(224, global_scale, blur=0.1, solarise=0.2, **colour),
        ),
        "local_crop": Crop(local_size, local_scale, blur=0.5, **colour),
        "interpolation": "bicubic",
        **others,
    }


def _swav(
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    local_size: int,
    strength: float,
    **counts: float,
) -> dict[str, Any]:
    """SwAV's augmentations (also MSN's, at half the colour strength): jitter .8/.8/.8/.2 times the strength, blur .5."""
    colour: dict[str, Any] = {"blur": 0.5, **_jitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)}
    return {
        "global_crops": (Crop(224, global_scale, **colour),),
        "local_crop": Crop(local_size, local_scale, **colour),
        **counts,
    }


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # The multi-crop baseline of SSLight (2210.02808) for ViTs; its CNNs use scales .14-1 and .05-.14 and six local crops.
        Recipe("dino", **_dino((0.25, 1.0), (0.05, 0.25), 96, num_local=10)),
        # SSLight: less extreme ratios between the paired views, larger local crops, which weigh .6 instead of .91.
        Recipe("sslight", **_dino((0.3, 1.0), (0.05, 0.3), 128, num_local=10, global_weight=0.4)),
        Recipe("swav", **_swav((0.14, 1.0), (0.05, 0.14), 96, 1.0, num_local=6)),
        Recipe(
            "sslight-swav",
            **_swav((0.3, 1.0), (0.05, 0.3), 128, 1.0, num_local=6, global_weight=0.4),
            interpolation="bicubic",
        ),
        Recipe("msn", **_swav((0.3, 1.0), (0.05, 0.3), 96, 0.5, num_local=10)),
        # MoCo-v2 and DisCo: two crops of one kind.
        Recipe("moco-v2", (Crop(224, (0.2, 1.0), blur=0.5, **_jitter(0.4, 0.4, 0.4, 0.1)),)),
        # RoB (2301.09451) as released. Its one strength of colours, times .8 .8 .8 .2, is .5 for DINO and iBOT.
        Recipe("rob-dino", **_dino((0.4, 1.0), (0.05, 0.4), 96, 0.4, num_local=8)),
        Recipe("rob-dino-b16", **_dino((0.25, 1.0), (0.05, 0.25), 96, 0.4, num_local=8)),
        Recipe("rob-ibot", **_dino((0.25, 1.0), (0.05, 0.25), 96, 0.4, num_local=10)),
        Recipe("rob-swav", **_swav((0.14, 1.0), (0.05, 0.14), 96, 1.0, num_local=4)),
        Recipe("rob-msn", **_swav((0.3, 1.0), (0.05, 0.3), 96, 1.0, num_local=10)),
        # For a teacher's targets: no colours and no extreme crops, as a student will see images later. Ours.
        Recipe("mild", (Crop(224, (0.5, 1.0)),), Crop(96, (0.1, 0.5)), interpolation="bicubic"),
        Recipe("weak", (Crop(224, centre=0.875),), num_global=1),
    )
}


USUAL_RECIPE, USUAL_ALONE = "mild", "dino"
"""Of a teacher's views, where nothing else is asked for, and of a student's without a teacher, which learns nothing from views
that are alike. ResNet-18 on 3,000 images in 2,057 steps: 60.0 % of k-NN with mild, 55.6 with dino (benchmarks/README.md)."""


def evaluation_recipe(centre: float, interpolation: str = "bilinear") -> Recipe:
    """The view that features are measured on: the centred square of ``centre`` of the shorter side, nothing else."""
    return Recipe("evaluation", (Crop(224, centre=centre, flip=0.0),), num_global=1, interpolation=interpolation)


Share = tuple[float, float]
"""A part of the image's area, low and high."""


@dataclass(frozen=True)
class RecipeOverrides:
    """What a user may change of a named recipe; None keeps the recipe's own value. ``colour`` scales all jitter strengths."""

    num_global: Annotated[int | None, Setting("Global crops an image; default the recipe's.", low=1)] = None
    num_local: Annotated[int | None, Setting("Local crops an image; default the recipe's.", low=0)] = None
    global_scale: Annotated[
        Share | None,
        Setting(
            "Area of a global crop as a fraction of the image, LOW HIGH; default the recipe's. Small objects want a high LOW."
        ),
    ] = None
    local_scale: Annotated[Share | None, Setting("Area of a local crop, LOW HIGH; default the recipe's.")] = None
    centre: Annotated[
        float | None,
        Setting(
            "Global crops: the centred square of this share of the shorter side instead of a random one.", low=0, high=1
        ),
    ] = None
    colour: Annotated[
        float | None,
        Setting("Factor on the recipe's colour jitter; 0 where colour is the signal (stains, dyes).", low=0),
    ] = None
    flip: Annotated[
        float | None,
        Setting("Probability of a mirrored view; 0 where left and right differ (text, digits).", low=0, high=1),
    ] = None
    grey: Annotated[float | None, Setting("Probability of a grey view.", low=0, high=1)] = None
    blur: Annotated[
        float | None,
        Setting("Probability of blur in every kind of view; 0 where detail is the signal.", low=0, high=1),
    ] = None
    solarise: Annotated[float | None, Setting("Probability of solarising in every kind of view.", low=0, high=1)] = None
    interpolation: Annotated[
        str | None,
        Setting(
            "Filter of the resize, bilinear or bicubic; default the recipe's. Bicubic is sharper, and slower to load.",
            choices=INTERPOLATIONS,
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name) or (1.0, 1.0)
            if not 0.0 < low <= high <= 1.0:
                raise MisuseError(
                    f"`{name}` is {low:g},{high:g}, expected 0 < LOW <= HIGH <= 1: shares of the image's area"
                )

        if self.centre is not None and self.global_scale is not None:
            raise MisuseError("`centre` and `global_scale` both say what a global crop shows: give one of them")

    def over(self, usual: "RecipeOverrides") -> "RecipeOverrides":
        """The ``usual`` ones, but for what is set here."""
        here = {name: value for name, value in vars(self).items() if value is not None}
        instead = {"centre": "global_scale", "global_scale": "centre"}
        return replace(usual, **{instead[name]: None for name in here if name in instead}, **here)


def with_local_crops() -> list[str]:
    """The recipes that have them."""
    return [name for name, recipe in RECIPES.items() if recipe.local_crop]


def get_recipe(name: str, overrides: RecipeOverrides | None = None) -> Recipe:
    """The named recipe with the overrides applied. Raises MisuseError for an unknown name or a value out of range."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    recipe, o = RECIPES[name], overrides or RecipeOverrides()
    if o.local_scale is not None and recipe.local_crop is None:
        raise MisuseError(f"`local_scale`: recipe {name} has no local crops, take {' or '.join(with_local_crops())}")

    def changed(crop: Crop, scale: tuple[float, float] | None, centre: float | None = None) -> Crop:
        new = {k: v for k in ("flip", "grey", "blur", "solarise") if (v := getattr(o, k)) is not None}
        if scale is not None:
            new |= {"scale": tuple(scale), "centre": 0.0}
        if centre is not None:
            new |= {"centre": centre}
        if o.colour is not None:
            new |= {k: getattr(crop, k) * o.colour for k in ("brightness", "contrast", "saturation")}
            new |= {"hue": min(0.5, crop.hue * o.colour), "jitter": crop.jitter if o.colour else 0.0}
        return replace(crop, **new)

    return replace(
        recipe,
        global_crops=tuple(changed(c, o.global_scale, o.centre) for c in recipe.global_crops),
        local_crop=changed(recipe.local_crop, o.local_scale) if recipe.local_crop else None,
        num_global=recipe.num_global if o.num_global is None else o.num_global,
        num_local=recipe.num_local if o.num_local is None else o.num_local,
        interpolation=o.interpolation or recipe.interpolation,
    )
