"""What each way of storing the base costs: bits, bytes at full size, rounding error, answers.

    python benchmarks/quantization.py                       # writes benchmarks/quantization.json
    python benchmarks/quantization.py --quant nf4 nf4_full  # only these, the others kept

Runs offline on a CPU. For every option of conf/quant that works here: bits of a weight and the
relative error of one layer of normal weights; bytes of Gemma-2B, counted from the tensors of a
model of its shape with random weights and one of its 18 equal blocks, which is taken 18 times; the
bundled toy Gemma on its test questions, without adapter, beside quant=none. An option that cannot
run here keeps the line that refused it. docs/quantization.md shows the result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loading import SIZES, write_random_model  # noqa: E402
from medqlora.errors import MedQLoRAError  # noqa: E402
from medqlora.evaluation import compare_family, hardware, read_predictions, read_runs, versions  # noqa: E402
from medqlora.quantization import (  # noqa: E402
    QuantConfig,
    dequantized_weight,
    footprint,
    load_base,
)
from medqlora.quantization.config import require_extra  # noqa: E402
from medqlora.quantization.linear import quantize_linear, stored_tensors  # noqa: E402

CONF = ROOT / "conf" / "quant"
SHAPE = (2048, 2048)
STANDARD_DEVIATION = 0.02
REFERENCE = "none"
NUM_BLOCKS = SIZES["gemma-2b"]["num_hidden_layers"]
ARGUMENTS = ["data=sample", "model=tiny_gemma", "peft=none", "trainer=cpu", "split=test"]


def read_option(option: str) -> QuantConfig:
    """The option as `pipeline` would make it."""
    node = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    return QuantConfig(**{key: value for key, value in node.items() if not key.startswith("_")})


def measure_layer(quant: QuantConfig) -> dict[str, float]:
    """Bits of a weight and relative error (Frobenius norms) of one layer of normal weights."""
    generator = torch.Generator().manual_seed(0)
    original = STANDARD_DEVIATION * torch.randn(SHAPE, generator=generator)
    weight = original.bfloat16().to(quant.torch_dtype)
    if quant.data_type == "none":
        stored, num_bytes = weight, weight.nbytes
    else:
        require_extra(quant)
        layer = quantize_linear(weight, quant, torch.device("cpu"))
        own, _ = stored_tensors(layer)
        stored, num_bytes = dequantized_weight(layer), sum(tensor.nbytes for tensor in own)
    error = (stored.float() - weight.float()).norm() / weight.float().norm()
    return {
        "bits_per_weight": round(8 * num_bytes / weight.numel(), 4),
        "relative_error": round(float(error), 4),
    }


def score_toy(options: list[str]) -> dict[str, dict[str, Any]]:
    """The bundled model with each option on the bundled test questions, against quant=none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "medqlora.evaluate", "-m", f"quant={','.join(options)}"]
        arguments = [*ARGUMENTS, "evaluate.figures=false", f"hydra.sweep.dir={folder}"]
        # A job that is refused, as blocks wider than the toy's layers are, fails the command.
        subprocess.run([*command, *arguments], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        runs = dict(zip(options, read_runs(folder), strict=True))  # job 0 is the first option
        done = {name: run for name, run in runs.items() if run.status == "completed"}
        predictions = {name: [read_predictions(run.run_dir)] for name, run in done.items()}
    found: dict[str, dict[str, Any]] = {
        name: {"refused": run.error} for name, run in runs.items() if name not in done
    }
    letters = {name: [p.prediction for p in rows[0]] for name, rows in predictions.items()}
    family = {c.name_b: c for c in compare_family(predictions, REFERENCE)}
    for name, run in done.items():
        test = run.metrics["test"]
        found[name] = {key: test[key] for key in ("n", "accuracy", "ci_low", "ci_high")}
        found[name]["majority_accuracy"] = test["majority_accuracy"]
        if (pair := family.get(name)) is not None:
            changed = zip(letters[name], letters[REFERENCE], strict=True)
            found[name] |= {
                "difference": pair.difference,
                "p_holm": pair.p_holm,
                "answers_changed": sum(a != b for a, b in changed),
            }
    return found


def measure_size(model: Path, quant: QuantConfig) -> dict[str, Any]:
    """GB of a full-size Gemma-2B by part, from a model with one block of its layers."""
    measured = footprint(load_base(str(model), quant))
    counted = dict.fromkeys(measured.parts, 0)
    in_block = dict.fromkeys(measured.parts, 0)
    for name, layer in measured.layers.items():
        counted[layer.part] += layer.num_bytes
        in_block[layer.part] += layer.num_bytes * (".layers.0." in name)
    counted["other"] = measured.parts["other"]["num_bytes"]
    parts = {part: counted[part] + (NUM_BLOCKS - 1) * in_block[part] for part in counted}
    return {
        "weight_gb": round(sum(parts.values()) / 1e9, 4),
        "parts_gb": {part: round(size / 1e9, 4) for part, size in parts.items() if size},
    }


def main() -> None:
    """Measure every option and write one JSON file."""
    names = sorted(path.stem for path in CONF.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quant", nargs="+", default=names, choices=names, help="options")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quantization.json")
    arguments = parser.parse_args()
    options: dict[str, dict[str, Any]] = {}
    if set(arguments.quant) != set(names):
        options = json.loads(arguments.out.read_text())["options"]
    chosen = [REFERENCE, *(name for name in arguments.quant if name != REFERENCE)]
    with tempfile.TemporaryDirectory() as folder:
        block = Path(folder) / "block"
        write_random_model(block, SIZES["gemma-2b"] | {"num_hidden_layers": 1}, "cpu")
        for name in chosen:
            quant = read_option(name)
            try:
                layer = measure_layer(quant)
            except MedQLoRAError as error:
                options[name] = {"refused": str(error)}
            else:
                options[name] = {"layer": layer, "gemma_2b": measure_size(block, quant)}
            print(name, options[name], flush=True)
    for name, found in score_toy([name for name in chosen if "layer" in options[name]]).items():
        options[name]["toy"] = found
    conditions = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": hardware("cpu")["device"],
        "versions": versions(),
        "layer": f"{SHAPE[0]} x {SHAPE[1]}, normal, deviation {STANDARD_DEVIATION}, seed 0",
        "toy": "python -m medqlora.evaluate " + " ".join(ARGUMENTS),
    }
    text = json.dumps({"conditions": conditions, "options": options}, indent=1)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
