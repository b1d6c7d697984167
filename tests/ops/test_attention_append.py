# SPDX-License-Identifier: Apache-2.0
"""dha_cache_append_ against its definition."""

import functools

import pytest
import torch
from torch.utils import _pytree as pytree

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    assert_close_to_ref,
    check_cuda_graph,
    check_errors,
    check_op,
    fill,
    layout,
    on,
)
from tenfold.testing.plugin import cuda_only

O = torch.ops.tenfold  # noqa: E741


def equal(got, want):
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, want, strict=True))


def caches(b, hk, hv, length, d, dv, dtype, seed=0):
    k, v = ((b, hk, length, d), (b, hv, length, dv))
    return fill(k, dtype, seed=seed + 1), fill(v, dtype, seed=seed + 2)


def angles(b, s, d, dtype=torch.float32, seed=0):
    turned = fill((b, s, d // 2), torch.float32, seed=seed)
    both = torch.cat([turned, turned], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def new_tokens(b, hk, hv, s, d, dv, dtype):
    return fill((b, hk, s, d), dtype, seed=7), fill((b, hv, s, dv), dtype, seed=8)


APPENDS = {  # cache shapes of HK 3, HV 2, D 16, DV 6, and slots [B, S] = [2, 4]
    "contiguous": ((2, 3, 20, 16), (2, 2, 20, 6), [[3, -1, 0, 19], [3, 4, 5, 6]], {}),
    "paged": ((7, 5, 3, 16), (7, 5, 2, 6), [[34, -1, 0, 19], [3, 4, 5, -1]], {"paged": True}),
    "ragged": ((33, 3, 16), (33, 2, 6), [[32, -1, 0, 19], [3, -1, 5, 6]], {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [None, "shared", "per sequence", "float32"])
@pytest.mark.parametrize("name", APPENDS)
def test_append(name, rotate, dtype, device):
    k_shape, v_shape, slots, kwargs = APPENDS[name]
    k, v = new_tokens(2, 3, 2, 4, 16, 6, dtype)
    if rotate:
        kind = torch.float32 if rotate == "float32" else dtype
        cos, sin = angles(1 if rotate == "shared" else 2, 4, 16, kind)
        kwargs = kwargs | {"cos": cos, "sin": sin}
    for index_dtype in (torch.int32, torch.int64):
        at = torch.tensor(slots, dtype=index_dtype)
        old = fill(k_shape, dtype, seed=1), fill(v_shape, dtype, seed=2)
        mine = on(device, tuple(x.clone() for x in old))
        ops.dha_cache_append_(*mine, *on(device, (k, v, at)), **on(device, kwargs))
        low = tuple(x.clone() for x in old)
        reference.dha_cache_append_(*low, k, v, at, **kwargs)
        exact = tuple(x.double() for x in old)
        wide = pytree.tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, kwargs)
        reference.dha_cache_append_(*exact, k.double(), v.double(), at, **wide)
        assert torch.equal(mine[1].cpu(), low[1])
        assert_close_to_ref(mine[0].cpu(), exact[0], low[0])
        untouched = exact[0] == old[0]
        assert torch.equal(mine[0].cpu()[untouched], old[0][untouched])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_append_layouts(kind, device):
    k_cache, v_cache = caches(2, 3, 2, 20, 16, 6, torch.bfloat16)
    k, v = new_tokens(2, 3, 2, 4, 16, 6, torch.bfloat16)
    cos, sin = angles(1, 4, 16)
    slots = torch.tensor([[3, -1, 0, 19], [3, 4, 5, 6]])
    want = k_cache.clone(), v_cache.clone()
    reference.dha_cache_append_(*want, k, v, slots, cos=cos, sin=sin)
    mine = [layout(x.to(device).clone(), kind) for x in (k_cache, v_cache)]
    new = [layout(x.to(device), kind) for x in (k, v)]
    turned = [x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in (cos, sin)]
    at = slots.t().contiguous().to(device).t()
    ops.dha_cache_append_(*mine, *new, at, cos=turned[0], sin=turned[1])
    assert torch.equal(mine[1].cpu(), want[1])
    torch.testing.assert_close(mine[0].cpu(), want[0], atol=2e-2, rtol=1e-2)


def test_append_rotation_is_that_of_transformers(device):
    """k * cos + rotate_half(k) * sin, and it does not change lengths."""
    k, v = new_tokens(1, 3, 2, 4, 64, 64, torch.float32)
    cos, sin = angles(1, 4, 64)
    caches_ = [torch.zeros(1, h, 9, 64, device=device) for h in (3, 2)]
    slots = torch.tensor([[5, 6, 7, 8]], device=device)
    ops.dha_cache_append_(
        *caches_, *on(device, (k, v)), slots, *(), **on(device, {"cos": cos, "sin": sin})
    )
    half = torch.cat([-k[..., 32:], k[..., :32]], -1)
    got = caches_[0].cpu()[:, :, 5:]
    torch.testing.assert_close(got, k * cos[:, None] + half * sin[:, None], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.norm(dim=-1), k.norm(dim=-1))
    assert not caches_[0][:, :, :5].any() and torch.equal(caches_[1].cpu()[:, :, 5:], v)


@pytest.mark.parametrize("b, s", [(0, 4), (2, 0)])
def test_append_nothing(b, s, device):
    k_cache, v_cache = on(device, caches(b, 3, 2, 20, 16, 6, torch.float32))
    before = k_cache.clone(), v_cache.clone()
    k, v = on(device, new_tokens(b, 3, 2, s, 16, 6, torch.float32))
    ops.dha_cache_append_(
        k_cache, v_cache, k, v, torch.zeros(b, s, dtype=torch.int64, device=device)
    )
    assert equal((k_cache, v_cache), before)


@pytest.mark.parametrize("name", APPENDS)
def test_append_standing_checks(name, device):
    k_shape, v_shape, slots, kwargs = APPENDS[name]
    k, v = new_tokens(2, 3, 2, 4, 16, 6, torch.bfloat16)
    old = fill(k_shape, torch.bfloat16, seed=1), fill(v_shape, torch.bfloat16, seed=2)
    cos, sin = angles(2, 4, 16)
    args = on(device, (*old, k, v, torch.tensor(slots)))
    kwargs = on(device, kwargs | {"cos": cos, "sin": sin})
    check_op(O.dha_cache_append_.default, args, kwargs, mutates=True, atol=2e-2, rtol=1e-2)


@cuda_only
def test_append_cuda_graph_and_slots_out_of_range(device):
    """Replays follow changed rows and slots; slots that are not there are skipped."""

    def call(k_cache, v_cache, k, v, slots, **kwargs):
        ops.dha_cache_append_(k_cache, v_cache, k, v, slots, **kwargs)
        return k_cache.clone(), v_cache.clone()

    def inputs(seed, slots):
        cos, sin = angles(2, 2, 64, seed=seed)
        pools = fill((6, 8, 3, 64), torch.bfloat16), fill((6, 8, 2, 64), torch.bfloat16)
        new = (fill((2, h, 2, 64), torch.bfloat16, seed=seed + h) for h in (3, 2))
        return on(
            device, ((*pools, *new, torch.tensor(slots)), {"paged": True, "cos": cos, "sin": sin})
        )

    check_cuda_graph(call, *inputs(1, [[0, 47], [9, -1]]), *inputs(5, [[48, 3], [2**40, -7]]))


def check_bad_append(device, error, *words, kwargs=None, **replaced):
    good = dict(zip(("k_cache", "v_cache"), caches(2, 3, 2, 20, 16, 6, torch.float32)))
    good |= dict(zip(("k", "v"), new_tokens(2, 3, 2, 4, 16, 6, torch.float32)))
    good["slots"] = torch.tensor([[3, -1, 0, 19], [3, 4, 5, 6]])
    args = tuple({**good, **replaced}.values())
    check_errors(ops.dha_cache_append_, O.dha_cache_append_, on(device, args), on(device, kwargs or {}),
                 error, "tenfold::dha_cache_append_", *words)  # fmt: skip


def test_append_bad_input(device):
    bad = functools.partial(check_bad_append, device)
    k_cache, v_cache = on(device, caches(2, 3, 2, 20, 16, 6, torch.float32))
    k, v = new_tokens(2, 3, 2, 4, 16, 6, torch.float32)
    bad(ValueError, "k", "dtype", k=k.half())
    bad(ValueError, "v", "dtype", v=v.bfloat16())
    bad(TypeError, "k_cache", "float64", k_cache=k_cache.double(), v_cache=v_cache.double())
    bad(ValueError, "k", "[2, 3, 4, 16]", "[2, 2, 4, 16]", k=k[:, :2])
    bad(ValueError, "v", "[2, 2, 4, 6]", "[2, 2, 3, 6]", v=v[:, :, :3])
    bad(ValueError, "v_cache", "same tokens", v_cache=v_cache[:, :, :19])
    bad(ValueError, "agree in B", k_cache=k_cache[:1], v_cache=v_cache[:1])
    bad(ValueError, "slots", "[B, S] = [2, 4]", slots=torch.zeros(2, 3, dtype=torch.int64))
    bad(TypeError, "slots", "float32", slots=torch.zeros(2, 4))
    cos, sin = angles(2, 4, 16)
    bad(ValueError, "together", kwargs={"cos": cos})
    bad(ValueError, "sin", "dtype", kwargs={"cos": cos, "sin": sin.half()})
    bad(
        ValueError,
        "cos",
        "[2, 4, 16]",
        "[2, 4, 8]",
        kwargs={"cos": cos[..., :8], "sin": sin[..., :8]},
    )
    odd = {"k_cache": k_cache[..., :15], "k": k[..., :15]}
    bad(ValueError, "even", kwargs={"cos": cos[..., :15], "sin": sin[..., :15]}, **odd)
    new = on(device, (k, v, torch.zeros(2, 4, dtype=torch.int64)))
    faces = ops.dha_cache_append_, O.dha_cache_append_
    wide = k_cache[:, :1].expand(2, 3, 20, 16)
    check_errors(*faces, (wide, v_cache, *new), {}, ValueError, "k_cache", "overlap")
    turned = v_cache.transpose(-1, -2).contiguous().transpose(-1, -2)
    check_errors(*faces, (k_cache, turned, *new), {}, ValueError, "v_cache", "last dimension")
    same = (k_cache, k_cache[:, :2], new[0], new[0][:, :2].contiguous(), new[2])
    check_errors(*faces, same, {}, ValueError, "share memory")
    with pytest.raises(RuntimeError, match="inference only"):
        ops.dha_cache_append_(k_cache, v_cache, new[0].clone().requires_grad_(), *new[1:])


def test_append_bad_slots():
    """CPU only: CUDA skips such tokens. Nothing is written, also not the tokens before."""
    bad = functools.partial(check_bad_append, "cpu")
    bad(
        IndexError,
        "slots[0][3]",
        "[0, 20)",
        "got 20",
        slots=torch.tensor([[3, 1, 0, 20], [3, 4, 5, 6]]),
    )
    bad(IndexError, "slots[1][0]", "got -2", slots=torch.tensor([[3, 1, 0, 2], [-2, 4, 5, 6]]))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_append_is_seen_by_autograd(device, mode):
    """A cache that was saved for a backward and written since must not be used silently."""
    with mode():
        k_cache, v_cache = on(device, caches(2, 3, 2, 20, 16, 6, torch.float32))
        new = on(device, new_tokens(2, 3, 2, 4, 16, 6, torch.float32))
        before = None if k_cache.is_inference() else (k_cache._version, v_cache._version)
        slots = torch.arange(8, device=device).view(2, 4)
        ops.dha_cache_append_(k_cache, v_cache, *new, slots)
    assert torch.equal(k_cache[0, :, :4], new[0][0])
    if before is not None:
        assert k_cache._version > before[0] and v_cache._version > before[1]
