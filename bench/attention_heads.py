# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the head operations of ``attention``: one layer's K or V projection, and the tables.

``llama`` is 32 heads of 128 over a width of 4096, ``smollm2`` 9 of 64 over 576. Bytes count each input
once and each output once; FLOPs are those of the definition, of ``head_cka`` those of its lower half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider

LLAMA = {"h": 32, "d": 128, "m": 4096}
SMOLLM2 = {"h": 9, "d": 64, "m": 576}
DTYPES = (torch.float32, torch.bfloat16)
PEAK = {torch.float32: "fma_fp32", torch.bfloat16: "dot_bf16"}
# Sizes of a group: a 25 % budget, a 12.5 % one, and the search, where a layer is one group.
GROUPINGS = [("llama", LLAMA, 4), ("llama", LLAMA, 8), ("llama-search", LLAMA, 32),
             ("smollm2", SMOLLM2, 3), ("smollm2-search", SMOLLM2, 9)]  # fmt: skip


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    h, g = s["h"], s["g"]
    omega = torch.eye(g)[None, :, :, None] + 0.1 * torch.randn(h // g, g, g, s["d"], generator=made)
    return Inputs(
        w=torch.randn(h, s["d"], s["m"], generator=made).to(device, dtype),
        omega=omega.to(device),
        groups=torch.randperm(h, generator=made).view(h // g, g).to(device),
        dout=torch.randn(h // g, g, s["d"], s["m"], generator=made).to(device, dtype),
    )


def _w_bytes(s: Shape, size: int) -> int:
    return s["h"] * s["d"] * s["m"] * size


def _omega_bytes(s: Shape) -> int:
    return 4 * s["h"] * s["g"] * s["d"]


def _flops(s: Shape) -> int:
    return 2 * s["h"] * s["g"] * s["d"] * s["m"]


# -- fuse_heads and its backward ---------------------------------------------------------------------


def _by_dim(x: Tensor) -> Tensor:
    """[N, g, d, m] with the dim before the heads: a batch of small matrices."""
    return x.transpose(1, 2)


def bmm_fuse(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    """A batch of [g, g] x [g, m] products over (group, dim)."""
    mixed = torch.matmul(omega.permute(0, 3, 1, 2).to(w.dtype), _by_dim(w[groups]))
    return _by_dim(mixed).contiguous()


def add_fuse(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    """Head by head, in place: no intermediate of more than the output."""
    n, g = groups.shape
    out = w.new_empty((n, g, *w.shape[1:]))
    x, by = w[groups], omega.to(w.dtype)[..., None]
    for h in range(g):
        torch.mul(x[:, 0], by[:, h, 0], out=out[:, h])
        for j in range(1, g):
            out[:, h].addcmul_(x[:, j], by[:, h, j])
    return out


def bmm_backward(i: Inputs) -> tuple[Tensor, Tensor]:
    grad, x = _by_dim(i.dout), _by_dim(i.w[i.groups])
    by = i.omega.permute(0, 3, 2, 1).to(i.w.dtype)
    dw = torch.empty_like(i.w)
    dw[i.groups.flatten()] = _by_dim(torch.matmul(by, grad)).flatten(0, 1)
    domega = torch.matmul(grad, x.transpose(-1, -2)).float()
    return dw, domega.permute(0, 2, 3, 1).contiguous()


def _as_float(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return i.w.float(), i.omega, i.groups


def _gradients(i: Inputs) -> tuple[Tensor, Tensor]:
    """By the definition, in float32."""
    grad, x = i.dout.float(), i.w.float()[i.groups]
    dw = torch.empty_like(i.w, dtype=torch.float32)
    dw[i.groups.flatten()] = torch.einsum("nhji,nhim->njim", i.omega, grad).flatten(0, 1)
    return dw, torch.einsum("nhim,njim->nhji", grad, x)


def _fuse_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, sizes, g in GROUPINGS:
            # bf16 rounds omega in the eager forms; tenfold keeps it float32.
            common = {"variant": name, "shape": {**sizes, "g": g}, "dtype": dtype, "inputs": _inputs,
                      "tolerance": 1e-4 if dtype == torch.float32 else 2e-2,
                      "quick": sizes is SMOLLM2}  # fmt: skip
            yield Case(
                op="fuse_heads", flops=_flops, peak="fma_fp32",
                bytes=lambda s, size: 2 * _w_bytes(s, size) + _omega_bytes(s),
                providers=[
                    provider("tenfold", lambda i: ops.fuse_heads(i.w, i.omega, i.groups)),
                    provider("eager:bmm", lambda i: bmm_fuse(i.w, i.omega, i.groups)),
                    *([provider("eager:addcmul", lambda i: add_fuse(i.w, i.omega, i.groups))]
                      if g <= 9 else []),
                    *([compiled(lambda i: bmm_fuse(i.w, i.omega, i.groups))] if g < 32 else []),
                    provider("clone", lambda i: i.w.clone(), "bound"),
                ],
                reference=lambda i: reference.fuse_heads(*_as_float(i)), **common,
            )  # fmt: skip
            yield Case(
                op="fuse_heads_backward", flops=lambda s: 2 * _flops(s), peak="fma_fp32",
                bytes=lambda s, size: 3 * _w_bytes(s, size) + 2 * _omega_bytes(s),
                providers=[
                    provider("tenfold",
                             lambda i: ops.fuse_heads_backward(i.dout, i.w, i.omega, i.groups)),
                    provider("eager:bmm", bmm_backward),
                    *([compiled(bmm_backward)] if g < 32 else []),
                ],
                reference=_gradients, **common,
            )  # fmt: skip


# -- collapse_heads ----------------------------------------------------------------------------------


def bmm_collapse(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    mean = omega.mean(1).permute(0, 2, 1)[:, :, None].to(w.dtype)  # [N, d, 1, g]
    return torch.matmul(mean, _by_dim(w[groups])).squeeze(2)


def sum_collapse(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    mean = omega.mean(1).to(w.dtype)[..., None]
    out = w[groups[:, 0]] * mean[:, 0]
    for j in range(1, groups.shape[1]):
        out.addcmul_(w[groups[:, j]], mean[:, j])
    return out


def _collapse_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, sizes, g in GROUPINGS:
            if "search" in name:
                continue
            yield Case(
                op="collapse_heads", variant=name, shape={**sizes, "g": g}, dtype=dtype,
                inputs=_inputs,
                bytes=lambda s, size: _w_bytes(s, size) * (s["g"] + 1) // s["g"] + _omega_bytes(s),
                flops=lambda s: 2 * s["h"] * s["d"] * s["m"], peak="fma_fp32",
                providers=[
                    provider("tenfold", lambda i: ops.collapse_heads(i.w, i.omega, i.groups)),
                    provider("eager:bmm", lambda i: bmm_collapse(i.w, i.omega, i.groups)),
                    provider("eager:addcmul", lambda i: sum_collapse(i.w, i.omega, i.groups)),
                    compiled(lambda i: sum_collapse(i.w, i.omega, i.groups)),
                ],
                reference=lambda i: reference.collapse_heads(*_as_float(i)),
                tolerance=1e-4 if dtype == torch.float32 else 2e-2, quick=sizes is SMOLLM2,
            )  # fmt: skip


# -- fusion_mse --------------------------------------------------------------------------------------


def _omega_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    n, g = s["n"], s["g"]
    return Inputs(
        omega=torch.randn(n, g, g, s["d"], generator=made).to(device, dtype),
        dout=torch.rand(n, generator=made).to(device),
    )


def var_mse(omega: Tensor) -> Tensor:
    """Unbiased variance over heads, twice: the pair mean of squared differences."""
    return 2 * omega.var(1).mean((1, 2))


def square_mse(omega: Tensor) -> Tensor:
    """The textbook closed form: g * sum of squares - square of the sum."""
    _, g, _, d = omega.shape
    squares = torch.einsum("nhji,nhji->n", omega, omega)
    total = omega.sum(1)
    apart = g * squares - torch.einsum("nji,nji->n", total, total)
    return apart * (2 / (g * (g - 1) * g * d))


def var_backward(i: Inputs) -> Tensor:
    g, d = i.omega.shape[1], i.omega.shape[3]
    apart = i.omega - i.omega.mean(1, keepdim=True)
    return apart.mul_((4 / ((g - 1) * g * d) * i.dout)[:, None, None, None])


def _mse_cases() -> Iterator[Case]:
    for name, n, g, d in (("llama", 512, 4, 128), ("llama-search", 64, 32, 128),
                          ("smollm2", 180, 3, 64)):  # fmt: skip
        common = {"variant": name, "shape": {"n": n, "g": g, "d": d}, "dtype": torch.float32,
                  "inputs": _omega_inputs, "tolerance": 1e-4, "quick": name == "smollm2"}  # fmt: skip
        yield Case(
            op="fusion_mse", bytes=lambda s, size: size * s["n"] * s["g"] ** 2 * s["d"],
            providers=[
                provider("tenfold", lambda i: ops.fusion_mse(i.omega)),
                provider("eager:squares", lambda i: square_mse(i.omega)),
                provider("eager:var", lambda i: var_mse(i.omega)),
                compiled(lambda i: square_mse(i.omega)),
            ],
            reference=lambda i: var_mse(i.omega.double()), **common,
        )  # fmt: skip
        yield Case(
            op="fusion_mse_backward",
            bytes=lambda s, size: 2 * size * s["n"] * s["g"] ** 2 * s["d"],
            providers=[
                provider("tenfold", lambda i: ops.fusion_mse_backward(i.dout, i.omega)),
                provider("eager:mean", var_backward),
                compiled(var_backward),
            ],
            reference=var_backward, **common,
        )  # fmt: skip


# -- head_cka ----------------------------------------------------------------------------------------


def whole_cka(w: Tensor) -> Tensor:
    """One matrix product, the whole Gram matrix."""
    h, d, m = w.shape
    flat = w.reshape(h * d, m)
    squares = torch.mm(flat, flat.T).float().view(h, d, h, d).square_().sum((1, 3))
    norm = squares.diagonal().sqrt()
    return squares / (norm * norm[:, None])


def half_cka(w: Tensor) -> Tensor:
    """A product per head with the heads up to it: half of the work."""
    h, d, m = w.shape
    flat, squares = w.reshape(h * d, m), w.new_empty((h, h), dtype=torch.float32)
    for a in range(h):
        gram = torch.mm(flat[: (a + 1) * d], w[a].T).float()
        squares[a, : a + 1] = squares[: a + 1, a] = gram.view(a + 1, d, d).square_().sum((1, 2))
    norm = squares.diagonal().sqrt()
    return squares / (norm * norm[:, None])


def _cka_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, sizes in (("llama", LLAMA), ("smollm2", SMOLLM2)):
            gram = 4 * (sizes["h"] * sizes["d"]) ** 2
            yield Case(
                op="head_cka", variant=name, shape={**sizes, "g": 1}, dtype=dtype, inputs=_inputs,
                bytes=lambda s, size: _w_bytes(s, size) + 4 * s["h"] ** 2,
                flops=lambda s: s["h"] * (s["h"] + 1) * s["d"] ** 2 * s["m"], peak=PEAK[dtype],
                providers=[
                    provider("tenfold", lambda i: ops.head_cka(i.w)),
                    provider("eager:gram", lambda i: whole_cka(i.w), scratch=gram),
                    provider("eager:rows", lambda i: half_cka(i.w)),
                    compiled(lambda i: whole_cka(i.w), scratch=gram),
                ],
                reference=lambda i: whole_cka(i.w.float()),
                tolerance=1e-4 if dtype == torch.float32 else 2e-2, quick=sizes is SMOLLM2,
            )  # fmt: skip


# -- group_heads, allocate_heads ---------------------------------------------------------------------


def _dist_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Planted groups: 0.1 inside, 0.5 outside, noise. Of plain noise every run has its own optimum."""
    made = torch.Generator().manual_seed(0)
    member = torch.randperm(s["h"], generator=made) % s["n"]
    noise = 0.02 * torch.randn(s["h"], s["h"], generator=made)
    dist = torch.where(member[:, None] == member, 0.1, 0.5) + (noise + noise.T) / 2
    return Inputs(dist=dist.to(device, dtype))


def _inside(groups: Tensor, dist: Tensor) -> Tensor:
    """Distance inside the groups, counted twice."""
    at = groups.long()
    return dist[at[:, :, None], at[:, None, :]].sum() - dist.diagonal().sum()


def torch_swaps(dist: Tensor, n: int, restarts: int = 20) -> Tensor:
    """The same descent with all swaps of a step evaluated at once."""
    h = dist.shape[0]
    both = (dist + dist.T) / 2
    both.fill_diagonal_(0.0)
    made, best, least = torch.Generator().manual_seed(0), torch.arange(h), float("inf")
    for run in range(restarts):
        order = torch.randperm(h, generator=made) if run else torch.arange(h)
        member = torch.empty(h, dtype=torch.int64)
        member[order] = torch.arange(n).repeat_interleave(h // n)
        while True:
            to = both @ torch.nn.functional.one_hot(member, n).to(both.dtype)
            cross = to[:, member]  # [a, b]: a to the group of b
            own = cross.diagonal()
            change = cross + cross.T - own[:, None] - own[None, :] - 2 * both
            change[member[:, None] == member] = 0.0
            at = int(change.argmin())
            if float(change.view(-1)[at]) > -1e-6:
                break
            a, b = divmod(at, h)
            member[[a, b]] = member[[b, a]]
        cost = float((both * (member[:, None] == member)).sum())
        if cost < least:
            best, least = member.clone(), cost
    return best.argsort(stable=True).view(n, -1)


def _as_good(got: Tensor, want: Tensor, i: Inputs) -> float:
    """Heuristics end in different partitions: the cost is at most 2 % above that of the reference."""
    if got.flatten().sort().values.tolist() != list(range(i.dist.shape[0])):
        return float("inf")
    return max(0.0, float(_inside(got.cpu(), i.dist.cpu()) / _inside(want.cpu(), i.dist.cpu())) - 1)


def _cost_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    cost = torch.rand(s["c"], s["k"], generator=made).sort(-1, descending=True).values
    return Inputs(cost=cost.to(device, dtype), sizes=(2 ** torch.arange(s["k"])).to(device))


def torch_knapsack(cost: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """The dynamic programme with all budgets of a component at once."""
    cost, heads = cost.double().cpu(), sizes.tolist()
    least = torch.full((budget + 1,), float("inf"), dtype=torch.float64)
    least[0] = 0.0
    chosen = []
    for costs in cost:
        shifted = [torch.cat([least.new_full((n,), float("inf")), least[: budget + 1 - n]]) + c
                   for n, c in zip(heads, costs)]  # fmt: skip
        least, choice = torch.stack(shifted).min(0)
        chosen.append(choice)
    spent = int((least == least.min()).nonzero()[-1])
    out = []
    for choice in reversed(chosen):
        out.append(heads[int(choice[spent])])
        spent -= out[-1]
    return torch.tensor(out[::-1], dtype=torch.int32)


def _table_cases() -> Iterator[Case]:
    for name, h, n in (("llama", 32, 8), ("smollm2", 9, 3), ("wide", 128, 32)):
        yield Case(
            op="group_heads", variant=name, shape={"h": h, "n": n}, dtype=torch.float32,
            inputs=_dist_inputs, bytes=lambda s, size: size * s["h"] ** 2 + 4 * s["h"],
            providers=[
                provider("tenfold", lambda i, n=n: ops.group_heads(i.dist, n)),
                provider("eager:torch", lambda i, n=n: torch_swaps(i.dist.cpu(), n), graph=False),
            ],
            reference=lambda i, n=n: ops.group_heads(i.dist, n, restarts=100), agree=_as_good,
            tolerance=0.02, quick=name == "smollm2",
        )  # fmt: skip
    yield Case(
        op="allocate_heads", variant="llama", shape={"c": 64, "k": 6, "budget": 512},
        dtype=torch.float32, inputs=_cost_inputs,
        bytes=lambda s, size: size * s["c"] * s["k"] + 4 * s["c"],
        providers=[
            provider("tenfold", lambda i: ops.allocate_heads(i.cost, i.sizes, 512)),
            provider("eager:torch", lambda i: torch_knapsack(i.cost, i.sizes, 512), graph=False),
        ],
        reference=lambda i: torch_knapsack(i.cost, i.sizes, 512), tolerance=0.0, quick=True,
    )  # fmt: skip


def cases() -> list[Case]:
    """All cases of the group, in the order of the table."""
    made: tuple[Callable[[], Iterator[Case]], ...] = (
        _fuse_cases, _collapse_cases, _mse_cases, _cka_cases, _table_cases,
    )  # fmt: skip
    return [case for part in made for case in part()]
