"""A run folder from elsewhere is data: nothing in it runs, however it is dressed up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from medqlora import instantiation
from medqlora.errors import ConfigError

MARK = "touch {mark}"

HOSTILE: dict[str, dict[str, Any]] = {
    "a shell": {"_target_": "os.system", "command": MARK},
    "a shell by way of this package": {
        "_target_": "medqlora.pipeline.os.system",
        "command": MARK,
    },
    "a shell by way of a part of it": {"_target_": "medqlora.tracking.os.system", "command": MARK},
    "a pickle": {"_target_": "lightning.pytorch.core.saving.torch.load", "f": "{mark}"},
    "code of a model": {
        "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "{mark}",
        "trust_remote_code": True,
    },
    "code from the hub": {
        "_target_": "transformers.dynamic_module_utils.get_class_from_dynamic_module",
        "class_reference": "x.Y",
        "pretrained_model_name_or_path": "{mark}",
    },
    "another command": {"_target_": "medqlora.train.train"},
    "another instantiation": {"_target_": "hydra.utils.instantiate"},
    "an argument that is an object": {
        "_target_": "medqlora.quantization.QuantConfig",
        "data_type": {"_target_": "subprocess.run", "args": ["touch", "{mark}"]},
    },
    "an object in a list": {
        "_target_": "medqlora.quantization.QuantConfig",
        "skip_modules": [{"_target_": "builtins.eval", "_args_": ["1"]}],
    },
    "an object made by an interpolation": {
        "_target_": "medqlora.quantization.QuantConfig",
        "data_type": '${oc.create:"{_target_: os.system, command: touch {mark}}"}',
    },
    "a secret of the environment": {
        "_target_": "medqlora.quantization.QuantConfig",
        "data_type": "${oc.env:HOME}",
    },
}


def filled(node: Any, mark: Path) -> Any:
    if isinstance(node, dict):
        return {key: filled(value, mark) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(value, mark) for value in node]
    return node.replace("{mark}", str(mark)) if isinstance(node, str) else node


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_node_is_refused_by_name_and_not_run(name, tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises(ConfigError, match=r"is not run|would be computed"):
        instantiation.make(filled(HOSTILE[name], mark))
    assert not mark.exists()


@pytest.mark.parametrize("group", ["quant", "acceleration", "prompt", "data"])
def test_a_hostile_run_folder_ends_predict_and_export_in_one_line(
    group, trained_run, tmp_path, run_command, question_files
):
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(trained_run, run)
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config[group] = filled(HOSTILE["a shell by way of this package"], mark)
    file.write_text(yaml.safe_dump(config))
    for verb, option in (("predict", f"questions={question_files['test']}"), ("export", "limit=0")):
        ended = run_command(verb, f"run={run}", option)
        assert ended.code == 2
        assert len(ended.errors) == 1
        assert "medqlora.pipeline.os.system is not run" in ended.errors[0]
    assert not mark.exists()
    assert not (run / "export" / "merged").exists()


def test_objects_in_yaml_tags_are_not_made(trained_run, tmp_path, run_command, question_files):
    """`!!python/object/apply` is YAML's own way to run code."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(trained_run, run)
    tag = f"quant: !!python/object/apply:os.system ['touch {mark}']\n"
    (run / "config.yaml").write_text(tag)
    ended = run_command("predict", f"run={run}", f"questions={question_files['test']}")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert not mark.exists()


# --- what Hydra itself would run ------------------------------------------------------------------

HYDRA_NODES: dict[str, dict[str, Any]] = {
    "a callback": {"hydra": {"callbacks": {"x": {"_target_": "os.system", "command": MARK}}}},
    "a launcher": {"hydra": {"launcher": {"_target_": "os.system"}}},
    "a sweeper": {"hydra": {"sweeper": {"_target_": "os.system"}}},
    "a log handler": {
        "hydra": {
            "job_logging": {
                "version": 1,
                "handlers": {"x": {"()": "os.system", "command": MARK}},
                "root": {"handlers": ["x"]},
            }
        }
    },
    "an environment variable": {"hydra": {"job": {"env_set": {"LD_PRELOAD": "{mark}"}}}},
    "a folder elsewhere": {"hydra": {"run": {"dir": "{mark}"}}},
    "a folder above": {"hydra": {"run": {"dir": "runs/../../mark"}}},
    "a secret of the environment": {"model": {"path": "x/${oc.env:HF_TOKEN}"}},
    "a secret by another name": {"seed": "HF_TOKEN", "model": {"path": "x/${oc.env:${seed}}"}},
    "a config from a text": {"model": '${oc.create:"{path: x}"}'},
}


@pytest.mark.parametrize("name", HYDRA_NODES)
def test_a_config_from_elsewhere_does_not_choose_what_hydra_runs(
    name, trained_run, tmp_path, run_command
):
    """The comment in every config.yaml says how to repeat its run, so people will type it."""
    sent, mark = tmp_path / "sent", tmp_path / "mark"
    sent.mkdir()
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    for key, node in filled(HYDRA_NODES[name], mark).items():
        if isinstance(node, dict):
            config[key] |= node
        else:
            config[key] = node
    config["hydra"].setdefault("run", {"dir": "runs/now"})
    (sent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    ended = run_command("train", "--config-path", str(sent), "--config-name", "config")
    assert ended.code == 2, ended.err
    assert len(ended.errors) == 1
    assert "is not used" in ended.errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sent"]


def test_what_hydra_runs_may_also_not_hide_in_a_file_beside_the_config(tmp_path, run_command):
    (tmp_path / "hydra" / "callbacks").mkdir(parents=True)
    mark = tmp_path / "mark"
    node = {"x": {"_target_": "os.system", "command": f"touch {mark}"}}
    (tmp_path / "hydra" / "callbacks" / "x.yaml").write_text(yaml.safe_dump(node))
    (tmp_path / "config.yaml").write_text("defaults: [_self_, {override hydra/callbacks: x}]\n")
    ended = run_command("train", "--config-path", str(tmp_path), "--config-name", "config")
    assert ended.code == 2
    assert "is not used" in ended.errors[0]
    assert not mark.exists()


def test_options_from_a_folder_of_ones_own_are_used(tmp_path, run_command):
    """The refusals must not cost the feature; nor what is typed, such as a folder elsewhere."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("path: /nowhere/mine\nrevision: null\n")
    ended = run_command(
        "train",
        *("--config-dir", str(tmp_path), "model=mine", "trainer=cpu", "logger=csv"),
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert ended.code == 2
    assert "/nowhere/mine" in ended.errors[0]


def test_a_pickled_job_of_hydra_is_refused(tmp_path, run_command):
    ended = run_command("train", "--experimental-rerun", str(tmp_path / "config.pickle"))
    assert ended.code == 2
    assert "pickle" in ended.errors[0]
