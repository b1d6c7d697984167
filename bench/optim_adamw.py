# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ``masked_adamw_`` and ``masked_adamw_8bit_``: one step over lists of tensors.

Sizes: one matrix of 1M to 105M elements, many small tensors, and the layers of SmolLM2-135M whole and with
every second matrix frozen: a frozen tensor is not in the list, and moves nothing.

Bytes are what a step must move: p and g read, m and v read, p, m and v written, of the trained rows
and blocks or of all elements (single frozen elements share sectors with trained ones; compact states
hold the trained ones only). The fastest eager form without a mask is torch's fused step; with a mask it
is either that step between a copy and a restore, or that step on the gathered trained part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tenfold import ops
from tenfold.optim import MaskedAdamW, dynamic_code

from .case import Case, Inputs, NotAvailable, Provider, Shape, compiled, provider, relative_error
from .optim_masks import SMOLLM2

HYPER = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
LR = 1e-3
CLIP = 1.0  # of the gradients' norm
FRACTION = 0.5
KINDS = ("row", "col", "block", "element")
BLOCK = 256
FP32, BF16 = torch.float32, torch.bfloat16


def _shapes(s: Shape) -> list[tuple[int, ...]]:
    if "layers" in s:
        matrices = SMOLLM2[0] * s["layers"]
        # An odd number per layer: one layer's odd ones, the next one's even ones.
        return matrices[:: 2 if s["frozen"] else 1]
    if "tensors" in s:
        return [(s["n"],)] * s["tensors"]
    return [(s["out"], s["in"])]


def _elements(s: Shape) -> int:
    return sum(torch.Size(shape).numel() for shape in _shapes(s))


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device, state: torch.dtype) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def randn(shape: tuple[int, ...], to: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=made) * scale).to(device, to)

    shapes = _shapes(s)
    return Inputs(
        p=[randn(x, dtype, 0.02) for x in shapes], g=[randn(x, dtype, 1e-3) for x in shapes],
        m=[randn(x, state, 1e-4) for x in shapes],
        v=[randn(x, state, 1e-3).square() for x in shapes],
        steps=[torch.tensor(10.0, device=device) for _ in shapes],
        lr=torch.tensor(LR, dtype=torch.float64), clip=torch.tensor(0.999, device=device),
    )  # fmt: skip


def _ours(**options: Any) -> Callable[[Inputs], None]:
    @torch.no_grad()
    def step(i: Inputs) -> None:
        clip = i.clip if options.get("clip") else None
        extra = {k: v for k, v in options.items() if k != "clip"}
        ops.masked_adamw_(i.p, i.g, i.m, i.v, i.steps, [], mask_kind="none", lr=i.lr,
                          clip_coef=clip, **HYPER, **extra)  # fmt: skip

    return step


@torch.no_grad()
def fused(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor],
          steps: list[Tensor]) -> None:  # fmt: skip
    """torch's fused step, as its optimizer calls it: it wants the advanced steps."""
    torch._foreach_add_(steps, 1.0)
    torch._fused_adamw_(p, g, m, v, [], steps, lr=LR, amsgrad=False, maximize=False, **HYPER)


def _fused(i: Inputs) -> None:
    fused(i.p, i.g, i.m, i.v, i.steps)


@torch.no_grad()
def _foreach(i: Inputs) -> None:
    adamw(i.p, i.g, i.m, i.v, [], i.steps, foreach=True, fused=False, amsgrad=False, lr=LR,
          maximize=False, **HYPER)  # fmt: skip


