"""Every option of `conf/` composes, says how to sweep it, and makes what it names."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from medqlora import instantiation, pipeline
from medqlora.config import CONFIG_DIR, compose
from medqlora.entry import group_options
from medqlora.errors import ConfigError
from medqlora.evaluation import config_hash
from medqlora.runs import resolved

ROOTS = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONFIG_DIR.glob("*/*.yaml") if path.is_file()
)
COMMAND = re.compile(
    r"^#\s+(?:python|torchrun --nproc-per-node 2) -m medqlora\.(\w+)(.*)$", re.MULTILINE
)


def groups_of(root: str) -> set[str]:
    """The config groups that a root's defaults list names."""
    defaults = OmegaConf.load(CONFIG_DIR / f"{root}.yaml")["defaults"]
    names = {str(key).split()[-1] for item in defaults if OmegaConf.is_dict(item) for key in item}
    return {name for name in names if not name.startswith("hydra/")}


GROUPS = {root: groups_of(root) for root in ROOTS}
IDS = [f"{group}={option}" for group, option in OPTIONS]


def options_of(group: str) -> list[str]:
    return [option for other, option in OPTIONS if other == group]


def text_of(group: str, option: str) -> str:
    return (CONFIG_DIR / group / f"{option}.yaml").read_text()


def test_help_lists_the_groups_that_a_command_has(run_command):
    told = run_command("audit", "--help").out
    listed = re.findall(r"^(\w+): .+, .+$", told.split("== The config")[0], re.MULTILINE)
    assert set(listed) == GROUPS["audit"]
    assert f"prompt: {', '.join(options_of('prompt'))}" in told
    for root in ("doctor", "benchmark", "evaluate"):
        assert {line.partition(":")[0] for line in group_options(root).splitlines()} == GROUPS[root]


# --- composing ------------------------------------------------------------------------------------


@functools.cache
def composed(root: str, *overrides: str) -> Any:
    """As `compose`; the result is shared, so it is never changed."""
    cfg = compose(root, overrides)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def root_of(group: str) -> str:
    """A command that takes a group; `train` where it does."""
    return next(root for root in ("train", *ROOTS) if group in GROUPS[root])


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=IDS)
def test_every_option_composes(group, option):
    cfg = composed(root_of(group), f"{group}={option}")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("root", ROOTS)
def test_every_command_composes_with_other_options_than_its_own(root):
    others = [f"{group}={options_of(group)[0]}" for group in GROUPS[root] if options_of(group)]
    for overrides in ([], others):
        OmegaConf.to_container(composed(root, *overrides), resolve=True)


@pytest.mark.parametrize(
    ("group", "needed"),
    {
        "data": {"medmcqa", "sample", "files"},
        "model": {"gemma_2b", "tiny_gemma"},
        "quant": {"none", "int8", "fp4", "nf4"},
        "peft": {"none", "lora_r4", "lora_r8", "lora_r16", "lora_r32", "lora_r64"},
        "optimizer": {"adamw", "adamw_8bit", "paged_adamw_8bit"},
        "scheduler": {"constant", "linear", "cosine"},
        "loss": {"choice", "token"},
        "logger": {"wandb", "csv"},
        "trainer": {"cpu", "gpu"},
        "experiment": {"quickstart"},
    }.items(),
)
def test_the_options_users_rely_on_are_there(group, needed):
    assert needed <= set(options_of(group))


def test_defaults_of_train_are_those_of_the_contract():
    defaults = OmegaConf.load(CONFIG_DIR / "train.yaml")["defaults"]
    chosen = {key: item[key] for item in defaults if OmegaConf.is_dict(item) for key in item}
    expected = {
        "data": "medmcqa",
        "model": "gemma_2b",
        "quant": "nf4",
        "peft": "lora_r16",
        "optimizer": "paged_adamw_8bit",
        "scheduler": "cosine",
        "loss": "choice",
    }
    assert {group: chosen[group] for group in expected} == expected


