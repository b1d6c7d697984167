# SPDX-License-Identifier: Apache-2.0
"""sft, dpo and continual: what trains when, exact resumption (check 13), baselines, what they refuse."""

import functools
import signal
from pathlib import Path

import hft_models as tiny
import pytest
import torch

from tenfold import hft
from tenfold.hft.config import HFTConfig, parse_reselect
from tenfold.hft.preference import dpo_loss, make_reference, sequence_log_probs
from tenfold.hft.training import Draws, rate_factor
from tenfold.testing import processes
from tenfold.training.errors import TrainingError

HERE = Path(__file__).resolve().parent
ROWS = tiny.rows(32)


class Killed(Exception):
    pass


def kill_at(stage, step):
    def told(progress):
        if (progress.stage, progress.step) == (stage, step):
            raise Killed

    return told


def small(**changes):
    return HFTConfig.from_preset("small", **({"steps": 6, "batch_size": 4, "learning_rate": 1e-2,
                                              "checkpoint_every": 1} | changes))  # fmt: skip


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def pairs(count=16, length=12):
    return {
        "input_ids": tiny.rows(count, length, 1), "labels": tiny.rows(count, length, 1),
        "rejected_input_ids": tiny.rows(count, length, 2), "rejected_labels": tiny.rows(count, length, 2),
    }  # fmt: skip


def tasks():
    return [hft.Task(f"task {i}", tiny.rows(16, 16, 10 + i), {"input_ids": tiny.rows(8, 16, 20 + i)})
            for i in range(3)]  # fmt: skip


@functools.cache
def undisturbed(states):
    """(weights, curves) of a run with new draws that nobody kills."""
    model = tiny.tiny(3)
    curves = hft.sft(model, ROWS, small(reselect="steps:3", states=states)).curves
    return weights(model), curves


@functools.cache
def undisturbed_tasks():
    """(weights, record) of all tasks."""
    model = tiny.tiny(2)
    record = hft.continual(model, tasks(), small())
    return weights(model), record


