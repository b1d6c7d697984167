# SPDX-License-Identifier: Apache-2.0
"""``tenfold doctor``'s self-test: ops of every family against their definitions, on one device and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference


class Check:
    """One device and dtype: where inputs go, and what counts as equal."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.close = 1e-4 if dtype == torch.float32 else 2e-2

    def move(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device."""
        return tuple(t.to(self.device) for t in tensors)

    def near(self, got: Tensor, want: Tensor) -> bool:
        """Whether a result is the definition's within the dtype's rounding."""
        return torch.allclose(got.cpu().float(), want.float(), rtol=self.close, atol=self.close)


def wrong_op(device: str, dtype: torch.dtype) -> str:
    """The first op whose result differs from its definition, or ''."""
    check = Check(device, dtype)
    made = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 64, generator=made).to(dtype) for h, n in ((6, 24), (2, 200), (2, 200))
    )
    return (
        _kv_eviction(check, q, k, v) or _attention(check, q, k, v) or _optim(check, made)
        or _rl(check, made) or _loss(check, made) or _norm(check, made) or _pixels(check, made)
        or _influence(check, made) or _diffusion(check, made) or _corruption(check, made)
    )  # fmt: skip


def _kv_eviction(check: Check, q: Tensor, k: Tensor, v: Tensor) -> str:
    move, near = check.move, check.near
    scores = reference.proxy_scores(q.float(), k.float())[0]
    if not near(ops.proxy_scores(*move(q, k))[0], scores):
        return "proxy_scores"
    counts: dict[str, Any] = {"n_sink": 4, "n_recent": 8, "n_topk": 20, "n_random": 12, "seed": 1}
    idx, _ = reference.nacl_select(scores, **counts)
    if not torch.equal(ops.nacl_select(*move(scores), **counts)[0].cpu(), idx):
        return "nacl_select"
    want = reference.kv_gather(k, v, idx)
    if not all(torch.equal(g.cpu(), w) for g, w in zip(ops.kv_gather(*move(k, v, idx)), want)):
        return "kv_gather"
    mine = move(k.clone(), v.clone())
    ops.kv_compact_(*mine, *move(idx))
    if not all(torch.equal(m.cpu()[:, :, : idx.shape[-1]], w) for m, w in zip(mine, want)):
        return "kv_compact_"
    evicted = ops.nacl_evict(*move(q, k, v), **counts)
    if evicted[0].shape != want[0].shape or not bool(evicted[0].isfinite().all()):
        return "nacl_evict"
    flat_k, flat_v = (t.reshape(-1, 64).contiguous() for t in want)
    offsets = torch.arange(3) * idx.shape[-1]
    attended = reference.ragged_decode(
        q[:, :, -1:].float(), flat_k.float(), flat_v.float(), offsets
    )[0]
    if not near(
        ops.ragged_decode(*move(q[:, :, -1:].contiguous(), flat_k, flat_v, offsets))[0], attended
    ):
        return "ragged_decode"
    return ""


def _attention(check: Check, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Of q [1, 6, 24, 64], k and v [1, 2, 200, 64]."""
    move, near = check.move, check.near
    maps = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 0, 1])
    wide = q.float(), k.float(), v.float()
    out, lse = reference.dha_attention(*wide, *maps)
    (mine, keys, values), (kmap, vmap) = move(q, k, v), move(*maps)
    found, found_lse = ops.dha_attention(mine, keys, values, kmap, vmap)
    if not near(found, out) or not near(found_lse, lse):
        return "dha_attention"
    grads = ops.dha_attention_backward(mine, mine, keys, values, found, found_lse, kmap, vmap)
    want = reference.dha_attention_backward(wide[0], *wide, out, lse, *maps)
    if not all(near(g, w) for g, w in zip(grads, want)):
        return "dha_attention_backward"
    table, all_heads = torch.linspace(-1, 1, 96).view(32, 3), maps[0][:3] % 2
    rows = wide[0][:, :3], wide[1][:, all_heads], wide[2][:, all_heads]
    t5_out, t5_lse = reference.t5_attention(*rows, table, scale=0.125)
    t5 = ops.t5_attention(*move(*(x.to(q.dtype) for x in rows), table), scale=0.125)
    if not near(t5[0], t5_out) or not near(t5[1], t5_lse):
        return "t5_attention"
    newest = mine[:, :, -4:].contiguous()
    lens = torch.tensor([keys.shape[2]], dtype=torch.int32, device=keys.device)
    if not near(ops.dha_decode(newest, keys, values, kmap, vmap, lens)[0], out[:, :, -4:]):
        return "dha_decode"
    weights, groups = k[0].contiguous(), torch.tensor([[0, 1]], dtype=torch.int32)
    omega = torch.rand(1, 2, 2, 200, generator=torch.Generator().manual_seed(0))
    fused = ops.fuse_heads(*move(weights, omega, groups))
    if not near(fused, reference.fuse_heads(wide[1][0], omega, groups)):
        return "fuse_heads"
    return ""


