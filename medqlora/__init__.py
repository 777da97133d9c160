"""QLoRA of Gemma-2B on medical multiple-choice questions."""

import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medqlora.pipeline import load_run as load_run

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:
    # As a command: its imports make a million objects that stay, which the collector would visit
    # again and again, for a seventh of the time. `entry.command` switches it on.
    gc.disable()
    # Before torch reads it: the blocks that its allocator takes of a GPU may grow, so that fewer
    # holes are left between tensors.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # cuBLAS takes 32 MiB on a Hopper for every stream and thread that multiplies; a quarter is as
    # fast here (`benchmarks/README.md`).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    # Threads of a CPU operation spin for milliseconds until the last of them is done. Where others
    # use the cores as well, that one may have none, and everything takes many times as long.
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"

# On the CPU bitsandbytes looks for a faster kernel on the hub and warns when the finder is not
# installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Where torchao is installed, transformers imports it, and it tells of kernels for other hardware.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """`load_run(dir).predict(questions)`, imported on first use: `pipeline` takes seconds."""
    if name == "load_run":
        from medqlora.pipeline import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
