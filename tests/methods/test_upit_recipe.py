# SPDX-License-Identifier: Apache-2.0
"""UpIT's settings and recipes: round trips, mergekit-moe's YAML, and a sentence for everything that is refused."""

import json

import pytest
import upit_dense as dense

from tenfold import upit
from tenfold.upit.config import CollectConfig, UpITConfig
from tenfold.upit.pipeline import STAGES, stages_of
from tenfold.upit.recipe import load_recipe

MERGEKIT = """
base_model: base
gate_mode: hidden
dtype: bfloat16
experts_per_token: 2
architecture: mixtral
experts:
  - source_model: one
    positive_prompts: [write code, a function]
    negative_prompts: [poetry]
    noise_scale: 0.0
    residual_scale: 1
  - source_model: two
    positive_prompts: ["solve x + 1 = 2"]
"""
DATA = {"tasks": ["topic"]}


def recipe(**fields):
    return load_recipe({"base_model": "base", "data": DATA} | fields)


class TestConfig:
    def test_the_papers_two_variants(self):
        ffn, lora = UpITConfig.make(), UpITConfig.make(variant="lora")
        assert (ffn.num_experts, ffn.collect.learning_rate, ffn.post.learning_rate) == (
            4,
            2e-5,
            2e-5,
        )
        assert (lora.num_experts, lora.collect.learning_rate, lora.lora.rank) == (8, 2e-4, 64)
        for c in (ffn, lora):
            assert (c.collect.epochs, c.collect.save_every, c.collect.pick) == (2.0, 0.25, "last")
            assert (c.expand.drop, c.expand.similarity, c.expand.policy) == (
                0.5,
                "cosine",
                "global",
            )
            assert (c.seeds.fraction, c.seeds.assign, c.router.alpha, c.router.epochs) == (
                0.01,
                "argmin",
                0.5,
                4.0,
            )
            assert (c.assembly.rest, c.post.aux_coef, c.post.lb_norm) == ("mean", 0.01, "slots")
            assert (c.collect.batch_size, c.collect.schedule, c.collect.warmup) == (
                128,
                "cosine",
                0.03,
            )

    def test_round_trip(self):
        made = UpITConfig.make("small", seed=7, num_experts=6, experts_per_token=3, collect={"pick": [1, 3]},
                               expand={"similarity": "l2"}, router={"normalize": "unit"})  # fmt: skip
        again = UpITConfig.from_json(json.loads(json.dumps(made.to_json())))
        assert again == made and made.collect.pick == (1, 3)
        assert {
            getattr(made, g).seed
            for g in ("collect", "expand", "seeds", "post", "assembly", "lora")
        } == {7}
        assert made.lora.experts == 6 and made.assembly.experts_per_token == 3
        assert made.with_changes(expand={"drop": 0.1}).expand.drop == 0.1

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"num_experts": 1}, "a mixture needs at least 2 experts, got 1"),
            ({"experts_per_token": 5}, r"must be 1 to 4 .*got 5"),
            ({"experts_per_token": 0}, "experts_per_token must be >= 1, got 0"),
            ({"collect": {"keep": 5}}, "at least the number of saved experts, got 4 and 5"),
            ({"collect": {"pick": [0, 0]}}, "pick must be 'last', 'even' or different numbers"),
            ({"collect": {"pick": "first"}}, "pick must be one of last, even"),
            ({"collect": {"save_every": 3.0}}, "save_every 3.0 epochs saves nothing in 2.0"),
            ({"collect": {"betas": [1.0, 0.9]}}, "betas must be two numbers"),
            ({"collect": {"dtype": "int8"}}, "dtype must be one of float32"),
            ({"expand": {"drop": 1.0}}, r"drop must be in \[0, 1\), got 1.0"),
            ({"expand": {"alpha": 2}}, r"alpha must be in \[0, 1\], got 2"),
            ({"expand": {"policy": "best"}}, "policy must be one of global, no_repeat, originals"),
            ({"expand": {"similarity": "dot"}}, "similarity must be one of cosine"),
            (
                {"expand": {"to": 4}, "num_experts": 8},
                "num_experts and expand.to must be equal, got 8 and 4",
            ),
            ({"expand": {"size": 4}}, "expand has no setting 'size'; it has to, similarity"),
            ({"seeds": {"fraction": 0}}, r"fraction must be in \(0, 1\], got 0"),
            ({"seeds": {"assign": "max"}}, "assign must be one of argmin, relative, random"),
            ({"seeds": 4}, "seeds must be settings and values, got 4"),
            ({"gates": {}}, "unknown setting 'gates'; there are"),
            ({"variant": "adapter"}, "variant must be one of ffn, lora"),
            ({"preset": "large"}, "preset must be one of paper, small"),
        ],
    )
    def test_refused(self, given, message):
        with pytest.raises((ValueError, TypeError), match=message):
            UpITConfig.make(**given)

    def test_checked_when_changed(self):
        with pytest.raises(ValueError, match="learning_rate must be a positive number"):
            CollectConfig(learning_rate=0)


