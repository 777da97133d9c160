"""Search by Optuna in place of a grid: a sweeper for Hydra, and what a trial tells while it runs.

Hydra takes sweepers from `hydra_plugins` alone, so `hydra_plugins/medqlora.py` passes this one on.

`hydra-optuna-sweeper` 1.3.0 asks for optuna<3 and knows no pruning, so the library is driven here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from medqlora.errors import ConfigError, MedQLoRAError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

log = logging.getLogger("medqlora.search")

METRICS: dict[str, Literal["minimize", "maximize"]] = {
    "val/loss": "minimize",
    "val/accuracy": "maximize",
}
SAMPLERS, PRUNERS = ("tpe", "random", "qmc"), ("median", "hyperband", "none")
_TARGET = "hydra_plugins.medqlora.OptunaSweeper"


class Search(Sweeper):
    """Asks an Optuna study for trials, has the launcher run them and tells the study what came out.

    The study lives in its storage: the same line typed again, or on another machine with the same
    storage, goes on with it. A trial that was killed is gone on with in its run folder.

    Args:
        storage: URL of the storage; None for SQLite in the folder of the sweep.
        study_name: None for the name of that folder.
        metric: "val/loss" or "val/accuracy".
        n_trials: Trials of the whole study.
        n_jobs: Trials given to the launcher at a time.
        sampler: "tpe", "random" or "qmc".
        pruner: "median", "hyperband" or "none".
        seed: Seed of the sampler.
        params: What is searched, as on the command line.
    """

    def __init__(
        self,
        storage: str | None,
        study_name: str | None,
        metric: str,
        n_trials: int,
        n_jobs: int,
        sampler: str,
        pruner: str,
        seed: int | None,
        params: DictConfig | None = None,
    ) -> None:
        for name, value, known in (
            ("metric", metric, METRICS),
            ("sampler", sampler, SAMPLERS),
            ("pruner", pruner, PRUNERS),
        ):
            if value not in known:
                raise ConfigError(
                    f"hydra.sweeper.{name}={value} is unknown. Choose {', '.join(known)}."
                )
        for name, number in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if number < 1:
                raise ConfigError(f"hydra.sweeper.{name}={number} runs nothing. Give 1 or more.")
        self.storage, self.study_name, self.metric = storage, study_name, metric
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.sampler, self.pruner, self.seed = sampler, pruner, seed
        self.params = dict(params or {})
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra hands over and make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has as many as it is to have.

        Raises:
            ConfigError: If nothing is searched, or the storage cannot be used.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        fixed, space = split_space(parser.parse_overrides(words))
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = self.study_name or folder.resolve().name
        study = open_study(
            storage_url(self.storage, folder),
            name,
            self.metric,
            self.sampler,
            self.pruner,
            self.seed,
        )
        _check_same_search(study, fixed, space, self.metric)
        while batch := self._next_trials(study, space):
            jobs = [
                [*fixed, *(f"{key}={value}" for key, value in trial.params.items())]
                for trial in batch
            ]
            # The folder tells a job which trial it is; see `trial_of_this_job`.
            numbered = [
                [*job, f"hydra.sweep.subdir='{trial.number}'"]
                for job, trial in zip(jobs, batch, strict=True)
            ]
            self.validate_batch_is_legal(numbered)
            returned = self.launcher.launch(numbered, initial_job_idx=batch[0].number)
            for trial in batch:
                _tell(study, trial, folder / str(trial.number), self.metric)
            for job in returned:
                _ = job.return_value  # raises where a job failed in a process of its own
        _summarise(study, self.metric, self.n_trials)

    def _next_trials(
        self, study: Study, space: dict[str, BaseDistribution]
    ) -> Sequence[FrozenTrial]:
        """Trials of dead processes of this machine, then new ones."""
        trials = study.get_trials(deepcopy=False)
        left = [trial for trial in trials if _is_abandoned(trial)][: self.n_jobs]
        for trial in left:
            log.info("going on with trial %d, which was not finished", trial.number)
        missing = max(0, self.n_trials - len(trials))
        asked = [study.ask(space) for _ in range(0 if left else min(missing, self.n_jobs))]
        numbers = [trial.number for trial in (*left, *asked)]
        for number in numbers:
            _claim(study, number)
        return [study.get_trials(deepcopy=False)[number] for number in numbers]


def split_space(
    overrides: Sequence[Override],
) -> tuple[list[str], dict[str, BaseDistribution]]:
    """What every trial has in common, and what is searched.

    Args:
        overrides: Of the command line and of the sweep; the last of a key counts.

    Returns:
        Fixed overrides, and a distribution a searched key.

    Raises:
        ConfigError: If nothing is searched.
    """
    fixed: dict[str, str] = {}
    space: dict[str, BaseDistribution] = {}
    for override in overrides:
        key = override.get_key_element()
        fixed.pop(key, None)
        space.pop(key, None)
        if override.is_sweep_override():
            space[key] = _distribution(override)
        else:
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search: every key has one value. Give one "
            "several, such as 'optimizer.lr=tag(log,interval(1e-5,1e-3))' or peft.r=4,8,16."
        )
    return list(fixed.values()), space


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    key = override.get_key_element()
    if isinstance(value, IntervalSweep):
        low, high, is_log = value.start, value.end, "log" in value.tags
        assert low is not None
        assert high is not None
        if low >= high or (is_log and low <= 0):
            raise ConfigError(
                f"{key}=interval({low},{high}) is empty"
                + (" on a log scale" if is_log else "")
                + ". Give the smaller end first"
                + (", above 0." if is_log else ".")
            )
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=is_log)
        return FloatDistribution(low, high, log=is_log)
    if isinstance(value, RangeSweep) and isinstance(value.step, int):
        numbers = range(int(value.start or 0), int(value.stop or 0), value.step)
        if not numbers:
            raise ConfigError(f"{key}={override.value()} is empty. Give range(first,end[,step]).")
        return IntDistribution(min(numbers), max(numbers), step=abs(value.step))
    return CategoricalDistribution([str(item) for item in override.sweep_string_iterator()])


def storage_url(storage: str | None, folder: Path) -> str:
    """The URL of a storage: the one given, or SQLite in the folder of the sweep.

    `postgresql://` means psycopg 3 where its predecessor is not installed.
    """
    if storage and storage.startswith("postgresql://") and not find_spec("psycopg2"):
        return storage.replace("postgresql://", "postgresql+psycopg://", 1)
    return storage or f"sqlite:///{folder.resolve() / 'optuna.db'}"


def open_study(
    url: str, name: str, metric: str, sampler: str, pruner: str, seed: int | None
) -> Study:
    """The study of this name in a storage, made if it is not there.

    Raises:
        ConfigError: If optuna is missing, or the storage cannot be reached or read.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "hydra/sweeper=optuna needs the package optuna, which is not installed. Type pip "
            "install 'medqlora[optuna]', or leave hydra/sweeper out for a grid."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers: dict[str, Callable[[], Any]] = {
        # A trial that is under way elsewhere counts as a bad one, so that it is not tried twice.
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "qmc": lambda: optuna.samplers.QMCSampler(seed=seed),
    }
    pruners: dict[str, Callable[[], Any]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(),
        "none": lambda: optuna.pruners.NopPruner(),
    }
    try:
        study = optuna.create_study(
            storage=url,
            study_name=name,
            direction=METRICS[metric],
            pruner=pruners[pruner](),
            load_if_exists=True,
        )
        if seed is not None:  # a search that goes on must not draw again what it drew first
            seed += len(study.get_trials(deepcopy=False))
        study.sampler = samplers[sampler]()
        return study
    except Exception as error:  # SQLAlchemy's and each driver's own
        raise ConfigError(
            f"the storage {_without_password(url)} of the search cannot be used "
            f"({type(error).__name__}: {_first_line(error)}). Check hydra.sweeper.storage: null is "
            "a file in the folder of the sweep, postgresql://user:password@host/database needs pip "
            "install 'medqlora[postgresql]'."
        ) from None


