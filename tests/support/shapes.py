"""Drawn shapes in the layouts of COCO (with masks) and VOC: detection that a small network learns in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square")


def draw_shapes(seed: int, side: int = 64) -> tuple[Image.Image, list[tuple[str, list[int], list[float]]]]:
    """A picture of one disc and one square, and of each: class, box (x, y, width, height), outline (x, y, x, y ...)."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(90, 130, (side, side, 3), dtype=np.uint8))
    draw, things = ImageDraw.Draw(image), []
    for number, name in enumerate(CLASSES):
        size = int(random.integers(14, 24))
        x = int(random.integers(0, side // 2 - size)) + number * side // 2
        y = int(random.integers(0, side - size))
        corners = (x, y, x + size - 1, y + size - 1)
        if name == "disc":
            draw.ellipse(corners, fill=(230, 60, 60))
            turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            half = size / 2
            outline = np.stack([x + half + half * np.cos(turns), y + half + half * np.sin(turns)], 1).ravel().tolist()
        else:
            draw.rectangle(corners, fill=(60, 60, 230))
            outline = [float(v) for v in (x, y, x + size, y, x + size, y + size, x, y + size)]
        things.append((name, [x, y, size, size], outline))
    return image, things


def coco_shapes(folder: Path, split: str, n: int, seed: int, masks: bool = True) -> dict[str, Any]:
    """``n`` pictures in ``folder/SPLIT`` and their ``annotations/instances_SPLIT.json``, which is returned."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for row in range(n):
        image, things = draw_shapes(seed * 1000 + row)
        image.save(folder / split / f"{row:03}.png")
        images.append({"id": 10 + row, "file_name": f"{row:03}.png", "width": image.width, "height": image.height})
        for name, box, outline in things:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + row,
                    "category_id": 7 + CLASSES.index(name),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    **({"segmentation": [outline]} if masks else {}),
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7 + number, "name": name} for number, name in enumerate(CLASSES)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return content


def voc_shapes(folder: Path, splits: dict[str, int]) -> Path:
    """Pictures in VOC's layout, ``splits`` gives how many each list has."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    row = 0
    for split, n in splits.items():
        names = []
        for _ in range(n):
            image, things = draw_shapes(row)
            image.save(folder / "JPEGImages" / f"{row:03}.jpg", quality=95)
            objects = "".join(
                f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for name, (x, y, w, h), _ in things
            )
            size = f"<size><width>{image.width}</width><height>{image.height}</height></size>"
            (folder / "Annotations" / f"{row:03}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
            names.append(f"{row:03}")
            row += 1
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def mask_shapes(folder: Path, n: int, seed: int, names: bool = True) -> Path:
    """``n`` pictures in ``folder/images`` and what is where in ``folder/masks``: 0 nothing, 1 disc, 2 square; their ``names``."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for row in range(n):
        image, things = draw_shapes(seed * 1000 + row)
        mask = Image.new("L", image.size)
        for name, _, outline in things:
            ImageDraw.Draw(mask).polygon(outline, fill=1 + CLASSES.index(name))
        image.save(folder / "images" / f"{row:03}.png")
        mask.save(folder / "masks" / f"{row:03}.png")
    if names:
        (folder / "classes.txt").write_text("\n".join(("nothing", *CLASSES)) + "\n")
    return folder
