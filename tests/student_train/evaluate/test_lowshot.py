"""Few labels: the protocol against scikit-learn by hand, statistics over seeds, and what is refused."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rob.common.errors import MisuseError
from rob.common.views.loader import LoaderConfig
from rob.student_train.evaluate import finetune as finetune_module
from rob.student_train.evaluate.config import FinetuneConfig
from rob.student_train.evaluate.features import Features
from rob.student_train.evaluate.labelled import LabelledImages
from rob.student_train.evaluate.logistic import fit_logistic
from rob.student_train.evaluate.lowshot import (
    MSN_REGULARISATION,
    REGULARISATION,
    Listed,
    Share,
    lowshot,
    prepared,
)
from rob.student_train.evaluate.network import FrozenNetwork
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


def test_msns_rows_are_centred_before_they_are_unit():
    rows = torch.randn(4, 6, dtype=torch.float64) + 2
    found = prepared(rows, centred=True)
    for n in range(4):
        mean = sum(rows[n].tolist()) / 6
        length = sum((value - mean) ** 2 for value in rows[n].tolist()) ** 0.5
        for d in range(6):
            assert abs(found[n, d].item() - (rows[n, d].item() - mean) / length) < 1e-10


def test_msns_objective_is_a_plain_double_loop_and_at_its_optimum():
    """Mean cross-entropy without intercept + lambda / N / 2 * sum of squared weights."""
    train = TRAIN.rows(torch.arange(30))
    rows = Features(prepared(train.features.double(), centred=True), train.labels)
    strength = MSN_REGULARISATION / 30
    model = fit_logistic(rows, strength, intercept=False)
    assert not model.biases.any()
    weights, loss = model.weights, 0.0
    gradient = strength * weights
    for n in range(30):
        logits = [
            sum(a * b for a, b in zip(rows.features[n].tolist(), weights[:, c].tolist(), strict=True))
            for c in range(10)
        ]
        total = sum(math.exp(logit) for logit in logits)
        loss -= (logits[train.labels[n]] - math.log(total)) / 30
        for c in range(10):
            share = math.exp(logits[c]) / total - float(c == train.labels[n])
            gradient[:, c] += share * rows.features[n] / 30
    loss += strength / 2 * sum(weight**2 for weight in weights.flatten().tolist())
    assert abs(loss - model.loss) < 1e-10
    assert gradient.abs().max() < 1e-6


def test_msns_protocol_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    result = lowshot(TRAIN, TEST, Share(per_class=20), seeds=(3,), protocol="msn")
    rows = balanced_subset(TRAIN.labels, per_class=20, seed=3)
    keys, queries = (prepared(f.double(), centred=True).numpy() for f in (TRAIN.features[rows], TEST.features))
    reference = linear_model.LogisticRegression(C=1 / MSN_REGULARISATION, fit_intercept=False, max_iter=5000, tol=1e-8)
    accuracy = 100 * reference.fit(keys, TRAIN.labels[rows].numpy()).score(queries, TEST.labels.numpy())
    assert result.mean == pytest.approx(accuracy, abs=0.3)
    assert result != lowshot(TRAIN, TEST, Share(per_class=20), seeds=(3,))


def test_a_list_is_the_same_for_every_seed():
    ids = tuple(balanced_subset(TRAIN.labels, per_class=5, seed=4).tolist())
    listed = lowshot(TRAIN, TEST, Listed("1percent.txt", ids), seeds=(0,))
    assert listed.top1 == lowshot(TRAIN, TEST, Share(per_class=5), seeds=(4,)).top1
    said = json.loads(json.dumps(listed.to_json()))
    assert said["labels"] == said["share"]["file"] == "1percent.txt"
    other = Listed("1percent.txt", ids[1:]).to_json()
    assert said["share"]["fingerprint"] != other["fingerprint"]


def test_what_was_kept_is_of_both_data_sets(tmp_path, monkeypatch):
    """An outcome on other test images, or after other training images, is none of this one's, nor is one of labels that were
    corrected since."""

    def stored(path, labels="first"):
        return SimpleNamespace(manifest=SimpleNamespace(fingerprint=path.name), labels_hash=labels)

    monkeypatch.setattr(finetune_module, "Beton", stored)
    monkeypatch.setattr(
        finetune_module, "finetune", lambda network, train, test, *_: 10 * int(train.path.stem) + int(test.path.stem)
    )
    network = FrozenNetwork.pixels(8, torch.device("cpu"))

    def top1(train: int, test: int) -> float:
        one, other = (LabelledImages(Path(f"{n}.beton"), TRAIN, torch.arange(2000), 2000) for n in (train, test))
        settings = FinetuneConfig(), LoaderConfig("torch", 8, 1), Share(per_class=1)
        return finetune_module.finetune_lowshot(network, one, other, *settings, (0,), keep_in=tmp_path).mean

    pairs = [(train, test) for train in (1, 2) for test in (3, 4)]
    assert [top1(*pair) for pair in pairs] == [13, 14, 23, 24]
    again = finetune_module.finetune
    monkeypatch.setattr(finetune_module, "finetune", None)
    assert [top1(*pair) for pair in pairs] == [13, 14, 23, 24]
    monkeypatch.setattr(finetune_module, "finetune", lambda *given: 1 + again(*given))
    monkeypatch.setattr(finetune_module, "Beton", lambda path: stored(path, "corrected"))
    assert [top1(*pair) for pair in pairs] == [14, 15, 24, 25]
