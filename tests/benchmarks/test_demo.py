"""Whose folder the demo clears."""

import pytest

from rob.benchmarks.demo import DemoConfig, begin
from rob.common.errors import MisuseError


@pytest.mark.parametrize("name", ["train.beton", "config.json"])
def test_only_a_folder_of_its_own_is_cleared(tmp_path, name):
    begin(DemoConfig(tmp_path / "demo"))
    (tmp_path / "demo" / "train.beton").write_bytes(b"of a demo that was killed")
    begin(DemoConfig(tmp_path / "demo"))
    assert not (tmp_path / "demo" / "train.beton").exists()
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(MisuseError, match=f"holds {name}, and no demo has made it"):
        begin(DemoConfig(tmp_path))
    assert (tmp_path / name).read_bytes() == b"somebody's"
