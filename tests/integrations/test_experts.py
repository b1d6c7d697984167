# SPDX-License-Identifier: Apache-2.0
"""experts_implementation="tenfold" on stock mixtures: outputs, all gradients and generation equal eager's."""

import pytest
import torch
import transformers
from tiny_models import GREEDY
from torch import nn

from tenfold import integrations, ops
from tenfold.integrations import experts
from tenfold.testing import assert_close_to_ref, poisoned_memory

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ARCHITECTURES = {
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 6, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 24},
    "FlexOlmo": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
}  # fmt: skip
MAIN = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")


@pytest.fixture(autouse=True)
def registered():
    experts.register()
    yield
    experts.unregister()


def make(kind, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**(SIZES | ARCHITECTURES[kind] | changes))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.copy_(1.5 * noise / p.shape[-1] ** 0.5 if p.ndim > 1 else 1 + 0.1 * noise)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often our block ran."""
    seen = []
    real = ops.moe_swiglu_mlp
    monkeypatch.setattr(ops, "moe_swiglu_mlp", lambda *a, **k: seen.append(1) or real(*a, **k))
    return seen


def ids(rows=3, length=9, seed=1):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, batch, padded=True):
    mask = torch.ones_like(batch)
    if padded:
        mask[0, :4] = 0
    out = model(input_ids=batch, attention_mask=mask, labels=batch, use_cache=False)
    model.zero_grad()
    out.loss.backward()
    return out.logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_equal_eager(kind, calls):
    model, batch = make(kind), ids()
    want, want_grads = loss_and_gradients(model, batch)
    assert not calls
    model.set_experts_implementation("tenfold")
    with poisoned_memory():
        got, grads = loss_and_gradients(model, batch)
    assert len(calls) == len(experts.experts_of(model)) == 2
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        scale = float(want_grads[name].abs().max())
        torch.testing.assert_close(
            grad, want_grads[name], atol=2e-5 * scale + 1e-8, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("route", ["stock", "empty", "sentinel"])
def test_blocks_against_float64(kind, dtype, route):
    """The experts of a layer: outputs and gradients as near to float64 as eager's own in that dtype."""
    model = make(kind)
    module = next(iter(experts.experts_of(model).values()))
    n, k = module.num_experts, 2
    made = torch.Generator().manual_seed(3)
    x = torch.randn(23, 32, generator=made)
    index = torch.randn(23, n, generator=made).topk(k).indices
    if route == "empty":
        index = index % 2
    elif route == "sentinel":
        index[torch.rand(23, k, generator=made) < 0.4] = n
        module._is_expert_parallel = True
    weight = torch.rand(23, k, generator=made)
    grad = torch.randn(23, 32, generator=made)

    def run(implementation, work):
        module.to(work)
        model.set_experts_implementation(implementation)
        routed = weight.to(work if work == torch.float64 else torch.float32)
        inputs = [x.to(dtype).to(work).requires_grad_(), routed.requires_grad_()]
        leaves = [*inputs, module.gate_up_proj, module.down_proj]
        out = module(inputs[0], index, inputs[1])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype).to(out.dtype))]

    module.to(dtype)  # float64 sees what the dtype can hold
    low = run("eager", dtype)
    with poisoned_memory():
        ours = run("tenfold", dtype)
    exact = run("eager", torch.float64)
    for name, got, ref, eager in zip(("out", "x", "weight", "gate_up", "down"), ours, exact, low):
        assert got.dtype == eager.dtype
        assert_close_to_ref(got, ref, eager, dtype=dtype, what=f"{kind} {route} {name}")
    if route == "empty":
        assert not ours[3][2:].any() and not ours[4][2:].any()


@pytest.mark.parametrize("kind", MAIN)
def test_generation(kind, calls):
    model, prompt = make(kind), ids(2, 6)
    want = model.generate(prompt, max_new_tokens=10, **GREEDY)
    model.set_experts_implementation("tenfold")
    got = model.generate(prompt, max_new_tokens=10, **GREEDY)
    assert torch.equal(got, want) and len(calls) >= 20


@pytest.mark.parametrize("kind", MAIN)
def test_bfloat16_models_against_float64(kind):
    """Logits and the gradients of all parameters, as near to float64 as eager's; one layer, so that all route alike."""
    model, batch = make(kind, num_hidden_layers=1).to(torch.bfloat16), ids(4, 12)
    gate = model.model.layers[0].mlp.gate
    chosen = []
    hook = gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    low = loss_and_gradients(model, batch)
    model.set_experts_implementation("tenfold")
    ours = loss_and_gradients(model, batch)
    hook.remove()
    assert torch.equal(*chosen)

    def routed(hidden):
        logits = hidden.reshape(-1, 32) @ gate.weight.T
        weights = logits.softmax(-1).gather(1, chosen[0])
        if getattr(gate, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen[0]

    model.double().set_experts_implementation("eager")
    gate.forward = routed
    exact = loss_and_gradients(model, batch)
    assert ours[0].dtype == torch.bfloat16 and ours[1].keys() == exact[1].keys() == low[1].keys()
    assert_close_to_ref(ours[0], exact[0].double(), low[0], what=f"{kind} logits")
    for name, grad in ours[1].items():
        assert grad.dtype == torch.bfloat16
        assert_close_to_ref(grad, exact[1][name].double(), low[1][name], what=f"{kind} {name}")


def test_under_autocast():
    model, batch = make("Olmoe"), ids()
    model.set_experts_implementation("tenfold")
    with torch.autocast("cpu", torch.bfloat16):
        got = model(batch).logits
    torch.testing.assert_close(got.float(), model(batch).logits, atol=0.3, rtol=0.1)


def test_from_pretrained(tmp_path, calls):
    model = make("Mixtral")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="tenfold"
    )
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, atol=2e-5, rtol=1e-4)
    assert len(calls) == 2


