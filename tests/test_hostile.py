"""A run folder from elsewhere is data: nothing in it runs, however it is dressed up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from medqlora import pipeline
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
        pipeline.make(filled(HOSTILE[name], mark))
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
