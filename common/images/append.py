"""What ``rob pack --append`` adds to: the rows of a ``.beton``, which stay as they are, and what of a source it lacks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from ..errors import FailureError, MisuseError
from .beton import Beton, BetonWriter, StoredImage
from .config import PackConfig
from .sources import Source


@dataclass(frozen=True)
class Earlier:
    """The packed images ``data``, and the classes of theirs and the source's, whose numbers stay."""

    data: Beton
    classes: tuple[str, ...] | None
    source_classes: tuple[str, ...] | None

    @classmethod
    def of(cls, config: PackConfig, source: Source) -> Self:
        """What is at ``config.out``. MisuseError: nothing, of other settings, or one of both has classes and the other none."""
        data = Beton(config.out)
        stored = data.manifest
        asked = {
            "raw": (stored.encoding == "raw", config.raw),
            "jpeg_quality": (stored.jpeg_quality, None if config.raw else config.jpeg_quality),
            "max_resolution": (stored.max_resolution, config.max_resolution),
            "window": (stored.window, config.window),
            "percentiles": (stored.percentiles, config.percentiles),
        }
        for name, (was, now) in asked.items():
            if was != now:
                raise MisuseError(f"`{name}` is {now}, and {config.out} was packed with {was}: append with the same")
        if (stored.classes is None) != (source.classes is None):
            has, lacks = ("has", "none") if stored.classes else ("has no", "some")
            raise MisuseError(
                f"{config.out} {has} classes, and {config.source} {lacks}: append a folder of the same form (one folder a class)"
            )
        more = [name for name in source.classes or () if name not in (stored.classes or ())]
        classes = None if stored.classes is None else (*stored.classes, *more)
        return cls(data, classes, source.classes)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Path -> row."""
        return {path: row for row, path in enumerate(self.data.manifest.paths)}

    @property
    def grown(self) -> tuple[tuple[int, str], ...]:
        """Of what is made of it."""
        return (*self.data.manifest.grown, (self.data.num_images, self.data.manifest.fingerprint))

    def lacks(self, source: Source) -> Source:
        """Of the images of ``source`` those of other paths. MisuseError: there is none."""
        new = tuple(path for path in source.paths if path not in self.rows)
        if not new:
            raise MisuseError(
                f"each of the {len(source.paths):,} images is in {self.data.path} already: nothing to append"
            )
        return replace(source, paths=new)

    def label(self, label: int) -> int:
        """Of the source -> of the file."""
        if label < 0 or self.classes is None or self.source_classes is None:
            return label
        return self.classes.index(self.source_classes[label])

    def copy_to(self, writer: BetonWriter) -> None:
        """The rows that are there. FailureError: their bytes are not those that were packed."""
        data, labels = self.data, self.data.manifest.labels
        for row in range(data.num_images):
            stored = data.encoded(row).tobytes()
            image = StoredImage(stored, int(data.heights[row]), int(data.widths[row]), int(data.modes[row]))
            writer.append(image, -1 if labels is None else labels[row])
        if writer.fingerprint != data.manifest.fingerprint:
            raise FailureError(
                f"{data.path} is damaged, its fingerprint is another: rob check says where; pack the data again"
            )

    def refuse_other(self, path: str, image: StoredImage) -> None:
        """MisuseError unless ``image`` is what the row of the same path has."""
        data, row = self.data, self.rows[path]
        there = (int(data.heights[row]), int(data.widths[row]), int(data.modes[row]), data.encoded(row).tobytes())
        if there != (image.height, image.width, image.mode, image.data):
            raise MisuseError(
                f"{path} is in {data.path} already, as another image: rename one of them, or pack all images anew"
            )
