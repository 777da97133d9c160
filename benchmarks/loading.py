"""Peak memory and time of loading a base model, for each way of storing it.

    python benchmarks/loading.py --random gemma-2b --device cuda     # full size
    python benchmarks/loading.py --model google/gemma-2b --quant nf4 nf4_full --cache
    python benchmarks/loading.py --random small --device cpu

Prints one JSON line per option. Each load runs in a process of its own, so that peaks are its own.
Peak host memory is VmHWM of that process, interpreter, torch and CUDA included; "host_before_gb"
is what they took before. With --cache each option is loaded twice more: once writing a quantised
copy, once reading it. Random weights say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CONF = Path(__file__).resolve().parent.parent / "conf" / "quant"
DEFAULT = ["none", "int8", "fp4", "nf4", "nf4_single", "nf4_int8_embedding", "nf4_full"]
SIZES = {
    "gemma-2b": {
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
    "small": {
        "vocab_size": 64_000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
}


def write_random_model(folder: Path, size: dict[str, int], device: str) -> None:
    """Write normal weights in bf16, one layer at a time, as transformers names them."""
    from transformers import AutoModelForCausalLM, GemmaConfig

    config = GemmaConfig(**size)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("lm_head"):
            part = ".".join(name.split(".")[:3]) if ".layers." in name else "rest"
            shards.setdefault(part, {})[name] = tuple(parameter.shape)
    weight_map = {}
    generator = torch.Generator(device).manual_seed(0)
    for number, names in enumerate(shards.values()):
        file = f"model-{number:05}.safetensors"
        tensors = {
            name: (0.02 * torch.randn(shape, generator=generator, device=device)).bfloat16().cpu()
            for name, shape in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def host_peak_gb() -> float:
    """Highest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError("this system does not report VmHWM")


def measure(
    model: str, revision: str | None, option: str, device: str, cache: str | None
) -> dict[str, object]:
    """Load once and say what it took."""
    from medqlora.quantization import QuantConfig, footprint, load_base

    node = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    quant = QuantConfig(**{k: v for k, v in node.items() if not k.startswith("_")})
    cuda = device.startswith("cuda")
    if cuda:
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    before = host_peak_gb()
    start = time.perf_counter()
    loaded = load_base(model, quant, revision=revision, device=device, cache_dir=cache)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    size = footprint(loaded)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return {
        "quant": option,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "seconds": round(seconds, 3),
        "weight_gb": round(size.weight_gb, 4),
        "weight_gb_16bit": round(size.weight_gb_16bit, 4),
        "parts_gb": {k: round(v["num_bytes"] / 1e9, 4) for k, v in size.parts.items()},
        "peak_device_gb": peak and round(peak, 4),
        "peak_device_over_weights": peak and round(peak / size.weight_gb, 3),
        "peak_host_gb": round(host_peak_gb(), 3),
        "host_before_gb": round(before, 3),
        "torch": torch.__version__,
    }


def main() -> None:
    """Run every option in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="hub name or folder")
    source.add_argument("--random", choices=sorted(SIZES), help="make a random model of this size")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--quant", nargs="+", default=DEFAULT, help="options of conf/quant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", action="store_true", help="time a quantised copy as well")
    parser.add_argument("--folder", type=Path, help="where a random model is kept")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        option, cache = arguments.one
        print(
            json.dumps(
                measure(
                    arguments.model, arguments.revision, option, arguments.device, cache or None
                )
            )
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        model = arguments.model
        if arguments.random:
            folder = (arguments.folder or Path(temporary)) / arguments.random
            if not (folder / "config.json").exists():
                write_random_model(folder, SIZES[arguments.random], arguments.device)
            model = str(folder)
        for option in arguments.quant:
            runs = ["", f"{temporary}/cache", f"{temporary}/cache"] if arguments.cache else [""]
            for label, cache in zip(("plain", "writes copy", "reads copy"), runs, strict=False):
                command = [sys.executable, __file__, "--model", model, "--device", arguments.device]
                if arguments.revision:
                    command += ["--revision", arguments.revision]
                run = subprocess.run(
                    [*command, "--one", option, cache], capture_output=True, text=True, check=False
                )
                if run.returncode:
                    last = (run.stderr.strip().splitlines() or ["no message"])[-1]
                    print(json.dumps({"quant": option, "run": label, "error": last}), flush=True)
                    break
                print(json.dumps({"run": label, **json.loads(run.stdout)}), flush=True)


if __name__ == "__main__":
    main()
