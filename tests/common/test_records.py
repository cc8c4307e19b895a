"""Files of ours are read in one way: a checksum, a form, a sentence."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rob.common.errors import FailureError, MisuseError
from rob.common.records import DamagedError, crc32c, read_foreign, read_record, sealed, typed, unsealed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text().filter(lambda key: key != "crc32c"), JSON, max_size=5)
Anything = dict[str, Any]


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0
    names: tuple[str, ...] | None = None


class Line(TypedDict):
    step: int
    kind: NotRequired[Literal["a", "b"]]


def test_a_checksum_is_castagnolis():
    assert crc32c(b"123456789") == crc32c(b"1234", b"56789") == "e3069283"


@given(OBJECTS, st.sampled_from([None, 2]))
def test_a_record_is_json_and_comes_back(content, indent):
    data = sealed(content, indent)
    assert {k: v for k, v in json.loads(data).items() if k != "crc32c"} == json.loads(json.dumps(content))
    assert unsealed(data, Anything) == json.loads(json.dumps(content))


@given(OBJECTS, st.data())
def test_no_flipped_bit_and_no_cut_passes(content, draw):
    data = sealed(content)
    at = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[at // 8] ^= 1 << at % 8
    for damaged in (bytes(flipped), data[: at // 8]):
        with suppress(DamagedError):
            assert unsealed(damaged, Anything) == json.loads(json.dumps(content))  # a space that became a tab


@given(st.binary(max_size=200) | OBJECTS.map(lambda value: json.dumps(value).encode()))
def test_whatever_else_a_file_holds_is_refused(data):
    with pytest.raises(DamagedError):
        unsealed(data, Anything)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_made_to_hurt_is_refused(text):
    with pytest.raises(DamagedError):
        unsealed(text.encode(), Anything)


def test_a_form_is_held_to():
    assert typed(Point, {"x": 1, "y": 2, "names": ["a"]}) == Point(1, 2.0, ("a",))
    assert typed(Point, {"x": 1}) == Point(1)
    assert typed(Line, {"step": 3, "more": [1]}) == {"step": 3, "more": [1]}
    assert typed(tuple[int, str], [1, "a"]) == (1, "a")
    assert typed(dict[str, Point], {"p": {"x": 1}}) == {"p": Point(1)}


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Point, {"x": True}, "says x is True, which it cannot be"),
        (Point, {"x": "1"}, "says x is '1', which it cannot be"),
        (Point, {"x": 1, "names": ["a", 2]}, r"says names\.1 is 2, which it cannot be"),
        (Point, {"x": 1, "names": "ab"}, "says names is 'ab', which it cannot be"),
        (Point, {"y": 1.0}, "lacks x"),
        (Point, {"x": 1, "z": 1}, "says 'z', which is nothing here"),
        (Point, [1], r"says all is \[1\], which it cannot be"),
        (Line, {"step": 1, "kind": "c"}, "says kind is 'c', which it cannot be"),
        (dict[str, float], {"a": None}, "says a is None, which it cannot be"),
        (tuple[int, str], [1], r"says all is \[1\], which it cannot be"),
    ],
)
def test_another_form_is_named_by_its_place(kind, value, words):
    with pytest.raises(DamagedError, match=f"^{words}$"):
        typed(kind, value)


def test_the_sentence_names_the_file_and_what_to_do(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(sealed({"x": 1}))
    assert read_record(path, Point, "make it again") == Point(1)
    path.write_bytes(sealed({"x": 1}).replace(b"1", b"2", 1))
    with pytest.raises(FailureError, match=r"a\.json is damaged or was edited: its checksum does not match: make it"):
        read_record(path, Point, "make it again")
    path.write_text('{"x": 1}')
    with pytest.raises(FailureError, match=r"a\.json has no checksum: it was edited, or is of a rob from before"):
        read_record(path, Point, "make it again")


def test_what_never_had_a_checksum_passes_where_something_else_vouches_for_it():
    assert unsealed(b'{"x": 1}', Point, unchecked=True) == Point(1)
    for damage in (lambda whole: whole.replace(b'{"x": 1', b'{"x": 2'), lambda whole: whole.replace(b"32c", b"33c")):
        with pytest.raises(DamagedError, match="its checksum does not match"):
            unsealed(damage(sealed({"x": 1})), Point, unchecked=True)


def test_json_of_others_is_held_to_its_form(tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text('{"x": 1}')
    assert read_foreign(path, Point, "a list of points", 100) == Point(1)
    for content, words in (('{"x": "a"}', "is not a list of points: it says x is 'a'"), ("[", "it is cut or no JSON")):
        path.write_text(content)
        with pytest.raises(MisuseError, match=rf"theirs\.json .*{words}"):
            read_foreign(path, Point, "a list of points", 100)
    with pytest.raises(MisuseError, match=r"theirs\.json cannot be read: 1 bytes, more than the 0"):
        read_foreign(path, Point, "a list of points", 0)


def test_only_a_regular_file_of_sane_size_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to read it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match=r"regular|directory"):
            read_record(type(tmp_path)(path), Point, "")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than the"):
        read_record(tmp_path / "large", Point, "")
