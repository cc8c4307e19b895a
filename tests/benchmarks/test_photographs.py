"""What is measured on where the packages that bring photographs are missing."""

import sys

from PIL import Image

from rob.benchmarks.photographs import HEIGHT, WIDTH, make_photographs


def test_without_scikit_learn_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it raises ModuleNotFoundError
    assert make_photographs(tmp_path / "drawn", 5) == "drawn pictures"
    files = sorted((tmp_path / "drawn").iterdir())
    for file in files:
        with Image.open(file) as image:
            assert image.size == (WIDTH, HEIGHT)
    assert len({file.read_bytes() for file in files}) == len(files) == 5
    assert all(30_000 < file.stat().st_size < 150_000 for file in files)  # as large as a photograph's
