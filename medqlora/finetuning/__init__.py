"""Fine-tuning: adapters, losses, optimisers, the LightningModule, checkpoints, callbacks."""

from medqlora.finetuning.adapters import (
    FullFinetuning,
    attach_adapter,
    changes_base,
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
    Pruning,
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
    token_budget_of,
)
from medqlora.finetuning.losses import ChoiceLoss, ExplanationLoss, Loss, TokenLoss
from medqlora.finetuning.memory import OutOfMemory, fit_in_memory
from medqlora.finetuning.module import MCQAModule
from medqlora.finetuning.parallel import AdapterParallel
from medqlora.finetuning.report import ValidationReport, scored_after
from medqlora.finetuning.spectrum import (
    WeightChange,
    effective_rank,
    low_rank_singular_values,
    weight_changes,
)

__all__ = [
    "AdapterParallel",
    "AtomicCheckpointIO",
    "ChoiceLoss",
    "ExplanationLoss",
    "FullFinetuning",
    "GracefulStop",
    "GradientGuard",
    "Loss",
    "MCQAModule",
    "NaNGuard",
    "OutOfMemory",
    "PeakMemory",
    "ProgressBar",
    "Pruning",
    "RunCheckpoints",
    "RunInterrupted",
    "Throughput",
    "TokenLoss",
    "ValidationReport",
    "WeightChange",
    "attach_adapter",
    "changes_base",
    "check_identity",
    "count_trainable",
    "effective_rank",
    "find_resumable",
    "fit",
    "fit_in_memory",
    "load_adapter",
    "load_trained_weights",
    "low_rank_singular_values",
    "merge_adapter",
    "no_adapter",
    "read_checkpoint",
    "save_adapter",
    "scored_after",
    "token_budget_of",
    "trainable_state",
    "weight_changes",
]
