# SPDX-License-Identifier: Apache-2.0
"""Merging whole models: recipes, streamed safetensors, interruption, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tenfold import merge, reference
from tenfold.merge import models as models_module
from tenfold.merge.checkpoint import INDEX, SINGLE, Planned, plan_shards
from tenfold.testing import assert_close_to_ref, peak_growth, threads

LAYERS = 3
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def weights(seed, dtype=BF16, scale=1.0):
    """A little Llama: the base is seed 0, the others are near it."""
    base, own = (torch.Generator().manual_seed(s) for s in (0, seed))
    shapes = {
        "model.embed_tokens.weight": (40, 16),
        "lm_head.weight": (40, 16),
        "model.norm.weight": (16,),
    }
    for i in range(LAYERS):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (16, 16)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (48, 16)
    made = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=base)
        if seed:
            x = x + 0.1 * scale * torch.randn(shape, generator=own)
        made[name] = x.to(dtype)
    made["model.position_ids"] = torch.arange(8)
    return made


def save(folder, tensors, shards=1, reverse=False, config=None):
    folder.mkdir(parents=True)
    names = sorted(tensors, reverse=reverse)
    if shards == 1:
        save_file(tensors, folder / SINGLE)
    else:
        weight_map = {}
        for i in range(shards):
            part = {n: tensors[n] for n in names[i::shards]}
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(
        json.dumps(config or {"model_type": "llama", "dtype": "bfloat16"})
    )
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


@pytest.fixture
def three(tmp_path):
    """Paths of base and two experts."""
    return [save(tmp_path / n, weights(i)) for i, n in enumerate(("base", "one", "two"))]


def recipe(
    paths, method="dare_ties", parameters=None, each=({"weight": 0.6}, {"weight": 0.4}), **fields
):
    base, *experts = paths
    made = {
        "merge_method": method,
        "models": [{"model": m, "parameters": p} for m, p in zip(experts, each)],
    }
    if method != "linear":
        made["base_model"] = base
    return made | ({"parameters": parameters} if parameters else {}) | fields


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def merged(tmp_path, *args, name="out", **kwargs):
    out = merge.merge_models(*args, tmp_path / name, **kwargs)
    return {k: v for f in sorted(out.glob("*.safetensors")) for k, v in load_file(f).items()}


def expected(name, method, base, experts):
    """By the definitions; parameters are those of test_every_method."""
    x, xs, w = base[name], [e[name] for e in experts], [0.6, 0.4]
    return {
        "linear": lambda: reference.linear_merge(xs, w),
        "task_arithmetic": lambda: reference.dare_merge(x, xs, w, 0.0, 0, lambda_=0.7),
        "ties": lambda: reference.ties_merge(x, xs, w, 0.3, lambda_=0.7),
        "dare_linear": lambda: reference.dare_merge(x, xs, w, 0.7, 9, name, lambda_=0.7),
        "dare_ties": lambda: reference.dare_merge(
            x, xs, w, 0.7, 9, name, elect_sign=True, lambda_=0.7
        ),
        "slerp": lambda: reference.slerp_merge(*xs, 0.3, base=x),
    }[method]()


PARAMETERS = {
    "linear": {}, "task_arithmetic": {"lambda": 0.7}, "ties": {"lambda": 0.7, "density": 0.3},
    "dare_linear": {"lambda": 0.7, "density": 0.3, "seed": 9},
    "dare_ties": {"lambda": 0.7, "density": 0.3, "seed": 9, "int8_mask": True}, "slerp": {"t": 0.3},
}  # fmt: skip


class TestMerges:
    @pytest.mark.parametrize("method", merge.METHODS)
    def test_every_method(self, method, three, tmp_path):
        each = ({}, {}) if method == "slerp" else ({"weight": 0.6}, {"weight": 0.4})
        got = merged(tmp_path, recipe(three, method, PARAMETERS[method], each))
        base, *experts = (load_file(f"{p}/{SINGLE}") for p in three)
        assert set(got) == set(base)
        for name, x in got.items():
            if not x.is_floating_point():
                assert torch.equal(x, base[name])
                continue
            wide_base, *wide_experts = to_double(base, *experts)
            wide = expected(name, method, wide_base, wide_experts)
            assert_close_to_ref(x, wide, expected(name, method, base, experts))

    def test_states_are_merged_as_folders_are(self, three, tmp_path):
        asked = recipe(three, parameters={"density": 0.5})
        states = {p: load_file(f"{p}/{SINGLE}") for p in three}
        made = merge.merge_states(asked, states)
        want = merged(tmp_path, asked)
        assert set(made) == set(want) and all(torch.equal(made[n], want[n]) for n in want)

    def test_loads_in_transformers(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                          num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
        paths = []
        for seed in range(3):
            torch.manual_seed(seed)
            paths.append(str(tmp_path / f"m{seed}"))
            transformers.LlamaForCausalLM(config).save_pretrained(paths[-1])
        made = merge.merge_models(recipe(paths, parameters={"density": 0.5}), tmp_path / "out",
                                  max_shard_bytes=4000)  # fmt: skip
        assert len(list(made.glob("*.safetensors"))) > 2
        model, about = transformers.LlamaForCausalLM.from_pretrained(made, output_loading_info=True)
        assert not about["missing_keys"] and not about["unexpected_keys"]
        want = merge.merge_states(recipe(paths, parameters={"density": 0.5}),
                                  {p: load_file(f"{p}/{SINGLE}") for p in paths})  # fmt: skip
        assert all(torch.equal(model.state_dict()[n], x) for n, x in want.items())

    def test_files_beside_the_weights(self, three, tmp_path):
        asked = recipe(three, "linear", dtype="float32", out_dtype="float16")
        got = merged(tmp_path, asked)
        assert {x.dtype for x in got.values()} == {F16, torch.int64}
        out = tmp_path / "out"
        assert json.loads((out / "config.json").read_text()) == {
            "model_type": "llama",
            "dtype": "float16",
        }
        yaml = pytest.importorskip("yaml")
        assert yaml.safe_load((out / "mergekit_config.yml").read_text()) == asked
        assert sorted(files(out)) == [
            "config.json",
            "mergekit_config.yml",
            SINGLE,
            "tokenizer.json",
        ]
        with safe_open(out / SINGLE, "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_progress_reaches_the_end(self, three, tmp_path):
        seen = []
        merged(tmp_path, recipe(three), progress=lambda *x: seen.append(x))
        assert {n for n, *_ in seen} == set(weights(0))
        assert seen[-1][1] == seen[-1][2] and len(seen) == len(weights(0))
        assert [d for _, d, _ in seen] == sorted(d for _, d, _ in seen)


def to_double(*states):
    return [{n: x.double() for n, x in s.items()} for s in states]


class TestParameters:
    def test_of_models_come_before_those_of_the_recipe(self, three):
        asked = recipe(
            three,
            parameters={"density": 0.5, "weight": 0.1},
            each=({"weight": 0.9}, {"density": 0.2}),
        )
        r = merge.load_recipe(asked)
        assert [r.value("weight", "x", 0, s) for s in r.models] == [0.9, 0.1]
        assert [r.value("density", "x", 0, s) for s in r.models] == [0.5, 0.2]

    def test_filters_and_gradients(self, three, tmp_path):
        """Numbers are interpolated over the layers; embeddings count as the first, norm and head as the last."""
        ramp = [{"filter": "self_attn", "value": [0.0, 1.0]}, {"filter": "mlp", "value": [1.0, 0.5, 0.0]},
                {"value": [0.25, 0.75]}]  # fmt: skip
        got = merged(
            tmp_path, recipe(three, "task_arithmetic", each=({"weight": ramp}, {"weight": 0.0}))
        )
        base, one = (load_file(f"{p}/{SINGLE}") for p in three[:2])
        for name in got:
            if name == "model.position_ids":
                continue
            layer = int(name.split(".")[2]) / 2 if ".layers." in name else None
            if "self_attn" in name:
                w = layer
            elif "mlp" in name:
                w = 1 - layer
            else:
                w = 0.25 if "embed" in name else 0.75
            wide = base[name].double() + w * (one[name].double() - base[name].double())
            assert_close_to_ref(got[name], wide)

    def test_a_filter_that_fits_nothing_falls_through(self, three):
        asked = recipe(
            three,
            parameters={"weight": 0.3},
            each=({"weight": [{"filter": "mlp", "value": 1}]}, {}),
        )
        r = merge.load_recipe(asked)
        assert r.value("weight", "a.mlp.b", 0, r.models[0]) == 1
        assert r.value("weight", "norm", 0, r.models[0]) == 0.3

    def test_the_base_may_be_listed(self, three):
        asked = recipe(three)
        asked["models"].insert(0, {"model": three[0]})
        assert [s.model for s in merge.load_recipe(asked).models] == three[1:]

    def test_slerp_from_the_base(self, three, tmp_path):
        """mergekit's form: two models of which one is base_model, where t = 0."""
        base, one = (load_file(f"{p}/{SINGLE}") for p in three[:2])
        asked = {"merge_method": "slerp", "base_model": three[0], "models": [{"model": three[1]}, {"model": three[0]}],
                 "parameters": {"t": 0.25}}  # fmt: skip
        got = merged(tmp_path, asked)
        for name in ("model.norm.weight", "lm_head.weight"):
            want = reference.slerp_merge(base[name].double(), one[name].double(), 0.25)
            assert_close_to_ref(got[name], want)

    def test_yaml_file(self, three, tmp_path):
        pytest.importorskip("yaml")
        file = tmp_path / "recipe.yml"
        file.write_text(
            f"merge_method: ties\nbase_model: {three[0]}\nmodels:\n  - model: {three[1]}\n    parameters:\n"
            f"      weight: 0.6\n  - model: {three[2]}\n    parameters: {{weight: 0.4}}\n"
            "parameters:\n  density: 0.3\n  lambda: 0.7\ndtype: bfloat16\n"
        )
        got = merged(tmp_path, file)
        want = merged(tmp_path, recipe(three, "ties", PARAMETERS["ties"]), name="other")
        assert all(torch.equal(got[n], want[n]) for n in want)


