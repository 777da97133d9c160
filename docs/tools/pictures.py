"""Draws the pictures of docs/concepts.md.

    python docs/tools/pictures.py

Each is an SVG of its own, readable where the repository is browsed, in light and dark; on the site
it stands in the page and takes the page's colours. `packing.svg` shows what `medqlora.data` really
does with bundled questions, `layers.svg` the rule that tests/test_layers.py checks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs" / "pictures"

# Okabe and Ito, as the figures of reports: told apart also by the colour-blind.
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLE = """
text{font-family:system-ui,sans-serif;font-size:13px;fill:var(--md-default-fg-color,#222)}
.s{font-size:11px;opacity:.75}.b{font-weight:600}.m{text-anchor:middle}.e{text-anchor:end}
.c{font-family:ui-monospace,monospace;font-size:12px}
.box{fill:var(--md-code-bg-color,#f5f5f5);stroke:var(--md-default-fg-color--light,#777)}
.key{fill:#0072B2;fill-opacity:.16;stroke:#0072B2}.warm{fill:#E69F00;fill-opacity:.2;stroke:#E69F00}
.green{fill:#009E73;fill-opacity:.16;stroke:#009E73}
.pad{fill:none;stroke:var(--md-default-fg-color--lighter,#aaa);stroke-dasharray:3 3}
.line{fill:none;stroke:var(--md-default-fg-color--light,#777);stroke-width:1.4}
.tip{fill:var(--md-default-fg-color--light,#777)}
"""
DARK = """
@media (prefers-color-scheme:dark){svg:root text{fill:#ddd}svg:root .box{fill:#2a2c33}}
"""


def svg(name: str, width: int, height: int, title: str, body: Iterable[str]) -> str:
    """A whole picture; its rules hold for itself only."""
    style = (
        "".join(f"#{name} {rule}" if rule[0] in ".t" else rule for rule in _rules(STYLE))
        + DARK.strip()
    )
    marker = (
        f'<marker id="{name}-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse"><path class="tip" d="M0 0L8 4L0 8z"/>'
        "</marker>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" id="{name}" role="img" '
        f'viewBox="0 0 {width} {height}" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n<defs>{marker}</defs>\n"
        + "\n".join(body).replace("url(#tip)", f"url(#{name}-tip)")
        + "\n</svg>\n"
    )


def _rules(style: str) -> list[str]:
    return [f"{rule}}}" for rule in style.replace("\n", "").split("}") if rule]


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """One line of text."""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{name}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, extra: str = "") -> str:
    """A box with slightly round corners."""
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'rx="3"{extra}/>'
    )


def box(
    x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str = "box"
) -> list[str]:
    """A box with its name in bold and small lines below."""
    top = y + height / 2 - 7.5 * (len(lines) - 1) + 4.5
    middle = x + width / 2
    return [
        rect(x, y, width, height, kind),
        *(
            text(middle, top + 15 * i, line, "m b" if i == 0 else "m s")
            for i, line in enumerate(lines)
        ),
    ]


def arrow(*points: tuple[float, float]) -> str:
    """A line through some points that ends in a tip."""
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path class="line" d="{path}" marker-end="url(#tip)"/>'


def tile(x: float, y: float, width: float, height: float, hue: int, label: str) -> list[str]:
    """A question: its colour and number."""
    colour = HUES[hue % len(HUES)]
    style = f' style="fill:{colour};fill-opacity:.55;stroke:{colour}"'
    return [
        rect(x, y, width, height, "", style),
        text(x + width / 2, y + height / 2 + 4, label, "m s") if width > 14 else "",
    ]


SHARED = ' style="fill:currentColor;fill-opacity:.45;stroke:none"'

# --- pictures -------------------------------------------------------------------------------------


def packing() -> str:
    """The first bundled questions, one a row with padding, and packed; then who sees whom."""
    shared, own, rows, budget = _packed_rows()
    scale, left = 0.82, 24
    lengths = [shared + length for length in own]
    longest = max(lengths)
    body = [text(left, 22, f"One question a row, padded to the longest ({longest} tokens)", "b")]
    columns, height = 4, 16
    width = 190
    for i, length in enumerate(lengths):
        x, y = left + (i % columns) * (width + 16), 34 + (i // columns) * (height + 6)
        part = width * length / longest
        body += [rect(x, y, width, height, "pad"), *tile(x, y, part, height, i, str(i + 1))]
    used = sum(lengths)
    y = 34 + -(-len(lengths) // columns) * (height + 6) + 12
    share = 100 * used / (longest * len(lengths))
    body.append(
        text(left, y, f"{share:.0f} % of {longest * len(lengths):,} places hold a token.", "s")
    )
    y += 34
    body.append(text(left, y, f"The same questions packed: rows of exactly {budget} tokens", "b"))
    y += 12
    for row in rows:
        body.append(rect(left, y, budget * scale, 26, "pad"))
        body.append(rect(left, y, shared * scale, 26, "", SHARED))
        x = left + shared * scale
        for question in row:
            part = own[question] * scale
            body += tile(x, y, part, 26, question, str(question + 1))
            x += part
        y += 34
    share = 100 * (sum(own) + shared * len(rows)) / (budget * len(rows))
    held = f"{share:.1f} % of {budget * len(rows):,} places hold a token"
    fewer = shared * (len(lengths) - len(rows))
    also = f"; the {shared} with which every prompt begins stand in front once: {fewer} fewer."
    body.append(text(left, y + 6, held + also, "s"))
    y += 40
    body += _mask(left, y, [own[question] for question in rows[0][:4]], rows[0])
    return svg("packing", 872, round(y + 214), "Questions padded, packed, and what each sees", body)


def _mask(left: float, y: float, sizes: list[int], row: list[int]) -> list[str]:
    side, front = 170.0, 12.0  # the shared tokens are drawn wider than they are
    unit = (side - front) / sum(sizes)
    heading = "What a token sees: its own question, backwards, and what all share"
    body = [
        text(left, y, f"{heading} (first four of row 1)", "b"),
        rect(left, y + 14, side, side, "pad"),
        rect(left, y + 14 + front, front, side - front, "", SHARED),
        f'<path d="M{left:g} {y + 14:g} v{front:g} h{front:g} Z"{SHARED}/>',
    ]
    start = front
    for question, size in zip(row, sizes, strict=False):
        part = size * unit
        x, top = left + start, y + 14 + start
        colour = HUES[question % len(HUES)]
        path = f"M{x:g} {top:g} L{x:g} {top + part:g} L{x + part:g} {top + part:g} Z"
        body.append(f'<path d="{path}" style="fill:{colour};fill-opacity:.55;stroke:{colour}"/>')
        start += part
    words = (
        "The grey front: BOS and what stands before every stem, with few shots those too",
        "position_ids go on from it in each question",
        "cu_seqlens holds where each one starts: attention never crosses it",
        "last points at the token before each answer letter",
        "Every row has the same shapes, so one compilation serves the run",
    )
    body += [text(left + side + 30, y + 50 + 28 * i, line) for i, line in enumerate(words)]
    return body


def _packed_rows() -> tuple[int, list[int], list[list[int]], int]:
    """The first two rows that the loader gives of the bundled training questions.

    Returns:
        Tokens they share, the others of each question, the questions of each row, its length.
    """
    from medqlora.config import compose
    from medqlora.pipeline import build_datamodule

    budget = 1024
    config = compose("train", ["experiment=quickstart", f"data.token_budget={budget}"])
    datamodule = build_datamodule(config)
    datamodule.setup()
    lengths: list[int] = []
    rows: list[list[int]] = []
    shared = 0
    for batch, _ in zip(datamodule.loader("train"), range(2), strict=False):
        sizes = batch.cu_seqlens[: batch.num_questions + 1].diff().tolist()
        rows.append(list(range(len(lengths), len(lengths) + len(sizes))))
        lengths += sizes
        shared = batch.prefix_length
    return shared, lengths, rows, budget


def flow() -> str:
    """One run from YAML to report."""
    body: list[str] = []
    top = [
        ("conf/*.yaml", ["one option a group"], "box"),
        ("Question", ["stem, 4 options,", "answer, subject"], "green"),
        ("prompt", ["text; never the", "explanation"], "green"),
        ("tokens", ["exactly one BOS,", "letter_ids"], "green"),
        ("PackedBatch", ["rows of exactly", "token_budget"], "green"),
    ]
    for i, (name, lines, kind) in enumerate(top):
        body += box(10 + 172 * i, 30, 140, 66, [name, *lines], kind)
        if i:
            body.append(arrow((10 + 172 * i - 32, 63), (10 + 172 * i - 3, 63)))
    body += [text(182, 20, "medqlora.data", "s c"), text(10, 136, "medqlora.quantization", "s c")]
    body += box(
        10, 146, 150, 76, ["base model", "frozen; NF4, INT8, ...", "read tensor by tensor"], "key"
    )
    body += box(210, 146, 150, 76, ["+ adapter", "LoRA, DoRA, ...", "what is trained"], "warm")
    body += box(
        410, 146, 150, 76, ["hidden states", "of the last prompt", "token of each question"]
    )
    body += box(
        610,
        146,
        232,
        76,
        ["letter scores", "4 rows of the head, not 256,000;", "log-probabilities in nats"],
    )
    body += [
        text(210, 136, "medqlora.finetuning", "s c"),
        text(610, 136, "medqlora.evaluation.scoring", "s c"),
    ]
    body += [
        arrow((160, 184), (207, 184)),
        arrow((360, 184), (407, 184)),
        arrow((560, 184), (607, 184)),
    ]
    body.append(arrow((768, 96), (768, 116), (485, 116), (485, 143)))
    body += box(610, 272, 104, 62, ["loss", "back into", "the adapter"], "warm")
    body += box(738, 272, 104, 62, ["metrics", "with intervals,", "baseline, n"])
    body += [arrow((662, 222), (662, 269)), arrow((790, 222), (790, 269))]
    body.append(arrow((607, 303), (285, 303), (285, 225)))
    body.append(text(300, 296, "gradients reach the adapter only", "s"))
    body += box(
        410,
        372,
        150,
        78,
        ["run folder", "config, metrics,", "predictions, adapter,", "checkpoints"],
        "box",
    )
    body += box(
        610,
        380,
        232,
        62,
        ["report, export, predict, serve", "read the run folder,", "never the run"],
    )
    body += [arrow((790, 334), (790, 356), (485, 356), (485, 369)), arrow((560, 411), (607, 411))]
    return svg("flow", 856, 462, "One run, from configuration to report", body)


def layers() -> str:
    """The parts of the package by layer, read from the test that checks them."""
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    [rule] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    parts: dict[int, set[str]] = ast.literal_eval(rule)
    about = {
        4: "one file a verb; never one another",
        3: "alone makes objects from YAML",
        2: "is given a model, never loads one",
        1: "side by side; never one another",
        0: "nothing of medqlora above them",
    }
    body: list[str] = []
    y = 10
    for layer in sorted(parts, reverse=True):
        names = sorted(parts[layer])
        kind = {2: "warm", 1: "green", 0: "box"}.get(layer, "key")
        body += [text(14, y + 20, f"L{layer}", "b"), text(44, y + 20, about[layer], "s")]
        width = min(150.0, (820 - 6 * (len(names) - 1)) / len(names))
        for i, name in enumerate(names):
            x = 14 + i * (width + 6)
            body += [rect(x, y + 30, width, 32, kind), text(x + width / 2, y + 50, name, "m c")]
        y += 96
        if layer:
            body.append(arrow((430, y - 30), (430, y - 8)))
            body.append(text(440, y - 14, "imports", "s"))
    return svg("layers", 848, y - 20, "The layers of the package; imports point down", body)


def linear() -> str:
    """One linear layer of the quantised base with its adapter, and what each part takes."""
    body = box(10, 118, 90, 54, ["x", "bfloat16"])
    body += box(
        160, 20, 170, 66, ["4-bit codes", "4 bits a weight:", "index into 16 levels"], "key"
    )
    body += box(
        160,
        100,
        170,
        66,
        ["block constants", "8 bits a 64 weights,", "32 bits a 256 of those"],
        "key",
    )
    body += box(
        390, 56, 170, 74, ["W = level · constant", "made for the product,", "in compute_dtype"]
    )
    body += box(160, 216, 170, 56, ["A: r by input", "float32, trained"], "warm")
    body += box(390, 216, 170, 56, ["B: output by r", "float32, starts at 0"], "warm")
    body += box(640, 118, 200, 54, ["y = W x + s B A x", "s = lora_alpha / r"])
    body += [arrow((330, 53), (360, 53), (360, 84), (387, 84))]
    body += [arrow((330, 133), (360, 133), (360, 104), (387, 104))]
    body += [arrow((560, 93), (600, 93), (600, 138), (637, 138))]
    body += [arrow((100, 152), (130, 152), (130, 244), (157, 244)), arrow((330, 244), (387, 244))]
    body += [arrow((560, 244), (600, 244), (600, 154), (637, 154))]
    body += [arrow((55, 118), (55, 6), (475, 6), (475, 53))]
    body += [text(640, 200, "4 + 8/64 + 32/(64·256) = 4.127 bits", "s")]
    body += [text(640, 216, "a weight; no gradient into W", "s")]
    return svg("linear", 856, 286, "A linear layer of QLoRA", body)


PICTURES = {"packing": packing, "flow": flow, "layers": layers, "linear": linear}


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