class TestRecipe:
    def test_ours(self, tmp_path):
        file = tmp_path / "recipe.yaml"
        file.write_text("base_model: smollm2\nvariant: lora\nexpand: {to: 6, drop: 0.25}\nseed: 3\npreset: small\n"
                        "data: {tasks: [german], files: [a/code.jsonl], train: 9, test: 2}\npost: false\n")  # fmt: skip
        made = load_recipe(file)
        assert made.base == "smollm2" and made.gate_mode == "seed" and not made.post
        assert made.config == UpITConfig.make("small", variant="lora", num_experts=6, seed=3,
                                              expand={"to": 6, "drop": 0.25})  # fmt: skip
        assert made.data.files == (("code", "a/code.jsonl"),) and made.data.train == 9
        assert stages_of(made) == ("collect", "expand", "seeds", "route", "assemble", "report")
        again = load_recipe(json.loads(json.dumps(dict(made.source))))
        assert again == made

    def test_mergekits(self, tmp_path):
        (tmp_path / "moe.yml").write_text(MERGEKIT)
        made = load_recipe(tmp_path / "moe.yml")
        assert made.gate_mode == "hidden" and made.data is None
        assert [e.model for e in made.experts] == ["one", "two"]
        assert made.experts[0].positive == ("write code", "a function") and made.experts[
            0
        ].negative == ("poetry",)
        assert made.config.num_experts == 2 and made.config.assembly.dtype == "bfloat16"
        assert stages_of(made) == ("collect", "expand", "route", "assemble")
        expanded = load_recipe(
            {**made.source, "expand": {"to": 4, "drop": 0.3, "policy": "no_repeat", "seed": 9}}
        )
        assert expanded.config.num_experts == 4 and expanded.config.expand.seed == 9
        assert expanded.config.expand.policy == "no_repeat"

    def test_a_folder_of_checkpoints(self, tmp_path):
        dense.folders(tmp_path, 3)
        made = recipe(experts=str(tmp_path))
        assert [e.model.rsplit("-")[-1] for e in made.experts] == ["1", "2", "3"]
        assert made.config.num_experts == 3
        assert recipe(experts=str(tmp_path), num_experts=8).config.num_experts == 8

    @pytest.mark.parametrize("mode", ["random", "uniform_random", "seed"])
    def test_modes_without_prompts(self, mode):
        assert recipe(experts=["one", "two"], gate_mode=mode).gate_mode == mode

    def test_stages(self):
        assert stages_of(recipe()) == tuple(STAGES)
        assert "seeds" not in stages_of(recipe(experts=["a", "b"], gate_mode="random"))

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"base_model": None}, "base_model must be the name of a model, got None"),
            ({"basemodel": "x"}, "unknown field 'basemodel'; known: architecture, assembly, base_model"),
            ({"shared_experts": []}, "shared_experts is not supported: a Mixtral has no shared experts"),
            ({"tokenizer_source": "union"}, "tokenizer_source is not supported"),
            ({"architecture": "deepseek"}, "architecture must be mixtral.*got 'deepseek'"),
            ({"gate_mode": "learned"}, "gate_mode must be one of seed, hidden"),
            ({"experts": []}, r"experts must be a list of models, or a folder of checkpoints, got \[\]"),
            ({"experts": [3]}, r"experts\[0\] must be a folder or \{source_model"),
            ({"experts": ["a", {"positive_prompts": ["x"]}]}, r"experts\[1\].source_model must be the name"),
            ({"experts": [{"source_model": "a", "positive_prompts": "x"}]}, "positive_prompts must be a list of texts"),
            ({"experts": [{"source_model": "a", "noise_scale": 0.1}, "b"]}, r"experts\[0\].noise_scale is not"),
            ({"experts": ["a", {"source_model": "b", "residual_scale": 2}]}, "residual_scale is not supported.*got 2"),
            ({"experts": [{"source_model": "a", "weight": 1}]}, r"experts\[0\] has an unknown field 'weight'"),
            ({"experts": ["a", "b"], "gate_mode": "hidden"}, "'hidden' needs positive_prompts of every expert"),
            ({"experts": [{"source_model": m, "positive_prompts": ["x"]} for m in "ab"]}, "all have the same prompts"),
            ({"experts": [{"source_model": "a", "positive_prompts": ["x"]}, "b"], "gate_mode": "random"},
             "are not used by gate_mode 'random'"),
            ({"experts": ["a", "b", "c"], "num_experts": 2}, "3 .*2"),
            ({"data": {"rows": 3}}, "data must have tasks or files"),
            ({"data": {"tasks": ["topic"], "seed": 3}}, "data has an unknown field 'seed'"),
            ({"data": {"tasks": ["topic"], "train": 0}}, "data.train must be a positive whole number, got 0"),
            ({"expand": {"drop": 2}}, r"recipe: drop must be in \[0, 1\), got 2"),
            ({"collect": 3}, "recipe: collect must be settings and values, got 3"),
            ({"dtype": "int8"}, "recipe: dtype must be one of"),
            ({"num_experts": "many"}, "recipe: num_experts must be an integer, got 'many'"),
        ],
    )  # fmt: skip
    def test_refused(self, fields, message):
        with pytest.raises((ValueError, TypeError), match=message):
            recipe(**fields)

    def test_no_recipe(self, tmp_path):
        (tmp_path / "text.yaml").write_text("x")
        with pytest.raises(ValueError, match="must be fields such as base_model and data, got 'x'"):
            upit.load_recipe(tmp_path / "text.yaml")
