# SPDX-License-Identifier: Apache-2.0
"""trace_token_class, lm_weight, first_stop and segment_mean: parts of traces, whatever their padding holds."""

import pytest
import torch
from moe_cases import agree, every_isa, rand

from tenfold import ops, reference
from tenfold.testing import check_errors, check_op, on, poisoned_memory

raw = torch.ops.tenfold
TOOL, OBS, WORK, EOS = SPECIAL = 97, 98, 99, 2
PADDING = (0, EOS, TOOL, OBS, -1)


def traces(rows, length, side="right", seed=0):
    """Random tokens, a tenth of them special, in padded rows: ids, mask, asst_start, answer_start."""
    made = torch.Generator().manual_seed(seed + rows + length)
    ids = torch.randint(3, 90, (rows, length), generator=made)
    special = torch.tensor([TOOL, OBS, WORK, TOOL, OBS, WORK, EOS])
    there = torch.rand(rows, length, generator=made) < 0.05
    ids = torch.where(there, special[torch.randint(0, 7, (rows, length), generator=made)], ids)
    size = torch.randint(0, length + 1, (rows, 1), generator=made)
    at = torch.arange(length)[None]
    mask = at < size if side == "right" else at >= length - size
    if side == "holes":
        mask &= torch.rand(rows, length, generator=made) > 0.1
    begin = (torch.rand(rows, 2, generator=made) * (length + 1) * 0.4).long().sort(1).values
    begin += 0 if side == "right" else length - size
    padding = torch.tensor(PADDING)[torch.randint(0, 5, (rows, length), generator=made)]
    return torch.where(mask, ids, padding), mask, *begin.clamp(max=length).unbind(1)[::-1]


def exact(name, args, device):
    want = getattr(reference, name)(*args)
    for isa in every_isa(device):
        with isa, poisoned_memory():
            got = getattr(ops, name)(*on(device, list(args)))
        for g, w in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want))):
            assert g.dtype == w.dtype and torch.equal(g.cpu(), w)
    return got


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (5, 1), (4, 63), (4, 64), (7, 65), (3, 700)])
def test_classes(shape, side, device):
    ids, mask, asst, answer = traces(*shape, side)
    exact("trace_token_class", (ids, mask, asst, answer, *SPECIAL), device)
    wide = torch.nn.functional.pad(ids.int(), (0, 3))[:, : shape[1]]
    exact("trace_token_class", (wide, mask.long(), asst.int(), answer, *SPECIAL), device)
    exact("trace_token_class", (ids, mask, asst, asst, TOOL, -1, -1, -1), device)


def test_a_trace_by_hand(device):
    """The tokens between which a model must choose are targets, whatever beta and omega are."""
    special = {"T": TOOL, "O": OBS, "W": WORK, "E": EOS}
    ids = torch.tensor([[special.get(x, 5) for x in "qqAAasTttOooTtOoWwwEx"]], device=device)
    start = torch.tensor([4], device=device), torch.tensor([2], device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    cls = ops.trace_token_class(ids, mask, *start, *SPECIAL)
    want = [0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 2, 2, 2, 3, 2, 4, 4, 5, 0]
    assert cls.tolist() == [want]
    w = ops.lm_weight(cls, torch.tensor([False], device=device), 0.0, 0.5, True)
    assert w.tolist() == [[{2: 1.0, 4: 0.5, 5: 1.0}.get(c, 0.0) for c in want]]
    w = ops.lm_weight(cls, torch.tensor([True], device=device), 2.0, 0.0, True)
    assert w.tolist() == [[{1: 1.0, 2: 1.0, 3: 2.0, 5: 1.0}.get(c, 0.0) for c in want]]


def test_padding_and_other_rows_change_nothing(device):
    ids, mask, asst, answer = on(device, traces(6, 90, "left"))
    want = ops.trace_token_class(ids, mask, asst, answer, *SPECIAL)
    for fill in PADDING:
        other = torch.where(mask, ids, fill)
        assert torch.equal(ops.trace_token_class(other, mask, asst, answer, *SPECIAL), want)
    for left, right in ((0, 41), (41, 0), (7, 64)):  # any extra padding
        wide = torch.nn.functional.pad(ids, (left, right), value=EOS)
        there = torch.nn.functional.pad(mask, (left, right))
        got = ops.trace_token_class(wide, there, asst + left, answer + left, *SPECIAL)
        assert torch.equal(got[:, left : left + 90], want) and not got[:, :left].any()
    alone = ops.trace_token_class(ids[2:3], mask[2:3], asst[2:3], answer[2:3], *SPECIAL)
    assert torch.equal(alone, want[2:3])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4, 1), (5, 33), (3, 1000)])
def test_weights(shape, device):
    made = torch.Generator().manual_seed(sum(shape))
    cls = torch.randint(0, 6, shape, generator=made, dtype=torch.int8)
    positive = torch.rand(shape[0], generator=made) < 0.5
    for beta, omega, answers in ((0.0, 1.0, True), (0.25, 3.0, False)):
        exact("lm_weight", (cls, positive, beta, omega, answers), device)
        exact("lm_weight", (cls, positive.long() * 3, beta, omega, answers), device)
    turned = cls.t().contiguous().t()
    exact("lm_weight", (turned, positive, 1.0, 1.0, True), device)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4, 1), (6, 64), (5, 200)])
