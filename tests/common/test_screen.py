"""The progress bar moves from the first step, and no rate is negative."""

import io
import re

import pytest
from rich.console import Console

from rob.common import screen


@pytest.fixture
def terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, markup=False)
    monkeypatch.setattr(screen, "console", console)
    return console


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


def test_what_was_done_before_or_begins_anew_has_no_rate_below_zero(terminal, clock):
    with screen.bar("features", "images") as update:
        for done, total, seconds in ((0, 1000, 1), (1000, 1000, 1), (1, 400, 1), (200, 400, 1), (400, 400, 1)):
            update(done, total)
            clock[0] += seconds
    text = terminal.file.getvalue()
    assert not re.search(r"-[\d,]+ images/s", text)
    assert "images/s" in text


def test_total_and_time_left_are_there_after_the_first_step(terminal, clock):
    with screen.bar("training", "steps") as update:
        update(0, 500)
        clock[0] += 2
        update(1, 500)
    assert "1/500" in terminal.file.getvalue()
    assert "0.5 steps/s" in terminal.file.getvalue()
    assert "0:16:38 left" in terminal.file.getvalue()


def test_sentences_end_their_lines_between_words_and_titles_are_as_wide_as_the_terminal(terminal):
    screen.say("a word " * 20)
    screen.facts("a title that is wider than its table", [("a", "b")])
    lines = terminal.file.getvalue().splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert {word for line in lines[:2] for word in line.split()} == {"a", "word"}
    assert "a title that is wider than its table" in lines[2]


def test_a_bar_that_nothing_moves_is_not_seen(terminal):
    with screen.bar("packing", "images"):
        pass
    assert "packing" not in terminal.file.getvalue()


def test_what_is_waited_for_is_said_at_once_and_only_on_a_terminal(terminal, monkeypatch):
    with screen.waiting("loading torch"):
        assert "loading torch" in terminal.file.getvalue()
        with screen.bar("caching", "images") as update:
            screen.say_waiting("loading the teacher")  # until there is something to count
            shown = terminal.file.getvalue()
            assert "loading the teacher" in shown
            assert "caching" not in shown
            assert "\x1b[?25h" not in shown  # the cursor, which comes back where nothing moves any more
            update(1, 2)
    silent = Console(file=io.StringIO(), width=100)
    monkeypatch.setattr(screen, "console", silent)
    with screen.waiting("loading torch"):
        pass
    assert silent.file.getvalue() == ""