def deepspeed() -> Provider:
    """DeepSpeed's CPU Adam, one call per tensor, as its optimizer makes them; built at first use."""

    def build(inputs: Inputs) -> Callable[[Inputs], None]:
        if inputs.p[0].is_cuda:
            raise NotAvailable("DeepSpeed's CPU Adam takes CPU tensors")
        try:
            from deepspeed.ops.op_builder import CPUAdamBuilder

            kernel = CPUAdamBuilder().load(verbose=False)
        except Exception as error:
            raise NotAvailable(f"DeepSpeed's CPU Adam cannot be had: {error}") from error
        b1, b2, decay, eps = (HYPER[k] for k in ("beta1", "beta2", "weight_decay", "eps"))
        kernel.create_adam(0, LR, b1, b2, eps, decay, True, False)

        @torch.no_grad()
        def step(i: Inputs) -> None:
            for p, g, m, v, t in zip(i.p, i.g, i.m, i.v, i.steps, strict=True):
                t += 1
                kernel.adam_update(0, int(t), LR, b1, b2, eps, decay, True, p, g, m, v)

        return step

    return Provider("peer:deepspeed", "peer", build)


@torch.no_grad()
def _fused_clipped(i: Inputs) -> None:
    torch._foreach_mul_(i.g, i.clip)
    _fused(i)


@torch.no_grad()
def _fused_wide(i: Inputs) -> None:
    """float32 states of bfloat16 parameters: torch's fused step takes one dtype only."""
    p, g = [x.float() for x in i.p], [x.float() for x in i.g]
    fused(p, g, i.m, i.v, i.steps)
    torch._foreach_copy_(i.p, p)


def _formula(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor) -> None:
    step = t.add_(1.0).double()  # 1 - b^t cancels
    x, grad = p.float() * (1 - LR * HYPER["weight_decay"]), g.float()
    m2 = torch.lerp(m.float(), grad, 1 - HYPER["beta1"])
    v2 = v.float() * HYPER["beta2"] + (1 - HYPER["beta2"]) * grad * grad
    d = v2.sqrt() / (1 - HYPER["beta2"] ** step).sqrt().float() + HYPER["eps"]
    p.copy_(x - (LR / (1 - HYPER["beta1"] ** step)).float() * m2 / d)
    m.copy_(m2)
    v.copy_(v2)


@torch.no_grad()
def _formula_step(i: Inputs) -> None:
    for tensors in zip(i.p, i.g, i.m, i.v, i.steps, strict=True):
        _formula(*tensors)


def _plain_case(variant: str, shape: Shape, dtype: torch.dtype, state: torch.dtype,
                eager: list[Provider], quick: bool = False, tolerance: float = 1e-6,
                reference: Callable[[Inputs], Any] = _formula_step, **options: Any) -> Case:  # fmt: skip
    return Case(
        op="masked_adamw_", variant=variant, shape=shape, dtype=dtype, mode="inplace", traffic="update",
        mutates=("p", "m", "v"), inputs=lambda s, t, where: _inputs(s, t, where, state),
        bytes=lambda s, size: _elements(s) * (3 * size + 4 * state.itemsize),
        providers=[provider("tenfold", _ours(**options)), *eager], reference=reference,
        tolerance=tolerance, quick=quick,
    )  # fmt: skip


BIG = {"out": 4096, "in": 4096}
SIZES = ({"out": 1024, "in": 1024}, {"out": 10240, "in": 10240})


def _plain() -> Iterator[Case]:
    fused_form = provider("eager:fused", _fused)
    both = [fused_form, compiled(_formula_step)]
    others = [fused_form, provider("eager:foreach", _foreach), deepspeed()]
    wide = [provider("eager:float32", _fused_wide, scratch=8 * _elements(BIG)),
            compiled(_formula_step)]  # fmt: skip
    yield _plain_case("fp32", BIG, FP32, FP32, [*others, compiled(_formula_step)], quick=True)
    for shape in SIZES:
        yield _plain_case("fp32", shape, FP32, FP32, others)
    yield _plain_case("bf16", BIG, BF16, BF16, both, quick=True, tolerance=1e-2)
    yield _plain_case("bf16-fp32", BIG, BF16, FP32, wide, tolerance=1e-2)
    yield _plain_case("clip", BIG, FP32, FP32, [provider("eager:fused", _fused_clipped)],
                      clip=True, reference=_fused_clipped)  # fmt: skip
    yield _plain_case("stochastic", BIG, BF16, BF16, both, tolerance=1e-2, stochastic_round=True)
    for n, tensors in ((576, 1000), (4096, 1000), (147456, 100)):
        yield _plain_case("many", {"n": n, "tensors": tensors}, FP32, FP32, others,
                          quick=n == 576)  # fmt: skip
    for frozen in (0, 1):
        shape = {"layers": SMOLLM2[1], "frozen": frozen}
        yield _plain_case("smollm2-half" if frozen else "smollm2", shape, FP32, FP32, others)


