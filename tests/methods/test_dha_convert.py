# SPDX-License-Identifier: Apache-2.0
"""``convert``: all routes through it, exact resumption, two ranks, what it refuses, and check 14."""

import functools
import signal
from pathlib import Path

import dha_models as tiny
import pytest
import torch
from ranks import MODES
from transformers import MistralConfig, MistralForCausalLM

from tenfold.dha.config import ConversionError, DhaConfig
from tenfold.dha.conversion import Conversion, budgets_of, convert, convert_to_dha
from tenfold.dha.model import DhaLlamaForCausalLM
from tenfold.dha.record import ConversionRecord
from tenfold.dha.recovery import distillation_loss, recover, teaching
from tenfold.dha.training import parameter_groups, rate_factor
from tenfold.testing import processes
from tenfold.training import tiny as lm
from tenfold.training.loop import make_accelerator

HERE = Path(__file__).parent
ROWS = tiny.rows()


def run(model=None, data=ROWS, work_dir=None, callback=None, **changes):
    return convert(model or tiny.make(), None, data, tiny.config(**changes), work_dir=work_dir,
                   callback=callback)  # fmt: skip


def state(model):
    return {n: p.clone() for n, p in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class TestRoutes:
    @pytest.mark.parametrize(
        "kv_heads",
        [8, pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)],
    )
    @pytest.mark.parametrize(
        "changes",
        [
            {}, {"budget": 0.5, "nested": True}, {"init": "aligned"}, {"coefficients": "tied"},
            {"progressive": True}, {"tp_size": 2}, {"allocation": "greedy", "fusion_loss": "summed"},
            {"allocation": "uniform", "lambda_lr": 0.0}, {"grouping": "cka"}, {"solver": "paper_sa"},
            {"grouping": "contiguous", "allocation": "uniform"}, {"distill": 0.7, "sort_heads": True},
            {"method": "gqa_mean"}, {"method": "cka_mean"}, {"method": "dha_mean"},
            {"keep_search_weights": True, "micro_batch_size": 1},
        ],
        ids=str,
    )  # fmt: skip
    def test_budget_is_kept_and_the_parent_unchanged(self, kv_heads, changes):
        model = tiny.make(kv_heads=kv_heads)
        before = state(model)
        made = run(model, **changes)
        assert isinstance(made, DhaLlamaForCausalLM) and not made.training
        heads = made.config.key_heads + made.config.value_heads
        budget = changes.get("budget", 0.25)
        assert sum(heads) <= budget * 2 * 2 * 8 and all(8 % n == 0 for n in heads)
        assert made.conversion.ratio == sum(heads) / 32
        assert same(before, state(model))
        if changes.get("sort_heads"):
            assert all(row == sorted(row) for row in made.config.key_head_map)
        if changes.get("nested"):
            layout = made.config.head_layout
            assert all(layout.is_nested(layer) for layer in range(2))

    def test_grouping_the_heads_of_a_gqa_checkpoint(self):
        made = run(tiny.make(kv_heads=4), gqa="group")
        assert sum(made.config.key_heads + made.config.value_heads) <= 8
        for row in made.config.key_head_map + made.config.value_head_map:
            assert row[::2] == row[1::2]  # the checkpoint's pairs stay together

    def test_a_budget_of_all_heads_is_the_parent(self):
        model = tiny.make(bias=True)
        made = run(model, budget=1.0, recovery_steps=0)
        assert made.config.key_heads == [8, 8]
        ids = tiny.rows(3, seed=5)
        torch.testing.assert_close(
            tiny.logits(made, ids), tiny.logits(model, ids), atol=1e-5, rtol=1e-5
        )

    def test_replicated_heads_cost_nothing(self):
        """A GQA checkpoint at its own head count: contiguous mean pooling gives it back."""
        model = tiny.make(kv_heads=2, bias=True)
        made = run(model, data=None, method="gqa_mean", recovery_steps=0)
        ids = tiny.rows(3, seed=5)
        torch.testing.assert_close(
            tiny.logits(made, ids), tiny.logits(model, ids), atol=1e-5, rtol=1e-5
        )

    def test_mean_pooled_gqa_is_that(self):
        model = tiny.make()
        made = run(model, data=None, method="gqa_mean", recovery_steps=0)
        for layer, parent in zip(made.model.layers, model.model.layers):
            for name in ("k_proj", "v_proj"):
                weight = getattr(parent.self_attn, name).weight
                want = weight.view(2, 4, 8, -1).mean(1).flatten(0, 1)
                torch.testing.assert_close(getattr(layer.self_attn, name).weight, want)
        assert made.config.key_head_map[0] == [0, 0, 0, 0, 1, 1, 1, 1]

    def test_dtype_config_and_other_llamas(self):
        config = MistralConfig(vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=32, head_dim=8,
                               num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                               sliding_window=None)  # fmt: skip
        made = run(MistralForCausalLM(config).to(torch.bfloat16))
        assert made.dtype == torch.bfloat16 and made.config.hidden_size == 32

    def test_data_of_all_kinds(self):
        stream = ROWS.flatten()
        rows = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}
        made = [run(data=d, sequence_length=16) for d in (stream, ROWS, rows)]
        assert same(state(made[0]), state(made[1])) and same(state(made[1]), state(made[2]))
        seen = []

        def function(stage, step, size):
            seen.append((stage, step, size))
            return ROWS[:size]

        run(data=function)
        assert ("search-1", 0, 4) in seen and ("recovery", 3, 4) in seen

    def test_alias_and_rounds(self):
        assert convert_to_dha is convert
        config = DhaConfig(budget=0.125, progressive=True)
        assert budgets_of(config) == [0.5, 0.25, 0.125]
        assert budgets_of(config.with_changes(progressive=False)) == [0.125]
        assert budgets_of(config, 0.5) == [0.25, 0.125] and budgets_of(config, 0.2) == [0.125]

    def test_no_round_that_removes_nothing(self):
        made = run(tiny.make(kv_heads=4), gqa="group", progressive=True)
        assert set(made.conversion.curves) == {"search-1", "fusion-1", "recovery"}
        assert made.conversion.ratio <= 0.25


