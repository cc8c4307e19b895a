"""Few labels: the protocol against scikit-learn by hand, statistics over seeds, and what is refused."""

import json
from statistics import mean, stdev

import pytest
import torch
import torch.nn.functional as F

from rob.common.errors import MisuseError
from rob.student_train.evaluate.features import Features
from rob.student_train.evaluate.lowshot import REGULARISATION, Share, lowshot
from rob.student_train.evaluate.subsets import balanced_subset
from support.gaussians import gaussian_classes

TRAIN, TEST = gaussian_classes(2000, seed=1), gaussian_classes(1000, seed=2)


def test_agrees_with_scikit_learn_on_the_same_subset():
    linear_model = pytest.importorskip("sklearn.linear_model")
    result = lowshot(TRAIN, TEST, Share(fraction=0.1), seeds=(3,))
    rows = balanced_subset(TRAIN.labels, fraction=0.1, seed=3)
    keys, queries = (F.normalize(features).double().numpy() for features in (TRAIN.features[rows], TEST.features))
    reference = linear_model.LogisticRegression(C=1 / (200 * REGULARISATION), max_iter=2000, tol=1e-6)
    accuracy = 100 * reference.fit(keys, TRAIN.labels[rows].numpy()).score(queries, TEST.labels.numpy())
    assert result.mean == pytest.approx(accuracy, abs=0.2)
    assert (result.num_train, result.num_test, result.deviation) == (200, 1000, None)


def test_more_labels_help_and_every_seed_counts():
    few, many = lowshot(TRAIN, TEST, Share(0.01)), lowshot(TRAIN, TEST, Share(per_class=20))
    assert many.mean > few.mean + 5
    assert len(set(few.top1)) > 1
    assert (few.mean, few.deviation) == (mean(few.top1), stdev(few.top1))
    assert few == lowshot(TRAIN, TEST, Share(0.01))
    assert json.loads(json.dumps(few.to_json()))["labels"] == "1 %"


def test_the_scale_of_the_features_does_not_matter():
    scaled = Features(1000 * TRAIN.features, TRAIN.labels)
    assert lowshot(scaled, TEST, Share(per_class=5)).top1 == pytest.approx(
        lowshot(TRAIN, TEST, Share(per_class=5)).top1, abs=0.1
    )


def test_bad_input_is_refused():
    with pytest.raises(MisuseError, match="201 images of each class are wanted"):
        lowshot(TRAIN, TEST, Share(per_class=201))
    with pytest.raises(MisuseError, match="class 11 of the test set"):
        lowshot(TRAIN, Features(TEST.features[:1], torch.tensor([11])), Share(per_class=1))
    with pytest.raises(MisuseError, match="at least one seed"):
        lowshot(TRAIN, TEST, Share(per_class=1), seeds=())