# -- optimizers ---------------------------------------------------------------------------------------


def _optimizer(name: str, make: Callable[[list[Tensor]], Any], kind: str | None = None,
               clip: bool = False, **extra: Any) -> Provider:  # fmt: skip
    """``step()`` of an optimizer over the parameters, with their gradients in place."""
    mine = f"optimizer {name}"  # lives and dies with the inputs

    def step(i: Inputs) -> None:
        found = getattr(i, mine, None)
        if found is None or found.param_groups[0]["params"][0] is not i.p[0]:
            for p, g in zip(i.p, i.g, strict=True):
                p.grad = g
            found = make(i.p)
            setattr(i, mine, found)
        if clip:
            torch.nn.utils.clip_grad_norm_(i.p, CLIP)
        found.step()

    return provider(name, step, kind, **extra)


def _step_case(variant: str, shape: Shape, dtype: torch.dtype, clip: bool = False,
               **about: bool) -> Case:  # fmt: skip
    """``MaskedAdamW.step()`` beside ``torch.optim.AdamW``'s, both as a training loop calls them."""
    hyper = {"lr": LR, "betas": (HYPER["beta1"], HYPER["beta2"]), "eps": HYPER["eps"],
             "weight_decay": HYPER["weight_decay"]}  # fmt: skip
    ours = CLIP if clip else None

    def torchs(**form: bool) -> Callable[[list[Tensor]], Any]:
        return lambda p: torch.optim.AdamW(p, **hyper, **form)

    def inputs(s: Shape, t: torch.dtype, where: torch.device) -> Inputs:
        i = _inputs(s, t, where, t)
        return Inputs(p=i.p, g=i.g)

    fused_form = _optimizer("eager:fused", torchs(fused=True), clip=clip)
    return Case(
        op="masked_adamw_", variant=variant, shape=shape, dtype=dtype, mode="inplace", traffic="update",
        mutates=("p",), inputs=inputs, tolerance=1e-6 if dtype == FP32 else 1e-2, **about,
        bytes=lambda s, size: _elements(s) * (7 + clip) * size,
        providers=[
            _optimizer("tenfold", lambda p: MaskedAdamW(p, **hyper, max_grad_norm=ours)), fused_form,
            _optimizer("eager:foreach", torchs(foreach=True), clip=clip),
        ],
        reference=_optimizer("reference", torchs(fused=True), "eager", clip=clip).build(Inputs()),
    )  # fmt: skip


def _steps() -> Iterator[Case]:
    layers = {"layers": SMOLLM2[1], "frozen": 0}
    for dtype in (FP32, BF16):
        yield _step_case("step", layers, dtype)
        yield _step_case("step-clip", layers, dtype, clip=True)
        # Copies outside the cache would be optimizers over a hundred thousand tensors.
        yield _step_case("step", {"n": 576, "tensors": 1000}, dtype, warm=True, quick=dtype == FP32)


# -- masks -------------------------------------------------------------------------------------------


def _block(s: Shape) -> int:
    return s.get("block", BLOCK)