class TestSft:
    def test_only_the_plan_trains(self):
        model = tiny.tiny(3)
        before, plan = weights(model), hft.select(model, 0, 0)
        record = hft.sft(model, ROWS, small(weight_decay=0.1), eval_rows=ROWS[:8])
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (n in plan.frozen), n
        assert all(p.requires_grad for p in model.parameters()) and not model.training
        assert (
            record.losses["after"] < record.losses["before"] and len(record.curves["round-0"]) == 6
        )
        assert [p["digest"] for p in record.plans] == [plan.digest()]
        assert record.trained_parameters == round(plan.fraction * record.parameters)

    def test_full_is_everything(self):
        model = tiny.tiny(2)
        before = weights(model)
        record = hft.sft(model, ROWS, small(method="full"))
        assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert record.plans[0]["fraction"] == 1.0

    @pytest.mark.parametrize("optimizer", ["masked_adamw", "adamw"])
    def test_steps_rule(self, optimizer):
        seen = []
        model = tiny.tiny(3)

        def told(progress):
            seen.append(frozenset(n for n, p in model.named_parameters() if p.requires_grad))

        config = small(reselect="steps:2", optimizer=optimizer)
        record = hft.sft(model, ROWS, config, callback=told)
        plans = [frozenset(hft.select(model, r).trained) for r in range(3)]
        # Told after the switch that follows a step.
        assert seen == [plans[0], plans[1], plans[1], plans[2], plans[2], plans[2]]
        assert len(record.plans) == 3

    def test_lisa(self):
        model = tiny.tiny(4)
        before = weights(model)
        record = hft.sft(model, ROWS, small(method="lisa", lisa_layers=1, lisa_every=100))
        moved = {n.split(".")[2] for n, p in model.named_parameters()
                 if "layers." in n and not torch.equal(p, before[n])}  # fmt: skip
        assert len(moved) == 1 and record.plans[0]["strategy"] == "layer"

    # All of both; before the new draw with all rules, and one of them at all steps, if time is short.
    @pytest.mark.parametrize(
        "states, stop",
        [
            pytest.param(
                rule, stop, marks=[] if stop == 3 or rule == "keep" else [pytest.mark.slow]
            )
            for rule in ("drop", "keep", "hand_over")
            for stop in (2, 3, 4)
        ],
    )
    def test_killed_and_resumed(self, tmp_path, states, stop):
        """Check 13: in the middle of a round, before and after a new draw, bit by bit."""
        config = small(reselect="steps:3", states=states)
        whole, curve = undisturbed(states)
        with pytest.raises(Killed):
            hft.sft(
                tiny.tiny(3), ROWS, config, work_dir=tmp_path, callback=kill_at("round-0", stop)
            )
        steps = []
        model = tiny.tiny(3)
        record = hft.sft(
            model, ROWS, config, work_dir=tmp_path, callback=lambda p: steps.append(p.step)
        )
        assert steps[0] == stop + 1 and same(weights(model), whole) and record.curves == curve
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("changes", [{"strategy": "element"}, {"state_dtype": "int8"}, {"soft_freeze": 0.1},
                                         {"optimizer": "adamw"}])  # fmt: skip
    def test_killed_and_resumed_otherwise(self, tmp_path, changes):
        config = small(**changes)
        whole = tiny.tiny(2)
        hft.sft(whole, ROWS, config)
        with pytest.raises(Killed):
            hft.sft(tiny.tiny(2), ROWS, config, work_dir=tmp_path, callback=kill_at("round-0", 4))
        model = tiny.tiny(2)
        hft.sft(model, ROWS, config, work_dir=tmp_path)
        assert same(weights(model), weights(whole))

    def test_a_process_that_is_killed_while_it_writes(self, tmp_path):
        done = processes.python(
            HERE / "hft_ranks.py", tmp_path, "continual", "round-0", 3, cwd=HERE
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        resumed, whole = tiny.tiny(2), tiny.tiny(2)
        hft.continual(resumed, tasks(), small(steps=4), work_dir=tmp_path)
        hft.continual(whole, tasks(), small(steps=4))
        assert same(weights(resumed), weights(whole))

    def test_soft_freeze_pulls_back(self):
        drift = {}
        for weight in (None, 0.0, 10.0):
            model = tiny.tiny(2)
            before, plan = weights(model), hft.select(model)
            hft.sft(model, ROWS, small(soft_freeze=weight, steps=12))
            drift[weight] = sum(float((p.detach() - before[n]).square().sum())
                                for n, p in model.named_parameters() if n in plan.frozen)  # fmt: skip
        assert drift[None] == 0 < drift[10.0] < 0.5 * drift[0.0]

    def test_micro_batches(self):
        a, b = tiny.tiny(2), tiny.tiny(2)
        hft.sft(a, ROWS, small())
        hft.sft(b, ROWS, small(micro_batch_size=1))
        torch.testing.assert_close(weights(a), weights(b), atol=2e-3, rtol=1e-2)

    def test_another_runs_folder(self, tmp_path):
        with pytest.raises(Killed):
            hft.sft(tiny.tiny(2), ROWS, small(), work_dir=tmp_path, callback=kill_at("round-0", 2))
        with pytest.raises(ValueError, match="seed 0 there, 1 here"):
            hft.sft(tiny.tiny(2), ROWS, small(seed=1), work_dir=tmp_path)

    def test_a_loss_that_is_no_number(self):
        model = tiny.tiny(1)
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(TrainingError, match="round-0: the loss became nan at step 1"):
            hft.sft(model, ROWS, small())


class TestDpo:
    def test_loss(self):
        policy, reference = torch.randn(2, 5), torch.randn(2, 5)
        loss, metrics = dpo_loss(policy, reference, 0.1)
        margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
        want = -torch.log(torch.sigmoid(0.1 * margin)).mean()
        torch.testing.assert_close(loss, want)
        assert float(metrics["accuracy"]) == float((margin > 0).float().mean())

    def test_log_probs(self):
        logits, labels = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
        labels[:, :3] = -100
        want = [
            sum(float(logits[b, t - 1].log_softmax(-1)[labels[b, t]]) for t in range(3, 6))
            for b in (0, 1)
        ]
        torch.testing.assert_close(sequence_log_probs(logits, labels), torch.tensor(want))

    @pytest.mark.parametrize("method", ["hft", "full"])
    def test_learns_to_prefer(self, method):
        model = tiny.tiny(2)
        before, plan = weights(model), hft.select(model)
        record = hft.dpo(model, pairs(), small(method=method, steps=20, learning_rate=3e-3))
        curve = record.curves["round-0"]
        assert curve[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert curve[-1]["accuracy"] == 1.0 and curve[-1]["loss"] < 0.6
        if method == "hft":
            assert all(
                torch.equal(p, before[n]) for n, p in model.named_parameters() if n in plan.frozen
            )

    def test_the_reference_shares_what_is_frozen(self):
        model = tiny.tiny(3)
        plan = hft.apply(model)
        reference = make_reference(model, plan)
        mine = dict(model.named_parameters())
        for n, p in reference.named_parameters():
            assert (p.data_ptr() == mine[n].data_ptr()) == (
                n in plan.frozen
            ) and not p.requires_grad
        assert mine[plan.trained[0]].requires_grad
        shared, own = tiny.tiny(3), tiny.tiny(3)
        for m, share in ((shared, True), (own, False)):
            hft.dpo(m, pairs(), small(share_reference=share))
        assert same(weights(shared), weights(own))

    def test_killed_and_resumed(self, tmp_path):
        whole = tiny.tiny(2)
        hft.dpo(whole, pairs(), small())
        with pytest.raises(Killed):
            hft.dpo(
                tiny.tiny(2), pairs(), small(), work_dir=tmp_path, callback=kill_at("round-0", 4)
            )
        model = tiny.tiny(2)
        hft.dpo(model, pairs(), small(), work_dir=tmp_path)
        assert same(weights(model), weights(whole))

    def test_pairs_count_equally(self):
        a, b = tiny.tiny(1), tiny.tiny(1)
        data = pairs()
        data["labels"][::2, :8] = -100
        hft.dpo(a, data, small(steps=2))
        hft.dpo(b, data, small(steps=2, micro_batch_size=1))
        torch.testing.assert_close(weights(a), weights(b), atol=1e-4, rtol=1e-3)

    def test_data(self):
        with pytest.raises(
            ValueError, match="data of DPO needs rejected_input_ids, rejected_labels, too"
        ):
            hft.dpo(tiny.tiny(1), {"input_ids": ROWS, "labels": ROWS})


class TestContinual:
    def test_record(self):
        model = tiny.tiny(2)
        record = hft.continual(model, tasks(), small())
        assert record.tasks == ["task 0", "task 1", "task 2"]
        for measure in ("log_prob", "accuracy"):
            assert len(record.scores[measure]) == 3 and len(record.start[measure]) == 3
            assert set(record.summary(measure)) == {"op", "bwt", "bwt_classic"}
        assert [p["round"] for p in record.plans] == [0, 1, 2]
        assert len({p["digest"] for p in record.plans}) == 3
        again = hft.TuneRecord(**{k: v for k, v in record.to_json().items() if k != "summary"})
        assert again == record

    def test_the_same_draw_always(self):
        record = hft.continual(tiny.tiny(2), tasks(), small(reselect="never"))
        assert len({p["digest"] for p in record.plans}) == 1

    def test_epochs(self):
        config = small(reselect="epoch", steps=None, epochs=2.0)  # 16 rows: 4 steps an epoch
        record = hft.continual(tiny.tiny(2), tasks()[:2], config)
        assert [p["round"] for p in record.plans] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        "stage, step",
        [
            ("round-1", 1),
            ("round-1", 6),
            *(pytest.param(*at, marks=pytest.mark.slow) for at in (("round-0", 2), ("round-2", 3))),
        ],
    )
    def test_killed_and_resumed(self, tmp_path, stage, step):
        whole, want = undisturbed_tasks()
        with pytest.raises(Killed):
            hft.continual(
                tiny.tiny(2), tasks(), small(), work_dir=tmp_path, callback=kill_at(stage, step)
            )
        model = tiny.tiny(2)
        record = hft.continual(model, tasks(), small(), work_dir=tmp_path)
        assert same(weights(model), whole) and record.scores == want.scores
        assert record.plans == want.plans and not list(tmp_path.iterdir())

    def test_no_tasks(self):
        with pytest.raises(ValueError, match="at least one task"):
            hft.continual(tiny.tiny(1), [])


class TestLora:
    def test_trains_adapters_and_merges(self):
        model = tiny.tiny(2)
        before = weights(model)
        record = hft.sft(
            model, ROWS, small(method="lora", lora_rank=4, lora_lr=1e-2), eval_rows=ROWS[:8]
        )
        after = weights(model)
        assert set(after) == set(before)  # merged
        assert record.losses["after"] < record.losses["before"]
        assert record.trained_parameters < 0.5 * record.parameters
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])

    def test_continual_and_dpo(self, tmp_path):
        config = small(method="lora", lora_rank=2, lora_lr=1e-2)
        whole, model = tiny.tiny(1), tiny.tiny(1)
        want = hft.continual(whole, tasks()[:2], config)
        with pytest.raises(Killed):
            hft.continual(
                tiny.tiny(1), tasks()[:2], config, work_dir=tmp_path, callback=kill_at("round-1", 3)
            )
        got = hft.continual(model, tasks()[:2], config, work_dir=tmp_path)
        assert got.scores == want.scores and same(weights(model), weights(whole))
        curve = hft.dpo(tiny.tiny(1), pairs(), config).curves["round-0"]
        assert curve[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and curve[-1]["loss"] < 0.69


class TestConfig:
    def test_recipes(self):
        sft, dpo, trace = (HFTConfig.from_preset(p) for p in ("sft", "dpo", "trace"))
        assert (sft.learning_rate, sft.schedule, sft.warmup, sft.weight_decay) == (
            2e-5,
            "linear",
            0.03,
            0.0,
        )
        assert (sft.epochs, sft.batch_size, sft.ratio, sft.strategy, sft.reselect) == (
            2,
            128,
            0.5,
            "category",
            "round",
        )
        assert (dpo.beta, dpo.learning_rate, dpo.epochs, dpo.batch_size, dpo.warmup) == (
            0.1,
            5e-7,
            3,
            32,
            0.1,
        )
        assert (trace.learning_rate, trace.schedule, trace.warmup, trace.batch_size) == (
            1e-5,
            "cosine",
            0,
            256,
        )
        assert HFTConfig.from_json(trace.to_json()) == trace

    @pytest.mark.parametrize(
        "changes, error, message",
        [
            ({"ratio": 1.5}, ValueError, "ratio must be in"),
            ({"ratio": float("nan")}, ValueError, "got nan"),
            ({"method": "half"}, ValueError, "method must be one of hft, full, lora, lisa"),
            ({"strategy": "rows"}, ValueError, "strategy must be one of category, layer, model"),
            (
                {"reselect": "task"},
                ValueError,
                "reselect must be one of round, epoch, steps:N, never",
            ),
            ({"reselect": "steps:0"}, ValueError, "reselect must be one of"),
            ({"states": "lose"}, ValueError, "states must be one of drop, keep, hand_over"),
            ({"schedule": "step"}, ValueError, "schedule must be one of linear, cosine, constant"),
            ({"learning_rate": 0.0}, ValueError, "learning_rate must be a positive number"),
            ({"soft_freeze": -1.0}, ValueError, "soft_freeze must be a number >= 0"),
            ({"batch_size": 0}, ValueError, "batch_size must be >= 1"),
            ({"steps": 1.5}, TypeError, "steps must be an integer"),
            ({"warmup": 2.0}, ValueError, "warmup must be in"),
            (
                {"optimizer": "adamw", "state_dtype": "int8"},
                ValueError,
                "need optimizer='masked_adamw'",
            ),
        ],
    )
    def test_bad_settings(self, changes, error, message):
        with pytest.raises(error, match=message):
            HFTConfig(**changes)

    def test_element_masks_need_the_optimizer(self):
        with pytest.raises(ValueError, match="optimizer='adamw' cannot"):
            hft.sft(tiny.tiny(1), ROWS, small(strategy="element", optimizer="adamw"))

    def test_draws(self):
        assert parse_reselect("steps:20") == ("steps", 20)
        rules = {"round": [2, 2, 2], "never": [0, 0, 0], "epoch": [6, 6, 7], "steps:5": [2, 2, 3]}
        for rule, want in rules.items():
            draws = Draws(HFTConfig(reselect=rule), round=2, before=10, epoch=5, epochs_before=6)
            assert [draws.at(s) for s in (0, 4, 5)] == want

    def test_rates(self):
        linear, constant = HFTConfig(warmup=0.1), HFTConfig(schedule="constant", warmup=0.0)
        rates = [rate_factor(s, 100, linear) for s in range(100)]
        assert max(rates) == rates[9] == 1.0 and rates[0] == 0.1 and 0 < rates[-1] < 0.02
        assert rate_factor(57, 100, constant) == 1.0
