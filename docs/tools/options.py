"""Pages about every option, made from the comments of `conf/`: nothing is typed twice."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf"

_NAME = re.compile(r"^conf/\S+\.yaml -- ")
_COMMAND = re.compile(r"^  +((?:python|torchrun|tensorboard|cat|make) .*)$")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INHERITED = {"_target_", "_convert_", "_partial_", "defaults"}


@dataclass
class Key:
    """One key of an option file: its dotted name, value as written, and comment."""

    name: str
    value: str
    comment: str


@dataclass
class Option:
    """What one file of `conf/` says.

    Attributes:
        name: Name of the file without its ending.
        text: Its head comment, without the file's own name and the commands.
        commands: Command lines of the head comment.
        keys: Keys in the order written, those for Hydra itself left out.
        defaults: Entries of its defaults list: name of the group or option, value, comment.
        target: What Python makes of it, if anything.
        usage: Text of `--help`, of a command's own file.
    """

    name: str
    text: str = ""
    commands: list[str] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    defaults: list[Key] = field(default_factory=list)
    target: str = ""
    usage: str = ""


def groups() -> dict[str, str]:
    """Every config group with what it is about: in the order of `train`, others behind."""
    about = {
        key.name.removeprefix("optional "): key.comment
        for key in read_option(CONF / "train.yaml").defaults
        if not key.name.startswith("override ")
    }
    files = (path.relative_to(CONF) for path in CONF.glob("*/**/*.yaml"))
    found = {path.parent.as_posix() for path in files}
    ordered = [name for name in about if name in found] + sorted(found - about.keys())
    about["hydra/sweeper"] = "a search in place of the grid of `-m`"
    return {name: about.get(name, "") for name in ordered}


def option_files(group: str) -> list[Path]:
    """Files of a group, in the order of their names."""
    return sorted((CONF / group).glob("*.yaml"))


def verbs() -> list[str]:
    """Commands that have a config of their own."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


@functools.cache
def read_option(path: Path) -> Option:
    """Read one file of `conf/` with its comments."""
    source = path.read_text(encoding="utf-8")
    option = Option(path.stem)
    _read_head(source, option)
    root = yaml.compose(source, Loader=_Loader)
    if isinstance(root, yaml.MappingNode):
        lines = source.splitlines()
        for name, node in _pairs(root):
            if name == "_target_":
                option.target = node.value
            elif name == "defaults":
                option.defaults = [_default(item, lines) for item in node.value]
            elif name == "hydra":
                plain = yaml.load(source, Loader=_Loader)["hydra"]
                option.usage = plain.get("help", {}).get("template", "")
                option.keys += _keys(node, lines, "hydra") if "mode" in plain else []
            elif name not in _INHERITED:
                option.keys += _leaves(name, node, lines)
    return option


def _read_head(source: str, option: Option) -> None:
    """The comment lines before the first key; an empty line in between ends a paragraph."""
    text: list[str] = []
    for line in source.splitlines():
        if not line.startswith("#"):
            break
        line = line.removeprefix("#").removeprefix(" ")
        if line.startswith("@package"):
            continue
        if command := _COMMAND.match(f" {line}" if line.startswith(" ") else line):
            option.commands.append(command[1])
        else:
            text.append(line)
    option.text = _NAME.sub("", "\n".join(text)).strip()


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    for key, value in node.value:
        yield key.value, value


def _keys(node: yaml.MappingNode, lines: list[str], prefix: str) -> list[Key]:
    return [
        key for name, value in _pairs(node) for key in _leaves(f"{prefix}.{name}", value, lines)
    ]


def _leaves(name: str, node: yaml.Node, lines: list[str]) -> list[Key]:
    """A key, or those below it; a mapping with a comment of its own is listed as well."""
    if not isinstance(node, yaml.MappingNode) or not node.value:
        return [Key(name, _written(node, lines), _comment(node, lines))]
    own = _above(lines, node.start_mark.line - 1)
    target = next((value.value for key, value in _pairs(node) if key == "_target_"), "")
    below = [
        key
        for child, value in _pairs(node)
        if child not in _INHERITED
        for key in _leaves(f"{name}.{child}", value, lines)
    ]
    return [Key(name, f"_{target}_" if target else "", own), *below] if own or target else below