class TestFusionStage:
    def test_operators_coincide_and_collapse_is_free(self):
        """Enough steps: below the stop, without force, and collapsing changes nothing to see."""
        made = run(fusion_steps=250, force=False, omega_lr=0.05, checkpoint_every=1000,
                   collapse_mse=2e-3)  # fmt: skip
        curve = made.conversion.curves["fusion-1"]
        assert curve[0]["mse"] > 0.2 and curve[-1]["mse"] < 2e-3
        assert curve[-1]["lambda"] > 1.0
        assert max(made.conversion.mse_by_layer) < 1e-2

    def test_it_stops_early(self):
        made = run(fusion_steps=250, stop_mse=0.1)
        curve = made.conversion.curves["fusion-1"]
        assert len(curve) < 250 and curve[-1]["mse"] < 0.1 <= curve[-2]["mse"]
        assert curve[-1]["stopped"] == 1

    def test_collapsing_too_early_raises_and_names_every_layer(self, tmp_path):
        with pytest.raises(
            ConversionError, match=r"have not fused: mean mse 0\.\d+ .*layer: 0: .*1: .*force"
        ):
            run(force=False, work_dir=tmp_path)
        with pytest.raises(ConversionError, match="have not fused"):
            run(force=False, work_dir=tmp_path, collapse_mse=0.02)
        # nothing is lost: the same folder goes straight on with a larger collapse_mse, or force
        stages = []
        made = run(
            force=False,
            work_dir=tmp_path,
            collapse_mse=10.0,
            callback=lambda p: stages.append(p.stage),
        )
        assert set(stages) == {"recovery"} and made.config.key_heads

    def test_a_wrong_start_is_noticed(self, monkeypatch):
        from tenfold.dha import fusion

        right = fusion.start_omega
        monkeypatch.setattr(fusion, "start_omega", lambda g, s: right(g, s) + 0.2)
        with pytest.raises(ConversionError, match=r"search-1: .*max logit error 0\.\d+"):
            run()
        run(check_equivalence=False)

    def test_a_loss_that_is_not_a_number_stops(self):
        model = tiny.make()
        model.lm_head.weight.data[3] = float("nan")
        with pytest.raises(ConversionError, match="search-1: the loss became nan at step 1"):
            run(model, check_equivalence=False)


