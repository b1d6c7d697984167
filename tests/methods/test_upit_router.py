# SPDX-License-Identifier: Apache-2.0
"""Router initialisation (S4): acceptance check 10, modes, negatives, errors; what is left of a model afterwards."""

import math

import pytest
import torch
import upit_mixtures as tiny

from tenfold.training.errors import TrainingError
from tenfold.upit import AssemblyConfig, RouterConfig, affinity, equal_steps, load, train_router
from tenfold.upit.assemble import assemble
from tenfold.upit.router import ffn_inputs, seed_loss

ONLY = {"train": "router", "learning_rate": 2e-3, "batch_size": 8}


def hidden_of(model, ids):
    with ffn_inputs(model) as seen, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen


def test_loss_and_gradient_at_zero():
    """ln 2, and -1/2 mean(h) over the tokens and layers."""
    hidden = hidden_of(tiny.dense(), tiny.rows())
    vectors = torch.zeros(tiny.LAYERS, tiny.WIDTH, requires_grad=True)
    loss = seed_loss(hidden, vectors, None, None)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    (grad,) = torch.autograd.grad(loss, vectors)
    want = torch.stack([-0.5 * h.flatten(0, 1).mean(0) for h in hidden]) / tiny.LAYERS
    torch.testing.assert_close(grad, want, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"negatives": True}, {"normalize": "unit"}])
def test_two_domains_find_their_experts(tmp_path, changes):
    """Separable domains: at least 90 % of the tokens go to the right expert after 200 steps each."""
    model = tiny.dense(1, layers=1, width=64)
    model.save_pretrained(tmp_path / "dense")
    half = tiny.VOCAB // 2
    domains = [tiny.rows(40, 12, 3, 0, half), tiny.rows(40, 12, 4, half, tiny.VOCAB)]
    config = RouterConfig(**ONLY, **changes)
    vectors = []
    for i, own in enumerate(domains):
        other = {"negatives": domains[1 - i]} if config.negatives else {}
        made, state = train_router(model, own, config=config, steps=200, seed=i, **other)
        assert state is None
        vectors.append(made)
    out = assemble([tmp_path / "dense"] * 2, torch.stack(vectors), tmp_path / "moe",
                   config=AssemblyConfig(experts_per_token=1, allow_identical=True))  # fmt: skip
    shares = affinity(
        load(out), {"low": tiny.rows(20, 12, 13, 0, half), "high": tiny.rows(20, 12, 14, half)}
    )
    right = shares[0].diagonal()
    print("right expert:", right.tolist())
    assert (right >= 0.9).all()


def test_small_buckets_starve_no_expert(tmp_path):
    """Buckets of 400 and 20 rows, equal steps: both experts are chosen by their own domain."""
    assert equal_steps([400, 20], RouterConfig(batch_size=8, epochs=4)) == 105
    model = tiny.dense(1, layers=1, width=64)
    model.save_pretrained(tmp_path / "dense")
    half = tiny.VOCAB // 2
    buckets = [tiny.rows(400, 12, 3, 0, half), tiny.rows(20, 12, 4, half, tiny.VOCAB)]
    steps = equal_steps([400, 20], RouterConfig(**ONLY))
    made = [
        train_router(model, b, config=RouterConfig(**ONLY), steps=steps, seed=i)[0]
        for i, b in enumerate(buckets)
    ]
    out = assemble([tmp_path / "dense"] * 2, torch.stack(made), tmp_path / "moe",
                   config=AssemblyConfig(experts_per_token=1, allow_identical=True))  # fmt: skip
    shares = affinity(load(out), {"low": buckets[0][:20], "high": buckets[1]})[0]
    print("shares:", shares.tolist())
    assert (shares.diagonal() >= 0.5).all()


