# SPDX-License-Identifier: Apache-2.0
"""Configurations of examples/accelerate, and what trainers say of those that shard."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

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
def test_trainers_refuse_what_shards_the_model(kind, monkeypatch):
    state = SimpleNamespace(device=torch.device("cpu"))
    made = SimpleNamespace(distributed_type=DistributedType(kind), num_processes=2, state=state)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: made)
    settings = SimpleNamespace(mixed_precision="no")
    if kind == "MULTI_GPU":
        assert make_accelerator(settings, torch.device("cpu")) is made
        return
    with pytest.raises(
        ValueError, match=rf"configured for {kind}, and this trainer needs the whole model"
    ):
        make_accelerator(settings, torch.device("cpu"))