class TestErrors:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"budget": 0.1}, r"at least 4 are needed.*\[0.125, 1\]"),
            ({"budget": 0.0}, "budget must be in"),
            ({"sizes": (3, 4)}, r"sizes must divide the 8 heads"),
            ({"tp_size": 3}, "tp_size must divide"),
            ({"nested": True, "progressive": True}, "nested cannot be combined with progressive"),
        ],
    )
    def test_refused_before_anything_is_trained(self, changes, message):
        told = []
        with pytest.raises(ValueError, match=message):
            run(callback=told.append, **changes)
        assert not told

    def test_data(self):
        for data, error, message in (
            (None, ValueError, "data is needed"), ([1, 2], TypeError, "data must be token ids"),
            (torch.zeros(3, 4), ValueError, "input_ids must be integers"),
            (torch.zeros(5, dtype=torch.long), ValueError, "5 tokens do not fill a row of 256"),
            ({"input_ids": ROWS, "labels": ROWS[:2]}, ValueError, "labels must have the shape"),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                run(data=data)

    def test_models(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        with pytest.raises(TypeError, match="GPT2"):
            run(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)))
        with pytest.raises(TypeError, match="dha_llama"):
            run(run(recovery_steps=0))

    def test_recover_without_a_teacher(self):
        with pytest.raises(ValueError, match="needs a teacher"):
            recover(tiny.make(), ROWS, tiny.config(), distill=0.5)


class TestRecovery:
    def test_the_teacher_is_in_eval_mode_and_left_as_it_was(self):
        teacher, seen = tiny.make(seed=3), []
        teacher.train()
        teacher.model.norm.eval()
        teacher.register_forward_pre_hook(lambda m, _: seen.append(m.training))
        modes = [m.training for m in teacher.modules()]
        recover(tiny.make(), ROWS, tiny.config(distill=0.5), teacher=teacher)
        assert seen == [False] * 4 and [m.training for m in teacher.modules()] == modes

    def test_the_teacher_goes_back_to_its_device(self):
        class Spy(torch.nn.Linear):
            places = ()

            def to(self, device):
                self.places += (device,)
                return self

        spy = Spy(2, 2)
        with pytest.raises(Killed), teaching(spy, torch.device("meta")):
            raise Killed
        assert spy.places == (torch.device("meta"), torch.device("cpu")) and spy.training

    def test_the_device_of_the_model_is_obeyed(self):
        config = tiny.config()
        assert make_accelerator(config, torch.device("cpu:0")).device == torch.device("cpu:0")
        assert make_accelerator(config, torch.device("cpu")).device == torch.device("cpu")

    def test_weights_are_clipped_whatever_the_rates(self):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.ones(2, 2))
        model.bias = torch.nn.Parameter(torch.ones(2))
        model.key = torch.nn.Module()
        model.key.omega = torch.nn.Parameter(torch.ones(2, 2))
        model.multiplier = torch.nn.Parameter(torch.ones(()))
        groups = parameter_groups(
            model, DhaConfig(learning_rate=1e-2, omega_lr=1e-2, lambda_lr=1e-2)
        )
        clipped = {id(p) for g in groups if g["clipped"] for p in g["params"]}
        assert clipped == {id(model.weight), id(model.bias)} and len(groups) == 4

    def test_pieces_change_no_more_than_rounding(self):
        """Rows with different numbers of predicted tokens, one with none."""
        labels = ROWS.clone()
        labels[::4] = -100
        labels[1::4, 5:] = -100
        data = {"input_ids": ROWS, "labels": labels}
        curves = []
        for micro in (None, 1, 3):
            config = tiny.config(micro_batch_size=micro, distill=0.5)
            curve = recover(tiny.make(), data, config, teacher=tiny.make(seed=3))
            curves.append([[m["loss"], m["lm"], m["kl"]] for m in curve])
        for other in curves[1:]:
            torch.testing.assert_close(
                torch.tensor(other), torch.tensor(curves[0]), atol=1e-4, rtol=1e-4
            )

    def test_distillation_loss(self):
        student, teacher = torch.randn(2, 2, 5, 7)
        labels = torch.tensor([[0, 1, -100, 2, 3]]).repeat(2, 1)
        want = 0.0
        for b in range(2):
            for s in (0, 2, 3):
                p, q = (x[b, s] / 2 for x in (teacher, student))
                want += (
                    float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()) * 4 / 6
                )
        assert float(distillation_loss(student, teacher, labels, 2.0)) == pytest.approx(
            want, rel=1e-4
        )
        assert float(distillation_loss(student, student, labels, 1.0)) == pytest.approx(0, abs=1e-6)

    def test_the_parent_teaches(self):
        model = tiny.make()
        made = run(model, recovery_steps=60, distill=1.0, learning_rate=3e-3)
        curve = made.conversion.curves["recovery"]
        assert curve[-1]["kl"] < 0.7 * curve[0]["kl"]

    def test_schedule(self):
        config = DhaConfig(warmup=0.1, final_lr=0.1)
        rates = [rate_factor(s, 100, config) for s in range(100)]
        assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        assert max(rates) == rates[10] == 1 and rates[-1] == pytest.approx(0.1, abs=1e-3)


