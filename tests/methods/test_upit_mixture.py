# SPDX-License-Identifier: Apache-2.0
"""Acceptance checks 1, 2, 4, 5, 6 of the method's specification on whole blocks and models."""

import math

import pytest
import torch
import upit_mixtures as tiny
from torch import nn

from tenfold import ops, reference
from tenfold.integrations import experts
from tenfold.upit import AssemblyConfig, load
from tenfold.upit.assemble import assemble
from tenfold.upit.mixture import fuse_routers, mixture_layers, restore_routers, routings
from tenfold.upit.objective import balance_loss


@pytest.fixture(autouse=True)
def registered():
    experts.register()
    yield
    experts.unregister()


def block(n=4, k=2, d=32, f=48, seed=0):
    """x, router, gate_up, down; values about 1."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(50, d, generator=made)
    router = torch.randn(n, d, generator=made) / d**0.5
    gate_up = torch.randn(n, 2 * f, d, generator=made) / d**0.5
    down = torch.randn(n, d, f, generator=made) / f**0.5
    return x, router, gate_up, down


def mixture_of(x, router, gate_up, down, k, renormalize=True, to=ops):
    weight, index = to.moe_gate(x @ router.T, k, renormalize)
    return to.moe_swiglu_mlp(x, gate_up, down, index, weight)


def dense_of(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (nn.functional.silu(gate) * up) @ down.T


# -- 1: identical experts


def test_identical_experts_are_the_dense_block():
    x, router, gate_up, down = block()
    down = down / 4  # the bound is for outputs below 1
    same = gate_up[:1].expand_as(gate_up).contiguous(), down[:1].expand_as(down).contiguous()
    wide = [t.double() for t in (x, router, *same)]
    exact = dense_of(wide[0], wide[2][0], wide[3][0])
    assert 0.5 < exact.abs().max() < 1
    assert (mixture_of(*wide, 2, to=reference) - exact).abs().max() <= 1e-15
    got = mixture_of(x, router, *same, 2)
    assert (got - dense_of(x, same[0][0], same[1][0])).abs().max() <= 5e-7


@pytest.mark.parametrize("renormalize", [True, False])
def test_identical_experts_teach_a_renormalised_router_nothing(renormalize):
    x, router, gate_up, down = block()
    router.requires_grad_()
    same = gate_up[:1].expand_as(gate_up), down[:1].expand_as(down)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) / x.numel()
    (mixture_of(x, router, *same, 2, renormalize) * grad).sum().backward()
    if renormalize:
        assert router.grad.abs().max() <= 1e-7
    else:
        assert router.grad.abs().max() > 1e-5


def test_a_mixture_of_one_model_is_that_model(tmp_path):
    model, ids = tiny.dense(), tiny.rows()
    model.save_pretrained(tmp_path / "dense")
    made = assemble(
        [tmp_path / "dense"] * 4,
        None,
        tmp_path / "moe",
        config=AssemblyConfig(allow_identical=True),
    )
    torch.testing.assert_close(
        tiny.logits(load(made), ids), tiny.logits(model, ids), atol=1e-5, rtol=1e-5
    )


# -- 2: k = n, n = 1


def test_all_experts_are_the_softmax_weighted_sum():
    x, router, gate_up, down = block()
    shares = (x.double() @ router.double().T).softmax(-1)
    want = sum(
        shares[:, e, None] * dense_of(*(t.double() for t in (x, gate_up[e], down[e])))
        for e in range(4)
    )
    torch.testing.assert_close(
        mixture_of(x, router, gate_up, down, 4).double(), want, atol=2e-6, rtol=1e-5
    )
    one = mixture_of(x, router[:1], gate_up[:1], down[:1], 1)
    torch.testing.assert_close(one, dense_of(x, gate_up[0], down[0]), atol=5e-7, rtol=1e-5)


def test_a_model_with_all_experts(tmp_path):
    """k = n in a Mixtral's layer equals its dense experts, weighted by the softmax."""
    model = tiny.mixtral(n=3, k=3)
    experts.replace_moe(model)
    x = torch.randn(2, 7, tiny.WIDTH)
    layer = model.model.layers[0].mlp
    shares = (x @ layer.gate.weight.T).softmax(-1)
    parts = [
        dense_of(x, layer.experts.gate_up_proj[e], layer.experts.down_proj[e]) for e in range(3)
    ]
    want = sum(shares[..., e, None] * part for e, part in enumerate(parts))
    torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)


def test_softmax_before_or_after_the_choice():
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
    weight, index = ops.moe_gate(logits, 2)
    top, choice = logits.topk(2)
    assert torch.equal(index.long(), choice)
    assert (weight - top.double().softmax(-1)).abs().max() <= 1e-7


# -- 4: transformers' block and torch's grouped product


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_mixtral_block_in_float32(implementation):
    for seed in range(10):
        n, k = 2 + seed % 7, 1 + seed % 2
        model = tiny.mixtral(n, k, seed=seed)
        block, x = model.model.layers[0].mlp, torch.randn(1, 1 + 5 * seed, tiny.WIDTH)
        model.set_experts_implementation(implementation)
        want = block(x)
        model.set_experts_implementation("tenfold")
        torch.testing.assert_close(
            block(x), want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max())
        )


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_mixtral_block_in_bfloat16(implementation):
    """SonicMoE's bar: atol 1.4e-2, rtol 2e-2 on values of about 1."""
    model = tiny.mixtral(8, 2).to(torch.bfloat16)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.experts.gate_up_proj.normal_(std=tiny.WIDTH**-0.5)
        block.experts.down_proj.normal_(std=tiny.FFN**-0.5)
    x = torch.randn(4, 25, tiny.WIDTH, dtype=torch.bfloat16)
    model.set_experts_implementation(implementation)
    want = block(x)
    model.set_experts_implementation("tenfold")
    torch.testing.assert_close(block(x), want, atol=1.4e-2, rtol=2e-2)


