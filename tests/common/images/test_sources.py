"""Images where they lie: a list, a tar and a table give the file that a folder of the same images gives."""

import glob
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.images.config import PackConfig
from rob.common.images.pack import pack
from rob.common.images.sources.files import fits
from rob.common.images.sources.webdataset import members
from support.packing import jpeg_bytes, packed
from support.photographs import photograph

CLASSES = ("cat", "dog")
NAMES = tuple(f"{CLASSES[number // 3]}/{number}.jpg" for number in range(6))
"""In sorted order; three of a class."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six images in folders of two classes."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(jpeg_bytes(Image.fromarray(photograph(number))))
    return root


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory) -> Beton:
    """It packed."""
    return packed(folder, tmp_path_factory.mktemp("packed"))


def tar_of(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def parquet_of(path: Path, columns: dict[str, list], names: tuple[str, ...] | None = None) -> Path:
    """``names``: of the classes, as a Hugging Face data set has them."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        parquet.write_table(table, path, row_group_size=2)
    return path


def text_list(folder: Path, at: Path) -> Path:
    (folder / "list.txt").write_text("\n".join(f"{name} {name[:3]}" for name in reversed(NAMES)))
    return folder / "list.txt"


def csv_list(folder: Path, at: Path) -> Path:
    rows = [f"{number},{folder / name},{name[:3]}\n" for number, name in enumerate(NAMES)]
    (at / "list.csv").write_text("id,filename,class\n" + "".join(rows))
    return at / "list.csv"


def jsonl_list(folder: Path, at: Path) -> Path:
    rows = [json.dumps({"photo": name, "label": name[:3], "size": 1}) for name in NAMES]
    (folder / "list.jsonl").write_text("\n".join(rows))
    return folder / "list.jsonl"


def tar_of_folders(folder: Path, at: Path) -> Path:
    return tar_of(at / "all.tar", {f"./{name}": (folder / name).read_bytes() for name in NAMES} | {"README": b"..."})


def shards(folder: Path, at: Path) -> Path:
    """Two, their samples in no order."""
    for shard in range(2):
        files = {}
        for number in (2, 0, 1):
            number += 3 * shard
            files |= {f"{number:04}.jpg": (folder / NAMES[number]).read_bytes(), f"{number:04}.json": b"{}"}
            files[f"{number:04}.cls"] = NAMES[number][:3].encode() + b"\n"
        tar_of(at / f"s-{shard:02}.tar", files)
    return at / "s-{00..01}.tar"


