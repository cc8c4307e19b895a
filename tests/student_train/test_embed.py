"""rob embed: every image's features in one file, in the order of paths; a killed one goes on."""

import csv

import numpy as np
import pyarrow.parquet
import pytest
import torch

from rob.common.errors import FailureError, MisuseError
from rob.student_train.embed import EmbedConfig, embed
from rob.student_train.evaluate import features
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.students import StudentConfig
from support.packing import packed
from support.tiny import contents, tiny_images
from support.training import LOADER

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows in another order than the paths."""
    folder = tmp_path_factory.mktemp("data")
    return packed(tiny_images(folder / "images", 24), folder, shuffle=True)


@pytest.fixture(scope="module")
def network():
    return FrozenNetwork.random_student(StudentConfig("test_vit", 32), 0, CPU)


def test_rows_follow_the_paths(tmp_path, data, network):
    files = embed(network, EmbedConfig(data.path, tmp_path / "out.npy", LOADER))
    assert [file.name for file in files] == ["out.npy", "out.csv"]
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    paths = [row["path"] for row in rows]
    assert paths == sorted(data.manifest.paths) != list(data.manifest.paths)
    assert [row["label"] for row in rows] == [path.split("/")[0] for path in paths]
    found, expected = np.load(tmp_path / "out.npy"), network.extract(data, LOADER)
    assert found.dtype == np.float32
    for path, row in zip(paths, found, strict=True):
        np.testing.assert_array_equal(row, expected[data.manifest.paths.index(path)])
    assert sorted(contents(tmp_path)) == ["out.csv", "out.npy"]


def test_parquet_has_the_same_columns(tmp_path, data, network):
    embed(network, EmbedConfig(data.path, tmp_path / "out.npy", LOADER))
    embed(network, EmbedConfig(data.path, tmp_path / "out.parquet", LOADER))
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["path", "label", "features"]
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), np.load(tmp_path / "out.npy"))
    assert table["path"].to_pylist() == sorted(data.manifest.paths)


def test_a_killed_one_goes_on_from_the_last_whole_shard(tmp_path, data, network, monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    config, asked = EmbedConfig(data.path, tmp_path / "out.npy", LOADER), []
    extract = FrozenNetwork.centred

    def killed_at_the_second(self, data, loader, image_ids):
        if asked:
            raise KeyboardInterrupt
        asked.append(image_ids)
        return extract(self, data, loader, image_ids)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenNetwork, "centred", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            embed(network, config)
    assert not config.out.exists()

    def counted(self, data, loader, image_ids):
        asked.append(image_ids)
        return extract(self, data, loader, image_ids)

    monkeypatch.setattr(FrozenNetwork, "centred", counted)
    embed(network, config)
    assert np.concatenate(asked).tolist() == list(range(24))  # none twice
    assert sorted(contents(tmp_path)) == ["out.csv", "out.npy"]


def test_what_is_there_is_kept(tmp_path, data, network):
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(MisuseError, match=r"out.csv is there already: pass `overwrite`"):
        embed(network, EmbedConfig(data.path, tmp_path / "out.npy", LOADER))
    assert contents(tmp_path) == {"out.csv": b"mine"}
    embed(network, EmbedConfig(data.path, tmp_path / "out.npy", LOADER, overwrite=True))
    assert (tmp_path / "out.csv").read_text() != "mine"


def test_a_full_disk_leaves_no_half_of_the_pair(tmp_path, data, network, monkeypatch):
    config = EmbedConfig(data.path, tmp_path / "out.npy", LOADER)

    def full(file, rows):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rob.student_train.embed.np.save", full)
        with pytest.raises(FailureError, match=r"cannot write .*out\.(npy|csv): No space left"):
            embed(network, config)
    assert not list(tmp_path.glob("out.csv*")) and not (tmp_path / "out.npy").exists()
    embed(network, config)
    assert (tmp_path / "out.npy").exists() and (tmp_path / "out.csv").exists()


def test_without_labels_there_is_no_such_column(tmp_path, network):
    images = tiny_images(tmp_path / "images", 4, classes=1) / "class0"
    embed(network, EmbedConfig(packed(images, tmp_path).path, tmp_path / "out.npy", LOADER))
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "path"


@pytest.mark.parametrize("given", [(0, None, 2), ("cat", None, "dog")])
def test_an_image_without_a_label_has_none(tmp_path, network, given):
    pictures = [path.read_bytes() for path in sorted(tiny_images(tmp_path / "images", 3).rglob("*.jpg"))]
    source = tmp_path / "source.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, "label": list(given)}), source)
    data = packed(source, tmp_path)
    for name in ("out.npy", "out.parquet"):
        embed(network, EmbedConfig(data.path, tmp_path / name, LOADER))
    in_table = pyarrow.parquet.read_table(tmp_path / "out.parquet")["label"].to_pylist()
    in_csv = [row["label"] for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines())]
    assert [label is None for label in in_table] == [label is None for label in given]
    assert in_csv == ["" if label is None else str(label) for label in in_table]


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(MisuseError, match=r"name it \.npy or \.parquet"):
        EmbedConfig(tmp_path / "data.beton", tmp_path / "out.txt", LOADER)
