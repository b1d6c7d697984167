# SPDX-License-Identifier: Apache-2.0
"""S1: dense tuning that leaves checkpoints; resumption, adapters, and which checkpoints become experts."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import upit_dense as dense
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tenfold.upit.adapters import load_adapter
from tenfold.upit.checkpoints import checkpoints_in, load_expert, pick_checkpoints
from tenfold.upit.collect import collect, save_points
from tenfold.upit.config import CollectConfig
from tenfold.upit.options import LoraExpertsConfig

CONFIG = CollectConfig(
    batch_size=8, learning_rate=1e-3, sequence_length=16, epochs=2.0, save_every=0.5
)


def states(paths):
    return [load_file(f"{p}/model.safetensors") for p in paths]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class TestCollect:
    def test_checkpoints(self, tmp_path):
        model, start = dense.llama(), dense.llama()
        paths = collect(
            model, dense.rows(32), tmp_path, CONFIG, tokenizer=dense.letters(), warmup=0.0
        )
        assert [p.name for p in paths] == [
            "checkpoint-2",
            "checkpoint-4",
            "checkpoint-6",
            "checkpoint-8",
        ]
        made = states(paths)
        assert all({t.dtype for t in s.values()} == {torch.bfloat16} for s in made)
        for n, p in model.named_parameters():  # the last one is the trained model
            assert torch.equal(made[-1][n], p.detach().bfloat16())
        first = {n: p.detach().bfloat16() for n, p in start.named_parameters()}
        assert not any(same(a, b) for a, b in pairwise([first, *made]))
        loaded = AutoModelForCausalLM.from_pretrained(paths[1])
        assert loaded.dtype == torch.bfloat16 and (paths[1] / "tokenizer.json").is_file()
        curve = json.loads((tmp_path / "collect.json").read_text())["curve"]
        assert len(curve) == 8 and curve[-1]["loss"] < curve[0]["loss"]
        assert not list(tmp_path.glob("tuning-*")) and not list(tmp_path.glob(".*"))

    def test_tied_embeddings(self, tmp_path):
        paths = collect(dense.llama(tied=True), dense.rows(16), tmp_path, CONFIG)
        assert "lm_head.weight" not in states(paths)[0]
        model = load_expert(paths[0])
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("stop", [3, 6])
    def test_a_run_that_is_stopped_goes_on_with_the_same_bits(self, tmp_path, stop):
        want = states(collect(dense.llama(), dense.rows(32), tmp_path / "whole", CONFIG))

        def told(progress):
            if progress.step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collect(
                dense.llama(),
                dense.rows(32),
                tmp_path / "cut",
                CONFIG,
                checkpoint_every=2,
                callback=told,
            )
        assert len(checkpoints_in(tmp_path / "cut")) == stop // 2
        steps = []
        paths = collect(dense.llama(), dense.rows(32), tmp_path / "cut", CONFIG, checkpoint_every=2,
                        callback=lambda p: steps.append(p.step))  # fmt: skip
        # The callback comes after the checkpoint of its step.
        assert steps[0] == stop // 2 * 2 + 1
        assert all(same(a, b) for a, b in zip(states(paths), want))
        again = []
        assert collect(dense.llama(), dense.rows(32), tmp_path / "cut", CONFIG,
                       callback=lambda p: again.append(p)) == paths  # fmt: skip
        assert again == []

    def test_a_folder_of_another_run(self, tmp_path):
        collect(dense.llama(), dense.rows(16), tmp_path, CONFIG)
        for changes in ({"learning_rate": 0.5}, {"seed": 4}):
            with pytest.raises(ValueError, match="belongs to another run"):
                collect(dense.llama(), dense.rows(16), tmp_path, CONFIG, **changes)
        with pytest.raises(ValueError, match="belongs to another run"):
            collect(dense.llama(3), dense.rows(16), tmp_path, CONFIG)
        # How many of them become experts is asked later.
        assert collect(dense.llama(), dense.rows(16), tmp_path, CONFIG, keep=2, pick="even")

    def test_adapters(self, tmp_path):
        model = dense.llama()
        before = {n: p.clone() for n, p in model.state_dict().items()}
        lora = LoraExpertsConfig(experts=2, rank=2, alpha=4.0)
        paths = collect(model, dense.rows(32), tmp_path, CONFIG, lora=lora, learning_rate=0.01)
        assert same(dict(model.state_dict()), before) and all(
            p.requires_grad for p in model.parameters()
        )
        initial, settings = load_adapter(tmp_path / "initial")
        first, last = (load_adapter(paths[i])[0] for i in (0, -1))
        assert len(paths) == 4 and settings["r"] == 2 and len(first) == 2 * 3 * 2
        b = [n for n in first if "lora_B" in n]
        assert all(not initial[n].any() for n in b) and all(first[n].any() for n in b)
        assert not any(torch.equal(first[n], last[n]) for n in b)
        rows = dense.rows(4)
        with torch.no_grad():
            plain = model(rows["input_ids"]).logits
            tuned = load_expert(paths[-1], model)(rows["input_ids"]).logits
        assert (plain - tuned).abs().max() > 1e-3

    def test_save_points(self):
        assert save_points(80, CollectConfig()) == [10, 20, 30, 40, 50, 60, 70, 80]
        assert save_points(9, CollectConfig(epochs=1.0, save_every=0.3)) == [3, 5, 8]
        with pytest.raises(
            ValueError, match=r"7 steps are too few for 8 checkpoints \(every 0.25 of 2.0 epochs\)"
        ):
            save_points(7, CollectConfig())


class TestPick:
    paths = tuple(Path(f"checkpoint-{i}") for i in range(8))

    def numbers(self, *args, **kwargs):
        return [int(p.name[11:]) for p in pick_checkpoints(self.paths, *args, **kwargs)]

    def test_rules(self):
        assert self.numbers(4) == [4, 5, 6, 7] and self.numbers(8) == list(range(8))
        assert self.numbers(16) == list(range(8)) and self.numbers(8, keep=3) == [5, 6, 7]
        assert self.numbers(4, "even") == [1, 3, 5, 7] and self.numbers(3, "even") == [1, 4, 7]
        assert self.numbers(4, (6, 0, 2)) == [6, 0, 2]

    def test_refused(self):
        with pytest.raises(
            ValueError, match="9 checkpoints are to become experts, but there are 8"
        ):
            self.numbers(16, keep=9)
        with pytest.raises(
            ValueError, match="3 saved experts are more than the 2 experts that are wanted"
        ):
            self.numbers(2, keep=3)
        with pytest.raises(ValueError, match=r"pick \[8\] must be some of the checkpoints 0 to 7"):
            self.numbers(4, (8,))
        with pytest.raises(ValueError, match="pick must be one of last, even, got 'best'"):
            self.numbers(4, "best")

    def test_folders_by_number(self, tmp_path):
        for n in (100, 20, 3):
            (tmp_path / f"checkpoint-{n}").mkdir()
        (tmp_path / "checkpoint-x").mkdir()
        assert [p.name for p in checkpoints_in(tmp_path)] == [
            "checkpoint-3",
            "checkpoint-20",
            "checkpoint-100",
        ]
