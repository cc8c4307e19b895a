"""A ``.beton`` is checked: its head, its rows and its manifest when it is opened, each image when it is first read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rob.common.errors import FailureError, MisuseError
from rob.common.images import beton
from rob.common.images.beton import Beton, manifest_path
from rob.common.images.pack import PackConfig, pack
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import RECIPES
from support import tiny


@pytest.fixture(scope="module", params=[False, True], ids=["jpeg", "raw"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return tiny.tiny_beton(tmp_path_factory.mktemp("packed"), 6, raw=request.param)


def read_all(path: Path) -> list[bytes]:
    data = Beton(path)
    labels = np.array(data.labels).tobytes()
    return [labels, repr(data.manifest).encode(), *(data.image(i).tobytes() for i in range(data.num_images))]


def copied(data: Beton, folder: Path) -> Path:
    shutil.copy(manifest_path(data.path), folder)
    return Path(shutil.copy(data.path, folder))


@settings(max_examples=60)
@given(draw=st.data())
def test_no_flipped_bit_and_no_cut_is_silent(packed, tmp_path_factory, draw):
    """Whatever is damaged, either the very same images come out (room between them was hit) or one sentence does."""
    folder = tmp_path_factory.mktemp("damaged")
    path = copied(packed, folder)
    target = draw.draw(st.sampled_from([path, path, manifest_path(path)]))
    content = bytearray(target.read_bytes())
    head = beton.ROWS_AT + beton.ROW.itemsize * packed.num_images
    where = st.integers(0, len(content) - 1)
    if target == path:
        where = where | st.integers(0, head) | st.integers(len(content) - 24 * packed.num_images, len(content) - 1)
    at = draw.draw(where)
    if draw.draw(st.booleans()):
        content[at] ^= 1 << draw.draw(st.integers(0, 7))
    else:
        del content[at:]
    target.write_bytes(content)
    try:
        assert read_all(path) == read_all(packed.path)
    except (MisuseError, FailureError) as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
    shutil.rmtree(folder)


@pytest.mark.parametrize("backend", ["torch", "ffcv"])
def test_a_flipped_byte_in_an_image_is_named_when_it_is_read(packed, tmp_path, backend):
    if backend == "ffcv":
        pytest.importorskip("ffcv")
    path = copied(packed, tmp_path)
    with path.open("r+b") as file:
        file.seek(int(packed.pointers[4]) + int(packed.sizes[4]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    data = Beton(path)
    assert data.damaged() == [4]
    loader = ViewLoader(data, RECIPES["weak"], 0, LoaderConfig(backend, batch_size=3, workers=1))
    batches = loader.epoch(np.arange(6), [ViewSet((0,), 16)])
    next(batches)
    with pytest.raises(FailureError, match=r"images-0\.beton: image 4 is damaged \(its checksum does not match\)"):
        next(batches)


def test_more_rows_than_the_file_can_hold_are_refused(packed, tmp_path):
    path = copied(packed, tmp_path)
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content, beton.HEADER, 1)
    rows = len(content) // beton.ALLOCATION.itemsize
    header["num_rows"], header["allocations_at"] = rows, len(content) - rows * beton.ALLOCATION.itemsize
    path.write_bytes(content)
    with pytest.raises(MisuseError, match=r"\.beton"):
        Beton(path)


def test_a_manifest_of_another_form_is_one_sentence(packed, tmp_path):
    path = copied(packed, tmp_path)
    for name, value in (("labels", "abc"), ("paths", {}), ("num_images", None), ("fingerprint", [1]), ("classes", 3)):
        content = json.loads(manifest_path(packed.path).read_text()) | {name: value}
        manifest_path(path).write_text(json.dumps(content))
        with pytest.raises(MisuseError, match=f"not a manifest of rob pack .it says {name} is .*pack the data again"):
            Beton(path)


def test_an_edited_manifest_is_refused(packed, tmp_path):
    path = copied(packed, tmp_path)
    content = json.loads(manifest_path(path).read_text()) | {"classes": ["one", "two"]}
    manifest_path(path).write_text(json.dumps(content))
    with pytest.raises(MisuseError, match=r"beton\.json: damaged or edited.*copy or pack both again"):
        Beton(path)


def test_a_file_from_before_checksums_says_so(packed, tmp_path):
    path = copied(packed, tmp_path)
    with path.open("r+b") as file:
        file.seek(beton.HEADER.itemsize + beton.FIELD.itemsize + beton.FIELD.fields["arguments"][1])
        file.write(bytes(8))
    with pytest.raises(MisuseError, match=r"packed by a rob from before checksums; pack it again"):
        Beton(path)


@pytest.mark.parametrize("moment", ["before any", "between", "after"])
def test_a_pack_over_another_may_be_killed_between_its_renames(image_folder, tmp_path, moment):
    """The earlier data are whole until the new ones are."""
    out = tmp_path / "data.beton"
    pack(PackConfig(str(image_folder), out, limit=4))
    before = Beton(out).manifest
    script = """
import os, sys
from pathlib import Path
from rob.common.images.pack import PackConfig, pack

moment = sys.argv[3]
replace, path_replace = os.replace, Path.replace

def dying(old, new):
    if moment == "before any": os._exit(9)
    replace(old, new)

def dying_at_the_end(old, new):
    if moment == "between": os._exit(9)
    path_replace(old, new)
    if moment == "after": os._exit(9)

os.replace, Path.replace = dying, dying_at_the_end
pack(PackConfig(sys.argv[1], Path(sys.argv[2]), limit=5))
"""
    for _ in range(2):  # and killed again
        killed = subprocess.run([sys.executable, "-c", script, str(image_folder), str(out), moment], check=False)
        assert killed.returncode == 9
        assert Beton(out).num_images == (5 if moment == "after" else 4)
        assert (Beton(out).manifest == before) == (moment != "after")
    pack(PackConfig(str(image_folder), out, limit=6))
    assert Beton(out).num_images == 6
    assert sorted(os.listdir(tmp_path)) == ["data.beton", "data.beton.json"]