def test_grouped_products_are_torchs():
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")
    a, w = torch.randn(24, 32, dtype=torch.bfloat16), torch.randn(3, 16, 32, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 8, 8, 24], dtype=torch.int32)
    want = torch._grouped_mm(a, w.transpose(1, 2), offs=offsets[1:])
    torch.testing.assert_close(ops.grouped_gemm(a, w, offsets), want, atol=1.4e-2, rtol=2e-2)


# -- 5: the order of experts


def test_experts_may_change_places_with_their_rows_of_the_router():
    model, ids = tiny.mixtral(6, 2), tiny.rows()
    experts.replace_moe(model)
    want = tiny.logits(model, ids)
    order = torch.randperm(6)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (
                layer.mlp.gate.weight,
                layer.mlp.experts.gate_up_proj,
                layer.mlp.experts.down_proj,
            ):
                p.copy_(p[order].clone())
    torch.testing.assert_close(tiny.logits(model, ids), want, atol=1e-6, rtol=1e-6)


def test_tokens_may_change_places():
    x, router, gate_up, down = block()
    order = torch.randperm(len(x))
    assert torch.equal(
        mixture_of(x[order], router, gate_up, down, 2),
        mixture_of(x, router, gate_up, down, 2)[order],
    )


# -- 6: balance


def balance_of(model, ids, norm="slots", mask=None):
    layers = mixture_layers(model)
    with routings(layers) as said:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return balance_loss(said, layers, mask, norm)


def test_balance_of_a_uniform_router():
    model, ids = tiny.mixtral(8, 2), tiny.rows()
    for layer in mixture_layers(model):
        layer.router.weight.data.zero_()
    fuse_routers(mixture_layers(model))
    for norm, want in (("slots", 1.0), ("tokens", 2.0)):
        loss, shares = balance_of(model, ids, norm)
        assert loss.item() == pytest.approx(want, abs=1e-6)
    assert shares[:, :2].tolist() == [[0.5, 0.5]] * tiny.LAYERS  # ties go to the lower index


def test_balance_with_all_mass_on_one_expert():
    """n = 8, k = 2: half of the slots and all of the mass are one expert's, 8 * 1/2 = 4."""
    logits = torch.full((100, 8), -60.0)
    logits[:, 3] = 60.0
    _, index = ops.moe_gate(logits, 2)
    counts = ops.moe_sort(index, 8)[2]
    assert ops.load_balance_loss(logits, counts, None, 2).item() == pytest.approx(4.0, abs=1e-6)


def test_padding_changes_no_balance():
    model, ids = tiny.mixtral(4, 2), tiny.rows()
    loss, shares = balance_of(model, ids, mask=torch.ones_like(ids))
    longer = torch.cat([ids, tiny.rows(8, 5, seed=9)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(8, 5, dtype=torch.int64)], 1)
    padded, padded_shares = balance_of(model, longer, mask=mask)
    assert padded.item() == pytest.approx(loss.item(), rel=1e-6) and torch.equal(
        shares, padded_shares
    )


def test_balance_gradient_is_autograds():
    model, ids = tiny.mixtral(4, 2), tiny.rows()
    routers = [layer.router.weight for layer in mixture_layers(model)]
    mask = torch.ones_like(ids)
    mask[2:, 7:] = 0
    got = torch.autograd.grad(balance_of(model, ids, mask=mask)[0], routers)
    with routings(mixture_layers(model)) as said:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    on, plain = mask.flatten().bool(), []
    for routing in said:
        p = routing.logits[on].softmax(-1)
        share = torch.nn.functional.one_hot(routing.index[on], 4).float().mean((0, 1))
        plain.append(4 * (share * p.mean(0)).sum())
    want = torch.autograd.grad(torch.stack(plain).mean(), routers)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


# -- routers through our gate


@pytest.mark.parametrize("renormalize", [True, False])
def test_fused_routers(renormalize):
    model, ids = tiny.mixtral(4, 2), tiny.rows()
    layers, want = mixture_layers(model), tiny.logits(model, ids)
    fused = fuse_routers(layers, renormalize)
    got = tiny.logits(model, ids)
    if renormalize:
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    else:
        assert (got - want).abs().max() > 1e-2
    restore_routers(fused)
    assert torch.equal(tiny.logits(model, ids), want)


def test_other_routers_are_not_renormalised():
    model = tiny.mixtral()
    layers = mixture_layers(model)
    type_of = type("SigmoidRouter", (type(layers[0].router),), {})
    layers[0].router.__class__ = type_of
    with pytest.raises(TypeError, match="SigmoidRouter"):
        fuse_routers(layers, renormalize=True)
    assert len(fuse_routers(layers)) == len(layers) - 1
    assert math.isfinite(float(tiny.logits(model, tiny.rows()).sum()))
