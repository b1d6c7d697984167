# SPDX-License-Identifier: Apache-2.0
"""A recipe end to end in one folder: what each stage leaves, resumption, gates without training, LoRA experts."""

import json
from pathlib import Path

import pytest
import torch
import upit_dense as dense
from safetensors.torch import load_file

from tenfold.upit import stages as stages_module
from tenfold.upit.families import Families, load_families, read_pairs, shares
from tenfold.upit.gates import prompt_gates, random_gates
from tenfold.upit.pipeline import Pipeline, run
from tenfold.upit.recipe import DataSpec, Source
from tenfold.upit.seeds import select

RECIPE = {
    "base_model": "letters", "preset": "small", "num_experts": 3, "experts_per_token": 2,
    "collect": {"batch_size": 8, "epochs": 1.0, "save_every": 0.5, "dtype": "float32", "learning_rate": 3e-3},
    "seeds": {"fraction": 0.5, "min_bucket": 2}, "router": {"batch_size": 4, "epochs": 1.0},
    "post": {"batch_size": 8, "epochs": 0.5}, "lora": {"rank": 2, "alpha": 4.0},
}  # fmt: skip


def data(count=32):
    one, two = dense.rows(count, seed=1), dense.rows(count, seed=2)
    return Families.of({"one": (one, select(one, range(4))), "two": (two, select(two, range(4)))})


def start(folder, **changes):
    return Pipeline({**RECIPE, **changes}, folder, model=dense.llama(), data=data())


def tensors(folder):
    made = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        made |= load_file(file)
    return made


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upit") / "run"
    return folder, start(folder).run()


