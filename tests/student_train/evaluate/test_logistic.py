"""Logistic regression: the optimum that scikit-learn finds, from one class image up to many."""

import pytest
import torch

from rob.student_train.evaluate.logistic import fit_logistic
from support.gaussians import gaussian_classes


@pytest.mark.parametrize(("count", "regularisation"), [(50, 1e-2), (300, 1e-3), (300, 1.0)])
def test_agrees_with_scikit_learn(count, regularisation):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = gaussian_classes(count, seed=1), gaussian_classes(1000, seed=2)
    ours = fit_logistic(train, regularisation)
    reference = linear_model.LogisticRegression(C=1 / (count * regularisation), max_iter=2000, tol=1e-6)
    reference.fit(train.features.double().numpy(), train.labels.numpy())
    torch.testing.assert_close(ours.weights.T, torch.from_numpy(reference.coef_), rtol=0, atol=2e-3)
    predicted = ours.logits(test.features).argmax(1)
    accuracy = 100 * (predicted == test.labels).double().mean().item()
    assert 30 < accuracy < 95
    assert accuracy == pytest.approx(
        100 * reference.score(test.features.double().numpy(), test.labels.numpy()), abs=0.2
    )


def test_the_gradient_vanishes_at_the_optimum():
    train = gaussian_classes(100, seed=1)
    model = fit_logistic(train, 1e-2)
    one_hot = torch.nn.functional.one_hot(train.labels, train.num_classes)
    residual = model.logits(train.features).softmax(1) - one_hot
    gradient = train.features.double().T @ residual / len(train) + 1e-2 * model.weights
    assert gradient.abs().max() < 1e-6
    assert residual.sum(0).abs().max() / len(train) < 1e-6
