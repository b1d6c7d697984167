# SPDX-License-Identifier: Apache-2.0
"""Assembly (S5), layouts and baselines: what a stock transformers loads, the values in it, errors; kills."""

import json

import pytest
import torch
import upit_mixtures as tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from tenfold.testing import peak_growth
from tenfold.upit import AssemblyConfig, btx, convert_layout, load, upcycle
from tenfold.upit.assemble import assemble
from tenfold.upit.layout import check_mixtral, mixtral_config


@pytest.fixture
def pool():
    base, states = tiny.experts(4)
    return base, states, base.config.to_dict()


def vectors(n=4, seed=0):
    return torch.randn(n, tiny.LAYERS, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def by_hand(states, routers, config):
    """The Mixtral that assembly means, made in memory."""
    model = tiny.mixtral(
        len(states), rope_parameters=config["rope_parameters"], rms_norm_eps=config["rms_norm_eps"]
    )
    mean = {n: torch.stack([s[n].float() for s in states]).mean(0) for n in states[0]}
    made = {n: t for n, t in mean.items() if ".mlp." not in n}
    for i in range(tiny.LAYERS):
        at = f"model.layers.{i}.mlp."
        parts = {
            p: torch.stack([s[f"{at}{p}_proj.weight"] for s in states])
            for p in ("gate", "up", "down")
        }
        made[at + "experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        made[at + "experts.down_proj"] = parts["down"]
        made[at + "gate.weight"] = routers[:, i]
    model.load_state_dict(made)
    return model.eval()


@pytest.mark.parametrize("layout", ["classic", "stacked"])
@pytest.mark.parametrize("source", ["states", "folders"])
def test_a_stock_mixtral(tmp_path, pool, layout, source):
    """transformers loads it unchanged, with the logits of the model made by hand."""
    base, states, config = pool
    given, more = states, {"model_config": config}
    if source == "folders":
        given, more = [tmp_path / f"expert-{i}" for i in range(4)], {}
        for path, state in zip(given, states):
            base.load_state_dict(state)
            base.save_pretrained(path)
            (path / "tokenizer.json").write_text(f'{{"of": "{path.name}"}}')
    sizes = AssemblyConfig(layout=layout, max_shard_bytes=60_000)
    out = assemble(given, vectors(), tmp_path / "moe", config=sizes, **more)
    assert len(list(out.glob("*.safetensors"))) > 3 and not (out / "run.json").exists()
    stock, ids = AutoModelForCausalLM.from_pretrained(out), tiny.rows()
    assert type(stock) is MixtralForCausalLM
    assert (stock.config.num_local_experts, stock.config.num_experts_per_tok) == (4, 2)
    assert stock.config.router_aux_loss_coef == 0.01 and stock.config.sliding_window is None
    want = by_hand(states, vectors(), config)
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(stock.state_dict()[name], tensor, atol=1e-7, rtol=1e-6, msg=name)
    torch.testing.assert_close(
        tiny.logits(stock, ids), tiny.logits(want, ids), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        tiny.logits(load(out), ids), tiny.logits(want, ids), atol=1e-5, rtol=1e-5
    )
    if source == "folders":
        assert json.loads((out / "tokenizer.json").read_text()) == {"of": "expert-3"}
    names = set().union(*(load_file(f) for f in out.glob("*.safetensors")))
    known = (
        "block_sparse_moe.experts.3.w2.weight" if layout == "classic" else "mlp.experts.down_proj"
    )
    assert f"model.layers.1.{known}" in names


def test_layouts_turn_into_each_other_bit_for_bit(tmp_path, pool):
    _, states, config = pool
    classic = assemble(states, vectors(), tmp_path / "a", model_config=config)
    stacked = assemble(
        states,
        vectors(),
        tmp_path / "b",
        model_config=config,
        config=AssemblyConfig(layout="stacked"),
    )
    assert convert_layout(classic, tmp_path / "c", "stacked") == tmp_path / "c"
    convert_layout(stacked, tmp_path / "d", "classic")
    convert_layout(classic, tmp_path / "e", "classic")
    for one, other in (("b", "c"), ("a", "d"), ("a", "e")):
        first, second = (load_file(tmp_path / x / "model.safetensors") for x in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert check_mixtral(tmp_path / "c")[0] == "stacked"


def test_saved_and_loaded_again_gives_the_same_logits(tmp_path, pool):
    _, states, config = pool
    model, ids = load(assemble(states, vectors(), tmp_path / "a", model_config=config)), tiny.rows()
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(tiny.logits(load(tmp_path / "b"), ids), tiny.logits(model, ids))


def test_without_renormalisation(tmp_path, pool):
    _, states, config = pool
    ids, made = tiny.rows(), []
    for renormalize in (True, False):
        out = assemble(states, vectors(), tmp_path / str(renormalize), model_config=config,
                       config=AssemblyConfig(renormalize=renormalize))  # fmt: skip
        made.append(tiny.logits(load(out), ids))
    assert (made[0] - made[1]).abs().max() > 1e-2


@pytest.mark.parametrize("rest", ["mean", "last", "base"])
def test_the_rest(tmp_path, pool, rest):
    """Attention, norms and embeddings of the saved checkpoints, not of merged experts."""
    base, states, config = pool
    base.load_state_dict(states[0])
    origin = tiny.dense(seed=9)
    out = assemble(states, None, tmp_path / "moe", base=origin.state_dict(), model_config=config,
                   config=AssemblyConfig(rest=rest, saved=3))  # fmt: skip
    made = load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    want = {"mean": sum(s[name] for s in states[:3]) / 3, "last": states[2][name],
            "base": origin.state_dict()[name]}[rest]  # fmt: skip
    torch.testing.assert_close(made[name], want, atol=1e-7, rtol=1e-6)
    assert rest == "mean" or torch.equal(made[name], want)


def test_random_routers(tmp_path, pool):
    _, states, config = pool
    made = {}
    for name, changes in (
        ("a", {}),
        ("b", {}),
        ("c", {"seed": 1}),
        ("d", {"router_init": "uniform", "router_std": 0.1}),
    ):
        out = assemble(
            states, None, tmp_path / name, model_config=config, config=AssemblyConfig(**changes)
        )
        made[name] = load_file(out / "model.safetensors")[
            "model.layers.1.block_sparse_moe.gate.weight"
        ]
    assert torch.equal(made["a"], made["b"]) and not torch.equal(made["a"], made["c"])
    assert 0.01 < made["a"].std() < 0.03 and 0.08 < made["d"].abs().max() <= 0.1


def test_dtypes(tmp_path, pool):
    _, states, config = pool
    narrow = [{n: t.bfloat16() for n, t in s.items()} for s in states]
    out = assemble(narrow, vectors(), tmp_path / "a", model_config=config)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    out = assemble([*narrow[:2], *states[2:]], vectors(), tmp_path / "b", model_config=config,
                   config=AssemblyConfig(dtype="float32"))  # fmt: skip
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"different dtypes at .*set dtype"):
        assemble([*narrow[:2], *states[2:]], vectors(), tmp_path / "c", model_config=config)
    quantised = [dict(s) for s in states]
    quantised[1]["model.norm.weight"] = quantised[1]["model.norm.weight"].to(torch.int8)
    with pytest.raises(TypeError, match="quantised"):
        assemble(quantised, vectors(), tmp_path / "d", model_config=config)


def test_a_tied_model(tmp_path):
    model = tiny.dense(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    out = upcycle(tmp_path / "dense", tmp_path / "moe", experts=3)
    ids = tiny.rows()
    torch.testing.assert_close(
        tiny.logits(load(out), ids), tiny.logits(model, ids), atol=1e-5, rtol=1e-5
    )


def test_a_killed_assembly_goes_on(tmp_path, pool):
    _, states, config = pool
    sizes = AssemblyConfig(max_shard_bytes=60_000)

    def stop(name, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assemble(
            states, vectors(), tmp_path / "a", model_config=config, config=sizes, progress=stop
        )
    there = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").glob("*.safetensors")}
    assert there and not (tmp_path / "a" / "config.json").exists()
    with pytest.raises(ValueError, match="another run"):
        assemble(states, vectors(seed=1), tmp_path / "a", model_config=config, config=sizes)
    assemble(states, vectors(), tmp_path / "a", model_config=config, config=sizes)
    assert all(f.stat().st_mtime_ns == t for f, t in there.items())
    assemble(states, vectors(), tmp_path / "b", model_config=config, config=sizes)
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Four experts of 38 MB become 95 MB in files of 20 MB: a tensor has 2.4 MB."""
    model = tiny.dense(layers=2, width=768, ffn=768)
    with torch.no_grad():
        for e in range(4):
            model.get_parameter("model.layers.1.mlp.down_proj.weight").add_(1)
            model.save_pretrained(tmp_path / str(e))
    setup = "from tenfold.upit import AssemblyConfig; from tenfold.upit.assemble import assemble"
    call = f"""
assemble(["{tmp_path}/" + str(e) for e in range(4)], None, "{tmp_path}/moe",
         config=AssemblyConfig(max_shard_bytes=20_000_000))
    """
    assert peak_growth(setup, call) < 45 * 2**20


def test_errors(tmp_path, pool):
    _, states, config = pool
    out = tmp_path / "moe"

    def fails(match, kind=ValueError, given=states, routers=None, **changes):
        more = {k: changes.pop(k) for k in ("base", "model_config") if k in changes}
        with pytest.raises(kind, match=match):
            assemble(
                given,
                routers,
                out,
                config=AssemblyConfig(**changes),
                **({"model_config": config} | more),
            )

    fails("at least 2 experts, got 1", given=states[:1])
    fails("must be 1 to 4 .*, got 5", experts_per_token=5)
    fails(r"= \[4, 2, 32\], got \[4, 3, 32\]", routers=torch.zeros(4, 3, 32))
    fails(r"= \[4, 2, 32\], got \[4, 2, 16\]", routers=torch.zeros(4, 2, 16))
    fails("not finite", routers=torch.full((4, 2, 32), float("nan")))
    fails("all 4 experts are identical", given=[states[0]] * 4)
    fails("saved=7 checkpoints of only 4", saved=7)
    fails("rest='base' needs base=", rest="base")
    fails("pass model_config=", model_config=None)
    less = {n: t for n, t in states[1].items() if "mlp" not in n}
    fails("lacks tensors of .*model.layers.0.mlp", given=[states[0], less])
    wrong = dict(states[1]) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(5, 32)}
    fails("shapes differ .*up_proj", given=[states[0], wrong])
    fails("attention_bias", TypeError, model_config=config | {"attention_bias": True})
    fails("model_type 'gpt2'", TypeError, model_config=config | {"model_type": "gpt2"})
    fails("3 layers, the experts 2", model_config=config | {"num_hidden_layers": 3})
    with pytest.raises(FileNotFoundError):
        assemble([tmp_path / "none"] * 2, None, out)
    assemble(states, None, out, model_config=config)
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert assemble(states, None, out, model_config=config) == out  # the same: nothing to do
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    fails("holds another model already", experts_per_token=1)


def test_a_missing_expert_is_named(tmp_path, pool):
    from safetensors.torch import save_file

    _, states, config = pool
    out = assemble(states, None, tmp_path / "moe", model_config=config)
    state = load_file(out / "model.safetensors")
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file(
        {n: t for n, t in state.items() if n != gone},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(KeyError, match=gone):
        load(out)
    with pytest.raises(KeyError, match=gone):
        convert_layout(out, tmp_path / "other")


def test_baselines(tmp_path, pool):
    base, states, config = pool
    ids = tiny.rows()
    base.load_state_dict(states[0])
    want = tiny.logits(base, ids)
    made = load(upcycle(states[0], tmp_path / "vanilla", experts=4, model_config=config))
    torch.testing.assert_close(tiny.logits(made, ids), want, atol=1e-5, rtol=1e-5)
    mixed = load_file(btx(states, tmp_path / "btx", model_config=config) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(mixed[name], sum(s[name] for s in states) / 4, atol=1e-7, rtol=1e-6)
    assert torch.equal(mixed["model.layers.0.block_sparse_moe.experts.3.w1.weight"],
                       states[3]["model.layers.0.mlp.gate_proj.weight"])  # fmt: skip


def test_other_models_are_no_mixtrals():
    with pytest.raises(TypeError, match="hidden_act 'gelu'"):
        mixtral_config({"model_type": "llama", "hidden_act": "gelu"}, 2, 1)
