"""What a user can do wrong, as exceptions with one-line messages.

Every message says what was given, why it cannot work, and what to type instead. Entry points print
it without a traceback and exit with `exit_code`.
"""


class MedQLoRAError(Exception):
    """A failure that was foreseen; its message is one line meant for the user.

    Also where it repeats what was given, which may have several.
    """

    exit_code = 1

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


class ConfigError(MedQLoRAError):
    """An option that cannot work or cannot take effect."""

    exit_code = 2


class DataError(MedQLoRAError):
    """A data set that cannot be read or contradicts itself; names the file and the row."""

    exit_code = 2


class ModelError(MedQLoRAError):
    """A base model or tokenizer that cannot be found, reached or used."""

    exit_code = 2


class NotFiniteError(ModelError):
    """A score of a model that is infinite or no number."""


class CheckpointError(MedQLoRAError):
    """A checkpoint or run folder that is damaged or belongs to something else."""

    exit_code = 2


class TrainingError(MedQLoRAError):
    """A run that started and could not go on, such as one with an infinite loss."""


class RunPruned(Exception):
    """The end of a run that a search gave up on; neither completed nor failed.

    Args:
        metric: What was compared.
        value: Its value.
        step: Updates that were made.
    """

    exit_code = 0

    def __init__(self, metric: str, value: float, step: int) -> None:
        super().__init__(
            f"pruned after {step} updates: {metric} {value:.4f} is worse than that of other trials"
        )
        self.metric, self.value, self.step = metric, value, step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device has no memory left."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be there
        return True
    text = str(error)
    signs = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
