"""What mkdocs does here beyond Markdown: generated pages, pictures in place, links out of docs/.

Sources are written so that they also read well where the repository is browsed: a link to a file
outside `docs/` is relative, as there. On the site it goes to the page made of that file, if there
is one, and is otherwise shown as the file's name.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent))

import notes
import options
import pictures

ROOT = options.ROOT
MIRRORED = {
    "benchmarks/README.md": "measurements.md",
    "medqlora/assets/README.md": "toy_model.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files outside docs/ that are pages of the site as they are."""

PAGES = MIRRORED | {"README.md": "index.md", "conf": "options/index.md"}
"""Where a link to a file or folder outside docs/ leads on the site."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r'<img alt="([^"]*)" src="[^"]*?pictures/(\w+)\.svg" ?/?>')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the generated pages, and the guides that nobody named, in the navigation."""
    assert config.nav is not None
    groups = [f"options/{group}.md" for group in options.groups()]
    section(config.nav, "Options")[:] = ["options/index.md", "options/commands.md", *groups]
    named = set(_files_in(config.nav))
    own = sorted(path.name for path in Path(config.docs_dir).glob("*.md"))
    section(config.nav, "Guides").extend(name for name in own if name not in named)
    return config


def section(nav: list[Any], title: str) -> list[Any]:
    """The entries below a title of the navigation."""
    return next(item[title] for item in nav if isinstance(item, dict) and title in item)


def _files_in(nav: list[Any]) -> list[str]:
    found: list[str] = []
    for item in nav:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        found += _files_in(value) if isinstance(value, list) else [value]
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from `conf/`, from measurements, and from files elsewhere."""
    pages = {
        "options/index.md": options.index_page(),
        "options/commands.md": options.commands_page(),
        **{f"options/{group}.md": options.group_page(group) for group in options.groups()},
    }
    for source, target in MIRRORED.items():
        pages[target] = (ROOT / source).read_text(encoding="utf-8")
    for target, content in pages.items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the notes in their place, and turn links to files outside docs/ into links to pages."""
    here = page.file.src_uri
    origin = next((path for path, target in MIRRORED.items() if target == here), f"docs/{here}")

    def resolve(match: re.Match[str]) -> str:
        bang, text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        to = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if to is not None:
            to = posixpath.relpath(to, posixpath.dirname(here) or ".")
            return f"{bang}[{text}]({to}{anchor or ''})"
        if not (ROOT / path).exists():
            return match[0]  # mkdocs says that it is not there
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    markdown = _LINK.sub(resolve, markdown)
    return markdown.replace(notes.PLACE, notes.notes()) if notes.PLACE in markdown else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put each picture into the page, so that it takes the colours of light and dark."""
    folder = Path(config.docs_dir) / "pictures"

    def inline(match: re.Match[str]) -> str:
        if match[2] == "layers":  # parts come and go: drawn from today's rule
            drawing = pictures.layers()
        else:
            drawing = (folder / f"{match[2]}.svg").read_text(encoding="utf-8")
        return f'<span class="picture">{drawing}</span>'

    return _PICTURE.sub(inline, html)
