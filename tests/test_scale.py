# SPDX-License-Identifier: Apache-2.0
"""Configurations of examples/accelerate, and what trainers say of those that shard."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from tenfold.training import sharding
from tenfold.training.loop import make_accelerator

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "accelerate"
KINDS = {
    "cpu": "NO",
    "cpu_ddp": "MULTI_CPU",
    "fsdp2": "FSDP",
    "multi_gpu": "MULTI_GPU",
    "multi_node": "MULTI_GPU",
}


def test_the_files_are_those_named():
    assert {p.stem for p in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_them(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # unknown keys raise
    assert isinstance(config, ClusterConfig) and config.distributed_type == DistributedType(
        KINDS[name]
    )
    written = yaml.safe_load(path.read_text())
    assert {k: v for k, v in config.to_dict().items() if k in written} == written
    per_machine, left = divmod(config.num_processes, config.num_machines)
    assert per_machine >= 1 and not left and config.use_cpu == name.startswith("cpu")


def test_fsdp2_options_are_those_of_the_launcher():
    options = {a.dest: a for a in launch_command_parser()._actions}
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert int(config["fsdp_version"]) == 2 and set(config) <= set(options)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "MULTI_GPU"])
def test_trainers_refuse_what_shards_the_model_otherwise(kind, monkeypatch):
    state = SimpleNamespace(device=torch.device("cpu"))
    made = SimpleNamespace(distributed_type=DistributedType(kind), num_processes=2, state=state)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: made)
    settings = SimpleNamespace(mixed_precision="no")
    if kind == "MULTI_GPU":
        assert make_accelerator(settings, torch.device("cpu")) is made
        return
    with pytest.raises(
        ValueError, match=rf"configured for {kind}, and this trainer shards models by its own FSDP2"
    ):
        make_accelerator(settings, torch.device("cpu"))


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP version 1, and trainers shard models by FSDP2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true is not supported"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use the method's gradient_checkpointing"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "every rank loads the model"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "got 'SIZE_BASED_WRAP'"),
        ({"FSDP_IGNORED_MODULES": "head"}, "FSDP_IGNORED_MODULES is not supported"),
    ],
)
def test_settings_of_fsdp_that_cannot_be_had(settings, says, monkeypatch):
    for name, value in (FSDP2 | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        sharding.asked()


def launched_with(path, monkeypatch):
    """Sets the environment that ``accelerate launch --config_file`` gives its processes."""
    parser = launch_command_parser()
    args, *_ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), "script.py"])
    )
    made = prepare_multi_gpu_env(args)
    for name in [n for n in os.environ if n.startswith("FSDP_")]:
        monkeypatch.delenv(name)
    for name, value in made.items():
        monkeypatch.setenv(name, value)


def test_the_file_asks_for_what_trainers_can(monkeypatch):
    assert not sharding.asked()
    launched_with(FOLDER / "fsdp2.yaml", monkeypatch)
    assert os.environ["FSDP_VERSION"] == "2" and sharding.asked()
    with sharding.unasked():
        assert not sharding.asked()
    assert sharding.asked()


def test_one_process_has_the_model_whole(monkeypatch):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    made = make_accelerator(SimpleNamespace(mixed_precision="no"), torch.device("cpu"))
    assert made.num_processes == 1 and sharding.mesh_of(made) is None


def test_precisions_that_cannot_be_sharded():
    with pytest.raises(ValueError, match="must be 'no' or 'bf16' with FSDP2, got 'fp16'"):
        sharding.shard_by(SimpleNamespace(), "fp16")


def test_blocks(monkeypatch):
    def block():
        return torch.nn.Sequential(torch.nn.Linear(4, 4))

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block(), block(), block()])
    model.few = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert sharding.blocks_of(model) == list(model.layers)
    model.head = torch.nn.Linear(4, 4)
    model.head.weight = model.layers[1][0].weight  # then neither is a block of its own
    assert sharding.blocks_of(model) == [model.layers[0], model.layers[2]]
    model._no_split_modules = ["Linear"]
    assert sharding.blocks_of(model) == [model.layers[0][0], model.layers[2][0], model.few[0]]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Sequential")
    assert sharding.blocks_of(model) == [model.layers[0], model.layers[2]]
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    assert sharding.blocks_of(model) == []


def test_one_dtype_trains_in_a_block():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    sharding._check(model, list(model))
    with pytest.raises(ValueError, match="got bfloat16 and float32 in the rest"):
        sharding._check(model, [])
    model[1].requires_grad_(False)
    sharding._check(model, [])