def _written(node: yaml.Node, lines: list[str]) -> str:
    """The value as it stands in the file."""
    start, end = node.start_mark, node.end_mark
    if start.line == end.line:
        return lines[start.line][start.column : end.column]
    return " ".join(line.strip() for line in lines[start.line : end.line + 1])


def _comment(node: yaml.Node, lines: list[str]) -> str:
    """The comment behind a value, after whole lines of comment above its key."""
    rest = lines[node.end_mark.line][node.end_mark.column :].strip(" }")
    behind = rest.removeprefix("#").strip() if rest.startswith("#") else ""
    above: list[str] = []
    line = node.start_mark.line - 1
    while line > 0 and lines[line].lstrip().startswith("#") and not _is_head(lines, line):
        above.insert(0, lines[line].strip().removeprefix("#").strip())
        line -= 1
    return " ".join([*above, behind]).strip()


def _above(lines: list[str], line: int) -> str:
    """The comment behind the key of a mapping, whose first own key is on the next line."""
    _, _, comment = lines[line].partition(": ")
    return comment.strip().removeprefix("#").strip()


def _is_head(lines: list[str], line: int) -> bool:
    """Whether a comment line belongs to the head of the file."""
    return all(before.startswith("#") for before in lines[: line + 1])


def _default(node: yaml.Node, lines: list[str]) -> Key:
    if isinstance(node, yaml.MappingNode):
        [(name, value)] = _pairs(node)
        return Key(name, _written(value, lines), _comment(value, lines))
    return Key(node.value, "", _comment(node, lines))


# --- pages ----------------------------------------------------------------------------------------


def index_page() -> str:
    """All commands and all groups, with the options of each."""
    rows = "\n".join(
        f"| [`{group}`]({group}.md) | {about} | "
        + ", ".join(f"[`{f.stem}`]({group}.md#{f.stem})" for f in option_files(group))
        + " |"
        for group, about in groups().items()
    )
    commands = "\n".join(
        f"- [`{verb}`](commands.md#{verb}): {_first_line(read_option(CONF / f'{verb}.yaml').text)}"
        for verb in verbs()
    )
    return f"""# Every option

A run is put together from one option of each group, `python -m medqlora.train quant=nf4
peft=lora_r16`, and every key of an option can be set on its own, `quant.block_size=128`. These
pages are made from the files in `conf/`, so they say what the files say. An option or key that does
not exist is answered with those that do; one that cannot take effect is an error, before the first
weight is loaded.

## Groups

| group | what it chooses | options |
|---|---|---|
{rows}

## Commands

{commands}
"""


def commands_page() -> str:
    """The keys of each command's own file, and its help."""
    parts = [
        "# Commands and their keys\n",
        "Each is `python -m medqlora.VERB [group=option] [key=value]`.\n",
    ]
    for verb in verbs():
        option = read_option(CONF / f"{verb}.yaml")
        chosen = [k for k in option.defaults if not k.name.startswith(("override ", "_self_"))]
        parts.append(f"## {verb} {{ #{verb} }}\n\n{prose(option.text)}\n")
        parts.append(_commands(option))
        if chosen:
            parts.append("Groups it takes, with the option it starts from:\n")
            parts.append(_table([_linked(key) for key in chosen], ("group", "option", "")))
        if option.keys:
            parts.append("Keys of its own:\n")
            parts.append(_table(_cells(option.keys), ("key", "value", "meaning")))
        if usage := _usage(option.usage):
            parts.append(f'??? note "What `python -m medqlora.{verb} --help` says"\n\n{usage}\n')
    return "\n".join(parts)


