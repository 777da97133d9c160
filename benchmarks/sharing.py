"""What a sweep saves by keeping the base and the questions between the jobs of one process.

    python benchmarks/sharing.py                                 # bundled model, bundled questions
    python benchmarks/sharing.py --random small                  # a larger base on the CPU
    python benchmarks/sharing.py --model google/gemma-2b --trainer gpu data=medmcqa

Makes what every job of `peft=A,B,...` needs before its first step, its questions and its base, once
for each of twelve adapters: as a sweep does, and as twelve commands would. Prints one JSON line.
Training itself and the start of Python are left out; the start is timed beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.loading import SIZES, write_random_model  # noqa: E402
from medqlora import instantiation, pipeline  # noqa: E402
from medqlora.config import compose  # noqa: E402
from medqlora.finetuning import attach_adapter  # noqa: E402

ADAPTERS = [
    *("lora_r4", "lora_r8", "lora_r16", "lora_r32", "lora_r64", "lora_attention", "lora_mlp"),
    *("rslora_r16", "dora_r16", "ia3", "vera", "norms"),
]


def prepare(overrides: list[str], *, share: bool, adapters: list[str]) -> dict[str, float]:
    """Seconds that the questions and the base of all jobs take, adapters put on and let go."""
    seconds = {"questions": 0.0, "base": 0.0}
    pipeline.forget_kept()
    for adapter in adapters:
        cfg = compose("train", [*overrides, f"peft={adapter}"])
        start = time.perf_counter()
        pipeline.build_datamodule(cfg, share=share).setup()
        seconds["questions"] += time.perf_counter() - start
        start = time.perf_counter()
        base = pipeline.build_base(cfg, share=share)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds["base"] += time.perf_counter() - start
        attach_adapter(base, instantiation.make(cfg.peft))
    pipeline.forget_kept()
    return {key: round(value, 3) for key, value in seconds.items()}


def main() -> None:
    """Time both ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="hub name or folder")
    source.add_argument("--random", choices=sorted(SIZES), help="make a random model of this size")
    parser.add_argument("--trainer", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("overrides", nargs="*", help="of train, such as data=medmcqa quant=int8")
    arguments = parser.parse_args()
    words = ["data=sample", "model=tiny_gemma", f"trainer={arguments.trainer}", "quant=nf4"]
    with tempfile.TemporaryDirectory() as temporary:
        model = arguments.model
        if arguments.random:
            model = f"{temporary}/{arguments.random}"
            device = "cuda" if arguments.trainer == "gpu" else "cpu"
            write_random_model(Path(model), SIZES[arguments.random], device)
            for file in (ROOT / "medqlora/assets/tiny_gemma").glob("*token*"):
                shutil.copy(file, model)
        if model:
            words += [f"model.path={model}", "model.revision=null"]
        words += arguments.overrides
        prepare(words, share=False, adapters=ADAPTERS[:1])  # first calls, files into the cache
        found = {
            "apart": prepare(words, share=False, adapters=ADAPTERS),
            "shared": prepare(words, share=True, adapters=ADAPTERS),
        }
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import medqlora.train"], check=True, cwd=ROOT)
    print(
        json.dumps(
            {
                "jobs": len(ADAPTERS),
                "model": arguments.model or arguments.random or "tiny_gemma",
                **{f"{name}_seconds": seconds for name, seconds in found.items()},
                "start_of_python_seconds": round(time.perf_counter() - start, 2),
                "device": torch.cuda.get_device_name() if arguments.trainer == "gpu" else "cpu",
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
