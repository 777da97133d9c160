"""The wheel holds all it needs: installed in a fresh environment it runs from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


def call(*command: str | Path, **options: object) -> str:
    """Run a command and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    [built] = folder.glob("medqlora-*.whl")
    return built


def names_below(folder: Path, prefix: str) -> set[str]:
    """Files below a folder as the wheel should name them."""
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def test_the_wheel_holds_package_configuration_and_assets_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = names_below(ROOT / "medqlora", "medqlora")
    expected |= names_below(ROOT / "conf", "medqlora/conf")
    expected |= names_below(ROOT / "hydra_plugins", "hydra_plugins")
    assert inside == expected
    for name in ("medqlora/conf/train.yaml", "medqlora/conf/quant/nf4.yaml", "medqlora/schema.py"):
        assert name in inside
    assert any(name.startswith("medqlora/assets/facts/") for name in inside)


def test_a_fresh_installation_of_the_wheel_trains_from_an_empty_folder(wheel, tmp_path):
    """A clean environment that borrows the libraries of this one, but not the checkout."""
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    call(sys.executable, "-m", "pip", "--python", python, *install)
    [packages] = environment.glob("lib/python*/site-packages")
    # A plain path: the .pth file there, by which the checkout is installed, is not read.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["experiment=quickstart", "baselines=[]", "data.limit_val=20", "data.limit_test=40"]
    call(python, "-m", "medqlora.train", *options, "trainer.max_steps=2", cwd=empty)
    found = call(python, "-c", "import medqlora; print(medqlora.__file__)", cwd=empty)
    assert Path(found.strip()).is_relative_to(packages)
    [file] = empty.glob("runs/*/*/metrics.json")
    metrics = json.loads(file.read_text())
    assert metrics["status"] == "completed"
    assert metrics["train"]["num_steps"] == 2
    assert metrics["test"]["n"] > 0
