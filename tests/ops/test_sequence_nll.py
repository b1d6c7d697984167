# SPDX-License-Identifier: Apache-2.0
"""``sequence_nll`` against its definition in float64."""

import pytest
import torch
from moe_cases import agree, every_isa, rand

from tenfold import ops, reference
from tenfold.testing import DTYPES, check_deterministic, check_errors, check_op, peak_growth

raw = torch.ops.tenfold
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 9, 1000), (2, 3, 20001), (0, 4, 5), (3, 0, 5)]


def labels_of(batch, length, vocab, ignore=-100):
    made = torch.Generator().manual_seed(batch + length)
    labels = torch.randint(0, vocab, (batch, length), generator=made)
    labels[:, : length // 2] = ignore  # the prompt
    if batch > 1:
        labels[1] = ignore  # nothing of this one counts
    return labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, device):
    logits, labels = rand(*shape, dtype=dtype, scale=3.0), labels_of(*shape)
    for there in (labels, labels.int()):
        agree("sequence_nll", [logits, there], device, wrt=(0,))


def test_is_cross_entropy(device):
    logits, labels = rand(4, 10, 50).to(device), labels_of(4, 10, 50).to(device)
    nll, count = ops.sequence_nll(logits, labels)
    want = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(nll, want.sum(1))
    assert count.dtype == torch.int64 and count.tolist() == (labels >= 0).sum(1).tolist()
    logp, _, _ = ops.selective_logprob(logits, labels)
    torch.testing.assert_close(nll, -logp.sum(1))


def test_a_long_sequence_does_not_overflow(device):
    """A mean of 90 per token: the perplexity would."""
    logits = torch.zeros(1, 4000, 3, device=device)
    logits[..., 0] = 90.0
    nll, count = ops.sequence_nll(logits, torch.ones(1, 4000, dtype=torch.long, device=device))
    assert float(nll / count) == pytest.approx(90.0)


def test_another_ignore_index_and_rows_never_read(device):
    logits, labels = rand(3, 8, 11).to(device), labels_of(3, 8, 11, ignore=2).to(device)
    want = ops.sequence_nll(logits, labels.masked_fill(labels == 2, -100))
    logits[labels == 2] = float("nan")
    logits.requires_grad_()
    nll, count = ops.sequence_nll(logits, labels, 2)
    assert torch.equal(nll, want[0]) and torch.equal(count, want[1])
    nll.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[labels == 2] == 0).all()


def test_slices_are_read_where_they_lie(device):
    logits, labels = rand(3, 9, 40).to(device), labels_of(3, 9, 40).to(device)
    want = ops.sequence_nll(logits[:, :-1].contiguous(), labels[:, 1:].contiguous())
    wide = torch.nn.functional.pad(logits, (0, 5))[..., :40]
    turned = logits.transpose(0, 2).contiguous().transpose(0, 2)
    for x in (logits, wide, turned, logits.transpose(0, 1).contiguous().transpose(0, 1)):
        for a, b in zip(ops.sequence_nll(x[:, :-1], labels[:, 1:]), want):
            assert torch.equal(a, b)
    leaf = logits.clone().requires_grad_()
    up = torch.ones(1, device=device).expand(3)
    (grad,) = torch.autograd.grad(ops.sequence_nll(leaf[:, :-1], labels[:, 1:])[0], leaf, up)
    assert (grad[:, -1] == 0).all() and grad.abs().sum() > 0


def test_no_copy_of_the_logits():
    setup = """
        import torch
        from tenfold import ops
        logits = torch.ones(4, 64, 40000, dtype=torch.bfloat16)
        labels = torch.randint(0, 40000, (4, 64))
        ops.sequence_nll(logits[:1, :2], labels[:1, :2])
    """
    assert peak_growth(setup, "ops.sequence_nll(logits[:, :-1], labels[:, 1:])") < 4 << 20


def test_sequences_alone_and_special_values(device):
    logits, labels = rand(4, 6, 30).to(device), labels_of(4, 6, 30).to(device)
    logits[0, 4, 3:] = -float("inf")
    labels[0, 4] = 1
    logits[2, 5, 0] = float("nan")
    for isa in every_isa(device):
        with isa:
            nll, count = ops.sequence_nll(logits, labels)
            for i in range(4):
                one = ops.sequence_nll(logits[i : i + 1], labels[i : i + 1])
                assert torch.equal(one[0].nan_to_num(7), nll[i : i + 1].nan_to_num(7))
        assert nll.isnan().tolist() == [False, False, True, False]
        assert count.tolist() == [3, 0, 3, 3] and nll[1] == 0 and nll[0].isfinite()


def test_gradcheck():
    labels = labels_of(3, 4, 5)
    x = rand(3, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.sequence_nll(x, labels)[0], x)


def test_threads_do_not_matter():
    logits, labels = rand(3, 5, 40000), labels_of(3, 5, 40000)
    check_deterministic(raw.sequence_nll, (logits, labels))


def test_errors(device):
    logits, labels = rand(2, 3, 5).to(device), labels_of(2, 3, 5).to(device)
    both = (ops.sequence_nll, raw.sequence_nll)
    check_errors(*both, (logits[0], labels), {}, ValueError, "logits", "[B, S, V]")
    check_errors(*both, (logits, labels[:, :2]), {}, ValueError, "labels", "[2, 3]", "[2, 2]")
    check_errors(*both, (logits, labels.float()), {}, TypeError, "labels", "float32")
    check_errors(*both, (logits.double(), labels), {}, TypeError, "logits", "float64")
    check_errors(*both, (logits[..., :0], labels), {}, ValueError, "logits")
    x = logits.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(ops.sequence_nll(x, labels)[0].sum(), x, create_graph=True)
    if device.type == "cpu":
        for value in (5, -1):
            wrong = labels.clone()
            wrong[1, 2] = value
            check_errors(*both, (logits, wrong), {}, IndexError, f"labels[1, 2] = {value}", "V = 5")


def test_registration(device):
    check_op(raw.sequence_nll, (rand(3, 4, 9).to(device).requires_grad_(), labels_of(3, 4, 9).to(device)))  # fmt: skip