class Killed(Exception):
    pass


STEPS = {"search-1": 3, "fusion-1": 5, "recovery": 4}


@functools.cache
def undisturbed(every):
    return run(checkpoint_every=every, distill=0.5)


class TestResume:
    # Everywhere; at both ends of a stage if time is short.
    @pytest.mark.parametrize(
        "stage, step",
        [
            pytest.param(s, n, marks=[] if n in (1, end) else [pytest.mark.slow])
            for s, end in STEPS.items()
            for n in range(1, end + 1)
        ],
    )
    @pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_killed_anywhere(self, tmp_path, stage, step, every):
        def kill(progress):
            if (progress.stage, progress.step) == (stage, step):
                raise Killed

        with pytest.raises(Killed):
            run(work_dir=tmp_path, callback=kill, checkpoint_every=every, distill=0.5)
        resumed = run(work_dir=tmp_path, checkpoint_every=every, distill=0.5)
        whole = undisturbed(every)
        assert same(state(resumed), state(whole))
        for name in STEPS:
            assert resumed.conversion.curves[name] == whole.conversion.curves[name]

    def test_killed_in_the_second_round(self, tmp_path):
        def kill(progress):
            if (progress.stage, progress.step) == ("fusion-2", 3):
                raise Killed

        with pytest.raises(Killed):
            run(work_dir=tmp_path, callback=kill, progressive=True)
        resumed = run(work_dir=tmp_path, progressive=True)
        assert same(state(resumed), state(run(progressive=True)))

    def test_a_process_that_is_killed_while_it_writes(self, tmp_path):
        done = processes.python(HERE / "dha_ranks.py", tmp_path, "fusion-1", 4)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        resumed = convert(tiny.make(), 0.25, ROWS, tiny.config(), work_dir=tmp_path,
                          eval_rows=tiny.rows(4, seed=9))  # fmt: skip
        assert same(state(resumed), state(run()))

    def test_a_finished_folder_is_read(self, tmp_path):
        first = run(work_dir=tmp_path)
        told = []
        again = run(work_dir=tmp_path, callback=told.append)
        assert not told and same(state(first), state(again))
        assert (
            again.conversion.to_json() == ConversionRecord.read(tmp_path / "record.json").to_json()
        )
        assert again.conversion.key_heads == first.conversion.key_heads
        assert not list(tmp_path.glob("recovery-*")) and not list(tmp_path.glob("fusion-1-*"))

    def test_recover_killed_and_resumed(self, tmp_path):
        def start(work_dir=None, callback=None, model=None, data=ROWS, teacher=3, **changes):
            model = model or tiny.make()
            config = tiny.config(distill=0.5, **changes)
            curve = recover(model, data, config, teacher=tiny.make(seed=teacher),
                            work_dir=work_dir, callback=callback)  # fmt: skip
            return state(model), curve

        def kill(progress):
            if progress.step == 3:
                raise Killed

        whole = start()
        with pytest.raises(Killed):
            start(tmp_path, kill)
        # Another run must not go on from these weights.
        for changes, message in (({"learning_rate": 1e-2}, "learning_rate 0.0003 there, 0.01 here"),
                                 ({"model": tiny.make(seed=5)}, "model '"), ({"teacher": 4}, "teacher '"),
                                 ({"data": tiny.rows(seed=4)}, "data '")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                start(tmp_path, **changes)
        steps = []
        resumed = start(tmp_path, lambda p: steps.append(p.step))
        assert steps == [4]  # a checkpoint of step 3 was there
        assert same(resumed[0], whole[0]) and resumed[1] == whole[1]
        assert not list(tmp_path.iterdir())  # finished: free for the next run
        start(tmp_path, learning_rate=1e-2)

    def test_another_runs_folder_is_refused(self, tmp_path):
        run(work_dir=tmp_path)
        for changes, message in (({"budget": 0.5}, "budget 0.25 there, 0.5 here"),
                                 ({"model": tiny.make(seed=3)}, "parent '"),
                                 ({"data": tiny.rows(seed=4)}, "data '")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                run(work_dir=tmp_path, **changes)

    def test_random_state_of_the_caller_is_left_alone(self):
        torch.manual_seed(3)
        want = torch.rand(4)
        torch.manual_seed(3)
        run(tiny_model := tiny.make())
        del tiny_model
        torch.manual_seed(3)
        model = tiny.make(seed=0)
        torch.manual_seed(3)
        run(model)
        assert torch.equal(torch.rand(4), want)

    def test_stages_draw_their_own_batches(self):
        conversion = Conversion(tiny.make(), ROWS, tiny.config())
        take = conversion.batches.take
        a, b = (take(s, 0, 8)["input_ids"] for s in ("search-1", "fusion-1"))
        assert not torch.equal(a, b)
        whole = torch.cat([take("recovery", s, 8)["input_ids"] for s in range(4)])
        assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, ROWS.tolist()))