def _optim(check: Check, made: torch.Generator) -> str:
    param, grad = (torch.randn(40, 24, generator=made).to(check.dtype) for _ in range(2))
    rows = torch.rand(40, generator=made) < 0.5
    settings: dict[str, Any] = {"mask_kind": "row", "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1,
                                "eps": 1e-8}  # fmt: skip

    def updated(module: Any, device: str) -> Tensor:
        own = [
            t.clone().to(device) for t in (param, grad, torch.zeros(40, 24), torch.zeros(40, 24))
        ]
        step, mask = torch.zeros((), device=device), reference.pack_mask(rows).to(device)
        lr = torch.tensor(1e-2, device=device)
        module.masked_adamw_(*([t] for t in own), [step], [mask], lr=lr, **settings)
        return own[0]

    if not check.near(updated(ops, check.device), updated(reference, "cpu")):
        return "masked_adamw_"
    norm = ops.grad_norm([*check.move(grad)])
    return "" if check.near(norm.reshape(()), grad.double().norm()) else "grad_norm"


def _rl(check: Check, made: torch.Generator) -> str:
    old, ref, value = (torch.randn(3, 50, generator=made) for _ in range(3))
    mask = torch.arange(50) < torch.tensor([50, 31, 7])[:, None]
    score = torch.randn(3, generator=made)
    seg, nseg = reference.macro_segment_fixed(mask, 5)
    (there,) = check.move(mask)
    found = ops.macro_segment_fixed(there, 5)
    if not all(torch.equal(f.cpu(), w) for f, w in zip(found, (seg, nseg))):
        return "macro_segment_fixed"
    want = reference.ma_ppo_prepare(old, ref, value, score, seg, nseg)
    a, b, c, d = check.move(old, ref, value, score)
    got = ops.ma_ppo_prepare(a, b, c, d, *found)
    if not all(check.near(g, w) for g, w in zip(got, want)):
        return "ma_ppo_prepare"
    loss = ops.ma_ppo_policy_loss(b, a, got[0], found[0])[0]
    if not check.near(loss, reference.ma_ppo_policy_loss(ref, old, want[0], seg)[0]):
        return "ma_ppo_policy_loss"
    return ""


def _loss(check: Check, made: torch.Generator) -> str:
    logits = torch.randn(5, 1003, generator=made).to(check.dtype)
    ids = torch.tensor([3, 1002, 0, -100, 500])
    want = reference.selective_logprob(logits.float(), ids)
    if not all(
        check.near(g, w) for g, w in zip(ops.selective_logprob(*check.move(logits, ids)), want)
    ):
        return "selective_logprob"
    return ""


def _norm(check: Check, made: torch.Generator) -> str:
    x, residual = (torch.randn(5, 96, generator=made).to(check.dtype) for _ in range(2))
    weight = torch.rand(96, generator=made).to(check.dtype)
    want = reference.rms_norm(x.float(), residual.float(), weight.float())
    if not all(
        check.near(g, w) for g, w in zip(ops.rms_norm(*check.move(x, residual, weight)), want)
    ):
        return "rms_norm"
    if not check.near(ops.swiglu(*check.move(x, residual)), reference.swiglu(x, residual)):
        return "swiglu"
    if not check.near(ops.gated_gelu(*check.move(x, residual)), reference.gated_gelu(x, residual)):
        return "gated_gelu"
    return ""


def _pixels(check: Check, made: torch.Generator) -> str:
    image = torch.randint(0, 256, (2, 16, 80, 3), generator=made, dtype=torch.uint8)
    (there,) = check.move(image)
    patches = ops.patchify_u8(there, normalize=True, dtype=check.dtype)
    if not check.near(patches, reference.patchify_u8(image, normalize=True)):
        return "patchify_u8"
    if not torch.equal(ops.unpatchify(ops.patchify_u8(there), 16, 16, 80, channels="last"), there):
        return "unpatchify"
    pred = torch.randn(2, 5, 768, generator=made).to(check.dtype)
    mask = ops.patch_mask(torch.tensor([3, 4]), 5)
    loss = ops.patch_mse(*check.move(pred, image, mask))[0]
    return "" if check.near(loss, reference.patch_mse(pred, image, mask)[0]) else "patch_mse"