def test_first_stop(shape, device):
    ids, *_ = traces(*shape)
    ids = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.8, 5, ids)
    made = torch.Generator().manual_seed(2)
    lens = torch.randint(0, shape[1] + 1, shape[:1], generator=made)
    for stops in ([OBS], [EOS, OBS, EOS], [], [-7]):
        exact("first_stop", (ids, lens, torch.tensor(stops, dtype=torch.long)), device)
    exact(
        "first_stop", (ids.int(), lens.int(), torch.tensor([EOS, OBS], dtype=torch.int32)), device
    )


@pytest.mark.parametrize(
    "shape", [(0, 5, 2), (3, 0, 2), (4, 7, 0), (4, 1, 9), (5, 65, 7), (3, 900, 12)]
)
def test_means_of_segments(shape, device):
    rows, length, count = shape
    made = torch.Generator().manual_seed(sum(shape))
    scattered = torch.randint(-2, count + 2, (rows, length), generator=made)
    runs = scattered[:, torch.arange(length) // 17] if length else scattered
    for seg in (scattered, runs, runs.int()):
        nll = rand(rows, length)
        nll[(seg < 0) | (seg >= count)] = float("nan")
        agree("segment_mean", [nll, seg, count], device, wrt=(0,))


def test_a_mean_does_not_depend_on_its_place(device):
    nll, seg = on(device, (rand(1, 300), torch.arange(300)[None] // 60))
    want = ops.segment_mean(nll, seg, 5)
    for left in (1, 5, 64):
        wide = torch.nn.functional.pad(nll, (left, 9), value=float("nan"))
        moved = torch.nn.functional.pad(seg, (left, 9), value=-1)
        assert torch.equal(ops.segment_mean(wide, moved, 5), want)
    assert ops.segment_mean(nll.bfloat16(), seg, 5).dtype == torch.float32


def test_gradcheck():
    seg = torch.tensor([[0, 3, 3, -1, 0], [1, 1, 1, 1, 5]])
    x = rand(2, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.segment_mean(x, seg, 4), x)


def test_errors(device):
    ids, mask, asst, answer = on(device, traces(3, 20))
    both = (ops.trace_token_class, raw.trace_token_class)
    args = (ids, mask, asst, answer, *SPECIAL)

    def with_(at, value):
        return (*args[:at], value, *args[at + 1 :])

    check_errors(*both, with_(0, ids[0]), {}, ValueError, "ids", "[N, S]")
    check_errors(*both, with_(0, ids.float()), {}, TypeError, "ids", "float32")
    check_errors(*both, with_(1, mask[:, 1:]), {}, ValueError, "mask", "[3, 20]")
    check_errors(*both, with_(2, asst[1:]), {}, ValueError, "asst_start", "[2]")
    check_errors(*both, with_(3, answer.double()), {}, TypeError, "answer_start")
    check_errors(*both, with_(7, OBS), {}, ValueError, "id_obs", "id_eos", "98")
    if device.type == "cpu":
        check_errors(*both, with_(2, asst + 21), {}, IndexError, "asst_start[0]", "20")
        check_errors(*both, with_(3, asst + 1), {}, IndexError, "answer_start[0]")
    both = (ops.lm_weight, raw.lm_weight)
    cls, positive = ops.trace_token_class(*args), asst > 0
    check_errors(
        *both, (cls.long(), positive, 1.0, 1.0, True), {}, TypeError, "cls", "int8", "int64"
    )
    check_errors(*both, (cls, positive[1:], 1.0, 1.0, True), {}, ValueError, "is_pos", "[3]")
    check_errors(*both, (cls, positive, -1.0, 1.0, True), {}, ValueError, "beta", "-1")
    check_errors(*both, (cls, positive, 1.0, float("inf"), True), {}, ValueError, "omega", "inf")
    if device.type == "cpu":
        for value in (6, -1):
            wrong = cls.clone()
            wrong[1, 19] = value
            check_errors(*both, (wrong, positive, 1.0, 1.0, True), {}, IndexError, f"cls[1, 19] = {value}")  # fmt: skip
    both = (ops.first_stop, raw.first_stop)
    check_errors(*both, (ids, asst, mask[0]), {}, TypeError, "stop_ids", "bool")
    check_errors(*both, (ids, asst, ids), {}, ValueError, "stop_ids", "[K]")
    check_errors(*both, (ids, asst[1:], asst), {}, ValueError, "lens")
    if device.type == "cpu":
        check_errors(*both, (ids, asst + 21, asst), {}, IndexError, "lens[0]")
    both = (ops.segment_mean, raw.segment_mean)
    nll = rand(3, 20).to(device)
    check_errors(*both, (nll.double(), ids, 2), {}, TypeError, "nll", "float64")
    check_errors(*both, (nll, ids[:, 1:], 2), {}, ValueError, "nll", "[3, 19]")
    check_errors(*both, (nll, ids, -1), {}, ValueError, "T", "-1")
    check_errors(*both, (nll, mask, 2), {}, TypeError, "seg", "bool")


def test_registration(device):
    ids, mask, asst, answer = on(device, traces(3, 70))
    check_op(raw.trace_token_class, (ids, mask, asst, answer, *SPECIAL))
    cls = ops.trace_token_class(ids, mask, asst, answer, *SPECIAL)
    check_op(raw.lm_weight, (cls, asst > 0, 0.5, 2.0, True))
    check_op(raw.first_stop, (ids, asst, torch.tensor([OBS, EOS], device=device)))
    check_op(raw.segment_mean, (rand(3, 70).to(device).requires_grad_(), cls.int(), 6))
