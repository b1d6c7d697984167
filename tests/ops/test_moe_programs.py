# SPDX-License-Identifier: Apache-2.0
"""Expert blocks and grouped products: registrations, programs, bad input."""

import pytest
import torch
from moe_expert_cases import SCALE, experts, lora

from tenfold import ops
from tenfold.testing import check_compiles, check_errors, check_op, on

raw = torch.ops.tenfold
SHAPE = 20, 12, 10, 3, 2


def block(dtype=torch.float32, **changes):
    (x, gate_up, down, weight), index = experts(SHAPE, dtype)
    args = {"x": x, "gate_up": gate_up, "down": down, "index": index, "weight": weight}
    return list((args | changes).values())


def lora_block(dtype=torch.float32, **changes):
    (x, wg, wu, wd, *ab, weight), index = lora(SHAPE, 4, dtype)
    args = {"x": x, "wg": wg, "wu": wu, "wd": wd, "lora_a": ab[:3], "lora_b": ab[3:], "scale": SCALE, "index": index,
            "weight": weight}  # fmt: skip
    return list((args | changes).values())


def grouped(dtype=torch.float32, **changes):
    args = {"a": torch.randn(12, 9).to(dtype), "w": torch.randn(3, 7, 9).to(dtype),
            "offsets": torch.tensor([0, 4, 4, 10]), "trans_w": True, "gather": torch.arange(12).flip(0)}  # fmt: skip
    return list((args | changes).values())


CHECKED = [("moe_swiglu_mlp", torch.float32), ("moe_swiglu_mlp", torch.bfloat16), ("grouped_gemm", torch.float32),
           ("grouped_gemm_wgrad", torch.float16), ("moe_lora_experts", torch.float32),
           ("moe_lora_swiglu_mlp", torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), CHECKED)
def test_standing_checks(name, dtype, device):
    if name == "moe_swiglu_mlp":
        args = block(dtype)
    elif name == "grouped_gemm":
        args = grouped(dtype)
    elif name == "grouped_gemm_wgrad":
        a, _, offsets, _, gather = grouped(dtype)
        args = a[:, :5], a, offsets, gather
    else:
        args = lora_block(dtype)
        if name == "moe_lora_experts":
            args = [t for x in args for t in (x if isinstance(x, list) else [x])]
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
    check_op(getattr(raw, name).default, on(device, args), **close)


def test_standing_checks_of_the_gradients(device):
    args = on(device, block())
    _, hidden = raw.moe_swiglu_mlp_train(*args)
    up = torch.randn(20, 12, device=device)
    close = {"rtol": 1e-4, "atol": 1e-4}
    args = (up, *args, hidden, True, False, True, True)
    check_op(raw.moe_swiglu_mlp_backward.default, args, **close)
    x, wg, wu, wd, a, b, *rest = on(device, lora_block())
    args = x, wg, wu, wd, *a, *b, *rest
    _, hidden, low = raw.moe_lora_experts_train(*args)
    args = (up, *args, hidden, low, 0b11110111001)
    check_op(raw.moe_lora_experts_backward.default, args, **close)


def is_floating(t):
    return torch.is_tensor(t) and t.is_floating_point()


def leaves(tree):
    return [t.detach().requires_grad_() if is_floating(t) else t for t in tree]


@pytest.mark.parametrize("face", ["moe_swiglu_mlp", "moe_lora_swiglu_mlp", "grouped_gemm"])
def test_compiles_with_gradients(face, device):
    """Forward and backward in whole graphs."""

    def train(*args):
        if face == "moe_lora_swiglu_mlp":
            x, wg, wu, wd, ag, au, ad, bg, bu, bd, scale, index, weight = leaves(args)
            ins = x, wg, wu, wd, ag, au, ad, bg, bu, bd, weight
            out = ops.moe_lora_swiglu_mlp(x, wg, wu, wd, [ag, au, ad], [bg, bu, bd], scale, index, weight)  # fmt: skip
        else:
            args = leaves(args)
            ins = list(filter(is_floating, args))
            out = getattr(ops, face)(*args)
        return out.detach(), *torch.autograd.grad(out.square().sum(), ins)

    made = {"moe_swiglu_mlp": block, "grouped_gemm": grouped, "moe_lora_swiglu_mlp": lora_block}[face]()  # fmt: skip
    flat = [t for x in made for t in (x if isinstance(x, list) else [x])]
    torch._dynamo.reset()
    want = train(*on(device, flat))
    step = compiled_step(face)
    ins = leaves(on(device, flat))
    out = step(*ins)
    out.square().sum().backward()
    got = out.detach(), *(t.grad for t in ins if torch.is_tensor(t) and t.requires_grad)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def compiled_step(face):
    def call(*args):
        if face != "moe_lora_swiglu_mlp":
            return getattr(ops, face)(*args)
        return ops.moe_lora_swiglu_mlp(*args[:4], list(args[4:7]), list(args[7:10]), *args[10:])

    return torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)


def test_compiles_with_inductor():
    check_compiles(ops.moe_swiglu_mlp, block(), backend="inductor", dynamic=None)