def test_every_option_says_how_to_sweep_it():
    """A header comment with a command, and in the command this very option or a key of it."""
    for group, option in OPTIONS:
        header = text_of(group, option).split("\n_target_")[0]
        commands = COMMAND.findall(header)
        assert commands, f"conf/{group}/{option}.yaml has no command in its header"


def test_the_command_in_every_header_can_be_copied_to_a_shell():
    """Each of its overrides names an option that exists, or a key that its options have."""
    commands = {
        (verb, rest): f"conf/{group}/{option}.yaml"
        for group, option in OPTIONS
        for verb, rest in COMMAND.findall(text_of(group, option))
    }
    for (verb, rest), file in commands.items():
        assert verb in ROOTS, file
        words = [word for word in shlex.split(rest) if word not in ("-m", "--multirun")]
        pairs = [word.partition("=")[::2] for word in words]
        for key, values in pairs:
            assert values, f"{file}: {key}"
            if key in GROUPS[verb]:
                missing = set(values.split(",")) - set(options_of(key))
                assert not missing, f"{file}: {key} has no option {missing}"
        if not all(key in GROUPS[verb] for key, _ in pairs):
            composed(verb, *(f"{key}={values.split(',')[0]}" for key, values in pairs))


# --- making ---------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """Weights with the names and shapes of a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Linear(128, 32, bias=False)
        self.lora_B = nn.Linear(32, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(x))