def hugging_face(folder: Path, at: Path, ending: str = ".parquet") -> Path:
    (at / "data").mkdir()
    for part, numbers in (("train-00000", range(4)), ("train-00001", range(4, 6)), ("test-00000", range(1))):
        images = [{"bytes": (folder / NAMES[n]).read_bytes(), "path": "x.jpg"} for n in numbers]
        columns = {"label": [n // 3 for n in numbers], "text": ["a"] * len(images), "image": images}
        parquet_of(at / "data" / f"{part}{ending}", columns, CLASSES)
    return at


def hugging_face_arrow(folder: Path, at: Path) -> Path:
    return hugging_face(folder, at, ".arrow")


def table_of_paths(folder: Path, at: Path) -> Path:
    columns = {"pixels": list(NAMES), "label": [name[:3] for name in NAMES]}
    return parquet_of(folder / "paths.parquet", columns)


@pytest.mark.parametrize(
    "make",
    [text_list, csv_list, jsonl_list, tar_of_folders, shards, hugging_face, hugging_face_arrow, table_of_paths],
    ids=lambda make: make.__name__,
)
def test_the_file_is_that_of_the_folder(make, folder, plain, tmp_path):
    column = {jsonl_list: "photo", table_of_paths: "pixels"}.get(make)
    source = make(folder, tmp_path)
    data = packed(source, tmp_path, image_column=column)
    assert data.manifest.fingerprint == plain.manifest.fingerprint
    assert data.manifest.classes == CLASSES
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    if make in (text_list, jsonl_list):
        assert data.manifest.paths == NAMES
    shuffled = packed(source, tmp_path, image_column=column, shuffle=True)
    assert sorted(shuffled.sizes.tolist()) == sorted(plain.sizes.tolist())
    assert shuffled.manifest.fingerprint == packed(folder, tmp_path, shuffle=True).manifest.fingerprint
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, form):
    long = f"{'d' * 90}/{'e' * 60}.jpg"
    names = {
        "a.jpg": b"1" * 700,
        long: b"2",
        "b/c.cls": b"",
        **({} if form == tarfile.USTAR_FORMAT else {"ü" * 120: b"3"}),
    }
    path = tar_of(tmp_path / "a.tar", names, form)
    with tarfile.open(path) as tar, path.open("rb") as file:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
        assert list(members(file)) == expected
    assert [name for name, _, _ in expected] == list(names)


def test_numbers_stay_and_columns_may_be_named(folder, tmp_path):
    """Labels of a part of the classes are those of the whole."""
    (folder / "a.csv").write_text("dog/3.jpg,7\ncat/1.jpg,2\n")
    data = packed(folder / "a.csv", tmp_path)
    assert (data.manifest.classes, data.labels.tolist()) == (None, [2, 7])
    (folder / "b.tsv").write_text("a\tb\nx\tcat/1.jpg\ny\tcat/2.jpg\n")
    named = packed(folder / "b.tsv", tmp_path, image_column="b", label_column="a")
    assert named.manifest.classes == ("x", "y")
    (folder / "c.txt").write_text("# mine\ncat/1.jpg\n\ncat/1.jpg\ndog/4.jpg\n")
    assert packed(folder / "c.txt", tmp_path).manifest.paths == ("cat/1.jpg", "dog/4.jpg")
    assert packed(folder / "c.txt", tmp_path).labels is None


def test_shards_that_are_added_later(folder, plain, tmp_path):
    pattern = shards(folder, tmp_path)
    first = packed(tmp_path / "s-00.tar", tmp_path)
    pack(PackConfig(str(pattern), tmp_path / "data.beton", append=True, shuffle=False))
    grown = Beton(tmp_path / "data.beton").manifest
    assert grown.paths[:3] == first.manifest.paths == ("s-00.tar/0000.jpg", "s-00.tar/0001.jpg", "s-00.tar/0002.jpg")
    assert grown.fingerprint == plain.manifest.fingerprint
    assert (first.manifest.classes, grown.classes) == (("cat",), CLASSES)


def test_folders_that_are_no_classes(folder, tmp_path):
    """And patterns: of files, of a part of the folders."""
    data = packed(folder, tmp_path, recursive=True)
    assert (data.manifest.paths, data.labels, data.manifest.classes) == (NAMES, None, None)
    tar = tar_of_folders(folder, tmp_path)
    assert packed(tar, tmp_path, recursive=True).manifest.classes is None
    assert packed(folder / "{cat,dog}/*.jpg", tmp_path).manifest.paths == NAMES
    assert packed(folder / "cat" / "[01].jpg", tmp_path).num_images == 2


def cut_tar(folder: Path, at: Path) -> Path:
    """In the last image."""
    path = tar_of(at / "cut.tar", {name: (folder / name).read_bytes() for name in NAMES})
    with path.open("r+b") as file:
        start, size = [(start, size) for _, start, size in members(file)][-1]
        file.truncate(start + size // 2)
    return path


def cut_between(folder: Path, at: Path) -> Path:
    path = tar_of(at / "cut.tar", {name: (folder / name).read_bytes() for name in NAMES})
    with path.open("r+b") as file:
        file.truncate([start for _, start, _ in members(file)][-1] - 512)
    return path


def no_tar(folder: Path, at: Path) -> Path:
    (at / "a.tar").write_bytes(b"\x1f\x8b" + bytes(range(256)) * 8)
    return at / "a.tar"


def missing_files(folder: Path, at: Path) -> Path:
    (at / "list.txt").write_text("\n".join([str(folder / NAMES[0]), *(f"no/{n:02}.jpg" for n in range(30))]))
    return at / "list.txt"


def missing_shards(folder: Path, at: Path) -> Path:
    shards(folder, at)
    return at / "s-{00..03}.tar"


def no_image_column(folder: Path, at: Path) -> Path:
    return parquet_of(at / "a.parquet", {"height": [1], "title": ["x"], "note": ["y"]})


def cut_parquet(folder: Path, at: Path) -> Path:
    path = parquet_of(at / "a.parquet", {"image": [b"x" * 1000]})
    path.write_bytes(path.read_bytes()[:-40])
    return path


def other_labels(folder: Path, at: Path) -> Path:
    (at / "a.csv").write_text("path,label\nx.jpg,1\nx.jpg,2\n")
    return at / "a.csv"


def no_objects(folder: Path, at: Path) -> Path:
    (at / "a.jsonl").write_text('"x.jpg"\n[1]\n')
    return at / "a.jsonl"


def written(name: str, data: bytes):
    def make(folder: Path, at: Path) -> Path:
        (at / name).write_bytes(data)
        return at / name

    return make


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (cut_tar, {}, r"cut\.tar: cut or damaged at byte [\d,]+, behind dog/4\.jpg; .* or set `skip_bad`"),
        (cut_between, {}, r"cut\.tar: cut or damaged at byte [\d,]+, behind dog/4\.jpg"),
        (no_tar, {}, r"a\.tar: not a tar"),
        (
            missing_files,
            {},
            r"list\.txt: 30 of its 31 images are missing: no/00\.jpg, .*no/19\.jpg and 10 more; paths are",
        ),
        (missing_shards, {}, r"2 of 4 files are missing: .*s-02\.tar, .*s-03\.tar"),
        (no_image_column, {}, r"a\.parquet: no column of images; its columns are height, title, note; name one with"),
        (no_image_column, {"image_column": "x"}, r"a\.parquet: no column 'x' among title, note"),
        (no_image_column, {"image_column": "height"}, r"column 'height' holds int64, and neither bytes nor paths"),
        (hugging_face, {"label_column": "kind"}, r"no column 'kind' among label, text, image"),
        (hugging_face, {"split": "val"}, r" has test, train and no val: set `split` to one of these, or all"),
        (
            lambda folder, at: f"{hugging_face(folder, at)}/data/*.parquet",
            {"split": "val"},
            r"and no val: set `split` to one",
        ),
        (lambda folder, at: folder, {"split": "test"}, r"`split` test is for a named data set, or Parquet files"),
        (cut_parquet, {}, r"a\.parquet: not a Parquet file, or cut"),
        (other_labels, {}, r"a\.csv: x\.jpg is on several lines, with different labels"),
        (no_objects, {}, r"a\.jsonl: line 2 is no JSON object"),
        (written("a.csv", b"a,b\nx,y\n"), {"image_column": "c"}, r"a\.csv: no column 'c' among a, b"),
        (written("a.csv", b'path\n"a.jpg\n' + b"b.jpg\n" * 30_000), {}, r"a\.csv: no table \(.*\); look for a quote"),
        (written("a.txt", b""), {}, r"a\.txt: an empty list"),
        (written("a.txt", b"\xff\xfe\x00"), {}, r"a\.txt: not a text file"),
        (written("a.tar.gz", b"x"), {}, r"a\.tar\.gz: compressed as a whole, .*gzip -dk a\.tar\.gz, and give a\.tar"),
        (written("a.json", b"[]"), {}, r"a\.json: a list as one JSON value; write one object a line"),
        (lambda folder, at: at / "*.tar", {}, r"\*\.tar: no file fits this pattern"),
        (lambda folder, at: folder / NAMES[0], {}, r"0\.jpg: a single image; give the folder that it is in, .*cat$"),
        (lambda folder, at: "nofs://a/b.tar", {}, r"nofs:// is no kind of address"),
        (lambda folder, at: "https://localhost/a", {}, r"what a web server has in a folder cannot be asked"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(folder, tmp_path, make, options, message):
    source = make(folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MisuseError, match=message):
        packed(source, tmp_path, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_whole_can_be_packed(folder, tmp_path):
    said = []
    config = PackConfig(str(cut_tar(folder, tmp_path)), tmp_path / "a.beton", shuffle=False, skip_bad=True)
    pack(config, note=said.append)
    assert Beton(config.out).manifest.paths == tuple(f"cut.tar/{name}" for name in NAMES[:5])
    assert said[0].startswith("left out what comes behind the damage of ")
    data = packed(missing_files(folder, tmp_path), tmp_path, skip_bad=True)
    assert (data.num_images, len(data.manifest.skipped)) == (1, 30)


def deep(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


def test_a_window_of_values(tmp_path):
    """Of 12 bits in 16, and of floats; what has 8 bits stays."""
    (tmp_path / "in").mkdir()
    ramp = np.linspace(100, 4000, 64).reshape(8, 8)
    (tmp_path / "in" / "a.tif").write_bytes(deep(ramp.astype(np.uint16)))
    (tmp_path / "in" / "b.tif").write_bytes(deep((ramp - 2000).astype(np.float32)))
    Image.fromarray(photograph(0, 8, 8)).save(tmp_path / "in" / "c.png")
    data = packed(tmp_path / "in", tmp_path, raw=True, percentiles=(0, 100))
    for row in (0, 1):
        grey = data.image(row)[..., 0]
        assert (grey.min(), grey.max()) == (0, 255)
        assert np.abs(grey.ravel() - np.linspace(0, 255, 64)).max() <= 0.6
    assert np.array_equal(data.image(2), photograph(0, 8, 8))
    grey = packed(tmp_path / "in", tmp_path, raw=True, window=(0, 2000)).image(0)[..., 0]
    assert np.abs(grey - np.clip(ramp * 255 / 2000, 0, 255)).max() <= 0.5 + 255 / 2000
    with pytest.raises(FailureError, match=r"a\.tif: its values are from 100 to 4000, .* 5000 to 6000 leaves one grey"):
        packed(tmp_path / "in", tmp_path, window=(5000, 6000))
    with pytest.raises(
        FailureError, match=r"b\.tif: floating-point pixels have no known range; state one with `window`"
    ):
        packed(tmp_path / "in", tmp_path)
    with pytest.raises(MisuseError, match=r"was packed with \(0.0, 2000.0\)"):
        packed(tmp_path / "in", tmp_path, raw=True, window=(0, 2000))
        pack(PackConfig(str(tmp_path / "in"), tmp_path / "data.beton", append=True, raw=True, window=(0, 3000)))
    for wrong in ({"window": (5, 5)}, {"percentiles": (1, 99), "window": (0, 1)}, {"percentiles": (1, 101)}):
        with pytest.raises(MisuseError, match=r"`(window|percentiles)` is"):
            PackConfig("in", tmp_path / "a.beton", **wrong)


def test_pages_of_a_tiff(tmp_path):
    (tmp_path / "in").mkdir()
    pages = [Image.fromarray(photograph(number, 8, 8)) for number in range(11)]
    pages[0].save(tmp_path / "in" / "b.tif", save_all=True, append_images=pages[1:])
    pages[3].save(tmp_path / "in" / "a.tif")
    single = packed(tmp_path / "in" / "b.tif", tmp_path, raw=True)
    assert single.manifest.paths == tuple(f"b.tif/{page:02}" for page in range(11))
    assert np.array_equal(single.image(7), photograph(7, 8, 8))
    assert packed(tmp_path / "in", tmp_path).manifest.paths == ("a.tif", "b.tif")  # as ever
    assert packed(tmp_path / "in", tmp_path, pages=True).manifest.paths == ("a.tif", *single.manifest.paths)


def test_only_line_feeds_end_the_lines_of_a_list(folder, tmp_path):
    """JSON may hold the line ends of Unicode, as may names of files."""
    rows = [json.dumps({"path": name, "text": "one\u2028two\x85three"}, ensure_ascii=False) for name in NAMES]
    (folder / "list.jsonl").write_text("\r\n".join(rows), newline="")
    assert packed(folder / "list.jsonl", tmp_path).manifest.paths == NAMES


def test_a_copy_of_a_table_that_is_cut_short_is_an_error(tmp_path, monkeypatch):
    """What the system writes of it when a disk is nearly full."""
    columns = {"image": [{"bytes": b"1" * 100, "path": "x.jpg"}], "label": [0]}
    parquet_of(tmp_path / "a.parquet", columns)
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, at: len(data) // 2)
    with pytest.raises(FailureError, match="No space left on device"):
        packed(tmp_path / "a.parquet", tmp_path)


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [("a/*.tar", {"a/1.tar"}), ("a/**/*.tar", {"a/1.tar", "a/b/2.tar", "a/b/c/3.tar"}), ("a/?/2.tar", {"a/b/2.tar"})],
)
def test_a_pattern_means_the_same_in_a_bucket_as_on_a_disk(tmp_path, pattern, fitting):
    names = ("a/1.tar", "a/b/2.tar", "a/b/c/3.tar", "a/1.txt", "d/1.tar")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert {name for name in names if fits(name, pattern)} == fitting
    assert set(glob.glob(pattern, root_dir=tmp_path, recursive=True)) == fitting