class TestRun:
    def test_stages(self, finished):
        folder, found = finished
        assert list(found) == [
            "collect",
            "expand",
            "seeds",
            "route",
            "assemble",
            "post-train",
            "report",
        ]
        assert len(found["collect"]["experts"]) == 2 and len(found["expand"]["experts"]) == 3
        assert len(found["expand"]["children"]) == 1
        buckets = found["seeds"]["buckets"]
        assert sum(map(len, buckets)) == 32 and all(len(b) >= 2 for b in buckets)
        assert len({r for b in buckets for r in b}) == 32
        for bucket, told in zip(buckets, found["seeds"]["families"]):
            assert told == pytest.approx(shares(data().family, bucket, 2)) and sum(
                told
            ) == pytest.approx(1)
        routers = load_file(found["route"]["routers"])["routers"]
        assert routers.shape == (3, 2, dense.WIDTH)
        assert all(
            "route/expert" in e for e in found["route"]["experts"]
        )  # trained with their routers
        names = {"base", "dense, last checkpoint", "mixture", "mixture, post-trained"}
        losses = found["report"]["losses"]
        assert set(losses) == names and set(losses["base"]) == {"one", "two", "mean"}
        assert losses["mixture, post-trained"]["mean"] < losses["base"]["mean"]
        assert (folder / "report" / "index.html").is_file() and (
            folder / "report" / "losses.png"
        ).is_file()
        load = torch.tensor(found["report"]["load"])
        assert load.shape == (2, 3) and torch.allclose(load.sum(1), torch.ones(2))

    def test_the_mixture_is_a_stock_mixtral(self, finished):
        from transformers import AutoModelForCausalLM

        folder, found = finished
        for stage in ("assemble", "post-train"):
            model = AutoModelForCausalLM.from_pretrained(found[stage]["model"], dtype=torch.float32)
            assert type(model).__name__ == "MixtralForCausalLM"
            assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (3, 2)
            ids = dense.rows(4)["input_ids"]
            ours = start(folder).mixture(found[stage]["model"])
            with torch.no_grad():
                torch.testing.assert_close(
                    ours(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5
                )
        gate = [
            t for n, t in tensors(found["assemble"]["model"]).items() if n.endswith("gate.weight")
        ]
        assert len(gate) == 2 and gate[0].shape == (3, dense.WIDTH)

    def test_a_finished_run_is_not_repeated(self, finished, monkeypatch):
        folder, found = finished
        for name in list(stages_module.STAGES):
            monkeypatch.setitem(stages_module.STAGES, name, None)
        assert start(folder).run() == found

    def test_other_settings_need_another_folder(self, finished):
        with pytest.raises(ValueError, match="belongs to another run"):
            start(finished[0], seeds={"fraction": 0.25}).run()
        other = Pipeline(RECIPE, finished[0], model=dense.llama(), data=data(16))
        with pytest.raises(ValueError, match="belongs to another run"):
            other.run()
        with pytest.raises(
            ValueError, match="this recipe has no stage 'post-train'; it has collect"
        ):
            start(finished[0], post=False).run("post-train")

    def test_stopped_anywhere_it_goes_on_with_the_same_bits(self, finished, tmp_path, monkeypatch):
        folder = tmp_path / "run"
        scored, trained = stages_module.mean_nll, stages_module._routed
        seen = []

        def once(name, function, at):
            def call(*args, **kwargs):
                seen.append(name)
                if seen.count(name) == at:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return call

        def told(progress):
            if (progress.stage, progress.step) in {
                ("tuning", 5),
                ("post_training", 3),
            } and progress.step not in seen:
                seen.append(progress.step)
                raise KeyboardInterrupt

        monkeypatch.setattr(stages_module, "mean_nll", once("nll", scored, 2))
        monkeypatch.setattr(stages_module, "_routed", once("route", trained, 3))
        recipe = {**RECIPE, "collect": RECIPE["collect"] | {"checkpoint_every": 2},
                  "post": RECIPE["post"] | {"checkpoint_every": 1}}  # fmt: skip
        stops = 0
        while True:
            try:
                found = Pipeline(
                    recipe, folder, model=dense.llama(), data=data(), callback=told
                ).run()
                break
            except KeyboardInterrupt:
                stops += 1
        assert stops == 4 and seen.count("nll") == 4 and seen.count("route") == 4
        whole, want = finished
        for stage in ("assemble", "post-train"):
            assert same(tensors(found[stage]["model"]), tensors(want[stage]["model"]))
        assert found["report"]["losses"] == want["report"]["losses"]
        assert found["seeds"] == want["seeds"] and whole != folder

    def test_until(self, tmp_path):
        found = start(tmp_path).run("expand")
        assert list(found) == ["collect", "expand"] and not (tmp_path / "seeds").exists()

    def test_lora(self, tmp_path):
        found = start(tmp_path, variant="lora").run()
        assert found["collect"]["initial"].endswith("initial")
        assert len(found["route"]["experts"]) == 3
        losses = found["report"]["losses"]
        assert losses["mixture, post-trained"]["mean"] < losses["base"]["mean"]


class TestReadyExperts:
    @pytest.fixture
    def place(self, tmp_path):
        base, experts = dense.folders(tmp_path / "models", 2)
        dense.letters().save_pretrained(base)
        prompts = (["ab"], ["xyz", "z"])
        listed = [{"source_model": e, "positive_prompts": p} for e, p in zip(experts, prompts)]
        return {"base_model": base, "experts": listed, "dtype": "bfloat16"}

    @pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
    def test_mergekits_recipe(self, place, tmp_path, mode):
        found = run({**place, "gate_mode": mode, "expand": {"to": 3, "seed": 5}}, tmp_path / "out")
        assert list(found) == ["collect", "expand", "route", "assemble"]
        made = tensors(found["assemble"]["model"])
        assert {t.dtype for t in made.values()} == {torch.bfloat16}
        routers = load_file(found["route"]["routers"])["routers"]
        torch.testing.assert_close(routers.norm(dim=-1), torch.ones(3, 2))
        child = found["expand"]["children"][0]
        mean = child["alpha"] * routers[0] + (1 - child["alpha"]) * routers[1]
        torch.testing.assert_close(routers[2], mean / mean.norm(dim=-1, keepdim=True))

    def test_random_gates_need_no_data(self, place, tmp_path):
        plain = [e["source_model"] for e in place["experts"]]
        found = run({**place, "experts": plain, "gate_mode": "random"}, tmp_path / "out")
        routers = load_file(found["route"]["routers"])["routers"]
        assert torch.equal(routers, random_gates(2, 2, dense.WIDTH, "random", 0))
        assert found["expand"]["experts"] == plain

    def test_checkpoints_of_another_trainer(self, place, tmp_path):
        folder = str(Path(place["experts"][0]["source_model"]).parent)
        recipe = {**{k: v for k, v in RECIPE.items() if k != "collect"}, "base_model": place["base_model"],
                  "experts": folder, "post": False}  # fmt: skip
        found = Pipeline(recipe, tmp_path / "out", data=data()).run("assemble")
        assert [Path(p).name for p in found["collect"]["experts"]] == [
            "checkpoint-1",
            "checkpoint-2",
        ]
        assert (
            found["collect"]["base"] == place["base_model"]
            and len(found["expand"]["children"]) == 1
        )

    def test_refused(self, place, tmp_path):
        with pytest.raises(ValueError, match="gate_mode 'seed' needs data"):
            Pipeline({"base_model": "base", "experts": ["a", "b"]}, tmp_path)
        with pytest.raises(ValueError, match="tuning a dense model needs data"):
            Pipeline({"base_model": "base", "gate_mode": "random"}, tmp_path)
        with pytest.raises(FileNotFoundError, match="no expert's folder at 'nowhere'"):
            run(
                {
                    "base_model": place["base_model"],
                    "experts": ["nowhere", "x"],
                    "gate_mode": "random",
                },
                tmp_path,
            )
        same_twice = [place["experts"][0]["source_model"]] * 2
        with pytest.raises(ValueError, match="all 2 experts are identical"):
            run({**place, "experts": same_twice, "gate_mode": "random"}, tmp_path / "twice")


class TestGates:
    def test_prompts(self):
        model, letters = dense.llama(), dense.letters()
        sources = [Source("a", ("ab", "cd"), ("z",)), Source("b", ("q",))]
        made = prompt_gates(model, letters, sources, "hidden")
        ids = [torch.tensor([letters(p)["input_ids"]]) for p in ("ab", "cd", "z", "q")]
        with torch.no_grad():
            last = [
                torch.stack(model(i, output_hidden_states=True).hidden_states[:2])[:, 0, -1]
                for i in ids
            ]
        want = torch.stack([(last[0] + last[1]) / 2 - last[2], last[3]])
        torch.testing.assert_close(made, want / want.norm(dim=-1, keepdim=True))
        cheap = prompt_gates(model, letters, sources, "cheap_embed")
        assert torch.equal(cheap[:, 0], cheap[:, 1])
        embed = model.model.embed_tokens.weight[ids[3][0]].sum(0)
        torch.testing.assert_close(cheap[1, 0], embed / embed.norm())
        with pytest.raises(ValueError, match="the prompt '' has no tokens"):
            prompt_gates(model, letters, [Source("a", ("",))], "hidden")

    def test_random(self):
        made = random_gates(4, 3, 64, "uniform_random", 1)
        assert float(made.abs().max()) <= 1 / 8 and float(made.std()) == pytest.approx(
            1 / 8 / 3**0.5, rel=0.1
        )
        assert float(random_gates(4, 3, 64, "random", 1).std()) == pytest.approx(1, rel=0.1)


class TestFamilies:
    def test_files(self, tmp_path):
        lines = [json.dumps({"prompt": f"q{i}", "answer": "a" * (i + 1)}) for i in range(12)]
        (tmp_path / "code.jsonl").write_text("\n".join([*lines, ""]))
        from tenfold.training.tasks import byte_encoder

        spec = DataSpec(("topic",), (("code", str(tmp_path / "code.jsonl")),), train=6, test=4)
        made = load_families(spec, byte_encoder, 32, 0)
        assert made.names == ("topic", "code") and made.family.tolist() == [0] * 6 + [1] * 6
        assert made.train["input_ids"].shape == (12, 32) and len(made.tests["code"]["labels"]) == 4
        other = load_families(spec, byte_encoder, 32, 0, seed=1)
        assert torch.equal(other.tests["code"]["labels"], made.tests["code"]["labels"])
        assert not torch.equal(other.train["input_ids"], made.train["input_ids"])

    def test_refused(self, tmp_path):
        file = tmp_path / "x.jsonl"
        file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
        with pytest.raises(
            ValueError, match=r"x.jsonl, line 2: needs an object with prompt, answer"
        ):
            read_pairs(file)
        file.write_text('{"prompt": "a", "answer": "b"}\n')
        with pytest.raises(ValueError, match=r"has 1 rows, and 64 are held out"):
            load_families(DataSpec((), (("x", str(file)),)), list, 8, 0)
