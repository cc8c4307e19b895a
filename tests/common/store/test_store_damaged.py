"""A store whose files are damaged, edited or made up is refused in a sentence, or goes on from what is whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from rob.common.errors import FailureError, MisuseError
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter
from support.stores import ENCODINGS, files, manifest_of, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "t.zarr"
    write(path, manifest_of(ENCODINGS[2], 30))
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "t.zarr"
    write(path, manifest_of(ENCODINGS[1]), stop=40)  # one shard, and two chunks journalled
    return path


def everything(path: Path) -> dict[str, bytes]:
    store = TargetStore.open(path)
    manifest = json.dumps(store.manifest.to_json()).encode()
    arrays = {name: values.tobytes() for name, values in store.read(0, store.manifest.num_images).items()}
    prototypes = {} if store.prototypes is None else {"prototypes": store.prototypes.tobytes()}
    return arrays | prototypes | {n: v.tobytes() for n, v in store.statistics.items()} | {"manifest": manifest}


def damage(draw: st.DataObject, path: Path) -> None:
    """A flipped bit in, or a cut of, one of the store's files."""
    file = draw.draw(st.sampled_from(sorted(found for found in path.rglob("*") if found.stat().st_size)))
    if file.is_dir():
        return
    content = bytearray(file.read_bytes())
    at = draw.draw(st.integers(0, len(content) - 1))
    if draw.draw(st.booleans()):
        content[at] ^= 1 << draw.draw(st.integers(0, 7))
    else:
        del content[at:]
    file.write_bytes(content)


@settings(max_examples=80)
@given(draw=st.data())
def test_no_damage_is_silent(whole, tmp_path_factory, draw):
    path = shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "t.zarr")
    damage(draw, path)
    try:
        assert everything(path) == everything(whole)
    except (MisuseError, FailureError) as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    shutil.rmtree(path)


@settings(max_examples=60)
@given(draw=st.data())
def test_a_half_written_store_goes_on_to_the_same_bytes_or_says_why_not(half, tmp_path_factory, draw):
    path = shutil.copytree(half, tmp_path_factory.mktemp("damaged") / "t.zarr")
    damage(draw, path)
    try:
        write(path, manifest_of(ENCODINGS[1]))
        assert everything(path).keys() >= {"embedding", "scale"}
    except (MisuseError, FailureError) as error:
        assert str(path) in str(error)
    shutil.rmtree(path)


@pytest.mark.parametrize("chunk", [3, 4])
def test_a_damaged_journal_is_dropped_with_what_follows_it(tmp_path, chunk):
    manifest = manifest_of(ENCODINGS[0])
    write(tmp_path / "undisturbed.zarr", manifest)
    write(tmp_path / "t.zarr", manifest, stop=40)
    journal = tmp_path / "t.zarr" / "pending" / f"chunk-{chunk:08}.npz"
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)
    with pytest.raises(MisuseError, match=f"half-written, {8 * chunk} of 70 rows are done"):
        TargetStore.open(tmp_path / "t.zarr")
    assert StoreWriter.open_or_resume(tmp_path / "t.zarr", manifest).rows_done == 8 * chunk
    write(tmp_path / "t.zarr", manifest)
    assert files(tmp_path / "t.zarr") == files(tmp_path / "undisturbed.zarr")


def edited(path: Path, **values: object) -> None:
    group = json.loads((path / "zarr.json").read_text())
    group["attributes"] |= values
    (path / "zarr.json").write_text(json.dumps(group))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_temp": 0.05}, "is damaged or was edited: its checksum does not match"),
        (
            {"recipe": {"name": "dino", "global_scale": [0.15, 1.0]}},
            "is damaged or was edited: its checksum does not match",
        ),
        ({"num_images": "70"}, "says num_images is '70', which it cannot be"),
        ({"view_ids": 3}, "says view_ids is 3, which it cannot be"),
        ({"extra": 3}, "says 'extra', which is nothing here"),
    ],
)
def test_an_edited_manifest_is_refused(whole, tmp_path, values, words):
    path = shutil.copytree(whole, tmp_path / "t.zarr")
    edited(path, **values)
    with pytest.raises(FailureError, match=f"t.zarr is damaged, its manifest {words}: delete the store"):
        TargetStore.open(path)


@pytest.mark.parametrize(
    "values",
    [
        {"num_images": 1 << 50},
        {"chunk_rows": 1 << 40},
        {"dim": 1 << 30},
        {"encoding": {"kind": "topk", "k": 8, "temps": []}},
        {"encoding": {"kind": "embedding", "open": "x"}},
        {"view_ids": list(range(1 << 16)), "dim": 1 << 20, "chunk_rows": 1 << 16},
    ],
)
def test_a_manifest_that_would_fill_the_memory_is_refused(whole, tmp_path, values):
    """Its checksum is right: somebody made it up."""
    path = shutil.copytree(whole, tmp_path / "t.zarr")
    made_up = replace(
        TargetStore.open(whole).manifest, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )
    edited(path, **made_up.to_json())
    with pytest.raises(FailureError, match="is damaged, its manifest says"):
        TargetStore.open(path)


def test_a_store_from_before_checksums_is_read_as_it_was_then(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "t.zarr")
    edited(path, versions={"torch": "2"})
    for description in [path / "prototypes" / "zarr.json", *path.glob("statistics/*/zarr.json")]:
        group = json.loads(description.read_text()) | {"attributes": {}}
        description.write_text(json.dumps(group))
    found = everything(path)
    assert found.pop("manifest") == everything(whole)["manifest"]
    assert found == {name: values for name, values in everything(whole).items() if name != "manifest"}


def test_a_small_arrays_own_description_is_checked(whole, tmp_path):
    """Zarr would give the same bytes as other numbers."""
    path = shutil.copytree(whole, tmp_path / "t.zarr")
    description = path / "prototypes" / "zarr.json"
    description.write_text(description.read_text().replace('"float32"', '"int32"').replace("0.0", "0"))
    assert zarr.open_array(path / "prototypes", mode="r")[...].dtype == np.int32
    with pytest.raises(FailureError, match=r"array 'prototypes' is damaged \(its checksum does not match"):
        _ = TargetStore.open(path).prototypes
