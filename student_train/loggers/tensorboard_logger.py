"""TensorBoard: event files in the run's folder. ``tensorboard --logdir runs`` shows all runs."""

from collections.abc import Mapping

from .logger import Logger, Opening


def open_logger(opening: Opening) -> Logger:
    return TensorboardLogger(opening)


class TensorboardLogger:
    """Each time the run goes on there is one more event file, which TensorBoard shows as one curve."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(opening.out / "tensorboard"))
        if opening.is_new:
            rows = [f"| {name} | {value} |".replace("\n", " ") for name, value in opening.settings.items()]
            self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill loses nothing that it is thought to know

    def close(self, finished: bool) -> None:
        self._writer.close()