def test_joint_training_is_the_objective_by_hand():
    """One step of alpha L_lm + (1 - alpha) L_aux on expert and vectors, against plain PyTorch; no hook is left."""
    rows, config = tiny.rows(4), RouterConfig(learning_rate=1e-2, batch_size=4, alpha=0.3)
    rows = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    rows["attention_mask"][1, 8:] = 0
    model, plain = tiny.dense(), tiny.dense()
    made, state = train_router(model, rows, config=config, steps=1, seed=3)
    r = torch.randn(tiny.LAYERS, tiny.WIDTH, generator=torch.Generator().manual_seed(3)) * 0.02
    r.requires_grad_()
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda m, i, o: seen.append(i[0]))
        for layer in plain.model.layers
    ]
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    lm = plain(**rows, labels=labels).loss
    on = rows["attention_mask"].bool()
    aux = torch.stack(
        [torch.nn.functional.softplus(-(h @ v))[on].mean() for h, v in zip(seen, r)]
    ).mean()
    (0.3 * lm + 0.7 * aux).backward()
    for hook in hooks:
        hook.remove()
    leaves = [r, *plain.parameters()]
    torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.0).step()
    torch.testing.assert_close(made, r.detach(), atol=1e-5, rtol=1e-4)
    assert set(state) == {n for n, _ in model.named_parameters()}
    for name, p in plain.named_parameters():
        torch.testing.assert_close(state[name], p.detach(), atol=1e-4, rtol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.parametrize("train", ["joint", "router"])
def test_an_expert_that_is_an_adapter(train):
    """With PEFT only the adapter trains, and it alone is handed back."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.dense(), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made, state = train_router(
        model, tiny.rows(), config=RouterConfig(learning_rate=1e-2, train=train), steps=2
    )
    assert made.shape == (tiny.LAYERS, tiny.WIDTH)
    if train == "router":
        assert state is None
    else:
        assert len(state) == 2 * tiny.LAYERS and all("lora_" in name for name in state)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (train == "joint" and "lora_" in name), name


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"cache_bytes": 0}])
def test_ways_to_the_same_vectors(changes):
    """Pieces, and hidden states that are made anew, give what is made at once."""
    model, rows = tiny.dense(), tiny.rows(16)
    want, _ = train_router(model, rows, config=RouterConfig(**ONLY), steps=6, seed=2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    got, _ = train_router(model, rows, config=RouterConfig(**ONLY, **changes), steps=6, seed=2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    again, _ = train_router(model, rows, config=RouterConfig(**ONLY), steps=6, seed=2)
    assert torch.equal(again, want)


def test_lengths_of_negatives_may_differ():
    config = RouterConfig(**ONLY, negatives=True)
    losses = []
    train_router(tiny.dense(), tiny.rows(8, 12), config=config, steps=3, negatives=tiny.rows(8, 7),
                 callback=lambda p: losses.append(p.metrics["aux_loss"]))  # fmt: skip
    assert losses[0] == pytest.approx(math.log(2), abs=0.05) and losses[-1] < losses[0]


def test_unit_vectors():
    made, _ = train_router(
        tiny.dense(), tiny.rows(), config=RouterConfig(**ONLY, normalize="unit"), steps=2
    )
    torch.testing.assert_close(made.norm(dim=1), torch.ones(tiny.LAYERS))


def test_errors():
    model, rows = tiny.dense(), tiny.rows()
    with pytest.raises(ValueError, match="negatives"):
        train_router(model, rows, config=RouterConfig(negatives=True), steps=1)
    with pytest.raises(ValueError, match="negatives=False"):
        train_router(model, rows, steps=1, negatives=rows)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        train_router(model, rows, steps=0)
    with pytest.raises(ValueError, match=r"tokenized_bucket must be rows.*\[96\]"):
        train_router(model, rows.flatten(), steps=1)
    with pytest.raises(TypeError, match="no FFN with gate_proj"):
        train_router(tiny.mixtral(), rows, steps=1)
    with pytest.raises(ValueError, match="empty: 1"):
        equal_steps([3, 0])
    with pytest.raises(ValueError, match="train must be one of joint, router"):
        RouterConfig(train="both")
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        RouterConfig(alpha=2)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1"):
        train_router(model, rows, steps=1)
