# SPDX-License-Identifier: Apache-2.0
"""Post-training (S6): the objective by hand, pieces, exact resumption, what trains, saving; dense models and LoRA."""

import json

import pytest
import torch
import upit_mixtures as tiny

from tenfold.training.errors import TrainingError
from tenfold.upit import (
    AssemblyConfig,
    LoraExpertsConfig,
    PostTrained,
    PostTrainingConfig,
    add_lora_experts,
    continue_dense,
    load,
    load_lora_experts,
)
from tenfold.upit.assemble import assemble
from tenfold.upit.measure import as_rows, mean_loss
from tenfold.upit.post_train import post_train

FAST = {"steps": 4, "batch_size": 4, "learning_rate": 5e-3, "warmup": 0.25, "checkpoint_every": 1}


def config(**changes):
    return PostTrainingConfig(**(FAST | changes))


def padded(count=16, length=12, seed=1):
    made = {
        "input_ids": tiny.rows(count, length, seed),
        "attention_mask": torch.ones(count, length, dtype=torch.int64),
    }
    made["attention_mask"][::3, 7:] = 0
    return made


def folder(tmp_path, **changes):
    base, states = tiny.experts(4)
    routers = (
        torch.randn(4, tiny.LAYERS, tiny.WIDTH, generator=torch.Generator().manual_seed(0)) * 0.1
    )
    return assemble(
        states,
        routers,
        tmp_path / "moe",
        model_config=base.config,
        config=AssemblyConfig(**changes),
    )


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["slots", "tokens"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_the_objective_by_hand(norm, fused):
    """One step of L_lm + c mean of L_load, against stock transformers and plain PyTorch."""
    model, plain, rows = tiny.mixtral(4, 2), tiny.mixtral(4, 2), padded(4)
    made = post_train(
        model,
        rows,
        config=config(steps=1, aux_coef=0.3, lb_norm=norm, warmup=0.0, fused_loss=fused),
    )
    batch = as_rows(rows)
    out = plain(**batch, output_router_logits=True)
    lm = plain(**batch).loss
    on, balances = rows["attention_mask"].flatten().bool(), []
    for logits in out.router_logits:
        p = logits[on].softmax(-1)
        share = torch.nn.functional.one_hot(p.topk(2).indices, 4).float().sum((0, 1)) / int(
            on.sum()
        )
        balances.append(4 * ((share / 2 if norm == "slots" else share) * p.mean(0)).sum())
    balance = torch.stack(balances).mean()
    (lm + 0.3 * balance).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    torch.optim.AdamW(plain.parameters(), lr=5e-3, weight_decay=0.0).step()
    step = made.curve[0]
    assert step["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
    assert step["balance"] == pytest.approx(balance.item(), rel=1e-5)
    assert step["loss"] == pytest.approx(lm.item() + 0.3 * balance.item(), rel=1e-5)
    assert sum(step[f"load/{e}"] for e in range(4)) == pytest.approx(1.0, abs=1e-6)
    differ = 0
    for (
        name,
        p,
    ) in plain.named_parameters():  # Adam's first step is the sign of a gradient, or nearly
        differ += int(((model.get_parameter(name) - p).abs() > 1e-4).sum())
    assert differ <= 2e-3 * sum(p.numel() for p in plain.parameters())
    assert model.config._experts_implementation != "tenfold"
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_folder_is_trained_saved_and_found_again(tmp_path):
    source, rows = folder(tmp_path), padded(32)
    (source / "tokenizer.json").write_text("{}")
    made = post_train(
        source, rows, config=config(steps=12), out=tmp_path / "out", eval_rows=padded(8, seed=3)
    )
    assert made.losses["after"] < made.losses["before"] and made.losses["after"] > 0
    assert [c["lm_loss"] for c in made.curve[-3:]] < [c["lm_loss"] for c in made.curve[:3]]
    assert torch.tensor(made.load).sum(1).tolist() == pytest.approx([1.0, 1.0])
    again, ids = load(tmp_path / "out"), tiny.rows()
    assert "tenfold" not in (tmp_path / "out" / "config.json").read_text()  # a stock checkpoint
    torch.testing.assert_close(
        tiny.logits(again, ids), tiny.logits(made.model, ids), atol=1e-5, rtol=1e-5
    )
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not list((tmp_path / "out" / "training").glob("post_training-*"))
    found = post_train(
        source, rows, config=config(steps=12), out=tmp_path / "out", eval_rows=padded(8, seed=3)
    )
    assert found.model is None and found.to_json() == json.loads(json.dumps(made.to_json()))
    assert PostTrained.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="another run"):
        post_train(source, rows, config=config(steps=13), out=tmp_path / "out")


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 2, "trainable": "routers+experts"}])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, changes):
    rows = padded(12)
    want = post_train(tiny.mixtral(), rows, config=config(**changes), out=tmp_path / "whole")

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        post_train(
            tiny.mixtral(), rows, config=config(**changes), out=tmp_path / "killed", callback=stop
        )
    got = post_train(tiny.mixtral(), rows, config=config(**changes), out=tmp_path / "killed")
    assert got.curve == want.curve
    state = got.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in want.model.state_dict().items())


