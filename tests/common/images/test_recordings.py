"""What cameras and scanners write besides JPEG: videos, DICOM, HEIC."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images.config import PackConfig
from rob.common.images.pack import pack
from support.packing import packed
from support.photographs import photograph


def video_of(path: Path, greys: list[int], rate: int = 10, key_frames: int = 7) -> Path:
    """Frames of one grey each, a key frame among so many."""
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream(
            "mpeg4", rate=Fraction(rate), options={"g": str(key_frames), "qscale": "2", "sc_threshold": "1000000000"}
        )
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def silent_sound(path: Path) -> Path:
    """Without pictures."""
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


@pytest.mark.parametrize("ending", ["mp4", "avi"])
def test_frames_of_a_video_by_their_time(tmp_path, ending):
    """One shown at 0, 0.25, 0.5 ... s, wherever the key frames are."""
    source = video_of(tmp_path / f"a.{ending}", [8 * number for number in range(31)])
    data = packed(source, tmp_path, raw=True, every=0.25)
    assert data.manifest.paths[:2] == (f"a.{ending}/0.000", f"a.{ending}/0.250")
    assert data.num_images == 13  # of 3.1 s
    shown = [int(data.image(row).mean()) for row in range(13)]
    assert np.abs(np.array(shown) - [8 * int(row * 2.5) for row in range(13)]).max() <= 5


def test_videos_in_folders_are_of_classes_and_may_be_added(tmp_path):
    for name in ("walk/b.mp4", "run/a.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        video_of(tmp_path / "in" / name, [50] * 110)
    data = packed(tmp_path / "in", tmp_path, every=5)
    paths = tuple(f"{name}/{time}" for name in ("run/a.mp4", "walk/b.mp4") for time in ("00.000", "05.000", "10.000"))
    assert (data.manifest.paths, data.manifest.classes) == (paths, ("run", "walk"))
    video_of(tmp_path / "in" / "run" / "c.mp4", [50] * 5)
    grown = pack(PackConfig(str(tmp_path / "in"), tmp_path / "data.beton", append=True, every=5))
    assert grown.paths == (*paths, "run/c.mp4/0.000")


def test_videos_that_have_no_images_are_a_sentence(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(MisuseError, match=r"in: no video in it or below"):
        packed(folder, tmp_path, every=1)
    silent_sound(folder / "a.mp4")
    (folder / "b.mp4").write_bytes(b"no video")
    for options, message in (
        ({}, r"a\.mp4: a video; set `every` to the seconds from one of its images to the next"),
        ({"every": 1}, r"a\.mp4: a video without frames, .*b\.mp4: cannot be read as a video \(.*\); .* `skip_bad`"),
        ({"every": 1, "skip_bad": True}, r"a\.mp4: a video without frames"),
    ):
        with pytest.raises(MisuseError, match=message):
            packed(folder, tmp_path, **options)
    video_of(folder / "c.mp4", [9] * 10)
    assert packed(folder, tmp_path, every=1, skip_bad=True).manifest.paths == ("c.mp4/0.000",)
    assert not list(tmp_path.glob(".*"))


def dicom_of(path: Path, values: np.ndarray, **tags) -> Path:
    """A grey picture of signed 16 bits, or several; ``slope`` 2 and ``intercept`` -1000."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.Rows, dataset.Columns = values.shape[-2:]
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = values.astype("<i2").tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_seen_by_its_own_window_or_another(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    values = np.arange(64).reshape(8, 8) * 16  # -1000 to 1016 units
    units = values * 2 - 1000
    dicom_of(folder / "a.dcm", values, WindowCenter=[40, 0], WindowWidth=[401, 1])
    dicom_of(folder / "b.dcm", values, PhotometricInterpretation="MONOCHROME1")
    own = packed(folder, tmp_path, raw=True)
    low, high = 40 - 0.5 - 200, 40 - 0.5 + 200
    assert np.abs(own.image(0)[..., 0] - np.clip((units - low) * 255 / (high - low), 0, 255)).max() <= 0.5
    assert np.abs(own.image(1)[..., 0] - (1016 - units) * 255 / 2016).max() <= 0.5  # white is least
    stated = packed(folder, tmp_path, raw=True, window=(0, 500))
    assert np.abs(stated.image(0)[..., 0] - np.clip(units * 255 / 500, 0, 255)).max() <= 0.5
    with pytest.raises(
        FailureError, match=r"a\.dcm: its values are from -1000 to 1016, .* 2000 to 3000 leaves one grey"
    ):
        packed(folder, tmp_path, window=(2000, 3000))
    (folder / "c.dcm").write_bytes((folder / "a.dcm").read_bytes()[:-20])
    with pytest.raises(FailureError, match=r"broken image .*c\.dcm: "):
        packed(folder, tmp_path)


def test_frames_of_a_dicom(tmp_path):
    path = dicom_of(tmp_path / "a.dcm", np.stack([np.full((8, 8), 100 * number) for number in range(3)]))
    data = packed(path, tmp_path, raw=True, window=(-1000, -600))
    assert data.manifest.paths == ("a.dcm/0", "a.dcm/1", "a.dcm/2")
    assert [int(data.image(row).mean()) for row in range(3)] == [0, 128, 255]


def test_heic(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    (tmp_path / "in").mkdir()
    buffer = io.BytesIO()
    Image.fromarray(photograph(0)).save(buffer, "HEIF", quality=90)
    (tmp_path / "in" / "a.HEIC").write_bytes(buffer.getvalue())
    found = packed(tmp_path / "in", tmp_path, raw=True).image(0)
    assert np.abs(found.astype(int) - photograph(0)).mean() < 4


def test_what_reads_them_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(MisuseError, match=r"needs the package av, which is not installed: .* -e '\.\[video\]'"):
        packed(tmp_path / "a.mp4", tmp_path, every=1)
