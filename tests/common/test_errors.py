"""What is told of another library's error."""

import pytest
from torch import nn

from rob.common.errors import first_line, named_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  expected 3 channels.\nat line 7"), "expected 3 channels."),
        (ValueError("heading:\n\tsize mismatch"), "size mismatch"),
        (ValueError("nothing below it:"), "nothing below it:"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_line_that_says_something(error, line):
    assert first_line(error) == line


def test_torchs_heading_over_tensors_is_left_out():
    with pytest.raises(RuntimeError) as raised:
        nn.Linear(2, 3).load_state_dict(nn.Linear(2, 4).state_dict())
    assert "size mismatch for weight" in first_line(raised.value)
    assert named_line(raised.value).startswith("RuntimeError: size mismatch for weight")