def test_pieces_add_up():
    """Gradient accumulation: the lm loss is that of the whole batch; without c the weights are, too."""
    rows, models = padded(8), [tiny.mixtral(), tiny.mixtral()]
    curves = [post_train(m, rows, config=config(aux_coef=0.0, micro_batch_size=size)).curve
              for m, size in zip(models, (None, 1))]  # fmt: skip
    for one, other in zip(*curves):
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-3)
    assert curves[0][0]["lm_loss"] == pytest.approx(curves[1][0]["lm_loss"], rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_piece_without_labels_counts_nothing(fused):
    rows = as_rows(tiny.rows(2))
    empty = {
        k: torch.cat([v, torch.full_like(v[:1], -100) if k == "labels" else v[:1]])
        for k, v in rows.items()
    }
    settings = config(steps=1, batch_size=3, micro_batch_size=1, aux_coef=0.0, fused_loss=fused)
    got = post_train(tiny.mixtral(), empty, config=settings).curve[0]["loss"]
    want = tiny.mixtral()(**rows).loss.item()
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [("routers", ("mlp.gate.",)), ("experts", ("mlp.experts.",)), ("routers+experts", ("mlp.gate.", "mlp.experts.")),
     ("all", ("",))],
)  # fmt: skip
def test_what_trains(trainable, parts):
    model = tiny.mixtral()
    before = parameters(model)
    post_train(model, padded(), config=config(trainable=trainable))
    for name, p in model.named_parameters():
        assert (not torch.equal(p, before[name])) == any(part in name for part in parts), name
        assert p.requires_grad


def test_without_renormalisation(tmp_path):
    source = folder(tmp_path, renormalize=False)
    made = post_train(source, padded(), config=config(), out=tmp_path / "out", eval_rows=padded(4))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_topk_prob"] is False
    assert mean_loss(load(tmp_path / "out"), padded(4)) == pytest.approx(
        made.losses["after"], rel=1e-5
    )
    stock = post_train(source, padded(), config=config(renormalize=True), eval_rows=padded(4))
    assert abs(stock.losses["before"] - made.losses["before"]) > 1e-3
    model = tiny.mixtral()
    inside = post_train(model, padded(), config=config(renormalize=False), eval_rows=padded(4))
    assert mean_loss(model, padded(4)) == inside.losses["after"]  # used as it was trained


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_other_implementations_train_the_same(implementation):
    runs = [post_train(tiny.mixtral(), padded(), config=config(experts_implementation=i)).curve
            for i in ("tenfold", implementation)]  # fmt: skip
    for one, other in zip(*runs):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_a_dense_model(tmp_path):
    tiny.dense().save_pretrained(tmp_path / "dense")
    made = continue_dense(tmp_path / "dense", padded(32), config=config(steps=12), out=tmp_path / "out",
                          eval_rows=padded(8))  # fmt: skip
    assert made.losses["after"] < made.losses["before"] and not made.load
    assert set(made.curve[0]) == {"loss", "lm_loss"}
    assert mean_loss(load(tmp_path / "out"), padded(8)) == pytest.approx(
        made.losses["after"], rel=1e-5
    )
    with pytest.raises(ValueError, match="this one is a mixture"):
        continue_dense(tiny.mixtral(), padded())
    with pytest.raises(ValueError, match="needs a mixture"):
        post_train(tiny.dense(), padded(), config=config(trainable="routers"))


def test_lora_experts(tmp_path):
    model = add_lora_experts(tiny.dense(), LoraExpertsConfig(experts=4, rank=4, alpha=8.0))
    before = parameters(model)
    made = post_train(
        model, padded(32), config=config(steps=12), out=tmp_path / "out", eval_rows=padded(8)
    )
    assert made.losses["after"] < made.losses["before"] and len(made.load) == tiny.LAYERS
    for name, p in model.named_parameters():
        trains = "mlp.experts" in name or "mlp.gate.weight" in name
        assert p.requires_grad == trains and torch.equal(p, before[name]) != trains, name
    with pytest.raises(FileNotFoundError, match="LoRA experts without their model"):
        load(tmp_path / "out")
    again = load_lora_experts(tiny.dense(), tmp_path / "out")
    assert mean_loss(again, padded(8)) == pytest.approx(made.losses["after"], rel=1e-5)


def test_a_loss_that_is_no_number():
    model = tiny.mixtral()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1"):
        post_train(model, padded(), config=config())


def test_settings():
    for changes, match in (
        ({"lb_norm": "rows"}, "lb_norm must be one of slots, tokens"), ({"steps": 0}, "steps must be >= 1"),
        ({"trainable": "none"}, "trainable must be one of"), ({"warmup": 2}, "warmup must be in"),
        ({"aux_coef": -1}, "aux_coef must be a number >= 0"),
        ({"experts_implementation": "fast"}, "must be one of tenfold"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            config(**changes)
