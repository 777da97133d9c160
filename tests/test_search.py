"""A search prunes what is hopeless, tells so in the run's row, and goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from medqlora import search
from medqlora.config import CONFIG_DIR, compose
from medqlora.errors import ConfigError
from medqlora.evaluation import read_run
from medqlora.report import report

optuna = pytest.importorskip("optuna", reason="optuna is not installed: extra [optuna]")

FOLDER = Path("sweeps/search")
RATE = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


def space_of(*words: str) -> Any:
    return search.split_space(OverridesParser.create().parse_overrides(list(words)))


# --- what is searched -----------------------------------------------------------------------------


def test_words_of_the_command_line_become_distributions():
    fixed, space = space_of(
        "seed=3",
        RATE,
        "a=interval(0,1.5)",
        "b=range(1,9,2)",
        "c=x,y",
        "d=int(interval(1,8))",
        "e=[1,2]",
    )
    assert fixed == ["seed=3", "e=[1,2]"]
    make = optuna.distributions
    assert space == {
        "optimizer.lr": make.FloatDistribution(1e-4, 1e-2, log=True),
        "a": make.FloatDistribution(0, 1.5),
        "b": make.IntDistribution(1, 7, step=2),
        "c": make.CategoricalDistribution(["x", "y"]),
        "d": make.IntDistribution(1, 8),
    }


def test_the_last_of_a_key_counts():
    """What is typed comes after the values of the named sweep."""
    fixed, space = space_of("peft.r=4,8", "loss=choice,token", "peft.r=16")
    assert fixed == ["peft.r=16"]
    assert list(space) == ["loss"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "nothing to search"),
        (["lr=interval(2,1)"], "is empty"),
        (["lr=tag(log,interval(0,1))"], "log scale"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        space_of(*words)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("metric=loss", "val/loss, val/accuracy"),
        ("sampler=best", "tpe, random, qmc"),
        ("pruner=axe", "median, hyperband, none"),
        ("n_trials=0", "1 or more"),
        ("storage=postgresql://me:secret@127.0.0.1:1/x", "me:***@127.0.0.1:1/x"),
        ("storage=nonsense", "nonsense"),
    ],
)
def test_an_option_of_the_search_that_cannot_work_is_one_line(
    option, said, run_command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ended = run_command("train", "sweep=optuna_lora", f"hydra.sweeper.{option}")
    assert ended.code == 2
    [error] = ended.errors
    assert said in error
    assert "secret" not in ended.err


def test_the_named_search_can_be_composed():
    """Every value that can be drawn gives a config; a search can end a trial ten times an epoch."""
    params = OmegaConf.load(CONFIG_DIR / "sweep" / "optuna_lora.yaml").hydra.sweeper.params
    _, space = space_of(*(f"{key}={value}" for key, value in params.items()))
    assert {"optimizer.lr", "peft.r"} <= set(space)
    for seed in range(2):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        drawn = [f"{key}={value}" for key, value in study.ask(space).params.items()]
        cfg = compose("train", ["sweep=optuna_lora", *drawn])
        assert cfg.trainer.val_check_interval == 0.1
        assert cfg.callbacks.checkpoints.monitor == "val/loss"


def test_an_address_of_postgresql_means_the_driver_that_is_installed(monkeypatch):
    """Psycopg 3 has another name in SQLAlchemy than its predecessor."""
    url, there = "postgresql://me@host/search", {"psycopg2"}
    monkeypatch.setattr(search, "find_spec", lambda name: name in there)
    assert search.storage_url(url, Path()) == url
    there.clear()
    assert search.storage_url(url, Path()) == "postgresql+psycopg://me@host/search"
    assert search.storage_url(None, Path("/a")) == "sqlite:////a/optuna.db"


# --- a real search --------------------------------------------------------------------------------


@pytest.fixture
def line(run_command, tiny_options, tmp_path, monkeypatch):
    """`line(n)`: the same line, typed for n trials of one packed row each."""
    monkeypatch.chdir(tmp_path)
    short = ["data.limit_train=16", "data.limit_val=8", "data.limit_test=8"]
    options = [*tiny_options, *short, "quant.compute_dtype=float32", "trainer.max_steps=2"]

    def typed(n_trials: int, *words: str) -> Any:
        fixed = [f"hydra.sweep.dir={FOLDER}", f"hydra.sweeper.n_trials={n_trials}"]
        fixed += ["hydra/sweeper=optuna", "trainer.val_check_interval=1"]
        return run_command("train", "-m", *options, *fixed, RATE, "peft=lora_r4,lora_r8", *words)

    return typed


def study() -> Any:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{FOLDER.resolve()}/optuna.db")


def test_a_search_prunes_goes_on_and_is_drawn(line, tmp_path):
    """One search from its first trial to its figures."""
    ended = line(1)
    assert ended.code == 0, ended.err
    [first] = study().trials
    value = read_run(FOLDER / "0").metrics["val"]["loss"]
    assert (first.state.name, first.value) == ("COMPLETE", value)
    assert read_run(FOLDER / "0").metrics["search"]["params"] == first.params
    command = read_run(FOLDER / "0").metrics["command"]
    assert f"optimizer.lr={first.params['optimizer.lr']}" in command
    assert "sweeper" not in command

    # Four trials that were far better, so that the next one is hopeless.
    for number in range(4):
        study().add_trial(
            optuna.trial.create_trial(
                params={"optimizer.lr": 1e-3 * (number + 1), "peft": "lora_r4"},
                distributions=first.distributions,
                value=0.01,
                intermediate_values={1: 0.01, 2: 0.01},
            )
        )
    ended = line(6)
    assert ended.code == 0, ended.err
    assert ended.errors == []
    assert study().trials[5].state.name == "PRUNED"
    run = read_run(FOLDER / "5")
    assert (run.status, run.metrics["pruned"]["step"]) == ("interrupted", 1)
    assert run.metrics["pruned"]["metric"] == "val/loss"
    assert math.isfinite(run.metrics["pruned"]["value"])
    assert run.metrics["test"]["accuracy"] is None

    # All trials are there: nothing runs.
    again = line(6)
    assert (again.code, "training " in again.err) == (0, False)
    assert "6 of 6 trials: 5 completed, 1 pruned" in again.err

    # A process died in the middle of a trial: the same line goes on with it and asks no other.
    running = study().ask(first.distributions)
    running.set_user_attr("host", search.socket.gethostname())
    running.set_user_attr("process", [2**22 + 1, 0.0])
    third = line(7)
    assert third.code == 0, third.err
    assert f"going on with trial {running.number}" in third.err
    assert study().trials[6].state.is_finished()
    assert len(study().trials) == 7

    # Another space in the same storage is another search.
    other = line(8, "peft=lora_r4,lora_r16")
    assert other.code == 2
    assert "begun with another space" in other.errors[0]

    ablation = report(compose("report", [f"runs={FOLDER}"]), tmp_path / "report")
    assert [e.run.metrics.get("pruned") is not None for e in ablation.entries].count(True) >= 1
    assert "pruned" in (tmp_path / "report" / "summary.csv").read_text()


def test_a_failed_trial_is_told_and_the_next_one_runs(line):
    ended = line(2, "peft=none,lora_r4", "hydra.sweeper.sampler=random", "hydra.sweeper.seed=0")
    states = {trial.params["peft"]: trial.state.name for trial in study().trials}
    assert states == {"none": "FAIL", "lora_r4": "COMPLETE"}
    assert ended.code == 1
    assert len(ended.errors) == 1


def test_a_trial_of_a_living_process_is_left_alone():
    """The same line in two terminals, or on two machines: nobody takes another's trial."""
    here = {"host": search.socket.gethostname()}
    me = search.psutil.Process()
    running = optuna.trial.TrialState.RUNNING
    for attrs, abandoned in (
        ({**here, "process": [me.pid, me.create_time()]}, False),
        ({**here, "process": [me.pid, 0.0]}, True),  # the number was given to another process
        ({"host": "elsewhere", "process": [2**22 + 1, 0.0]}, False),
        ({}, False),
    ):
        trial = optuna.trial.create_trial(state=running, user_attrs=attrs)
        assert search._is_abandoned(trial) is abandoned