class TestReproducible:
    """The same bytes, whatever the machine was doing."""

    def asked(self, paths):
        return recipe(paths, parameters={"density": 0.4, "seed": 5})

    def test_any_sharding_and_threads(self, three, tmp_path):
        want = merged(tmp_path, self.asked(three))
        for i, (shards, reverse, count) in enumerate([(3, False, 1), (4, True, 2)]):
            paths = [
                save(tmp_path / f"{i}-{n}", weights(n), shards, reverse != bool(n))
                for n in range(3)
            ]
            with threads(count):
                got = merged(
                    tmp_path, self.asked(paths), name=f"out{i}", max_shard_bytes=2000 * (i + 1)
                )
            assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)

    def test_another_process(self, three, tmp_path):
        merge.merge_models(self.asked(three), tmp_path / "out", max_shard_bytes=3000)
        code = f"from tenfold import merge; merge.merge_models({self.asked(three)!r}, {str(tmp_path / 'again')!r}, " \
               "max_shard_bytes=3000)"  # fmt: skip
        env = {**os.environ, "PYTHONHASHSEED": "77"}
        subprocess.run([sys.executable, "-c", code], check=True, env=env)
        assert files(tmp_path / "out") == files(tmp_path / "again")

    @pytest.mark.parametrize("after", [0, 1, 4, 9])
    def test_an_interrupted_merge_goes_on(self, after, three, tmp_path):
        want = tmp_path / "want"
        merge.merge_models(self.asked(three), want, max_shard_bytes=2000)
        seen = []

        def stop(name, *_):
            seen.append(name)
            if len(seen) > after:
                raise KeyboardInterrupt

        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            merge.merge_models(self.asked(three), out, max_shard_bytes=2000, progress=stop)
        done = {p.name for p in out.glob("*.safetensors")}
        first = {n: p.stat().st_mtime_ns for n in done for p in [out / n]}
        assert not (out / INDEX).exists() and (out / "run.json").exists()
        again = []
        merge.merge_models(
            self.asked(three), out, max_shard_bytes=2000, progress=lambda n, *_: again.append(n)
        )
        assert files(out) == files(want)
        assert all((out / n).stat().st_mtime_ns == t for n, t in first.items())
        if done:
            assert len(again) < len(weights(0))

    def test_what_was_interrupted_is_not_mixed_with_something_else(self, three, tmp_path):
        def stop(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge.merge_models(self.asked(three), tmp_path / "out", progress=stop)
        with pytest.raises(ValueError, match=r"belongs to another run.*recipe"):
            merge.merge_models(recipe(three, "ties"), tmp_path / "out")
        os.utime(f"{three[1]}/{SINGLE}", ns=(1, 1))
        with pytest.raises(ValueError, match=r"belongs to another run.*inputs"):
            merge.merge_models(self.asked(three), tmp_path / "out")


class TestMemory:
    def test_streams(self, tmp_path):
        """Three models of 96 MB into one: a tensor of 8 MB of each, not the models."""
        x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
        for i in range(3):
            save(tmp_path / f"m{i}", {f"model.layers.{k}.w": x * (1 + 0.1 * i) for k in range(12)})
        asked = recipe([str(tmp_path / f"m{i}") for i in range(3)], parameters={"density": 0.5})
        setup = f"""
            from tenfold import merge, ops
            recipe = {asked!r}
            x = torch.zeros(64)
            ops.dare_merge(x, [x], [1.0], 0.5, 1)
            """
        call = f"merge.merge_models(recipe, {str(tmp_path / 'out')!r}, max_shard_bytes=1 << 30)"
        assert peak_growth(setup, call) < 60 * 2**20
        gram = (
            f"merge.model_gram(recipe['base_model'], {[str(tmp_path / f'm{i}') for i in (1, 2)]!r})"
        )
        assert peak_growth(setup, gram) < 50 * 2**20


class TestGram:
    def test_of_models(self, three):
        base, *experts = (load_file(f"{p}/{SINGLE}") for p in three)

        def flat(state, wanted=""):
            return torch.cat([x.double().flatten() for n, x in sorted(state.items())
                              if x.is_floating_point() and wanted in n])  # fmt: skip

        for wanted in ("", "mlp"):
            deltas = torch.stack([flat(e, wanted) - flat(base, wanted) for e in experts])
            got = merge.model_gram(three[0], three[1:], include=lambda n, w=wanted: w in n)
            torch.testing.assert_close(got, deltas @ deltas.T, rtol=1e-12, atol=1e-12)
        everything = merge.model_gram(base, experts)
        assert torch.equal(everything, merge.model_gram(*three[:1], three[1:]))
        whole = torch.stack([flat(e) for e in experts])
        torch.testing.assert_close(
            merge.model_gram(None, experts), whole @ whole.T, rtol=1e-12, atol=0
        )


# -- what is refused ---------------------------------------------------------------------------------

FIELDS = [
    ({"merge_method": "breadcrumbs"}, r"merge_method must be one of linear.*got 'breadcrumbs'"),
    ({"models": []}, r"models must be a list of models, got \[\]"),
    ({"models": [3]}, r"models\[0\] must be"),
    ({"models": [{"model": "a", "weights": 1}]}, r"models\[0\] has an unknown field 'weights'"),
    ({"base_model": None}, r"dare_ties needs base_model"),
    ({"dtype": "int8"}, r"dtype must be one of float32.*got 'int8'"),
    ({"out_dtype": "fp16"}, r"out_dtype must be one of float32.*got 'fp16'"),
    ({"slices": [1]}, "slices is not supported"),
    ({"tokenizer_source": "union"}, "tokenizer_source is not supported"),
    ({"chat_template": "auto"}, "chat_template is not supported"),
    ({"merge_methods": "x"}, "unknown field 'merge_methods'"),
    ({"parameters": {"lamda": 1}}, r"parameters: 'lamda' is not a parameter of 'dare_ties'"),
    ({"parameters": {"t": 1}}, r"'t' is not a parameter of 'dare_ties'"),
    ({"parameters": {"density": "half"}}, r"density must be a number, got 'half'"),
    ({"parameters": {"density": [0.1, "x"]}}, r"density must be numbers, got 'x'"),
    ({"parameters": {"density": [0.1, {"value": 1}]}}, r"density must be a value, numbers, or"),
    ({"parameters": {"density": [{"filter": "x"}]}}, r"an entry of density must be"),
    ({"parameters": {"normalize": 1}}, r"normalize must be true or false, got 1"),
    ({"parameters": {"rescale": "l7"}}, r"rescale must be true, false, 'l1' or 'l2', got 'l7'"),
    ({"parameters": {"seed": 0.5}}, r"seed must be a whole number, got 0.5"),
    ({"models": [{"model": "b", "parameters": {"normalize": True}}]}, r"models\[0\].*'normalize' is not a parameter"),
    ({"models": ["x", "x"]}, r"models has 'x' twice"),
    ({"models": ["base"], "base_model": "base"}, r"nothing but base_model"),
    ({"merge_method": "slerp", "parameters": {"t": 0.1}, "models": ["a", "b", "c"]}, r"slerp merges 2 models, got 3"),
    ({"merge_method": "slerp", "models": ["a", "b"]}, r"slerp needs parameters"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", FIELDS, ids=range(len(FIELDS)))
def test_bad_recipes(changes, message):
    asked = {"merge_method": "dare_ties", "base_model": "base", "models": ["a", "b"]} | changes
    with pytest.raises(ValueError, match=message):
        merge.load_recipe(asked)


class TestRefuses:
    def check(self, tmp_path, paths, error, message, **kwargs):
        fields = kwargs.pop("fields", {})
        with pytest.raises(error, match=message):
            merge.merge_models(recipe(paths, **fields), tmp_path / "out", **kwargs)
        assert not (tmp_path / "out").exists()

    def changed(self, tmp_path, seed=2, **changes):
        state = weights(seed) | changes
        return save(tmp_path / "changed", {n: x for n, x in state.items() if x is not None})

    def test_a_missing_weight(self, three, tmp_path):
        self.check(
            tmp_path,
            three,
            ValueError,
            "has no value of 'weight'",
            fields={"each": ({}, {"weight": 1})},
        )

    def test_other_tensors(self, three, tmp_path):
        gone = {f"model.layers.{i}.mlp.up_proj.weight": None for i in range(3)} | {
            "lm_head.weight": None
        }
        paths = [*three[:2], self.changed(tmp_path, **gone)]
        self.check(tmp_path, paths, ValueError, r"lacks tensors of base_model .*: lm_head.weight, model.layers.0.mlp."
                   r"up_proj.weight, model.layers.1.mlp.up_proj.weight and 1 more")  # fmt: skip
        self.check(
            tmp_path,
            [paths[2], *three[1:]],
            ValueError,
            r"has tensors that base_model .* lacks: lm_head",
        )

    def test_other_shapes(self, three, tmp_path):
        paths = [
            *three[:2],
            self.changed(tmp_path, **{"model.norm.weight": torch.zeros(17, dtype=BF16)}),
        ]
        self.check(tmp_path, paths, ValueError, r"model.norm.weight: \[16\] and \[17\]")

    def test_other_dtypes(self, three, tmp_path):
        paths = [*three[:2], save(tmp_path / "half", weights(2, F16))]
        self.check(
            tmp_path,
            paths,
            ValueError,
            r"different dtypes at lm_head.weight.*set the recipe's dtype",
        )
        got = merged(tmp_path, recipe(paths, dtype="float32"), name="converted")
        assert got["lm_head.weight"].dtype == F32

    def test_another_dtype_of_the_base_warns(self, three, tmp_path):
        experts = [save(tmp_path / f"half{i}", weights(i, F16)) for i in (1, 2)]
        with pytest.warns(UserWarning, match="different dtypes at .*merged in float32"):
            got = merged(tmp_path, recipe([three[0], *experts], "task_arithmetic"))
        assert got["lm_head.weight"].dtype == BF16
        base, *others = (
            load_file(f"{p}/{SINGLE}")["lm_head.weight"].double() for p in (three[0], *experts)
        )
        wide = base + 0.6 * (others[0] - base) + 0.4 * (others[1] - base)
        assert_close_to_ref(got["lm_head.weight"], wide)

    def test_identical_models(self, three, tmp_path):
        paths = [*three[:2], save(tmp_path / "same", weights(1))]
        self.check(tmp_path, paths, ValueError, "all models are identical")
        merge.merge_models(recipe(paths), tmp_path / "out", allow_identical=True)

    def test_quantised_models(self, three, tmp_path):
        for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
            path = save(
                tmp_path / str(dtype),
                weights(2) | {"lm_head.weight": torch.zeros(40, 16).to(dtype)},
            )
            self.check(tmp_path, [*three[:2], path], TypeError, "lm_head.weight .*quantised")
        path = save(tmp_path / "config", weights(2), config={"quantization_config": {"bits": 4}})
        self.check(tmp_path, [*three[:2], path], TypeError, "quantization_config")

    def test_float64(self, tmp_path):
        paths = [save(tmp_path / f"d{i}", weights(i, torch.float64)) for i in range(3)]
        self.check(tmp_path, paths, TypeError, "lm_head.weight is float64; set the recipe's dtype")

    def test_buffers_that_differ(self, three, tmp_path):
        path = self.changed(tmp_path, **{"model.position_ids": torch.arange(1, 9)})
        with pytest.raises(ValueError, match=r"model.position_ids .* differs"):
            merge.merge_models(recipe([*three[:2], path]), tmp_path / "out")

    def test_no_model(self, three, tmp_path):
        self.check(
            tmp_path, [*three[:2], str(tmp_path / "nothing")], FileNotFoundError, "no model folder"
        )
        (tmp_path / "empty").mkdir()
        self.check(
            tmp_path, [*three[:2], str(tmp_path / "empty")], FileNotFoundError, "no safetensors"
        )

    def test_damaged_files(self, three, tmp_path):
        for name, cut in (("short", -100), ("tiny", 4)):
            path = save(tmp_path / name, weights(2))
            whole = (tmp_path / name / SINGLE).read_bytes()
            (tmp_path / name / SINGLE).write_bytes(whole[:cut])
            self.check(tmp_path, [*three[:2], path], ValueError, "cut short")
        path = save(tmp_path / "shards", weights(2), shards=3)
        (tmp_path / "shards" / "model-00002-of-00003.safetensors").unlink()
        self.check(
            tmp_path,
            [*three[:2], path],
            FileNotFoundError,
            "model-00002-of-00003.safetensors are missing",
        )

    def test_an_occupied_folder(self, three, tmp_path):
        for out in (three[0], three[1], save(tmp_path / "other", weights(5))):
            with pytest.raises(ValueError, match="holds a model already"):
                merge.merge_models(recipe(three), out)

    def test_drop_of_everything(self, three, tmp_path):
        self.check(tmp_path, three, ValueError, r"density must be in \(0, 1\] for dare_ties, got 0",
                   fields={"parameters": {"density": 0.0}})  # fmt: skip


def test_plan_is_by_name_and_size():
    sizes = {"c": 10, "a": 30, "b": 30, "d": 100, "e": 1}
    planned = [Planned(n, torch.uint8, (s,)) for n, s in sizes.items()]
    shards = plan_shards(planned, 60)
    assert [[t.name for t in s.tensors] for s in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shards[0].file == "model-00001-of-00004.safetensors"
    assert [s.file for s in plan_shards(planned, 1000)] == [SINGLE]


def test_depths():
    depth = models_module.Depths(["model.layers.0.a", "model.layers.4.a"])
    names = ("model.embed_tokens.weight", "model.layers.1.x", "model.layers.4.x", "lm_head.weight")
    assert [depth(n) for n in names] == [0.0, 0.25, 1.0, 1.0]
