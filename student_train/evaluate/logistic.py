"""Multinomial logistic regression on frozen features, to its optimum."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Features


@dataclass(frozen=True)
class LogisticModel:
    """``weights`` (D, C) and ``biases`` (C,), float64; ``loss`` is the objective at the optimum."""

    weights: Tensor
    biases: Tensor
    loss: float
    iterations: int

    def logits(self, features: Tensor) -> Tensor:
        return features.to(self.weights.dtype) @ self.weights + self.biases


def fit_logistic(
    train: Features, regularisation: float, max_iterations: int = 1000, intercept: bool = True
) -> LogisticModel:
    """The minimum of mean cross-entropy + regularisation / 2 * sum of squared weights; biases are free, or none.

    scikit-learn's ``LogisticRegression(C=1 / (N * regularisation))``, by L-BFGS in float64 from zero: no seed, and the
    same answer everywhere. Runs on the features' device, which has to have float64.
    """
    features, labels = train.features.double(), train.labels
    weights = features.new_zeros(features.shape[1], train.num_classes, requires_grad=True)
    biases = features.new_zeros(train.num_classes, requires_grad=intercept)
    optimiser = torch.optim.LBFGS(
        [weights, biases] if intercept else [weights],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=10,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(torch.addmm(biases, features, weights), labels)
        loss = loss + 0.5 * regularisation * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(objective)
    loss = objective().item()
    iterations = optimiser.state[weights]["n_iter"]
    return LogisticModel(weights.detach(), biases.detach(), loss, iterations)