@pytest.fixture(scope="module", params=MODES)
def two_ranks(request, tmp_path_factory):
    folder, env = tmp_path_factory.mktemp("ranks"), MODES[request.param]
    killed = processes.ranks(HERE / "dha_ranks.py", folder, "fusion-1", 4, env=env)
    done = processes.ranks(HERE / "dha_ranks.py", folder, env=env)
    return folder, killed, done


class TestRanks:
    def test_two_gloo_ranks_resume_and_agree_with_one(self, two_ranks):
        folder, killed, done = two_ranks
        assert killed.returncode != 0 and done.returncode == 0, done.stderr[-3000:]
        record = ConversionRecord.read(folder / "record.json")
        alone = run()
        assert record.key_heads == alone.conversion.key_heads
        for stage, curve in alone.conversion.curves.items():
            got = [m["loss"] for m in record.curves[stage]]
            assert got == pytest.approx([m["loss"] for m in curve], rel=2e-3), stage
        made = DhaLlamaForCausalLM.from_pretrained(folder / "model")
        for name, want in alone.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], want, atol=2e-3, rtol=2e-2)

    def test_rows_must_divide(self):
        conversion = Conversion(tiny.make(), ROWS, tiny.config())

        class Three:
            num_processes, process_index, device = 3, 0, torch.device("cpu")

        conversion.trainer.accelerator = Three()
        with pytest.raises(ValueError, match="a batch of 4 rows cannot be shared by 3 ranks"):
            conversion.trainer.rank_rows({"input_ids": ROWS[:4]})


# (seed, budgets, steps of the parent, of search, fusion and recovery): half of the heads is the easier one.
STUDIES = [
    (0, (0.25,), (40, 8, 50, 15)),
    *(pytest.param(s, (0.5, 0.25), (150, 12, 70, 25), marks=pytest.mark.slow) for s in (0, 1, 2)),
]


@pytest.mark.parametrize(("seed", "budgets", "steps"), STUDIES)
def test_end_to_end(seed, budgets, steps):
    """Check 14: 4 layers, 8 heads, d 32, bytes of real text and recall; against mean-pooled GQA."""
    length, pairs = 64, 4
    train, held = lm.split(lm.byte_stream(limit=12))
    data = lm.mixture(train, seed, length, pairs)
    rows = lm.mixture(held, seed + 1, length, pairs)("held", 0, 48)
    of_parent, search, fusion, recovery = steps
    parent = lm.train(lm.make_model(seed), data, of_parent, batch_size=8)
    found = {}
    for budget in budgets:
        for method in ("dha", "gqa_mean"):
            made = convert(
                parent, budget, data, "small", method=method, search_steps=search, fusion_steps=fusion,
                recovery_steps=recovery, omega_lr=0.06, margin_end=0.6, sequence_length=length,
                collapse_mse=0.05, eval_rows=rows, seed=seed,
            )  # fmt: skip
            found[budget, method] = made.conversion, lm.recall_score(made, seed, 128, pairs)
            assert made.conversion.ratio <= budget
    print({key: (record.losses, score) for key, (record, score) in found.items()})
    for budget in budgets:
        (ours, our_recall), (gqa, gqa_recall) = (found[budget, m] for m in ("dha", "gqa_mean"))
        assert ours.losses["collapsed"] < gqa.losses["collapsed"]
        assert ours.losses["final"] <= gqa.losses["final"]
        if budget == 0.25:
            # Not accuracy: after 40 steps, as after 150, this parent has hardly learnt more than which 4 values
            # there are (any of them would be right in 0.25), so that accuracies differ by chance.
            assert our_recall["log_prob"] >= gqa_recall["log_prob"]
