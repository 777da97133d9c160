"""What jobs of a sweep in one process compile again: graphs and seconds of each.

    python benchmarks/recompiling.py

Four short jobs of the bundled model on the CPU, plain layers, `acceleration.compile=default`: one
adapter under two seeds, another, and the first again. Needs a C++ compiler. Prints a line a job.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from medqlora import train as verb  # noqa: E402
from medqlora.config import compose  # noqa: E402

JOBS = [("lora_r4", 1), ("lora_r4", 2), ("lora_r8", 1), ("lora_r4", 3)]
SHORT = [
    "experiment=quickstart",
    "acceleration.compile=default",
    "acceleration.fused=off",
    "trainer.max_steps=2",
    "data.limit_val=8",
    "data.limit_test=8",
    "baselines=[]",
    "callbacks.progress=null",
]


def main() -> None:
    """Run the jobs as those of one sweep."""
    with tempfile.TemporaryDirectory() as caches:
        # Nothing that was compiled before today counts.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        verb.is_sweep = lambda: True
        for number, (adapter, seed) in enumerate(JOBS):
            cfg = compose("train", [*SHORT, f"peft={adapter}", f"seed={seed}"])
            folder = Path(caches) / "sweeps" / "recompiling" / str(number)
            folder.mkdir(parents=True)
            before, started = counters["stats"]["unique_graphs"], time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                verb.train(cfg, folder)
            result = {
                "peft": adapter,
                "seed": seed,
                "graphs": counters["stats"]["unique_graphs"] - before,
                "seconds": round(time.perf_counter() - started, 1),
                "torch": torch.__version__,
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