def test_bad_blocks(device):
    def bad(error, *words, **changes):
        check_errors(ops.moe_swiglu_mlp, raw.moe_swiglu_mlp, on(device, block(**changes)), {}, error,
                     "moe_swiglu_mlp", *words)  # fmt: skip

    x, gate_up, down, index, weight = block()
    bad(TypeError, "x", "float64", x=x.double())
    bad(ValueError, "gate_up", "dtype", gate_up=gate_up.half())
    bad(ValueError, "down", "dtype", down=down.bfloat16())
    bad(ValueError, "gate_up", "[3, 19, 12]", gate_up=gate_up[:, :19])
    bad(ValueError, "gate_up", "[3, 20, 11]", gate_up=gate_up[..., :11])
    bad(ValueError, "gate_up", "n > 0", gate_up=gate_up[:0])
    bad(ValueError, "down", "[3, 12, 9]", down=down[..., :9])
    bad(ValueError, "down", "[2, 12, 10]", down=down[:2])
    bad(IndexError, "index", "float32", index=index.float())
    bad(RuntimeError, "weight", "[20, 1]", "[20, 2]", weight=weight[:, :1])
    bad(RuntimeError, "index", "[19, 2]", "T = 20", index=index[:19], weight=weight[:19])
    with pytest.raises(RuntimeError, match=r"index must be \[4, 5, 'k'\]"):
        ops.moe_swiglu_mlp(x.view(4, 5, 12), gate_up, down, index, weight)
    bad(TypeError, "weight", "float32", "int64", weight=weight.long())


def test_bad_indices():
    """CPU only: CUDA does not wait for values on the device. With gradients the text is the same."""
    index = block()[3]
    call = ops.moe_swiglu_mlp, raw.moe_swiglu_mlp
    for value, words, error in ((-1, ["-1", "index[7, 1]", "3 experts"], IndexError),
                                (3, ["= 3", "allow_sentinel"], IndexError)):  # fmt: skip
        index[7, 1] = value
        args = block(index=index)
        check_errors(*call, args, {}, error, "tenfold::moe_swiglu_mlp:", *words)
        args[0].requires_grad_()
        check_errors(*call, args, {}, error, "tenfold::moe_swiglu_mlp:", *words)
        check_errors(ops.moe_lora_swiglu_mlp, raw.moe_lora_swiglu_mlp, lora_block(index=index), {}, error,
                     "tenfold::moe_lora_swiglu_mlp:", *words)  # fmt: skip
    index[7, 1] = -1
    check_errors(*call, block(index=index), {"allow_sentinel": True}, IndexError, "-1")


def test_bad_lora_blocks(device):
    def bad(error, *words, **changes):
        check_errors(ops.moe_lora_swiglu_mlp, raw.moe_lora_swiglu_mlp, on(device, lora_block(**changes)), {}, error,
                     "moe_lora_swiglu_mlp", *words)  # fmt: skip

    x, wg, wu, wd, a, b, _, index, weight = lora_block()
    bad(ValueError, "wu", "[9, 12]", wu=wu[:9])
    bad(ValueError, "wd", "[12, 9]", wd=wd[:, :9])
    bad(ValueError, "wg", wg=wg[0])
    bad(ValueError, "lora_a", "3 tensors", "got 2", lora_a=a[:2])
    bad(ValueError, "lora_a[1]", "[3, 3, 12]", lora_a=[a[0], a[1][:, :3], a[2]])
    bad(ValueError, "lora_a[0]", lora_a=[a[0][..., :11], *a[1:]])
    bad(ValueError, "lora_b[2]", "[2, 12, 4]", lora_b=[*b[:2], b[2][:2]])
    bad(ValueError, "lora_b[0]", "dtype", lora_b=[b[0].half(), *b[1:]])
    bad(ValueError, "scale", "nan", scale=float("nan"))
    bad(TypeError, "x", "int64", x=x.long())
    bad(RuntimeError, "weight", "[20, 1]", weight=weight[:, :1])
    bad(IndexError, "index", "bool", index=index.bool())


def test_bad_groups(device):
    def bad(error, *words, **changes):
        check_errors(ops.grouped_gemm, raw.grouped_gemm, on(device, grouped(**changes)), {}, error,
                     "grouped_gemm", *words)  # fmt: skip

    a, w, offsets, _, gather = grouped()
    bad(TypeError, "a", "float64", a=a.double(), w=w.double())
    bad(ValueError, "w", "dtype", w=w.half())
    bad(ValueError, "w", "[3, 7, 8]", "K = 9", w=w[..., :8])
    bad(ValueError, "w", "[n, K, N]", trans_w=False)
    bad(ValueError, "offsets", "[4]", "[3]", offsets=offsets[:3])
    bad(IndexError, "offsets", "float32", offsets=offsets.float())
    bad(ValueError, "offsets", "1-dimensional", offsets=offsets[None])
    bad(IndexError, "gather", "float32", gather=gather.float())
    dy, wgrad = torch.randn(12, 7), (ops.grouped_gemm_wgrad, raw.grouped_gemm_wgrad)
    check_errors(*wgrad, on(device, [dy[:5], a, offsets]), {}, ValueError, "dy", "[5, 7]", "12")
    check_errors(*wgrad, on(device, [dy.half(), a, offsets]), {}, ValueError, "dtype")
    with pytest.raises(RuntimeError, match="inference only"):
        ops.grouped_gemm_wgrad(*on(device, [dy.requires_grad_(), a, offsets]))


def test_bad_values_of_groups():
    """CPU only."""
    call = ops.grouped_gemm, raw.grouped_gemm
    for offsets in ([1, 2, 3, 4], [0, 5, 4, 6], [0, 4, 8, 13]):
        args = grouped(offsets=torch.tensor(offsets))
        check_errors(*call, args, {}, ValueError, "offsets", "S = 12")
    for row in (12, -1):
        args = grouped(gather=torch.tensor([row, *range(11)]))
        check_errors(*call, args, {}, IndexError, "gather[0]", str(row))
