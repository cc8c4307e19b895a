"""The texts name what is there: CONTRIBUTING.md's map every file of the product, benchmarks/README.md every result and note."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest
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


def test_every_result_and_note_is_named_beside_it():
    """Of those that are in the repository: ``rob bench`` in a clone writes others."""
    text, patterns = (ROOT / "benchmarks/README.md").read_text(), ("benchmarks/results/*.json", "benchmarks/*notes*.md")
    words = ["git", "ls-files", *patterns]
    listed = (
        subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False).stdout if which("git") else ""
    )
    found = listed.splitlines() or [str(path) for pattern in patterns for path in ROOT.glob(pattern)]  # no clone
    there = {Path(path).name for path in found}
    assert set(re.findall(r"\w+_\d{8}(?:-\d+)?\.json|\w*notes\w*\.md", text)) == there


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/tutorial.md"])
def test_links_lead_somewhere(text):
    """To a file, and to a heading as GitHub spells it in addresses."""
    for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / text).read_text()):
        target = (ROOT / text).parent / path if path else ROOT / text
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 200
