"""Balanced subsets: fixed for a seed, nested, and untouched by other classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rob.common.errors import MisuseError
from rob.student_train.evaluate.subsets import balanced_subset

LABELS = torch.tensor([2, 0, 1, 0, 2, 1, 0, 0, 2, 1, 0, 2, 1, 1, 2, 0])


def test_the_published_rows_of_a_seed_never_change():
    assert balanced_subset(LABELS, per_class=2, seed=0).tolist() == [2, 5, 7, 11, 14, 15]
    assert balanced_subset(LABELS, per_class=2, seed=1).tolist() == [3, 4, 8, 9, 10, 12]


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