def _make_data(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    given = {"train_file": "questions.jsonl"} if cfg.data.name == "files" else {}
    made = instantiation.make(
        OmegaConf.to_container(cfg.data, resolve=True) | given,
        tokenizer=tokenizer,
        prompt=instantiation.make(cfg.prompt),
        seed=0,
        targets="answer",
        pin_memory=False,
    )
    assert made.name == cfg.data.name
    assert made.token_budget == cfg.data.token_budget


def _make_prompt(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    assert instantiation.make(cfg.prompt).name == cfg.prompt.name


def _make_model(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    assert set(cfg.model) >= {"path", "revision"}
    if cfg.model.path == "google/gemma-2b":
        # Unpinned, the main job would be another one some day.
        assert re.fullmatch(r"[0-9a-f]{40}", cfg.model.revision)


def _make_quant(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    assert instantiation.make(cfg.quant).data_type == cfg.quant.data_type


def _make_peft(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    made = instantiation.make(cfg.peft)
    if callable(made):
        made = made(total_step=100)
    target = cfg.peft["_target_"].rpartition(".")[2]
    assert (made is None) is (target == "no_adapter")
    for key in ("r", "lora_alpha", "use_dora", "use_rslora"):
        if key in cfg.peft:
            assert getattr(made, key) == cfg.peft[key]


def _make_optimizer(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    layer = _Layer()
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = instantiation.make(cfg.optimizer)(layer.named_parameters())
    layer(torch.randn(8, 128)).square().mean().backward()
    optimizer.step()
    for old, new in zip(before, layer.parameters(), strict=True):
        assert new.isfinite().all()
        assert (new - old).abs().max() > 0


def _make_scheduler(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    optimizer = torch.optim.SGD(_Layer().parameters(), lr=1.0)
    schedule = instantiation.make(cfg.scheduler)(optimizer, num_training_steps=100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(1.0)
    assert min(rates) >= 0
    assert all(rates[1:])


def _make_loss(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    assert instantiation.make(cfg.loss).targets in ("answer", "explanation")


def _make_acceleration(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    assert instantiation.make(cfg.acceleration).compile == cfg.acceleration.compile


def _make_trainer(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="trainer=cpu"):
            instantiation.check(cfg)
        if "strategy" not in cfg.trainer:
            return
        cfg = OmegaConf.merge(cfg, {"trainer": {"accelerator": "cpu"}})
        with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
            instantiation.check(cfg)
        return
    trainer = pipeline.build_trainer(cfg, tmp_path, {}, [])
    assert trainer.max_epochs == cfg.trainer.max_epochs
    assert trainer.accumulate_grad_batches == cfg.trainer.accumulate_grad_batches


def _make_logger(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    """`metrics.csv` always, and one service where it is asked for and its package is there."""
    services = [key for key, options in cfg.logger.items() if OmegaConf.is_dict(options)]
    runtime = {"run_dir": tmp_path, "run_config": {}, "group": None, "tags": []}
    if any(find_spec(service) is None for service in services):
        with pytest.raises(ConfigError, match="pip install"):
            instantiation.make(cfg.logger, **runtime)
        return
    loggers = instantiation.make(cfg.logger, **runtime)
    assert type(loggers[0]).__name__ == "RunCSVLogger"
    assert len(loggers) == 1 + len(services)


def _make_callbacks(cfg: Any, tmp_path: Path, tokenizer: Any) -> None:
    datamodule: Any = SimpleNamespace(questions={"train": []})
    made = pipeline.build_callbacks(cfg, tmp_path, datamodule, {"seed": 0})
    assert set(made) == {name for name, node in cfg.callbacks.items() if node}


MAKERS: dict[str, Callable[[Any, Path, Any], None]] = {
    name.removeprefix("_make_"): maker
    for name, maker in list(globals().items())
    if name.startswith("_make_")
}
COMPOSED_ONLY = {"experiment", "sweep"}
"""Groups without parts of their own: they choose among the others."""


def test_every_group_is_made_here_or_chooses_among_others():
    assert {group for group, _ in OPTIONS} <= MAKERS.keys() | COMPOSED_ONLY


@pytest.fixture(scope="module")
def tokenizer(tiny_gemma_folder):
    from medqlora.data import load_tokenizer

    return load_tokenizer(tiny_gemma_folder)


@pytest.mark.parametrize(
    ("group", "option"), [pair for pair in OPTIONS if pair[0] in MAKERS], ids="{}".format
)
def test_every_option_makes_what_it_names(group, option, tmp_path, tokenizer):
    MAKERS[group](composed(root_of(group), f"{group}={option}"), tmp_path, tokenizer)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", sorted(GROUPS["train"] - COMPOSED_ONLY))
def test_a_misspelt_option_lists_the_ones_there_are(group, run_command):
    ended = run_command("train", f"{group}=nosuch")
    assert ended.code == 2
    [line] = ended.err.splitlines()
    assert "nosuch" in line
    for option in options_of(group):
        assert option in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.token_budgt=512", ["token_budgt"]),
        ("sed=1", ["sed"]),
        ("quannt=nf4", ["quannt"]),
        ("quant=", ["quant"]),
        ("trainer.max_steps", ["trainer.max_steps"]),
        ("seed=${nothing}", ["nothing"]),
    ],
)
def test_a_misspelt_key_is_one_line_and_exit_code_2(override, words, run_command, tmp_path):
    ended = run_command("train", "trainer=cpu", override, f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1, ended.err
    for word in words:
        assert word in ended.err
    assert not (tmp_path / "run").exists()


def test_compose_raises_for_notebooks_what_a_command_prints():
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException)):
        compose("train", ["quant=nf5"])


def test_a_target_outside_the_project_is_not_run():
    """A config that came with somebody's run folder is data, not code."""
    with pytest.raises(ConfigError, match=r"_target_=os\.system"):
        instantiation.make({"_target_": "os.system", "command": "true"})


def test_config_hash_sees_every_option_but_those_of_logging():
    """What can change a result has another hash; where it is logged has not."""
    hashes: dict[str, str] = {}
    for group, option in OPTIONS:
        if group in GROUPS["train"] - COMPOSED_ONLY:
            cfg = composed("train", f"{group}={option}")
            hashes[f"{group}={option}"] = config_hash(resolved(cfg))
    same = {name for name in hashes if name.startswith("logger=")}
    assert len({hashes[name] for name in same}) == 1
    for group in ("data", "model", "quant", "peft", "optimizer", "scheduler", "loss", "prompt"):
        own = [value for name, value in hashes.items() if name.startswith(f"{group}=")]
        assert len(set(own)) == len(own), group