def test_compiles_without_a_break():
    model = make("Mixtral")
    module = next(iter(experts.experts_of(model).values()))
    model.set_experts_implementation("tenfold")
    x, index, weight = torch.randn(7, 32), torch.randint(0, 6, (7, 2)), torch.rand(7, 2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index, weight), module(x, index, weight))


REFUSED = {
    "activation": ("Mixtral", {"hidden_act": "gelu"}, "the activation GELU"),
    "transposed, interleaved, biases": (
        "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "interleaved rows of gate and up",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_other_experts_by_name(case):
    kind, changes, why = REFUSED[case]
    config = getattr(transformers, kind + "Config")(**(SIZES | changes))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    before = model.config._experts_implementation
    with pytest.raises(TypeError, match=why):
        experts.replace_moe(model)
    assert model.config._experts_implementation == before
    model.set_experts_implementation("tenfold")
    with pytest.raises(TypeError, match=f"{why}.*supported: SwiGLU"):
        model(ids())


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("has_bias", True, "biases"), ("is_transposed", True, "transposed"), ("has_gate", False, "no gate"),
     ("has_post_expert_norm", True, "a norm after each expert"), ("act_fn", nn.ReLU(), "activation ReLU"),
     ("down_proj", nn.Parameter(torch.zeros(6, 32, 7)), r"weights \[6, 80, 32\] and \[6, 32, 7\]")],
)  # fmt: skip
def test_each_reason(name, value, why):
    model = make("Mixtral")
    module = model.model.layers[1].mlp.experts
    setattr(module, name, value)
    with pytest.raises(
        TypeError, match=rf"model\.layers\.1\.mlp\.experts \(MixtralExperts\).*{why}"
    ):
        experts.replace_moe(model)


def test_a_gate_of_its_own_is_refused(monkeypatch):
    model = make("Mixtral")
    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", lambda self, x: x)
    with pytest.raises(TypeError, match="a gate of its own"):
        experts.replace_moe(model)


def test_models_that_cannot_be_set_are_not_passed_over(monkeypatch):
    model = make("Mixtral")
    monkeypatch.setattr(
        type(model), "_can_set_experts_implementation", classmethod(lambda cls: False)
    )
    with pytest.raises(TypeError, match=r"does not let .*layers\.0\.mlp\.experts stays"):
        experts.replace_moe(model)


def test_replace_and_put_back(calls):
    model, batch = make("Qwen3Moe"), ids()
    want = model(batch).logits
    with experts.replace_moe(model) as replaced:
        assert replaced.experts == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        torch.testing.assert_close(model(batch).logits, want, atol=2e-5, rtol=1e-4)
        assert len(calls) == 2
    assert (
        torch.equal(model(batch).logits, want) and model.config._experts_implementation == "eager"
    )
    replaced.remove()
    sizes = {k: v for k, v in SIZES.items() if k != "moe_intermediate_size"}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with pytest.raises(TypeError, match="LlamaForCausalLM has no experts"):
        experts.replace_moe(dense)
    with pytest.raises(TypeError, match="got Linear"):
        experts.replace_moe(nn.Linear(2, 2))


def test_patch_and_unpatch():
    model = make("Mixtral")
    want = model(ids()).logits
    handle = experts.patch(model)
    with pytest.raises(RuntimeError, match="experts of this MixtralForCausalLM is patched already"):
        experts.patch(model)
    assert model.config._experts_implementation == "tenfold"
    experts.unpatch(model)
    handle.remove()
    assert model.config._experts_implementation == "eager" and torch.equal(
        model(ids()).logits, want
    )
    with pytest.raises(RuntimeError, match="is not patched"):
        experts.unpatch(model)


def test_registration_is_undone_and_guarded():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    integrations.register_experts()
    assert ALL_EXPERTS_FUNCTIONS["tenfold"] is experts.experts_forward
    experts.unregister()
    experts.unregister()
    assert "tenfold" not in ALL_EXPERTS_FUNCTIONS
    with pytest.raises(ValueError, match="tenfold"):
        make("Mixtral").set_experts_implementation("tenfold")
    ExpertsInterface.register("tenfold", len)
    try:
        with pytest.raises(RuntimeError, match="registered already"):
            experts.register()
    finally:
        del ExpertsInterface._global_mapping["tenfold"]


def test_unknown_interfaces_are_named(monkeypatch):
    from transformers.integrations import moe

    monkeypatch.setattr(
        moe, "use_experts_implementation", lambda experts_class=None, *, has_fins=False: None
    )
    with pytest.raises(ImportError, match=r"kinds of experts \(has_fins\).*5\.24"):
        experts._moe()
    monkeypatch.delattr(moe, "ExpertsInterface")
    with pytest.raises(ImportError, match="no experts interface"):
        experts._moe()


def test_ligers_call_shape():
    model = make("Mixtral")
    module = model.model.layers[0].mlp.experts
    x, index, weight = torch.randn(5, 32), torch.randint(0, 7, (5, 2)), torch.rand(5, 2)
    got = experts.fused_moe(x, module.gate_up_proj, module.down_proj, index, weight)
    torch.testing.assert_close(got, module(x, index, weight), atol=2e-5, rtol=1e-4)
