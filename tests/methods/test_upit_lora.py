# SPDX-License-Identifier: Apache-2.0
"""LoRA experts (S7): acceptance check 11, both routings, adapters of PEFT, saving, what trains."""

import pytest
import torch
import upit_mixtures as tiny
from torch import nn

from tenfold import reference
from tenfold.upit import (
    LoraExpertsConfig,
    add_lora_experts,
    expert_load,
    load_lora_experts,
    save_lora_experts,
)
from tenfold.upit.lora import PARTS
from tenfold.upit.lora_model import lora_layers

SMALL = {"experts": 4, "experts_per_token": 2, "rank": 5, "alpha": 7.0}


def filled(model, seed=0):
    """B and routers that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for name, p in layer.named_parameters():
                if not name.startswith("base."):
                    p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("routing", ["block", "linear"])
@torch.no_grad()
def test_without_b_the_model_is_the_base(routing):
    """Exactly, for routing="block": the base is read as it is."""
    model, ids = tiny.dense(), tiny.rows()
    want = tiny.logits(model, ids)
    add_lora_experts(model, LoraExpertsConfig(**SMALL, routing=routing))
    layers = lora_layers(model).values()
    assert len(layers) == tiny.LAYERS
    x = torch.randn(3, 5, tiny.WIDTH)
    for layer in layers:
        torch.testing.assert_close(layer(x), layer.base(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(model, ids), want, atol=1e-5, rtol=1e-5)


def test_without_b_a_block_is_exactly_that_with_no_pairs():
    """All LoRA B = 0: bit for bit what the op gives where A is 0, too."""
    model = add_lora_experts(tiny.dense(), LoraExpertsConfig(**SMALL))
    layer, x = next(iter(lora_layers(model).values())), torch.randn(9, tiny.WIDTH)
    want = layer(x)
    with torch.no_grad():
        for a in layer.experts.a():
            a.normal_()
    assert torch.equal(layer(x), want)


@torch.no_grad()
def test_one_product_with_the_base_is_the_naive_form():
    """To 1e-6 of the largest value: per slot in float64, W + s B A of the expert."""
    model = filled(add_lora_experts(tiny.dense(), LoraExpertsConfig(**SMALL)))
    for layer in lora_layers(model).values():
        x = torch.randn(40, tiny.WIDTH)
        _, weight, index = layer.gate(x)
        parts = [t.double() for t in (*layer._weights(), *layer.experts.a(), *layer.experts.b())]
        want = reference.moe_lora_swiglu_mlp(x.double(), *parts[:3], parts[3:6], parts[6:], layer.scale, index,
                                             weight.double())  # fmt: skip
        got = layer(x).double()
        worst = float((got - want).abs().max() / want.abs().max())
        print("relative to the largest value:", worst)
        assert worst <= 1e-6


def test_linear_routing_is_loramoes():
    """Every linear layer: W x + s sum_e softmax(R x)_e B_e A_e x, without top-k."""
    model = filled(add_lora_experts(tiny.dense(), LoraExpertsConfig(**SMALL, routing="linear")))
    layer, x = next(iter(lora_layers(model).values())), torch.randn(2, 7, tiny.WIDTH)

    def linear(part, x):
        at = PARTS.index(part)
        share = (x @ layer.routers[part].weight.T).softmax(-1)
        a, b = layer.experts.a()[at], layer.experts.b()[at]
        each = torch.stack([x @ a[e].T @ b[e].T for e in range(4)], -1)
        return x @ layer._weights()[at].T + layer.scale * (each * share.unsqueeze(-2)).sum(-1)

    want = linear("down", nn.functional.silu(linear("gate", x)) * linear("up", x))
    torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("routing", ["block", "linear"])
def test_only_experts_and_routers_train(routing):
    model = filled(add_lora_experts(tiny.dense(), LoraExpertsConfig(**SMALL, routing=routing)))
    ids = tiny.rows()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        trains = ".experts." in name or ".gate.weight" in name or ".routers." in name
        assert p.requires_grad == trains and (p.grad is not None) == trains, name
        assert not trains or bool(p.grad.any()), name


@pytest.mark.parametrize("routing", ["block", "linear"])
def test_saved_and_loaded(tmp_path, routing):
    config = LoraExpertsConfig(**SMALL, routing=routing)
    model, ids = filled(add_lora_experts(tiny.dense(), config)), tiny.rows()
    save_lora_experts(model, tmp_path)
    again = load_lora_experts(tiny.dense(), tmp_path)
    assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))
    assert next(iter(lora_layers(again).values())).config == config
    with pytest.raises(ValueError, match=r"this model needs \[4, 5, 64\]"):
        load_lora_experts(tiny.dense(width=64), tmp_path)
    with pytest.raises(KeyError, match=r"lacks model\.layers\.2\.mlp"):
        load_lora_experts(tiny.dense(layers=3), tmp_path)


def test_adapters_of_peft_become_experts():
    """Expert e alone computes what PEFT computes with adapter e."""
    peft = pytest.importorskip("peft")
    adapters, outputs, ids = [], [], tiny.rows()
    for seed in range(2):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(tiny.dense(), peft.LoraConfig(
            r=5, lora_alpha=7, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False,
        ))  # fmt: skip
        adapters.append(peft.get_peft_model_state_dict(wrapped))
        outputs.append(tiny.logits(wrapped.eval(), ids))
    vectors = torch.zeros(2, tiny.LAYERS, tiny.WIDTH)
    config = LoraExpertsConfig(**(SMALL | {"experts": 2, "experts_per_token": 1}))
    for e in range(2):  # equal logits: the first of the two is chosen
        model = add_lora_experts(
            tiny.dense(), config, adapters=adapters[e:] + adapters[:e], routers=vectors
        )
        torch.testing.assert_close(tiny.logits(model, ids), outputs[e], atol=1e-4, rtol=1e-4)
    assert expert_load(model, ids)[:, 0].tolist() == [1.0] * tiny.LAYERS


def test_errors():
    config = LoraExpertsConfig(**SMALL)
    with pytest.raises(ValueError, match="2 adapters for 4 experts"):
        add_lora_experts(tiny.dense(), config, adapters=[{}, {}])
    with pytest.raises(KeyError, match=r"adapters\[0\] lacks layers\.0\.mlp\.gate_proj\.lora_A"):
        add_lora_experts(tiny.dense(), config, adapters=[{}] * 4)
    with pytest.raises(ValueError, match=r"q_proj.*pairs on gate, up and down"):
        other = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}
        add_lora_experts(tiny.dense(), config, adapters=[other] * 4)
    with pytest.raises(ValueError, match=r"= \[4, 2, 32\], got \[4, 2, 8\]"):
        add_lora_experts(tiny.dense(), config, routers=torch.zeros(4, 2, 8))
    with pytest.raises(ValueError, match="routing='block'"):
        add_lora_experts(
            tiny.dense(),
            LoraExpertsConfig(**SMALL, routing="linear"),
            routers=torch.zeros(4, 2, 32),
        )
    model = add_lora_experts(tiny.dense(), config)
    with pytest.raises(RuntimeError, match="already"):
        add_lora_experts(model, config)
    with pytest.raises(TypeError, match="LlamaMLP cannot have LoRA experts"):
        add_lora_experts(tiny.dense(mlp_bias=True), config)
    with pytest.raises(ValueError, match="experts must be >= 2, got 1"):
        LoraExpertsConfig(experts=1)
    with pytest.raises(ValueError, match=r"must be 1 to 4 .*, got 5"):
        LoraExpertsConfig(experts=4, experts_per_token=5)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA experts"):
        save_lora_experts(tiny.dense(), "nowhere")
    with pytest.raises(FileNotFoundError, match="no LoRA experts were saved"):
        load_lora_experts(tiny.dense(), "nowhere")
