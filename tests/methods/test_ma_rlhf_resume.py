# SPDX-License-Identifier: Apache-2.0
"""Killed at any step and run again on the folder: the same weights, curves and samples, bit by bit."""

import signal
from pathlib import Path

import ma_rlhf_models as small
import pytest
import torch
from ma_rlhf_ranks import make

from tenfold.ma_rlhf.record import PPORecord
from tenfold.ma_rlhf.samples import SampleFile, read_samples
from tenfold.rlhf.generation import hf_generate
from tenfold.testing import processes

HERE = Path(__file__).resolve().parent


def noisy(completion_ids, **columns):
    """A reward that draws from the global generators of torch, numpy and Python."""
    import random

    import numpy as np

    base = small.low_bytes(completion_ids)
    return [b + 0.1 * (float(torch.rand(())) + random.random() + np.random.rand()) for b in base]


SETTINGS = {
    "own": {"ppo_epochs": 2, "kl_controller": "adaptive", "kl_horizon": 10},
    "shared": {"critic": "shared", "termination": "random", "lengths": (1, 2), "schedule": "cosine", "warmup": 2.0},
    "hf": {"generate": hf_generate(eos=small.ENDS, pad=0), "reward": noisy},
    "lora": {"lora_rank": 2, "learning_rate": 1e-2},
    "free": {"advantage": "grpo", "group_size": 2, "top_p": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("kind, stop", [("own", 1), ("own", 2), *((kind, 3) for kind in SETTINGS)])
def test_killed_and_resumed(tmp_path, kind, stop):
    def build(**kwargs):
        return small.trainer(**({"sample_every": 1, "samples": 2} | SETTINGS[kind] | kwargs))

    whole = build()
    want = whole.train()
    with pytest.raises(small.Killed):
        build(folder=tmp_path, callback=small.kill_at(stop)).train()
    assert (tmp_path / f"ppo-{stop}").is_dir()
    steps = []
    resumed = build(folder=tmp_path, callback=lambda p: steps.append(p.step))
    record = resumed.train()
    assert steps == list(range(stop + 1, 5))
    assert small.same(small.weights(resumed.module), small.weights(whole.module))
    assert record.curve == want.curve and record.samples == want.samples
    assert {p.name for p in tmp_path.iterdir()} == {"record.json", "samples.jsonl"}
    assert PPORecord.read(tmp_path / "record.json") == record
    assert read_samples(tmp_path / "samples.jsonl") == want.samples


def test_killed_between_checkpoints(tmp_path):
    """Steps since the checkpoint are done again, and their samples are there once."""

    def build(**kwargs):
        return small.trainer(checkpoint_every=2, sample_every=1, **kwargs)

    whole = build()
    want = whole.train()
    with pytest.raises(small.Killed):
        build(folder=tmp_path, callback=small.kill_at(3)).train()
    assert max(s["step"] for s in read_samples(tmp_path / "samples.jsonl")) == 3
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "half a li')
    resumed = build(folder=tmp_path)
    record = resumed.train()
    assert small.same(small.weights(resumed.module), small.weights(whole.module))
    assert record.curve == want.curve and record.samples == want.samples


def test_a_process_that_is_killed(tmp_path):
    done = processes.python(HERE / "ma_rlhf_ranks.py", tmp_path, "own", 2)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    resumed = make("own", folder=tmp_path / "own")
    record = resumed.train()
    whole = make("own")
    want = whole.train()
    threads = torch.get_num_threads()
    assert len(record.seconds) == 1 and record.curve[2].keys() == want.curve[2].keys()
    if threads == 1:  # the process that was killed had one: else sums may be in another order
        assert small.same(small.weights(resumed.module), small.weights(whole.module))
        assert record.curve == want.curve
    else:
        small.close(small.weights(resumed.module), small.weights(whole.module))


def test_without_checkpoints_it_begins_anew(tmp_path):
    config = small.settings(checkpoint_every=None)
    with pytest.raises(small.Killed):
        small.trainer(config=config, folder=tmp_path, callback=small.kill_at(2)).train()
    steps = []
    small.trainer(config=config, folder=tmp_path, callback=lambda p: steps.append(p.step)).train()
    assert steps == [1, 2, 3, 4]


def test_tied_embeddings(tmp_path):
    def policy():
        made = small.tiny()
        made.config.tie_word_embeddings = True
        made.lm_head.weight = made.model.embed_tokens.weight
        return made

    whole = small.trainer(policy(), critic="shared")
    want = whole.train()
    with pytest.raises(small.Killed):
        small.trainer(policy(), critic="shared", folder=tmp_path, callback=small.kill_at(2)).train()
    resumed = small.trainer(policy(), critic="shared", folder=tmp_path)
    assert resumed.train().curve == want.curve
    assert resumed.policy.lm_head.weight is resumed.policy.model.embed_tokens.weight
    assert small.same(small.weights(resumed.module), small.weights(whole.module))


def test_lora_checkpoints_are_small(tmp_path):
    with pytest.raises(small.Killed):
        small.trainer(
            folder=tmp_path, lora_rank=2, critic="shared", callback=small.kill_at(2)
        ).train()
    from safetensors import safe_open

    (file,) = (tmp_path / "ppo-2").glob("*.safetensors")
    with safe_open(file, "pt") as saved:
        names = list(saved.keys())
    assert names and all("lora_" in n or n == "critic.weight" for n in names)


def test_a_folder_of_another_run(tmp_path):
    with pytest.raises(small.Killed):
        small.trainer(folder=tmp_path, callback=small.kill_at(1)).train()
    for changes, message in (
        ({"n": 4}, "n 3 there, 4 here"),
        ({"policy": small.tiny(5)}, "model"),
        ({"prompts": ["other"]}, "data"),
        ({"reward": small.vowels}, r"rewards \['low_bytes'\] there, \['vowels'\] here"),
        ({"critic": "shared"}, "critic"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run.*{message}"):
            small.trainer(folder=tmp_path, **changes)
    # how rows are split and how often it is saved may change
    small.trainer(folder=tmp_path, micro_batch_size=2, checkpoint_every=3).train()


def test_samples_in_memory_only():
    table = SampleFile(None)
    table.resume(3)
    table.add([{"step": 1}])
    assert table.samples == [{"step": 1}]
