"""The map in CONTRIBUTING.md names every file of the product, each once and with a description, and no other."""

import re
from collections import Counter
from collections.abc import Iterator

from test_packaging import ROOT, modules

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def mapped() -> Iterator[str]:
    """Paths from the root, in the order of the map: a heading names the folder of the files listed below it, or none."""
    folder = ""
    for line in TEXT.partition("\n## Map\n")[2].splitlines():
        if line.startswith("#"):
            heading = re.fullmatch(r"### `(\S+/)`", line)
            folder = heading[1] if heading else ""
        elif file := re.fullmatch(r"- `(\S+\.py)`: \S.*", line):
            yield folder + file[1]


def test_every_file_is_on_the_map():
    """Empty ``__init__.py`` have nothing to say."""
    product = {path for path in modules() if (ROOT / path).read_text().strip()}
    assert sorted(product - set(mapped())) == []


def test_every_file_of_the_map_exists():
    assert [path for path in mapped() if not (ROOT / path).is_file()] == []


def test_no_file_is_on_the_map_twice():
    assert [path for path, count in Counter(mapped()).items() if count > 1] == []


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 200