def _influence(check: Check, made: torch.Generator) -> str:
    factors = 0.1 * torch.randn(3, 9, 21, generator=made)
    factors = factors.to(torch.bfloat16 if check.dtype == torch.bfloat16 else torch.float32)
    order = torch.randint(-1, 9, (2, 12, 4), generator=made)
    y0 = torch.randn(2, 2, 21, generator=made)
    want = reference.markov_scan(factors, order, y0, True)
    factors, order, y0 = check.move(factors, order, y0)
    if not check.near(ops.markov_scan(factors, order, y0, True), want):
        return "markov_scan"
    J, X = (torch.randn(3, 5, n, generator=made).to(check.dtype) for n in (40, 24))
    scores = reference.outer_dot(J, X, J, X) / 1e3
    return "" if check.near(ops.outer_dot(*check.move(J, X, J, X)) / 1e3, scores) else "outer_dot"


def _diffusion(check: Check, made: torch.Generator) -> str:
    x0, noise = (torch.randn(2, 3, 40, generator=made).to(check.dtype) for _ in range(2))
    t, move, near = torch.tensor([0.3, 0.8]), check.move, check.near
    z, v = reference.vdiff_noise(x0, t, noise)
    if not all(map(near, ops.vdiff_noise(*move(x0, t, noise)), (z, v))):
        return "vdiff_noise"
    drawn, (there, times) = reference.vdiff_noise_rng(x0, t, 5, 6), move(x0, t)
    if not all(map(near, ops.vdiff_noise_rng(there, times, 5, 6), drawn)):
        return "vdiff_noise_rng"
    if not near(ops.vdiff_loss(*move(v, x0, noise, t)), reference.vdiff_loss(v, x0, noise, t)):
        return "vdiff_loss"
    g = torch.tensor(2.0)
    want = reference.vdiff_step(z, v, noise, t, t / 2, g)
    if not all(map(near, ops.vdiff_step(*move(z, v, noise, t, t / 2, g)), want)):
        return "vdiff_step"
    if not near(ops.fir_down2(*move(x0)), reference.fir_down2(x0)):
        return "fir_down2"
    short = x0[..., :20]
    if not near(ops.fir_up2_cat(*move(short, noise)), reference.fir_up2_cat(short, noise)):
        return "fir_up2_cat"
    weight, bias = torch.ones(3).to(check.dtype), torch.zeros(3).to(check.dtype)
    if not near(ops.gn1_gelu(*move(x0, weight, bias))[0], reference.gn1_gelu(x0, weight, bias)[0]):
        return "gn1_gelu"
    planes, kernel = noise[:, :, 0], torch.randn(4, 6, 5, generator=made).to(check.dtype) / 6
    made_here = ops.conv1d_planes(*move(x0, planes, kernel))
    want_there = reference.conv1d_planes(x0.float(), planes.float(), kernel.float())
    return "" if near(made_here, want_there) else "conv1d_planes"


def _corruption(check: Check, made: torch.Generator) -> str:
    tokens, lengths = torch.randint(2, 900, (3, 90), generator=made), torch.tensor([90, 31, 1])
    rule, ids = (0.15, 3.0, 5, 6), (999, 50, 1, 0)
    mask = reference.span_mask(lengths, 90, *rule)
    sides = reference.span_corrupt(tokens, lengths, mask, *ids, 90, 40)
    row = torch.tensor([0, 4, 30])
    pairs = (tokens[0], row, tokens[1], row, tokens[2], row // 2)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("span_mask", (lengths, 90, *rule)),
        ("span_corrupt", (tokens, lengths, mask, *ids, 90, 40)),
        ("span_corruption", (tokens, lengths, *rule, *ids, 90, 40)),
        ("span_restore", (*sides, *ids[:3])),
        ("pair_pack", (*pairs, 1, 0, 20, 20)),
        ("shift_right", (tokens,)),
    ]  # fmt: skip
    for name, args in calls:
        there = [a.to(check.device) if isinstance(a, Tensor) else a for a in args]
        got, want = getattr(ops, name)(*there), getattr(reference, name)(*args)
        both = [x if isinstance(x, tuple) else (x,) for x in (got, want)]
        if not all(torch.equal(g.cpu(), w) for g, w in zip(*both, strict=True)):
            return name
    return ""
