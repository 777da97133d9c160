"""The documentation builds strictly, leaves no option out, and its pages need no network."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from medqlora.config import CONFIG_DIR
from tests.browser import MISSING, Browser, free_port
from tests.conftest import ROOT
from tests.test_layers import LAYERS

OPTIONS = sorted((path.parent.name, path.stem) for path in CONFIG_DIR.glob("*/*.yaml"))
QUANT = [option for group, option in OPTIONS if group == "quant"]
VERBS = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
MEASURED = ROOT / "benchmarks" / "quantization.json"
FETCHED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src")}


class Document(HTMLParser):
    """What a page says, names, links to and fetches."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.inside = ""
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetches: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif (tag, name) in FETCHED and value:
                self.fetches.append(value)
            elif (tag, name) == ("a", "href") and value:
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, built as `make docs` does, where no proxy leads anywhere."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Document]:
    """Every page by its path."""
    return {str(p.relative_to(site)): Document(p) for p in sorted(site.rglob("*.html"))}


def keys_of(node: object, prefix: str = "") -> set[str]:
    """Dotted names of the values of an option that a user can set."""
    if not isinstance(node, dict) or not node:
        return {prefix}
    own = {key: value for key, value in node.items() if key not in ("defaults", "hydra")}
    return {
        name
        for key, value in own.items()
        if not key.startswith("_")
        for name in keys_of(value, f"{prefix}.{key}" if prefix else key)
        if not (isinstance(value, dict) and value and not keys_of(value))
    }


def plain(text: str) -> str:
    """Text as a page shows it: without the marks of code."""
    return " ".join(text.replace("`", "").split())


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=map("=".join, OPTIONS))
def test_no_option_key_comment_or_command_is_missing(group, option, pages):
    page = pages[f"options/{group}.html"]
    source = (CONFIG_DIR / group / f"{option}.yaml").read_text()
    assert option in page.ids
    for key in keys_of(yaml.safe_load(source)):
        assert key in page.text, key
    for comment in re.findall(r"^ *[a-zA-Z]\S*: .* +# (.*)$", source, re.MULTILINE):
        assert plain(comment) in plain(page.text), comment
    command = re.search(r"^# +((?:python|torchrun) .*?)(?: {2}|$)", source, re.MULTILINE)
    assert command is not None
    assert command[1] in page.text
    assert f"{group}.html#{option}" in pages["options/index.html"].links


@pytest.mark.parametrize("verb", VERBS)
def test_no_command_or_key_of_its_own_is_missing(verb, pages):
    page = pages["options/commands.html"]
    assert verb in page.ids
    for key in keys_of(yaml.safe_load((CONFIG_DIR / f"{verb}.yaml").read_text())):
        assert key in page.text, key


@pytest.mark.parametrize("option", QUANT)
def test_every_method_has_a_note_with_formula_source_use_and_cost(option, site):
    text = (site / "quantization.html").read_text(encoding="utf-8")
    start = text.index(f'<h2 id="{option}"')
    note = text[start : text.find("<h2 ", start + 1)]
    for part in ("Formula.", "When.", "Cost here."):
        assert f"<strong>{part}</strong>" in note, part
    found = json.loads(MEASURED.read_text())["options"][option]
    if "refused" in found:
        assert "Not measured on this machine" in note
    else:
        assert f"{found['layer']['bits_per_weight']:.3f} bits a weight" in note
        if "gemma_2b" in found:
            assert f"{found['gemma_2b']['weight_gb']:.3f} GB" in note


@pytest.mark.parametrize("option", QUANT)
def test_measured_bits_are_those_of_the_format(option):
    """A table that was measured before an option changed is noticed."""
    from medqlora.quantization import QuantConfig

    found = json.loads(MEASURED.read_text())["options"][option]
    node = yaml.safe_load((CONFIG_DIR / "quant" / f"{option}.yaml").read_text())
    quant = QuantConfig(**{key: value for key, value in node.items() if not key.startswith("_")})
    if "refused" in found:
        assert quant.data_type == "torchao_int4", "this one runs on a CPU: measure it again"
    else:
        # 8-bit formats have a constant a row of 2048
        assert found["layer"]["bits_per_weight"] == pytest.approx(quant.bits, abs=0.02)


def test_every_demand_has_an_answer(pages):
    headings = [id for id in pages["faq.html"].ids if re.match(r"\d+-", id)]
    assert sorted(int(id.split("-")[0]) for id in headings) == list(range(1, 21))


def test_the_api_shows_shapes_and_errors(pages):
    text = pages["api/evaluation.html"].text
    assert 'Float[Tensor, "question width"]' in text
    assert "Raises:" in text
    for package in ("data", "finetuning", "quantization", "acceleration", "evaluation"):
        tree = ast.parse((ROOT / "medqlora" / package / "__init__.py").read_text())
        [exported] = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
        ids = pages[f"api/{package}.html"].ids
        missing = [
            name
            for name in exported
            if not any(id.startswith(f"medqlora.{package}") and id.endswith(name) for id in ids)
        ]
        assert not missing, package


def test_every_link_and_anchor_leads_somewhere(site, pages):
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or name == "404.html":
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            assert target.resolve().is_file(), f"{name}: {link}"
            if parts.fragment and target.suffix == ".html":
                ids = pages[str(target.resolve().relative_to(site.resolve()))].ids
                assert unquote(parts.fragment) in ids, f"{name}: {link}"


def test_links_lead_to_files_where_the_repository_is_browsed():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    for file in files:
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", text):
            assert (file.parent / link).exists(), f"{file.relative_to(ROOT)}: {link}"


def test_no_page_fetches_anything_from_elsewhere(site, pages):
    for name, page in pages.items():
        for address in page.fetches:
            assert not urlsplit(address).netloc, f"{name}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_the_picture_of_the_layers_has_every_part_of_today(pages):
    for parts in LAYERS.values():
        for part in parts:
            assert part in pages["concepts.html"].text, part


@pytest.mark.parametrize("name", ["packing", "flow", "linear"])
def test_a_picture_is_what_its_code_draws(name):
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/tools/pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    kept = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert pictures.PICTURES[name]() == kept, "draw it again: python docs/tools/pictures.py"


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("dark", [False, True])
def test_pages_open_from_the_folder_in_light_and_dark_and_can_be_searched(site, dark):
    browser = Browser(free_port(), dark=dark)
    try:
        browser.open(site / "concepts.html")
        scheme = browser.run("return document.body.dataset.mdColorScheme;")
        assert scheme == ("slate" if dark else "default")
        assert browser.run("return document.querySelectorAll('.picture svg').length;") == 4
        fits = "return document.documentElement.scrollWidth <= innerWidth;"
        browser.wait(fits)
        browser.wait("return !document.querySelector('.md-search').hidden;")
        browser.run("document.querySelector('.md-search__input').focus();")
        browser.type("NormalFloat")
        browser.wait(
            "document.querySelector('.md-search__input').dispatchEvent(new Event('keyup'));"
            "return document.querySelectorAll('.md-search-result__item').length;"
        )
        browser.resize(400, 800)
        browser.run("document.querySelector('#__search').checked = false;")
        browser.wait(fits)
        assert [a for a in browser.requests() if not a.startswith(("file:", "data:"))] == []
        assert [entry["message"] for entry in browser.log("browser")] == []
    finally:
        browser.close()
