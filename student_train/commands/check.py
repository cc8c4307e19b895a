"""``rob check``."""

import json
from itertools import combinations
from pathlib import Path
from typing import Annotated

from ...common.config import Overwrite, Workers
from ...common.errors import FailureError, MisuseError
from ...common.files import refuse_existing, replacing
from ...common.look.config import ALIKE, Alike
from ...common.places import shown
from ...common.screen import bar, facts, note
from ...common.settings import Setting


def check(
    paths: Annotated[list[Path], Setting("Packed images, target stores, run folders, sweeps.", argument="PATH")],
    checksums_only: Annotated[
        bool, Setting("Do not look at the images themselves, which decodes them all.", option="--checksums-only")
    ] = False,
    image_size: Annotated[
        int, Setting("Side in pixels that you will train at: images that are smaller are counted.", low=8)
    ] = 224,
    alike: Alike = ALIKE,
    out: Annotated[Path | None, Setting("Write all that was found of images to this JSON.")] = None,
    sheet: Annotated[
        Path | None, Setting("Draw up to 60 of the pairs of images alike to this PNG: are they really the same?")
    ] = None,
    workers: Workers = 0,
    overwrite: Overwrite = False,
) -> None:
    """Look at every checksum of images, targets and runs, and at the images themselves.

    Of a DATA.beton it says which images are broken, blank, small, or there more than once, and which classes have few; of a
    TEST.beton behind it also which of its images are in the first, and which classes are missing in either. A student that has
    trained on its test images looks better than it is. Images are alike by a perceptual hash and small grey pictures, whatever
    their size, quality and brightness; what is cut out, mirrored or turned is not found. --sheet shows whether to believe it.

    Exit code 1 where something is damaged; the rest are warnings, exit code 0.
    """
    from ...common.images.beton import Beton
    from ...common.look.image_check import check_images, check_leak
    from ...common.look.pairs_sheet import pairs_sheet
    from ..check import check, is_packed

    if checksums_only and (out or sheet):
        raise MisuseError("--out and --sheet are of the images themselves: leave --checksums-only out")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise MisuseError(f"{sheet}: expected a name that ends with .png")
    for file in filter(None, (out, sheet)):
        refuse_existing(file, overwrite)
    packed = [] if checksums_only else [path for path in paths if is_packed(path)]
    if (out or sheet) and not packed:
        raise MisuseError("--out and --sheet are of packed images: give a .beton")

    damaged: list[str] = []
    looked = []
    for path in paths:
        with bar("checking", "images" if path in packed else "parts") as update:
            if path in packed:
                found = check_images(Beton(path), alike, workers, update)
                looked.append(found)
                problems, parts = found.damaged(), f"{found.data.num_images:,} images"
            else:
                checked = check(path, update)
                problems, parts = checked.damaged, checked.parts
        damaged += problems
        note(f"{shown(path)}: {parts}, {len(problems) or 'none'} damaged")
    leaks = [check_leak(test, train, alike) for train, test in combinations(looked, 2)]
    for found in looked:
        facts(str(found.data.path), [*found.facts(image_size)])
    for found in looked:
        for warning in found.warnings(image_size):
            note(warning)
    for leak in leaks:
        for warning in leak.warnings():
            note(warning)
    if out is not None:
        content = {"data": [found.to_dict() for found in looked], "leaks": [leak.to_dict() for leak in leaks]}
        with replacing(out) as file:
            file.write(json.dumps(content, indent=1).encode())
        note(f"written to {out}")
    if sheet is not None:
        pairs = pairs_sheet(
            sheet,
            [(found.data, found.data, found.repeated) for found in looked]
            + [(leak.test.data, leak.train.data, leak.shared) for leak in leaks],
        )
        note(f"written to {sheet}" if pairs else "no images are alike: no sheet was drawn")
    for problem in damaged[1:]:
        note(problem)
    if damaged:
        raise FailureError(damaged[0])
