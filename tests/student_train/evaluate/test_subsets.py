"""Balanced subsets: fixed for a seed, nested, and untouched by other classes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rob.common.errors import MisuseError
from rob.student_train.evaluate.subsets import balanced_subset, listed_rows

LABELS = torch.tensor([2, 0, 1, 0, 2, 1, 0, 0, 2, 1, 0, 2, 1, 1, 2, 0])


def test_the_published_rows_of_a_seed_never_change():
    assert balanced_subset(LABELS, per_class=2, seed=0).tolist() == [2, 5, 7, 11, 14, 15]
    assert balanced_subset(LABELS, per_class=2, seed=1).tolist() == [3, 4, 8, 9, 10, 12]


@pytest.mark.parametrize("seed", [2**32, 202611271530])
def test_a_seed_may_be_a_date(seed):
    rows = balanced_subset(LABELS, per_class=2, seed=seed).tolist()
    assert len(rows) == 6
    assert rows != balanced_subset(LABELS, per_class=2, seed=seed + 2**32).tolist()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(0, 1000))
def test_each_class_gives_its_share(labels, fraction, seed):
    labels = torch.tensor(labels)
    rows = balanced_subset(labels, fraction=fraction, seed=seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    for label in labels.unique():
        count = int((labels == label).sum())
        assert int((labels[rows] == label).sum()) == max(1, round(fraction * count))


def test_a_smaller_subset_is_part_of_a_larger_and_other_classes_play_no_part():
    labels = torch.arange(300) % 3
    small, large = (set(balanced_subset(labels, fraction=f, seed=5).tolist()) for f in (0.01, 0.1))
    assert small < large
    relabelled = torch.where(labels == 2, 7, labels)
    others = set(balanced_subset(relabelled, fraction=0.1, seed=5).tolist())
    assert {row for row in large if labels[row] < 2} == {row for row in others if labels[row] < 2}


def test_impossible_subsets_are_refused():
    with pytest.raises(MisuseError, match="6 images of each class are wanted and class 1 has 5"):
        balanced_subset(LABELS, per_class=6)
    with pytest.raises(MisuseError, match="fraction of 0"):
        balanced_subset(LABELS, fraction=0)
    with pytest.raises(MisuseError, match="0 images of each class"):
        balanced_subset(LABELS, per_class=0)
    with pytest.raises(MisuseError, match="one of the two"):
        balanced_subset(LABELS)


PATHS = ("train/n01/a.JPEG", "train/n01/b.JPEG", "train/n02/a.JPEG", "train/n02/c.JPEG", "d.JPEG")


def listed(folder, text):
    (folder / "list.txt").write_text(text)
    return listed_rows(folder / "list.txt", PATHS)


def test_images_are_found_by_name_and_by_path(tmp_path):
    assert listed(tmp_path, "c.JPEG\n\n  b.JPEG\nd.JPEG\n").tolist() == [1, 3, 4]
    assert listed(tmp_path, "n02/a.JPEG\ntrain/n01/a.JPEG\nn02/a.JPEG").tolist() == [0, 2]


@given(st.sets(st.sampled_from(PATHS), min_size=1))
def test_whole_paths_are_always_found(tmp_path_factory, paths):
    found = listed(tmp_path_factory.mktemp("lists"), "\n".join(sorted(paths)))
    assert {PATHS[row] for row in found.tolist()} == paths


def test_lists_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(MisuseError, match=r"list.txt: 4 of 5 names .* \(e.JPEG, 01/b.JPEG, n03/c.JPEG ...\): pack all"):
        listed(tmp_path, "e.JPEG\n01/b.JPEG\nn03/c.JPEG\nf.JPEG\nb.JPEG")
    with pytest.raises(MisuseError, match=r"1 of 1 names are not those of exactly one image of the data \(a.JPEG\)"):
        listed(tmp_path, "a.JPEG")
    with pytest.raises(MisuseError, match="names no image"):
        listed(tmp_path, " \n")
    for path in (tmp_path / "nowhere.txt", Path("/dev/zero")):
        with pytest.raises(MisuseError, match="cannot be read"):
            listed_rows(path, PATHS)