def _check_same_search(
    study: Study, fixed: Sequence[str], space: dict[str, BaseDistribution], metric: str
) -> None:
    from optuna.distributions import distribution_to_json

    ours = {
        "fixed": sorted(word for word in fixed if not word.startswith("hydra")),
        "space": {key: json.loads(distribution_to_json(space[key])) for key in sorted(space)},
        "metric": metric,
    }
    theirs = study.user_attrs.get("search")
    if theirs is None:
        study.set_user_attr("search", ours)
    elif theirs != ours:
        changed = next(key for key in ours if theirs.get(key) != ours[key])
        raise ConfigError(
            f"the search {study.study_name} was begun with another {changed} "
            f"({_shortened(theirs.get(changed))}, now {_shortened(ours[changed])}), and trials of "
            "both cannot be compared. Type the old line to go on with it, or give a new "
            "hydra.sweep.dir=DIR."
        )


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 160 else text[:159] + "…"


def _claim(study: Study, number: int) -> None:
    """Note which process runs a trial."""
    trial = _trial(study, number)
    trial.set_user_attr("host", socket.gethostname())
    trial.set_user_attr("process", [os.getpid(), psutil.Process().create_time()])


def _is_abandoned(trial: FrozenTrial) -> bool:
    """Whether a trial is under way in a process of this machine that is no more."""
    if trial.state.is_finished() or trial.user_attrs.get("host") != socket.gethostname():
        return False
    number, created = trial.user_attrs["process"]
    try:
        return psutil.Process(number).create_time() != created
    except psutil.NoSuchProcess:
        return True


