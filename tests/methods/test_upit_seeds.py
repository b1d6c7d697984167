# SPDX-License-Identifier: Apache-2.0
"""S3: a sample of the data, its loss under every expert, and who gets which of it (acceptance check 9)."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import upit_dense as dense

from tenfold.upit.seeds import (
    _others_best,
    as_rows,
    assign_buckets,
    mean_nll,
    nll_matrix,
    sample_rows,
    select,
)


def plain(model, rows):
    """Mean response loss of each row, from a log-softmax in float64."""
    logits = (
        model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        .logits[:, :-1]
        .double()
    )
    want = rows["labels"][:, 1:]
    loss = F.cross_entropy(logits.transpose(1, 2), want, reduction="none", ignore_index=-100)
    return loss.sum(1) / (want != -100).sum(1)


class TestAssignment:
    def test_by_hand(self):
        nll = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.5, 1.0], [3.0, 0.5, 4.0], [0.1, 0.2, 0.3]])
        assert assign_buckets(nll, min_bucket=0) == [[0, 3], [2], [1]]

    def test_ties_go_to_the_lower_expert(self):
        nll = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [5.0, 5.0, 3.0]])
        assert assign_buckets(nll, min_bucket=0) == [[0], [1], [2]]

    def test_an_empty_bucket_is_filled_with_what_suits_it_best(self):
        # Expert 1 is better at everything; expert 0 loses least on rows 4, then 2.
        nll = torch.tensor(
            [[2.0, 1.0], [1.9, 1.0], [1.2, 1.0], [3.0, 1.0], [1.05, 1.0], [1.8, 1.0]]
        )
        assert assign_buckets(nll, min_bucket=2) == [[2, 4], [0, 1, 3, 5]]
        with pytest.raises(ValueError, match="expert 0 has no seed samples"):
            assign_buckets(nll, min_bucket=0)

    def test_each_row_is_used_once_and_no_bucket_gets_short(self):
        nll = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
        nll[:, 3] -= 1.0
        buckets = assign_buckets(nll)
        assert sorted(r for b in buckets for r in b) == list(range(40))
        assert min(map(len, buckets)) >= 8  # max(8, 40 / 16)
        assert [len(b) for b in assign_buckets(nll, min_bucket=10)] == [10] * 4

    def test_the_margin_is_against_the_best_other(self):
        nll = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 3.0], [4.0, 2.0, 1.0]])
        assert _others_best(nll).tolist() == [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 2.0]]

    def test_relative(self):
        nll = torch.tensor([[1.0, 0.2], [1.2, 0.9], [0.9, 0.1], [1.1, 0.8]])
        with pytest.raises(ValueError, match="expert 0 has no"):
            assign_buckets(nll, min_bucket=0)
        assert assign_buckets(nll, "relative", min_bucket=0) == [[1, 3], [0, 2]]

    def test_capacity_overflows_to_the_next_best(self):
        # All like expert 0; rows 2 and 0 gain most by it. The others go to their second choice.
        nll = torch.tensor([[0.0, 5.0, 6.0], [0.0, 1.0, 2.0], [0.0, 9.0, 8.0], [0.0, 3.0, 2.0]])
        assert assign_buckets(nll, min_bucket=0, capacity=2) == [[0, 2], [1], [3]]
        with pytest.raises(ValueError, match="capacity 1 of 3 experts must hold 4"):
            assign_buckets(nll, min_bucket=0, capacity=1)

    def test_random(self):
        nll = torch.zeros(11, 4)
        a, b = (assign_buckets(nll, "random", min_bucket=0, seed=s) for s in (0, 1))
        assert sorted(map(len, a)) == [2, 3, 3, 3] and a != b
        assert sorted(r for x in a for r in x) == list(range(11))

    def test_losses_of_90_do_not_overflow(self):
        nll = torch.tensor([[90.0, 91.0], [200.0, 199.0], [1e4, 1e5]])
        assert assign_buckets(nll, min_bucket=0) == [[0, 2], [1]]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_refused(self, bad):
        nll = torch.zeros(3, 2)
        nll[2, 1] = bad
        with pytest.raises(ValueError, match="the loss of sample 2 under expert 1 is"):
            assign_buckets(nll)
        with pytest.raises(ValueError, match="min_bucket 2 of 2 experts needs 4 samples, got 3"):
            assign_buckets(torch.zeros(3, 2), min_bucket=2)
        with pytest.raises(ValueError, match=r"nll must be \[samples, experts\], got \[3\]"):
            assign_buckets(torch.zeros(3))
        with pytest.raises(ValueError, match="assign must be one of argmin"):
            assign_buckets(torch.zeros(3, 2), "best")


class TestSample:
    def test_share_and_seed(self):
        labels = torch.zeros(400, 4, dtype=torch.int64)
        a, b, c = (
            sample_rows(labels, 0.01, 0),
            sample_rows(labels, 0.01, 0),
            sample_rows(labels, 0.01, 1),
        )
        assert len(a) == 4 and a == b != c and a == sorted(set(a))
        assert (
            sample_rows(labels, 1.0, 0) == list(range(400))
            and len(sample_rows(labels, 1e-6, 0)) == 1
        )

    def test_rows_without_a_response(self):
        labels = torch.zeros(6, 4, dtype=torch.int64)
        labels[[1, 4], 1:] = -100
        with pytest.warns(UserWarning, match="2 of 6 seed samples have no response tokens") as said:
            assert sample_rows(labels, 1.0, 0) == [0, 2, 3, 5]
        assert len(said) == 1
        with pytest.raises(ValueError, match="none of the 6 seed samples has response tokens"):
            sample_rows(torch.full((6, 4), -100), 1.0, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample_rows(torch.zeros(6, 4), 1.0, 0)

    def test_rows(self):
        ids = torch.arange(12)
        assert as_rows(ids, 4)["labels"].tolist() == ids.view(3, 4).tolist()
        made = as_rows(
            {"input_ids": ids.view(3, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]] * 3)}, 4
        )
        assert made["labels"][:, 3].tolist() == [-100] * 3
        assert select(made, [2, 0])["input_ids"][0].tolist() == [8, 9, 10, 11]
        with pytest.raises(TypeError, match="data given as a function have none"):
            as_rows(lambda *_: ids, 4)


class TestScores:
    def test_against_a_log_softmax(self):
        model, rows = dense.llama(), dense.rows(10)
        want = plain(model, rows)
        for size in (3, 10):
            torch.testing.assert_close(
                mean_nll(model, rows, size).double(), want, atol=1e-5, rtol=1e-5
            )

    def test_experts_are_read_one_after_the_other(self, tmp_path):
        _base, experts = dense.folders(tmp_path, 2, scale=0.3)
        rows, done = dense.rows(12), []
        nll = nll_matrix(experts, rows, progress=done.append)
        assert nll.shape == (12, 2) and nll.dtype == torch.float32 and done == [0, 1]
        from tenfold.upit.checkpoints import load_expert

        for i, path in enumerate(experts):
            torch.testing.assert_close(
                nll[:, i].double(), plain(load_expert(path), rows), atol=1e-5, rtol=1e-5
            )
        states = [load_expert(p).state_dict() for p in experts]
        torch.testing.assert_close(nll_matrix(states, rows, base=dense.llama()), nll)
        with pytest.raises(ValueError, match="needs its base model"):
            nll_matrix(states, rows)

    def test_adapters(self, tmp_path):
        path = dense.adapter(tmp_path / "a", 1, scale=1.0)
        base, rows = dense.llama(), dense.rows(8)
        before = base.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
        found = nll_matrix([path], rows, base=base)[:, 0]
        assert (found - mean_nll(base, rows)).abs().max() > 1e-3
        assert torch.equal(base.state_dict()["model.layers.0.mlp.up_proj.weight"], before)

    def test_a_loss_of_90_is_finite(self):
        model = dense.llama()
        with torch.no_grad():
            model.lm_head.weight.mul_(3000)
        rows = dense.rows(6, length=64)
        nll = torch.stack([mean_nll(model, rows), mean_nll(dense.llama(1), rows)], 1)
        assert float(nll[:, 0].min()) > 90 and bool(nll.isfinite().all())
        assert assign_buckets(nll, min_bucket=1)[1]
