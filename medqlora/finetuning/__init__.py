"""Fine-tuning: adapters, losses, optimisers, the LightningModule, checkpoints, callbacks."""

from medqlora.finetuning.adapters import (
    FullFinetuning,
    attach_adapter,
    count_trainable,
    load_adapter,
    merge_adapter,
    no_adapter,
    save_adapter,
    trainable_state,
)
from medqlora.finetuning.callbacks import (
    GracefulStop,
    GradientGuard,
    NaNGuard,
    PeakMemory,
    ProgressBar,
    RunInterrupted,
    Throughput,
    fit,
)
from medqlora.finetuning.checkpoints import (
    AtomicCheckpointIO,
    RunCheckpoints,
    check_identity,
    find_resumable,
    load_trained_weights,
    read_checkpoint,
)
from medqlora.finetuning.losses import ChoiceLoss, ExplanationLoss, Loss, TokenLoss
from medqlora.finetuning.module import MCQAModule

__all__ = [
    "AtomicCheckpointIO",
    "ChoiceLoss",
    "ExplanationLoss",
    "FullFinetuning",
    "GracefulStop",
    "GradientGuard",
    "Loss",
    "MCQAModule",
    "NaNGuard",
    "PeakMemory",
    "ProgressBar",
    "RunCheckpoints",
    "RunInterrupted",
    "Throughput",
    "TokenLoss",
    "attach_adapter",
    "check_identity",
    "count_trainable",
    "find_resumable",
    "fit",
    "load_adapter",
    "load_trained_weights",
    "merge_adapter",
    "no_adapter",
    "read_checkpoint",
    "save_adapter",
    "trainable_state",
]
