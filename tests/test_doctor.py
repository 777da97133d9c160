"""The doctor: every check says what is there, and what to do where something is missing."""

from __future__ import annotations

import importlib.metadata
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from medqlora import doctor
from medqlora.config import compose
from medqlora.doctor import Check, checks_table, disk_check, examine
from tests.hub import LoopbackHub, Repository


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def config(*overrides: str):
    return compose("doctor", overrides)


@pytest.fixture
def local_options(tiny_gemma_folder: str, question_files: dict[str, str]) -> list[str]:
    """Model and data that need no hub."""
    return [
        f"model.path={tiny_gemma_folder}",
        "model.revision=null",
        "data=files",
        *(f"data.{split}_file={file}" for split, file in question_files.items()),
    ]


def test_a_working_machine_passes_and_leaves_no_file(
    local_options, run_command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ended = run_command("doctor", *local_options)
    assert ended.code == 0, ended.err
    assert "fail" not in ended.out
    for word in ("Python", "torch", "accelerator", "bitsandbytes on cpu", "32,768", "W&B"):
        assert word in ended.out
    assert list(tmp_path.iterdir()) == []


def test_every_check_that_is_not_passed_says_what_to_do(local_options, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for options in (local_options, []):
        for check in examine(config(*options)):
            assert check.status in ("pass", "warn", "fail")
            assert check.found
            assert check.status == "pass" or check.advice, check


def test_without_a_network_it_says_so_within_seconds(monkeypatch):
    """The hub is asked once and not retried; the default model and data fail, with advice."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    checks = by_name(list(doctor.check_hub(config(), 2)))
    assert time.monotonic() - started < 3
    assert checks["hub"].status == "warn"
    for name in ("model google/gemma-2b", "data set openlifescienceai/medmcqa"):
        assert checks[name].status == "fail"
        assert "quickstart" in checks[name].advice


@pytest.mark.parametrize(
    ("refusal", "status", "words"),
    [
        (None, "pass", ""),
        (403, "fail", "Accept the licence"),
        (401, "fail", "hf auth login"),
        (404, "fail", "spelling"),
    ],
)
def test_what_the_hub_answers_about_the_model_and_the_data(refusal, status, words, monkeypatch):
    """Nothing is downloaded: only headers and the description are asked for."""
    model = Repository({"config.json": b"{}"}, refusal=refusal)
    data = Repository({"README.md": b""}, refusal=refusal)
    models, datasets = {"some/model": model}, {"some/data": data}
    with LoopbackHub(models, datasets) as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        cfg = config("model.path=some/model", "model.revision=null", "data.revision=null")
        cfg.data.hub = "some/data"
        checks = by_name(list(doctor.check_hub(cfg, 5)))
        assert not [request for request in hub.requests if request.startswith("GET /some")]
    assert checks["hub"].status == "pass"
    for name in ("model some/model", "data set some/data"):
        assert checks[name].status == status
        assert words in checks[name].advice


def test_local_model_and_files_are_checked_for_what_is_missing(tmp_path, tiny_gemma_folder):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes(
        (Path(tiny_gemma_folder) / "config.json").read_bytes()
    )
    cfg = config(f"model.path={tmp_path / 'half'}", "data=files", "data.test_file=/none.jsonl")
    checks = by_name(list(doctor.check_hub(cfg, 1)))
    assert "hub" not in checks
    assert checks["data /none.jsonl"].status == "fail"
    model = next(check for name, check in checks.items() if name.startswith("model"))
    assert model.status == "fail"
    assert "safetensors" in model.found


@pytest.mark.parametrize(
    ("version", "status"), [("5.17.0", "pass"), ("5.16.9", "fail"), ("6.0", "fail"), (None, "fail")]
)
def test_packages_are_held_against_the_supported_ranges(version, status, monkeypatch):
    def installed(name: str) -> str:
        if name == "transformers" and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == "transformers" else "99"

    wanted = ["transformers>=5.17,<5.24", "numpy>=2", "hqq>=1; extra == 'hqq'"]
    monkeypatch.setattr(doctor, "requirements", lambda: (">=3.11", wanted))
    monkeypatch.setattr(importlib.metadata, "version", installed)
    checks = by_name(list(doctor.check_packages()))
    assert checks["transformers"].status == status
    assert ("pip install" in checks["transformers"].advice) is (status == "fail")
    assert checks["Python"].status == "pass"
    assert "hqq" not in checks


def test_ranges_are_known_without_an_installed_package(monkeypatch):
    """A plain clone has no metadata of its own: pyproject.toml says the same."""
    installed = doctor.requirements()

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    python, wanted = doctor.requirements()
    assert python == installed[0]
    assert any(text.startswith("transformers") for text in wanted)


@pytest.mark.parametrize(
    ("capability", "status", "words"),
    [
        ((9, 0), "pass", "bf16 yes, fp8 yes"),
        ((8, 0), "pass", "bf16 yes, fp8 no"),
        ((7, 5), "warn", "bf16 no, fp8 no"),
    ],
)
def test_a_gpu_is_told_by_what_it_multiplies(capability, status, words, monkeypatch):
    card = SimpleNamespace(
        name="Card", total_memory=int(24e9), major=capability[0], minor=capability[1]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(20e9), int(24e9)))
    (check,) = doctor.check_accelerator()
    assert check.status == status
    assert words in check.found
    rows, name, available = doctor.memory_rows(config())
    assert name == "Card"
    assert available == pytest.approx(0.92 * 24)
    assert rows[0][0] == 1024


def test_a_gpu_that_others_fill_is_told(monkeypatch):
    card = SimpleNamespace(name="Card", total_memory=int(24e9), major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(3e9), int(24e9)))
    (check,) = doctor.check_accelerator()
    assert check.status == "warn"
    assert "3.0 free" in check.found
    assert "nvidia-smi" in check.advice


@pytest.mark.parametrize(
    ("there", "status", "words"), [(True, "pass", "cc there"), (False, "warn", "compiler missing")]
)
def test_a_gpu_without_a_compiler_is_told_what_is_missing(
    there, status, words, monkeypatch, tmp_path
):
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if there else None)
    (check,) = doctor.check_compiler()
    assert check.status == status
    assert words in check.found
    assert ("acceleration.compile=none" in check.advice) is not there


GROUP_LIMIT = {
    "/proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 48828125 kB\n",
    "/sys/fs/cgroup/memory.max": "8000000000\n",
    "/sys/fs/cgroup/memory.current": "6000000000\n",
}


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        (GROUP_LIMIT, 8, 2),
        (GROUP_LIMIT | {"/sys/fs/cgroup/memory.max": "max\n"}, 64, 50),
        ({"/proc/meminfo": GROUP_LIMIT["/proc/meminfo"]}, 64, 50),
        ({}, 64, 64),
    ],
)
def test_the_limit_of_a_container_is_its_memory(files, total, free, monkeypatch):
    def read(self: Path, *arguments: Any, **options: Any) -> str:
        if str(self) not in files:
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return files[str(self)]

    monkeypatch.setattr(doctor, "hardware", lambda device: {"device": "CPU", "memory_gb": 64.0})
    monkeypatch.setattr(Path, "read_text", read)
    assert doctor.main_memory_gb() == pytest.approx((total, free))
    check = by_name(list(doctor.check_machine()))["main memory"]
    assert check.status == ("warn" if free < 3 else "pass")
    assert f"{total:.1f} GB, {free:.1f} free" in check.found


def test_memory_that_the_system_does_not_tell_is_unknown(monkeypatch):
    monkeypatch.setattr(doctor, "main_memory_gb", lambda: (None, None))
    assert by_name(list(doctor.check_machine()))["main memory"].status == "warn"
    (check,) = doctor.check_memory(config())
    assert check.status == "warn"
    assert "unknown" in check.found


@pytest.mark.parametrize(
    ("free", "status", "advice"),
    [
        (1000.0, "pass", ""),
        ("between", "warn", "acceleration.gradient_checkpointing=true"),
        (0.5, "fail", "a larger device"),
    ],
)
def test_the_longest_rows_that_fit_are_told_with_what_to_do_where_none_do(
    free, status, advice, monkeypatch
):
    rows, *_ = doctor.memory_rows(config())
    _, plain, light = rows[0]
    room = (plain + light) / 2 if free == "between" else free
    monkeypatch.setattr(doctor, "main_memory_gb", lambda: (2000.0, room))
    (check,) = doctor.check_memory(config())
    assert check.status == status
    assert advice in check.advice
    if free == "between":
        longest = max(tokens for tokens, _, light in rows if light <= room)
        assert f"up to {longest:,} in" in check.found
        assert "with checkpointing only" in check.found


def test_a_kernel_that_breaks_is_a_failed_check(monkeypatch):
    import bitsandbytes.functional as bnb

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no\nkernel image")

    monkeypatch.setattr(bnb, "quantize_4bit", broken)
    (check,) = doctor.check_bitsandbytes()
    assert (check.status, check.found) == ("fail", "RuntimeError: no, kernel image")
    assert "Reinstall bitsandbytes" in check.advice


def test_a_storage_or_method_that_cannot_be_made_is_a_failed_check(monkeypatch):
    cfg = config()
    cfg.quant.block_size = 100
    checks = by_name(list(doctor.check_options(cfg)))
    assert checks["quant"].status == "fail"
    assert "block_size" in checks["quant"].found
    assert checks["peft"].status == "pass"


def test_what_was_downloaded_before_passes_without_a_hub(monkeypatch, tmp_path):
    """Offline on purpose: no one is asked, and the caches of this machine decide."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "cached", lambda path, name, revision: None)
    missing = by_name(list(doctor.check_hub(config(), 1)))
    assert "HF_HUB_OFFLINE" in missing["hub"].found
    names = ("model google/gemma-2b", "data set openlifescienceai/medmcqa")
    assert [missing[name].status for name in names] == ["fail", "fail"]
    (tmp_path / "datasets--openlifescienceai--medmcqa" / "snapshots" / "abc").mkdir(parents=True)
    monkeypatch.setattr(doctor, "cached", lambda path, name, revision: f"/cache/{name}")
    there = by_name(list(doctor.check_hub(config(), 1)))
    assert [there[name].status for name in names] == ["pass", "pass"]


def test_a_model_without_tokenizer_and_data_without_a_file_are_told(tmp_path, tiny_gemma_folder):
    for file in Path(tiny_gemma_folder).iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    checks = by_name(list(doctor.check_hub(config(f"model.path={tmp_path}", "data=files"), 1)))
    model = checks[f"model {tmp_path}"]
    assert (model.status, model.found) == ("fail", "has no tokenizer")
    assert str(tmp_path) in model.advice
    assert checks["data files"].found == "no file is given"
    assert "data.train_file" in checks["data files"].advice


def test_a_broken_4bit_kernel_fails(monkeypatch):
    import bitsandbytes.functional as bnb

    monkeypatch.setattr(bnb, "dequantize_4bit", lambda packed, state: torch.zeros(256, 256))
    (check,) = doctor.check_bitsandbytes()
    assert check.status == "fail"


def test_a_check_that_breaks_stops_no_other_and_the_exit_code_tells(
    local_options, run_command, monkeypatch
):
    def breaks():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "check_machine", breaks)
    ended = run_command("doctor", *local_options)
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert "machine" in ended.errors[0]
    assert "W&B" in ended.out


def test_a_folder_is_checked_where_it_will_be_made(tmp_path):
    assert disk_check("disk", tmp_path / "a" / "b", 1e-9).status == "pass"
    assert disk_check("disk", tmp_path / "a" / "b", 1e9).status == "warn"
    (tmp_path / "file").write_text("")
    assert disk_check("disk", tmp_path / "file" / "b", 1e-9).status == "fail"
    assert not (tmp_path / "a").exists()


def test_a_disk_that_is_full_fails_however_little_is_wanted(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=int(1e12), used=int(1e12), free=int(5e7))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    check = disk_check("disk", tmp_path, 0.0)
    assert (check.status, check.advice) == ("fail", "Free some space.")


@pytest.mark.parametrize(("key", "mode", "words"), [("x", "", "uploaded"), ("", "", "offline")])
def test_wandb_is_online_only_with_a_key(key, mode, words, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (check,) = doctor.check_wandb()
    assert words in check.found
    assert "x:" not in check.found
    monkeypatch.setenv("WANDB_MODE", "offline")
    (check,) = doctor.check_wandb()
    assert "offline" in check.found


def test_without_wandb_a_run_can_log_into_its_folder(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (check,) = doctor.check_wandb()
    assert check.status == "warn"
    assert "logger=csv" in check.advice


def test_a_table_of_memory_is_left_out_where_it_cannot_be_estimated(
    local_options, run_command, monkeypatch
):
    """The reason stands in the first table, and no traceback below it."""

    def breaks(*arguments: Any) -> None:
        raise RuntimeError("no estimate")

    monkeypatch.setattr(doctor, "estimated_peak", breaks)
    ended = run_command("doctor", *local_options)
    assert ended.code == 1
    assert "no estimate" in ended.out
    assert "estimated peak of training" not in ended.out
    assert "Traceback" not in ended.err


def test_at_80_columns_names_stay_whole_and_what_to_do_stands_below():
    advice = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; `make quickstart` needs none."
    checks = [
        Check("data bundled:sample/train.jsonl.gz", "pass", "0.5 MB"),
        Check("data set openlifescienceai/medmcqa", "fail", "not on this machine", advice),
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(checks_table(checks))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("bundled:sample/train.jsonl.gz", "openlifescienceai/medmcqa", "HF_HUB_OFFLINE"):
        assert name in out.getvalue()
    [found] = [number for number, line in enumerate(lines) if "not on this machine" in line]
    assert "→ Check the network" in "".join(lines[found + 1 : found + 3])
