"""A local web page that answers questions with a run, and the same over HTTP for other programs.

python -m medqlora.serve run=runs/DAY/TIME
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import math
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from medqlora import pipeline
from medqlora.answering import AnswerThread, run_temperature
from medqlora.entry import command
from medqlora.errors import CheckpointError, ConfigError, MedQLoRAError
from medqlora.evaluation import read_predictions
from medqlora.hub import display_name
from medqlora.runs import describe
from medqlora.schema import LETTERS

log = logging.getLogger("medqlora.serve")

DISCLAIMER = (
    "This is no medical device and gives no medical advice. The model is often wrong and sounds no "
    "less sure when it is. Do not use its answers for the diagnosis, treatment or care of anybody."
)

_TRIAL = {"question": "Which of these?", **dict.fromkeys(("opa", "opb", "opc", "opd"), "this")}


def serve(cfg: DictConfig) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Args:
        cfg: The composed config of `serve`.

    Raises:
        ConfigError: If the request cannot work, such as a port that is taken.
        CheckpointError: If the run folder is none.
        MedQLoRAError: If the run cannot answer.
    """
    _check(cfg)
    with open_socket(str(cfg.host), cfg.port, public=cfg.public) as listener:
        temperature = temperature_of(cfg.run, cfg.temperature)
        run = pipeline.load_run(cfg.run, device=cfg.device)
        from medqlora import web

        answers = AnswerThread(run, temperature or 1.0, max_waiting=cfg.max_waiting)
        try:
            _try_out(answers)
            limits = web.Limits(cfg.max_bytes, cfg.max_questions, float(cfg.timeout))
            facts = describe_run(run, temperature)
            app = web.build_app(answers, facts, limits, host=str(cfg.host))
            address = _address(str(cfg.host), listener.getsockname()[1])
            print(f"{facts['name']} answers at {address} (Ctrl-C ends it)", flush=True)
            web.run_server(app, listener, limits)
        finally:
            answers.close()
    log.info("ended")


def _check(cfg: DictConfig) -> None:
    if OmegaConf.is_missing(cfg, "run") or cfg.run is None:
        raise ConfigError("serve needs run=runs/DAY/TIME, and run is not given.")
    port = cfg.port
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ConfigError(f"port={port} is no port: give 1 to 65535, or 0 for any that is free.")
    for key in ("max_bytes", "max_questions", "max_waiting"):
        value = cfg[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key}={value} is no limit: give a whole number, 1 or more.")
    timeout = cfg.timeout
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < math.inf:
        raise ConfigError(f"timeout={timeout} is no time: give seconds, more than 0.")
    if cfg.temperature not in ("auto", "run", None):
        raise ConfigError(f"temperature={cfg.temperature} is unknown. Choose auto, run or null.")
    if not isinstance(cfg.public, bool):
        raise ConfigError(f"public={cfg.public} is unknown. Choose true or false.")
    missing = [n for n in ("starlette", "uvicorn") if importlib.util.find_spec(n) is None]
    if missing:
        raise ConfigError(
            f"serve needs {' and '.join(missing)}, which this environment lacks: pip install "
            "'medqlora[serve]'."
        )


def open_socket(host: str, port: int, *, public: bool = False) -> socket.socket:
    """A listening socket, so that an address in use is refused before a model is loaded.

    Args:
        host: Name or address of this machine.
        port: Port; 0 for any that is free.
        public: Whether other machines may reach it.

    Raises:
        ConfigError: If the address is not to be had, or is reachable and `public` is false.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host={host} is no address of this machine: try 127.0.0.1.") from error
    if not ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback:
        if not public:
            raise ConfigError(
                f"host={host} can be reached by other machines, which could ask without a login "
                "and read along. Leave host=127.0.0.1, or add public=true if that is meant."
            )
        log.warning(
            "host=%s: every machine that reaches this one can ask the model and read the run's "
            "accuracy, without a login, and what is asked travels without encryption",
            host,
        )
    try:
        listener = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(
            f"host={host} port={port} cannot be listened at ({error.strerror}): give another port, "
            "or port=0 for any that is free."
        ) from error
    # Inherited by its connections: asyncio sets it only on sockets that name their protocol, and
    # without it the body of an answer waits 40 ms for the other side to confirm its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def temperature_of(run_dir: str | Path, choice: str | None) -> float | None:
    """The run's temperature; None for scores as they are.

    Args:
        run_dir: The run folder.
        choice: "auto" takes it if the run has one, "run" insists, None leaves it.

    Raises:
        CheckpointError: If the run folder is none, or "run" insists in vain.
    """
    if choice is None:
        return None
    try:
        return run_temperature(run_dir, "run")
    except CheckpointError:
        if choice == "run":
            raise
        return None


def _try_out(answers: AnswerThread) -> None:
    """Score a first question, so that compilation is done and what fails, fails now."""
    record = _TRIAL | ({"ope": "this"} if answers.num_options == 5 else {})
    try:
        (line,) = answers.ask([record]).result()
    except MedQLoRAError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise MedQLoRAError(
            f"the run cannot answer here ({reason}): run `python -m medqlora.doctor`, or try "
            "device=cpu."
        ) from error
    if "error" in line:
        raise MedQLoRAError(f"the run cannot answer a short question: {line['error']}")


# --- what the page says about the run -------------------------------------------------------------


def describe_run(run: pipeline.LoadedRun, temperature: float | None) -> dict[str, Any]:
    """What `GET /run` answers: the run, how good it is, and by subject.

    Args:
        run: The run.
        temperature: What its scores are divided by; None if they are left as they are.

    Returns:
        Plain values. `overall` and each of `subjects` have `n`, `accuracy`, `ci_low`, `ci_high`
        (95 % Wilson) and `majority_accuracy`, that of always giving the most frequent letter; they
        are null and empty for a run that was not scored.
    """
    metrics = run.metrics
    split = next((name for name in ("test", "val") if metrics[name]["n"]), None)
    section = metrics[split] if split else {}
    return {
        "name": run.run_dir.resolve().name,
        "method": describe(run.config),
        "base": display_name(str(run.config["model"]["path"])),
        "data": metrics["data"]["name"],
        "status": metrics["status"],
        "letters": list(LETTERS[: run.datamodule.num_options]),
        "split": split,
        "overall": _brief(section, section["majority_accuracy"]) if split else None,
        "subjects": _subjects(run, split, section),
        "temperature": temperature,
        "disclaimer": DISCLAIMER,
    }


def _brief(group: Mapping[str, Any], majority_accuracy: float | None) -> dict[str, Any]:
    keys = ("n", "accuracy", "ci_low", "ci_high")
    return {key: group[key] for key in keys} | {"majority_accuracy": majority_accuracy}


def _subjects(
    run: pipeline.LoadedRun, split: str | None, section: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Accuracy of each subject by name, beside its own best constant letter."""
    if split is None:
        return {}
    answers: defaultdict[str, Counter[int]] = defaultdict(Counter)
    with contextlib.suppress(MedQLoRAError):  # the accuracies are there without the predictions
        for prediction in read_predictions(run.run_dir, split):
            if prediction.answer is not None:
                answers[prediction.subject_name][prediction.answer] += 1
    return {
        name: _brief(group, max(answers[name].values(), default=0) / group["n"] or None)
        for name, group in sorted(section["by"]["subject_name"].items())
    }


@command("serve")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Serve until it is ended."""
    serve(cfg)


if __name__ == "__main__":
    main()
