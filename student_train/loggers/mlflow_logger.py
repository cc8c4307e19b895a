"""MLflow, as ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` (else rob) have it; without them a file of the working
directory."""

import os
import time
from collections.abc import Mapping

from ..run_folder import flat_settings
from .logger import Logger, Opening

MOST_LETTERS = 500
"""Of the value of a parameter."""


def open_logger(opening: Opening) -> Logger:
    return MlflowLogger(opening)


class MlflowLogger:
    """``key`` is MLflow's own id of the run."""

    def __init__(self, opening: Opening) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._client, self._metric = MlflowClient(), Metric
        if not opening.is_new:
            self.key = opening.key
            self._client.update_run(self.key, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rob")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.key = self._client.create_run(experiment, run_name=opening.out.resolve().name).info.run_id
        params = [Param(key, str(value)[:MOST_LETTERS]) for key, value in flat_settings(opening.settings).items()]
        for start in range(0, len(params), 100):  # as many as a server takes at a time
            self._client.log_batch(self.key, params=params[start : start + 100])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(
            self.key, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.key, "FINISHED" if finished else "KILLED")
