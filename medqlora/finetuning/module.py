"""MCQAModule: the LightningModule that trains an adapter to answer multiple-choice questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from medqlora.acceleration import last_hidden, make_room
from medqlora.errors import CheckpointError
from medqlora.evaluation.metrics import LetterMetrics, PredictionCollector
from medqlora.evaluation.scoring import letter_scores
from medqlora.finetuning import adalora
from medqlora.finetuning.adapters import count_trainable, trainable_state
from medqlora.finetuning.losses import Loss
from medqlora.finetuning.parallel import AdapterParallel
from medqlora.schema import PackedBatch

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]

ADALORA_STATE = "adalora"


class MCQAModule(LightningModule):
    """Trains the adapter of a frozen base model and scores letters.

    The base weights are never in a checkpoint: only what is trained.

    Args:
        model: Base model with its adapter, switched to packed attention.
        letter_ids: Token ids of the answer letters, in option order.
        letter_rows: Rows of the output embedding that belong to them.
        loss: What is minimised; None for scoring only.
        optimizer: Makes the optimiser from named parameters; None for scoring only.
        scheduler: Makes the schedule from the optimiser and `num_training_steps`; None keeps the
            rate.
        num_training_steps: Updates of the run.
    """

    letter_rows: Tensor
    letter_ids: Tensor
    window_count: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        letter_ids: Sequence[int],
        letter_rows: Float[Tensor, "letter width"],
        loss: Loss | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        num_training_steps: int | None = None,
    ) -> None:
        super().__init__()
        # The base is rebuilt from its source; what must match is checked in `on_load_checkpoint`.
        self.strict_loading = False
        self.model = model
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.num_training_steps = num_training_steps
        self.register_buffer("letter_rows", letter_rows.detach().clone(), persistent=False)
        self.register_buffer("letter_ids", torch.tensor(list(letter_ids)), persistent=False)
        self.register_buffer("window_count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.metrics = nn.ModuleDict({"val": LetterMetrics(), "test": LetterMetrics()})
        self.predictions = nn.ModuleDict(
            {split: PredictionCollector(len(letter_ids)) for split in ("val", "test")}
        )

    def forward(self, batch: PackedBatch) -> Float[Tensor, "question letter"]:
        """Log-probabilities of the letters, in nats."""
        return letter_scores(last_hidden(self.model, batch), self.letter_rows)

    def configure_optimizers(self) -> Any:
        """The optimiser over what is trainable, and its schedule by updates."""
        assert self.make_optimizer is not None
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        optimizer = self.make_optimizer(named)
        if self.make_scheduler is None:
            return optimizer
        assert self.num_training_steps is not None
        schedule = self.make_scheduler(optimizer, num_training_steps=self.num_training_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Switch dropout on: the base is loaded in eval mode, and Lightning leaves modes alone."""
        self.model.train()
        self.window_count.zero_()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of one packed row.

        Lightning divides by `accumulate_grad_batches`; multiplying by it here leaves plain sums in
        the gradients, which `on_before_optimizer_step` divides by the positions of the whole
        window.
        """
        assert self.loss is not None
        total, count = self.loss(self.model, batch, self.letter_rows, self.letter_ids)
        self.window_count += count
        mean = total.detach() / count.clamp(min=1)
        # Not for the bar: Lightning would read it after every row, drawn or not, and so wait for
        # the device. `ProgressBar` reads it when it draws.
        self.log(
            "train/loss",
            mean,
            batch_size=batch.num_questions,
            sync_dist=self.trainer.world_size > 1,
        )
        if (tuner := adalora.find_adalora(self.model)) is not None:
            total = total + count * adalora.orthogonality(tuner)
        return total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the summed gradients by the supervised positions of the window, on every rank.

        Equal weight for every position, however the rows of the window are filled: averages of
        averages are wrong where rows differ (transformers issue 34191). Comes before clipping.
        """
        count = self.window_count
        if (gather := getattr(optimizer, "gather_gradients", None)) is not None:
            gather()
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1:
            if isinstance(strategy, AdapterParallel):
                strategy.average_gradients(gradients)
            # Gradients are means over the ranks; the count has to be one as well.
            count = strategy.reduce(count.float(), reduce_op="mean")
        scale = cast(Tensor, count).float().clamp(min=1e-6).reciprocal()
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        self.window_count.zero_()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Let AdaLoRA move its rank budget after the update, then let go of the gradients.

        Lightning would keep them through the next forward pass, where a step is at its largest.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (tuner := adalora.find_adalora(self.model)) is not None:
            tuner.update_and_allocate(self.global_step + 1)
        optimizer.zero_grad()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Score one packed row of questions for ``val/accuracy`` and ``val/loss``."""
        self._score("val", batch)

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Score one packed row of questions for ``test/accuracy`` and ``test/loss``."""
        self._score("test", batch)

    def predict_step(
        self, batch: PackedBatch, batch_idx: int
    ) -> tuple[Int[Tensor, " question"], Float[Tensor, "question letter"]]:
        """Row numbers and letter scores; -1 marks an empty place."""
        return batch.index, self(batch)

    def on_validation_start(self) -> None:
        """Let go of recorded passes where the rows of val need their memory."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if (tokens := getattr(data, "eval_token_budget", None)) is not None:
            make_room(self.model, tokens)

    def on_validation_epoch_start(self) -> None:
        """Forget the predictions of the previous validation."""
        self._collector("val").reset()

    def on_test_epoch_start(self) -> None:
        """Forget the predictions of the previous test."""
        self._collector("test").reset()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy``, ``val/loss`` in nats over the letters, and ``val/n``."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, ``test/loss`` in nats over the letters, and ``test/n``."""
        self._log_metrics("test")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is trained, and nothing of the base, whose 4-bit weights take time to describe."""
        return {f"model.{name}": t for name, t in trainable_state(self.model).items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of AdaLoRA's rank allocator, if there is one."""
        if (tuner := adalora.find_adalora(self.model)) is not None:
            checkpoint[ADALORA_STATE] = adalora.state_of(tuner)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not set every trained weight.

        Raises:
            CheckpointError: If one is missing, unknown or of another shape.
        """
        ours = {f"model.{name}": t.shape for name, t in trainable_state(self.model).items()}
        theirs = {name: t.shape for name, t in checkpoint["state_dict"].items()}
        wrong = sorted(
            {n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)},
        )
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"the checkpoint does not fit this adapter: {len(wrong)} weights differ, such as "
                f"{name} (checkpoint {_shape(theirs.get(name))}, model {_shape(ours.get(name))}). "
                "Resume with the same peft, quant and model options."
            )
        if (tuner := adalora.find_adalora(self.model)) is not None:
            adalora.restore(tuner, checkpoint[ADALORA_STATE], self.letter_rows.device)

    @property
    def num_trainable(self) -> int:
        """Number of trainable numbers."""
        return count_trainable(self.model)

    def _collector(self, split: str) -> PredictionCollector:
        return cast(PredictionCollector, self.predictions[split])

    def _score(self, split: str, batch: PackedBatch) -> None:
        scores = self(batch)
        cast(LetterMetrics, self.metrics[split]).update(scores, batch.answer)
        self._collector(split).update(scores, batch.index)

    def _log_metrics(self, split: str) -> None:
        metrics = cast(LetterMetrics, self.metrics[split])
        values = metrics.compute()
        for name in ("accuracy", "loss", "n"):
            # torchmetrics has summed over the ranks: the mean of equal values changes nothing.
            self.log(f"{split}/{name}", values[name].float(), prog_bar=name != "n", sync_dist=True)
        metrics.reset()


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))
