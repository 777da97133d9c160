"""The note of each quantisation method: what `conf/quant` says of it, and what it cost here."""

from __future__ import annotations

import json
from typing import Any

import options

PLACE = "<!-- one note a method, made by docs/tools/notes.py -->"
MATRIX = options.ROOT / "benchmarks" / "matrix.json"
MEASURED = options.ROOT / "benchmarks" / "quantization.json"


def notes() -> str:
    """A table of all methods and a section for each."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = measured["options"]
    reference = found["none"]["gemma_2b"]["weight_gb"]
    names = [path.stem for path in options.option_files("quant")]
    parts = [_conditions(measured["conditions"]), *_overview(names, found, reference)]
    for name in names:
        option = options.read_option(options.CONF / "quant" / f"{name}.yaml")
        parts += [
            f"## {name} {{ #{name} }}",
            options.prose(option.text),
            f"**Cost here.** {_cost(found.get(name, {}), reference)}{_speed(name)}",
            f"```bash\n{option.commands[0]}\n```",
            f"Every key: [`quant={name}`](options/quant.md#{name})",
        ]
    return "\n\n".join(parts)


def _conditions(conditions: dict[str, Any]) -> str:
    packages = ", ".join(
        f"{name} {conditions['versions'][name]}"
        for name in ("torch", "transformers", "bitsandbytes")
    )
    return (
        "Speed and peak memory, where given: benchmarks/matrix.py on one GPU, a random full-size "
        "Gemma-2B, 2,048 tokens a row, LoRA r=16; plain layers, as of int8, are not compiled. "
        f"All else was measured on {conditions['date']}: {conditions['device']}, {packages}. "
        f"Error and bits: one layer, {conditions['layer']}. Toy: `{conditions['toy']}`."
    )


def _overview(names: list[str], found: dict[str, Any], reference: float) -> list[str]:
    rows = ["| option | bits a weight | relative error | Gemma-2B, GB | of 16 bit | toy, points |"]
    rows.append("|---|--:|--:|--:|--:|--:|")
    for name in names:
        measured = found.get(name, {})
        layer, size = measured.get("layer", {}), measured.get("gemma_2b", {})
        gb = size.get("weight_gb")
        cells = [
            f"[`{name}`](#{name})",
            _number(layer.get("bits_per_weight"), ".3f"),
            _number(layer.get("relative_error"), ".4f"),
            _number(gb, ".2f"),
            _number(gb and 100 * gb / reference, ".0f", " %"),
            _number(_points(measured), "+.1f"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return ["\n".join(rows)]


def _points(measured: dict[str, Any]) -> float | None:
    difference = measured.get("toy", {}).get("difference")
    return None if difference is None else 100 * difference


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _speed(name: str) -> str:
    """Questions a second and peak memory on a GPU, of the options that were tried on one."""
    table = json.loads(MATRIX.read_text(encoding="utf-8"))
    rows = [row for row in table if row["quant"] == name and "overrides" not in row]
    newest = {(row["device"], row["peft"]): row for row in rows if "failed" not in row}
    text = ""
    for row in newest.values():
        if row["peft"] is None and "scored_per_second" in row:
            text += f" {row['device']}: scores {row['scored_per_second']:,.0f} questions/s."
        if row["peft"] == "lora_r16" and "questions_per_second" in row:
            peak = f" at a peak of {row['peak_gb']:.1f} GB" if row.get("peak_gb") else ""
            text += f" {row['device']}: trains {row['questions_per_second']:,.0f}{peak}."
    return text


def _cost(measured: dict[str, Any], reference: float) -> str:
    """What was measured, in words; what could not be says why."""
    if "refused" in measured:
        return f"Not measured on this machine. {measured['refused']}"
    layer, toy, size = measured["layer"], measured["toy"], measured.get("gemma_2b")
    text = (
        f"{layer['bits_per_weight']:.3f} bits a weight, "
        f"relative error {layer['relative_error']:.4f}. "
    )
    if size:
        share = size["weight_gb"] / reference
        text += (
            f"Gemma-2B takes {size['weight_gb']:.3f} GB, {100 * share:.1f} % of "
            f"{reference:.3f} GB in 16 bit (embedding {size['parts_gb']['embedding']:.3f}). "
        )
    if "refused" in toy:
        return f"{text}The toy was not scored: {toy['refused']}"
    text += (
        f"The toy has {100 * toy['accuracy']:.1f} % of {toy['n']} questions right "
        f"[{100 * toy['ci_low']:.1f}, {100 * toy['ci_high']:.1f}]; always one letter: "
        f"{100 * toy['majority_accuracy']:.1f} %"
    )
    if "difference" not in toy:
        return f"{text}. The others are compared with it."
    return (
        f"{text}; against 16 bit {100 * toy['difference']:+.1f} points, p = {toy['p_holm']:.3f} "
        f"(exact McNemar, Holm), {toy['answers_changed']} answers changed."
    )
