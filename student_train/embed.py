"""The features of every image in one file, for search, clustering, and whatever else takes vectors."""

import csv
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..common.errors import MisuseError
from ..common.files import flush_to_disk, locked, refuse_existing, replacing
from ..common.images.beton import Beton
from ..common.views.config import LoaderConfig
from .evaluate.network import FrozenNetwork

SUFFIXES = (".npy", ".parquet")
EXTRA = "pip install pyarrow"


@dataclass(frozen=True)
class EmbedConfig:
    """Which images, and where to. ``keep_in`` is a run folder whose kept features are used; None: they are kept beside ``out``
    until it is written."""

    data: Path
    out: Path
    loader: LoaderConfig
    keep_in: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.out.suffix not in SUFFIXES:
            raise MisuseError(f"`out` {self.out}: name it .npy or .parquet")


def embed(
    network: FrozenNetwork, config: EmbedConfig, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write the features in the order of the images' paths; the files that hold them. Killed, the same call goes on.

    ``.npy``: (N, D) float32, and beside it ``.csv`` with the columns path and label. ``.parquet``: path, label and features.
    Labels are class names, or numbers where classes have none; without labels there is no such column. MisuseError: a file is
    there already, or pyarrow is not.
    """
    out = config.out
    table = out.with_suffix(".csv")
    files = [out] if out.suffix == ".parquet" else [out, table]
    for path in files:
        refuse_existing(path, config.overwrite)
    if out.suffix == ".parquet":
        _pyarrow()
    data = Beton(config.data)
    parts = out.with_name(out.name + ".parts")
    with locked(
        out.with_name(out.name + ".lock"), f"{out}: another rob embed is writing it: wait, or give another name"
    ):
        features = network.extract(data, config.loader, config.keep_in or parts, progress)
        paths = data.manifest.paths
        order = sorted(range(data.num_images), key=paths.__getitem__)
        names = [paths[row] for row in order]
        labels = _labels(data, order)
        rows = features[torch.tensor(order)].contiguous().numpy()
        if out.suffix == ".parquet":
            _write_parquet(out, names, labels, rows)
        else:
            with replacing(out) as file, replacing(table) as beside:  # both are written before either gets its name
                np.save(file, rows)
                flush_to_disk(file)
                beside.write(_csv(names, labels))
        shutil.rmtree(parts, ignore_errors=True)
    return files


def _labels(data: Beton, order: list[int]) -> list[str | int | None] | None:
    """Of each image in this order, None where it has none; None: no image has one."""
    if data.labels is None:
        return None
    classes, labels = data.manifest.classes, data.labels.tolist()
    return [None if labels[row] < 0 else classes[labels[row]] if classes else labels[row] for row in order]


def _csv(paths: list[str], labels: list[str | int | None] | None) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path"] if labels is None else ["path", "label"])
    if labels is None:
        writer.writerows([path] for path in paths)
    else:
        writer.writerows(zip(paths, labels, strict=True))
    return text.getvalue().encode(errors="surrogateescape")


def _write_parquet(out: Path, paths: list[str], labels: list[str | int | None] | None, rows: np.ndarray) -> None:
    import pyarrow.parquet

    plain = [path.encode(errors="surrogateescape").decode(errors="backslashreplace") for path in paths]
    columns: dict[str, pyarrow.Array] = {"path": pyarrow.array(plain)}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
    columns["features"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), rows.shape[1])
    with replacing(out) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)


def _pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise MisuseError(f"parquet needs pyarrow, which is not installed: {EXTRA}, or name `out` .npy") from None
