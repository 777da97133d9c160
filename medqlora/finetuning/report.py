"""What a validation during training says beyond one accuracy: calibration, letters, breakdowns."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from lightning import Callback, LightningModule, Trainer

from medqlora.errors import NotFiniteError, TrainingError
from medqlora.evaluation.metrics import PredictionCollector, summarise
from medqlora.schema import LETTERS, Prediction, Question

log = logging.getLogger(__name__)

MakeFigures = Callable[[Mapping[str, Any], Sequence[Prediction]], Mapping[str, Any]]


class ValidationReport(Callback):
    """Logs each validation in full.

    Every logger, so `metrics.csv` as well, gets the numbers: ``val/macro_accuracy``, ``val/ece``,
    ``val/brier``, ``val/letter_share/A`` ... and the accuracy of each group,
    ``val/subject_name/Anatomy`` ... (counts stay the same: they are in `metrics.json`). Weights &
    Biases also gets a table of each breakdown with n and interval, and figures. Without labels
    nothing but the letter shares is logged.

    Args:
        questions: Questions of the val split, in its order.
        figures: Makes matplotlib figures of a section and its predictions; None for none.
    """

    def __init__(
        self, questions: Sequence[Question] = (), *, figures: MakeFigures | None = None
    ) -> None:
        self.questions = questions
        self.figures = figures

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarise what all processes have scored and log it.

        Raises:
            TrainingError: If a score is not finite.
        """
        if trainer.sanity_checking or not self.questions:
            return
        collector = cast(Any, pl_module).predictions["val"]
        assert isinstance(collector, PredictionCollector)
        # Every process takes part in gathering, though only the first one writes.
        predictions = collector.predictions(self.questions, "val")
        scored = {prediction.id for prediction in predictions}
        # `trainer.limit_val_batches` may have left some out.
        questions = [q for q in self.questions if q.id in scored]
        with scored_after(trainer.global_step):
            section = summarise(predictions, questions)
        for name, value in scalars(section):
            pl_module.log(f"val/{name}", value, sync_dist=True)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                inner = getattr(logger, "inner", logger)  # what a guarded logger has started
                if type(inner).__name__ == "WandbLogger":
                    self._log_media(inner, section, predictions, trainer.global_step)

    def _log_media(
        self, logger: Any, section: Mapping[str, Any], predictions: list[Prediction], step: int
    ) -> None:
        columns = ["group", "n", "accuracy", "ci_low", "ci_high"]
        figures = self.figures or (lambda *_: {})
        try:
            for name, groups in section["by"].items():
                rows = [[group, *(v[key] for key in columns[1:])] for group, v in groups.items()]
                if rows:
                    logger.log_table(f"val/by_{name}", columns=columns, data=rows, step=step)
            for name, figure in figures(section, predictions).items():
                logger.log_image(f"val/figure_{name}", [_pixels(figure)], step=step)
        except Exception as error:  # a lost connection must not lose the run
            log.warning("W&B did not take the validation report: %s", error)


@contextlib.contextmanager
def scored_after(num_updates: int) -> Iterator[None]:
    """Scores that are not finite are the failure of the training that came before.

    Raises:
        TrainingError: In the place of `NotFiniteError`.
    """
    try:
        yield
    except NotFiniteError as error:
        raise TrainingError(
            f"after {num_updates} updates the model gives no finite scores; the last good "
            "checkpoint is kept. Lower optimizer.lr or trainer.gradient_clip_val."
        ) from error


def scalars(section: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every number of a section that is logged after each validation."""
    for name in ("macro_accuracy", "ece", "brier"):
        if section[name] is not None:
            yield name, float(section[name])
    for letter, share in zip(LETTERS, section["letter_share"] or (), strict=False):
        yield f"letter_share/{letter}", float(share)
    for name, groups in section["by"].items():
        for group, values in groups.items():
            yield f"{name}/{group}", float(values["accuracy"])


def _pixels(figure: Any) -> np.ndarray:
    """A matplotlib figure as an image, without pyplot."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