def group_page(group: str) -> str:
    """Every option of a group."""
    about = groups()[group]
    parts = [f"# {group}\n\n{about[:1].upper()}{about[1:]}\n" if about else f"# {group}\n"]
    starts: dict[str, list[str]] = {}
    for verb in verbs():
        for key in read_option(CONF / f"{verb}.yaml").defaults:
            if key.name == group:
                starts.setdefault(key.value, []).append(f"`{verb}`")
    for path in option_files(group):
        option = read_option(path)
        parts.append(f"## {option.name} {{ #{option.name} }}\n")
        if option.name in starts:
            parts.append(f"Default of {', '.join(starts[option.name])}.\n{{ .default }}\n")
        parts.append(f"{prose(option.text)}\n")
        parts.append(_commands(option))
        parts.append(_inherits(group, option))
        if option.keys:
            parts.append(_table(_cells(option.keys), ("key", "value", "meaning")))
        elif option.target:
            parts.append("It has no keys.\n")
        made = f"Makes `{option.target}`. " if option.target else ""
        parts.append(f"{made}File: `conf/{group}/{option.name}.yaml`\n{{ .source }}\n")
    return "\n".join(part for part in parts if part)


def _inherits(group: str, option: Option) -> str:
    own = {path.stem for path in option_files(group)}
    others = [key for key in option.defaults if key.name in own]
    chosen = [key for key in option.defaults if key.name.startswith("override ")]
    text = "".join(f"Everything else as in [`{k.name}`](#{k.name}).\n" for k in others)
    if chosen:
        pairs = ((k.name.removeprefix("override ").lstrip("/"), k.value) for k in chosen)
        links = ", ".join(f"[`{name}={value}`]({name}.md#{value})" for name, value in pairs)
        text += f"Chooses {links}.\n"
    return text


def _linked(key: Key) -> tuple[str, str, str]:
    name = key.name.removeprefix("optional ")
    value = f"[`{key.value}`]({name}.md#{key.value})" if key.value != "null" else "none"
    return f"[`{name}`]({name}.md)", value, _escape(key.comment)


def _cells(keys: list[Key]) -> list[tuple[str, str, str]]:
    return [(f"`{key.name}`", _code(key.value), _escape(key.comment)) for key in keys]


def _code(value: str) -> str:
    if value.startswith("_") and value.endswith("_"):
        return f"made by `{value.strip('_')}`"
    return f"`{value}`" if value else ""


def prose(text: str) -> str:
    """A head comment as Markdown: `Formula:`, `When:` and `Needs:` each start a paragraph."""
    if not re.search(r"\d", text.split(" ")[0]):
        text = text[:1].upper() + text[1:]
    text = re.sub(r"^Formula: (\w+)\. When: ", r"Formula: \1.\nWhen: ", text, flags=re.MULTILINE)
    return re.sub(r"^(Formula|When|Needs): ", r"\n**\1.** ", _escape(text), flags=re.MULTILINE)


def _escape(text: str) -> str:
    """Comments are plain text: what Markdown would read as markup is shown as written."""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"([*_<|\[\]])", r"\\\1", piece) for piece in pieces[::2]]
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "".join(pieces))


def _table(rows: list[tuple[str, str, str]], head: tuple[str, str, str]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|---|---|"]
    # a bar ends a cell even within code
    lines += [
        "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _commands(option: Option) -> str:
    if not option.commands:
        return ""
    # what is behind two spaces tells what the command does
    lines = (re.sub(r"(?<=\S) {2,}(?=\S)", "  # ", line) for line in option.commands)
    return "```bash\n" + "\n".join(lines) + "\n```\n"


def _usage(template: str) -> str:
    """Help without what Hydra fills in."""
    text = template.split("== Groups and their options ==")[0]
    text = text.replace("${hydra.help.header}", "").replace("$CONFIG", "").strip()
    return "\n".join(f"    {line}".rstrip() for line in ["```text", *text.splitlines(), "```"])


def _first_line(text: str) -> str:
    return text.split("\n")[0]