def _trial(study: Study, number: int) -> Any:
    import optuna

    frozen = study.get_trials(deepcopy=False)[number]
    return optuna.trial.Trial(study, frozen._trial_id)


def _tell(study: Study, trial: FrozenTrial, run_dir: Path, metric: str) -> None:
    """Tell the study how a trial ended, by what its run folder says."""
    from optuna.trial import TrialState

    from medqlora.evaluation.results import read_run

    answered = study.get_trials(deepcopy=False)[trial.number].user_attrs.get("run_dir")
    try:
        metrics: dict[str, Any] = read_run(answered or run_dir).metrics
    except MedQLoRAError:  # the job never began
        metrics = {"status": "failed"}
    if metrics["status"] == "interrupted" and not metrics.get("pruned"):
        return  # the same line goes on with it
    split, key = metric.split("/")
    value = (metrics.get(split) or {}).get(key)
    if metrics.get("pruned"):
        study.tell(trial.number, state=TrialState.PRUNED)
    elif metrics["status"] == "completed" and value is not None and math.isfinite(value):
        study.tell(trial.number, value)
    else:
        study.tell(trial.number, state=TrialState.FAIL)


def _summarise(study: Study, metric: str, wanted: int) -> None:
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    counts = {name: states.count(name) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")}
    log.info(
        "%d of %d trials: %s",
        len(states),
        wanted,
        ", ".join(f"{number} {_STATES[name]}" for name, number in counts.items() if number),
    )
    if counts["COMPLETE"]:
        best = study.best_trial
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        log.info("best: trial %d, %s %.4f, %s", best.number, metric, best.value, words)
    log.info("more: hydra.sweeper.n_trials=%d", 2 * wanted)


_STATES = {
    "COMPLETE": "completed",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "under way",
}


class RunningTrial:
    """The trial that the job of this process is.

    Attributes:
        metric: What it reports.
    """

    def __init__(self, study: Study, number: int, metric: str) -> None:
        self._trial = _trial(study, number)
        self.metric = metric

    def describe(self) -> dict[str, Any]:
        """What a run folder keeps of it, enough to draw the search from run folders alone."""
        from optuna.distributions import distribution_to_json

        return {
            "study": self._trial.study.study_name,
            "trial": self._trial.number,
            "metric": self.metric,
            "params": dict(self._trial.params),
            "distributions": {
                key: distribution_to_json(value) for key, value in self._trial.distributions.items()
            },
        }

    def answered_by(self, run_dir: Path) -> None:
        """Note the run that had the same config: a sampler may draw what was tried before."""
        self._trial.set_user_attr("run_dir", str(run_dir))

    def is_hopeless(self, value: float, step: int) -> bool:
        """Report a value of the metric after some updates; whether the pruner would end it here."""
        if step not in self._trial.storage.get_trial(self._trial._trial_id).intermediate_values:
            self._trial.report(value, step)
        return self._trial.should_prune()


def trial_of_this_job() -> RunningTrial | None:
    """The trial that runs in this process; None where the job is no trial of a search.

    Raises:
        ConfigError: If its storage cannot be used.
    """
    if not HydraConfig.initialized() or HydraConfig.get().sweeper._target_ != _TARGET:
        return None
    hydra = HydraConfig.get()
    options, folder = hydra.sweeper, Path(hydra.sweep.dir)
    if not str(hydra.sweep.subdir).isdigit():
        return None
    study = open_study(
        storage_url(options.storage, folder),
        options.study_name or folder.resolve().name,
        options.metric,
        options.sampler,
        options.pruner,
        options.seed,
    )
    return RunningTrial(study, int(hydra.sweep.subdir), options.metric)


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if "@" not in rest:
        return url
    user = rest.rpartition("@")[0].partition(":")[0]
    return f"{scheme}{separator}{user}:***@{rest.rpartition('@')[2]}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