def _units(s: Shape, kind: str) -> int:
    n = _elements(s)
    return {"row": s["out"], "col": s["in"], "block": n // _block(s), "element": n}[kind]


def _spread(bits: Tensor, s: Shape, kind: str) -> Tensor:
    if kind == "row":
        return bits[:, None].expand(s["out"], s["in"])
    if kind == "col":
        return bits.expand(s["out"], s["in"])
    each = _block(s) if kind == "block" else 1
    return bits.repeat_interleave(each).view(s["out"], s["in"])


def _masked_inputs(s: Shape, dtype: torch.dtype, device: torch.device, state: torch.dtype,
                   kind: str, compact: bool) -> Inputs:  # fmt: skip
    i = _inputs(s, dtype, device, state)
    units = _units(s, kind)
    bits = torch.zeros(units, dtype=torch.bool)
    made = torch.Generator().manual_seed(1)
    bits[torch.randperm(units, generator=made)[: int(FRACTION * units)]] = True
    i.mask, i.index = [ops.pack_mask(bits).to(device)], bits.nonzero()[:, 0].to(device)
    i.on, i.block = _spread(bits, s, kind).contiguous().to(device), _block(s)
    i.prefix = []
    if compact:
        counts = bits.view(-1, 256).sum(1)
        i.prefix = [(counts.cumsum(0) - counts).int().to(device)]
        i.m, i.v = [i.m[0][i.on]], [i.v[0][i.on]]
    return i


def _ours_masked(kind: str) -> Callable[[Inputs], None]:
    @torch.no_grad()
    def step(i: Inputs) -> None:
        ops.masked_adamw_(i.p, i.g, i.m, i.v, i.steps, i.mask, [], i.prefix, mask_kind=kind,
                          lr=i.lr, block_size=i.block, **HYPER)  # fmt: skip

    return step


def _restore(i: Inputs) -> None:
    """The whole step, then the frozen elements back to what they were."""
    before = [[x.clone() for x in i.p], [x.clone() for x in i.m], [x.clone() for x in i.v]]
    _fused(i)
    for now, old in zip((i.p, i.m, i.v), before, strict=True):
        now[0].copy_(torch.where(i.on, now[0], old[0]))


def _view(x: Tensor, kind: str, block: int) -> tuple[Tensor, int]:
    """A view of the tensor in units, and the dimension that counts them."""
    if kind == "col":
        return x, 1
    return (x, 0) if kind == "row" else (x.view(-1, block), 0)


def _gather(kind: str) -> Callable[[Inputs], None]:
    """The step on copies of the trained rows, columns or blocks."""

    @torch.no_grad()
    def step(i: Inputs) -> None:
        views = [_view(x[0], kind, i.block) for x in (i.p, i.g, i.m, i.v)]
        parts = [[x.index_select(dim, i.index)] for x, dim in views]
        fused(*parts, i.steps)
        for (x, dim), part in zip(views, parts, strict=True):
            if part is not parts[1]:
                x.index_copy_(dim, i.index, part[0])

    return step


def _gather_compact(i: Inputs) -> None:
    """States are compact already: only p and g are gathered."""
    # torch's step takes one dtype only
    p, g = (x[0][i.on].to(i.m[0].dtype) for x in (i.p, i.g))
    fused([p], [g], i.m, i.v, i.steps)
    i.p[0].masked_scatter_(i.on, p.to(i.p[0].dtype))


def _masked_bytes(kind: str, state: int, compact: bool) -> Callable[[Shape, int], int]:
    def count(s: Shape, size: int) -> int:
        n = _elements(s)
        part = n if kind in ("col", "element") else n * FRACTION
        states = n * FRACTION if compact else part
        return int(part * 3 * size + states * 4 * state + _units(s, kind) / 8)

    return count


def _masked_case(kind: str, dtype: torch.dtype, state: torch.dtype, compact: bool = False,
                 **extra: int) -> Case:  # fmt: skip
    if compact:
        forms = [provider("eager:gather", _gather_compact)]
    else:
        forms = [provider("eager:restore", _restore)]
        if kind != "element":
            forms.append(provider("eager:gather", _gather(kind)))
    return Case(
        op="masked_adamw_", variant=f"{kind}-compact" if compact else kind, shape=BIG | extra, dtype=dtype,
        mode="inplace", traffic="update", mutates=("p", "m", "v"),
        inputs=lambda s, t, where: _masked_inputs(s, t, where, state, kind, compact),
        bytes=_masked_bytes(kind, state.itemsize, compact),
        providers=[provider("tenfold", _ours_masked(kind)), *forms],
        reference=_gather_compact if compact else _restore,
        tolerance=1e-6 if dtype == FP32 else 1e-2, quick=kind == "row" and dtype == FP32,
    )  # fmt: skip


# -- 8 bits ------------------------------------------------------------------------------------------


def _cuts(code: Tensor) -> Tensor:
    return (code[1:] + code[:-1]) / 2


def _bit8_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    i = _inputs(s, dtype, device, FP32)
    i.code1, i.code2 = (dynamic_code(x).to(device) for x in (True, False))
    i.m, i.a1 = _quantise(i.m[0], i.code1)
    i.v, i.a2 = _quantise(i.v[0], i.code2)
    return i


def _quantise(x: Tensor, code: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    blocks = x.view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(1e-38)[:, None]
    q = torch.bucketize(scaled, _cuts(code), out_int32=True).to(torch.uint8)
    return [q.view(x.shape)], [absmax]


def _dequantise(q: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    return (code[q.view(-1, BLOCK).int()] * absmax[:, None]).view(q.shape)


def _ours_8bit(i: Inputs) -> None:
    ops.masked_adamw_8bit_(i.p, i.g, i.m, i.v, i.steps, [], i.a1, i.a2, i.code1, i.code2,
                           mask_kind="none", lr=i.lr, **HYPER)  # fmt: skip


def _eager_8bit(i: Inputs) -> None:
    p, g = i.p[0].float(), i.g[0].float()
    m = _dequantise(i.m[0], i.a1[0], i.code1)
    v = _dequantise(i.v[0], i.a2[0], i.code2)
    fused([p], [g], [m], [v], i.steps)
    i.p[0].copy_(p)
    for codes, absmax, x, code in ((i.m, i.a1, m, i.code1), (i.v, i.a2, v, i.code2)):
        q, a = _quantise(x, code)
        codes[0].copy_(q[0])
        absmax[0].copy_(a[0])


def _agree_8bit(got: Any, want: Any, i: Inputs) -> float:
    """p, absmax and the values that the codes stand for: a code may differ where two are as near."""
    values = []
    for p, m, v, a1, a2 in (got, want):
        values.append([p[0], a1[0], a2[0], _dequantise(m[0], a1[0], i.code1),
                       _dequantise(v[0], a2[0], i.code2)])  # fmt: skip
    return relative_error(*values)


def _bit8_case(dtype: torch.dtype) -> Case:
    n = _elements(BIG)
    return Case(
        op="masked_adamw_8bit_", variant="none", shape=BIG, dtype=dtype, mode="inplace", traffic="update",
        mutates=("p", "m", "v", "a1", "a2"), inputs=_bit8_inputs, agree=_agree_8bit,
        bytes=lambda s, size: _elements(s) * (3 * size + 4) + _elements(s) // BLOCK * 16,
        providers=[
            provider("tenfold", _ours_8bit), provider("eager:fused", _eager_8bit, scratch=40 * n),
        ],
        reference=_eager_8bit, tolerance=1e-3, quick=dtype == BF16,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    yield from _plain()
    yield from _steps()
    for kind in KINDS:
        yield _masked_case(kind, FP32, FP32)
    for block in (1024, 4096):  # longer runs of memory
        yield _masked_case("block", FP32, FP32, block=block)
    for kind in ("row", "element"):
        yield _masked_case(kind, BF16, BF16)
    yield _masked_case("element", FP32, FP32, compact=True)
    yield _masked_case("element", BF16, FP32, compact=True)
    for dtype in (FP32, BF16):
        yield _bit8_case(dtype)
