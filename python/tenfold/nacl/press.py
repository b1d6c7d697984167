# SPDX-License-Identifier: Apache-2.0
"""Presses: context managers that evict the KV cache of a transformers model while it runs.

Inside ``with press(model):`` two hooks sit on every full-attention layer. Before the layer's forward
its cache layer is made one of ours and the mask is put right for what the cache still holds; after
it, when the prompt is in, the layer's cache is evicted. Attention itself always sees the full prompt.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import ops
from tenfold.integrations import transformers as hf
from tenfold.nacl.cache import NaclCache, NaclCacheLayer, RaggedCacheLayer, cache_bytes
from tenfold.nacl.config import BudgetPlan, NaclConfig
from tenfold.nacl.heads import SharedSets, adaptive_counts


@dataclass
class Stats:
    """What a press did: seconds spent evicting, evictions, bytes held before and after."""

    evict_seconds: float = 0.0
    evictions: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    lengths: list[int] = field(default_factory=list)


@dataclass
class _Rows:
    """The sequences of a batch on the physical slots: first valid slot, valid slots."""

    start: Tensor  # [B] int64, CPU
    lens: Tensor  # [B] int64, CPU

    @property
    def padded(self) -> bool:
        return bool((self.start != 0).any()) or bool((self.lens != self.lens[0]).any())


@dataclass
class Prefill:
    """A prompt's full cache and the post-RoPE queries of every layer, to be evicted by any press."""

    cache: Any
    queries: dict[int, Tensor]  # layer -> [B, Hq, L, D], or of the last tokens only
    logits: Tensor  # [B, V] of the last prompt token
    mask: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def run(
        cls,
        model: nn.Module,
        input_ids: Tensor,
        mask: Tensor | None = None,
        proxies: int | None = None,
    ) -> Prefill:
        """Runs a prompt once.

        Args:
            input_ids: [B, L]. mask: [B, L], 1 where a token is.
            proxies: keep the queries of so many of the last tokens only (default: of all): enough for rules
                without padding whose proxies are fewer, and it spares memory and time.

        Raises:
            ValueError: ``proxies`` below 1.
        """
        if proxies is not None and proxies < 1:
            raise ValueError(f"proxies must be >= 1 or None (all tokens), got {proxies}")
        found: dict[int, Tensor] = {}

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            hidden = hf.hidden_states(args, kwargs)
            last = min(proxies or hidden.shape[1], hidden.shape[1])
            found[module.layer_idx] = hf.queries(module, hidden[:, -last:], kwargs, last)

        layers = hf.attention_layers(model)
        hooks = [m.register_forward_hook(keep, with_kwargs=True) for m in layers]
        try:
            out = model(input_ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(hf.get_cache(dict(out)), found, out.logits[:, -1], mask)


class Press:
    """Base of all eviction methods; subclasses say how many tokens of each kind to keep.

    Usage: ``with NaclPress(compression_ratio=0.8)(model): model.generate(...)``.
    After it: ``press.stats`` and ``press.kept[layer]`` (original positions [B, Hkv, C];
    with decoupled heads [B, N, C], one set per component of the maps).
    """

    config: NaclConfig
    share_heads = False  # one index set for all heads of a layer

    def __init__(self, config: NaclConfig | None = None, **kwargs: Any) -> None:
        if config is not None and not isinstance(config, NaclConfig):
            raise TypeError(f"config must be a NaclConfig, got {type(config).__name__}")
        if config is None:
            preset = kwargs.pop("preset", "default")
            config = NaclConfig.from_preset(preset, **kwargs)
        elif kwargs:
            config = config.with_changes(**kwargs)
        self.config = config
        self.stats = Stats()
        self.kept: dict[int, Tensor] = {}
        self._model: nn.Module | None = None
        self._mask: Tensor | None = None
        self._cache: Any = None
        self._queries: dict[int, Tensor] = {}

    # -- what a method decides -------------------------------------------------------------------

    def plan(self, length: int) -> BudgetPlan | None:
        """The integers for a prompt of ``length`` tokens, or None to leave it alone."""
        return self.config.budget(length)

    @property
    def needs_scores(self) -> bool:
        """Does the rule look at attention at all?"""
        return True

    # -- context ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Press]:
        """Hooks ``model`` for the duration of the context; nothing global is changed."""
        layers = hf.attention_layers(model)
        self.stats, self.kept, self._model = Stats(), {}, model
        adaptive = self.config.head_budget == "adaptive"
        self._check_heads(layers)
        handles = [model.register_forward_pre_hook(self._before_model, with_kwargs=True)]
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after_layer, with_kwargs=True))
        with contextlib.ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            stack.callback(self._forget)
            if adaptive:
                stack.enter_context(hf.ragged_attention(model))
            yield self

    def _check_heads(self, layers: list[nn.Module]) -> None:
        if self.config.head_budget == "adaptive" and any(hasattr(m, "key_map") for m in layers):
            raise ValueError(
                'head_budget="adaptive" keeps a set of tokens of its own for every key head, but with '
                "decoupled heads (DHA) keys and values of a slot are shared by different query heads; "
                'use head_budget="uniform" (one set per connected component of the maps)'
            )

    def _forget(self) -> None:
        self._model = self._mask = self._cache = None
        self._queries.clear()

    def new_cache(self, model: nn.Module) -> NaclCache:
        """An empty cache for manual loops (``model(ids, past_key_values=cache)``)."""
        return NaclCache(config=model.config)

    # -- hooks -----------------------------------------------------------------------------------

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        cache = hf.get_cache(kwargs)
        shift = next(
            (
                layer.position_shift
                for layer in getattr(cache, "layers", [])
                if getattr(layer, "position_shift", None) is not None
            ),
            None,
        )
        if shift is None:
            return args, kwargs
        positions = kwargs.get("position_ids")
        if positions is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is None:
                ids = kwargs["inputs_embeds"]
            seen = cache.get_seq_length()
            positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)[None]
        return args, kwargs | {"position_ids": positions - shift[:, None].to(positions.device)}

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache = hf.get_cache(kwargs)
        if cache is None:
            return args, kwargs
        self._cache = cache
        hidden = hf.hidden_states(args, kwargs)
        count = hidden.shape[1]
        make = RaggedCacheLayer if self.config.head_budget == "adaptive" else NaclCacheLayer
        layer = hf.own_layer(cache, module.layer_idx, make)
        if self._waiting(layer) and count == 1 and layer.seen > 0:
            self._evict(module, layer, self._queries.pop(module.layer_idx, None))
        if not layer.evicted:
            return args, kwargs
        new = None if self._mask is None else self._mask[:, -count:].bool()
        if not isinstance(layer, RaggedCacheLayer):
            layer.note_append(new, count)
            mask = self._slot_mask(module, layer, count, hidden)
            kwargs = kwargs | {"attention_mask": mask}
        return args, kwargs

    def _slot_mask(
        self, module: nn.Module, layer: NaclCacheLayer, count: int, hidden: Tensor
    ) -> Tensor | None:
        """Mask over the physical slots and the new tokens: valid slots, causal among the new."""
        if layer.valid is None and count == 1:
            return None
        total = layer.physical + count
        row = torch.arange(count, device=hidden.device)[:, None] + layer.physical
        see = (torch.arange(total, device=hidden.device) <= row)[None, None]
        if layer.valid is not None:
            see = see & layer.valid[:, None, None, :]
        see = see.expand(hidden.shape[0], 1, count, total)
        return hf.as_mask(module, see, hidden.dtype)

    def _after_layer(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cache = hf.get_cache(kwargs)
        if cache is None:
            return
        layer = cache.layers[module.layer_idx]
        if not isinstance(layer, NaclCacheLayer):
            return
        hidden = hf.hidden_states(args, kwargs)
        count = hidden.shape[1]
        if layer.evicted:
            self._after_eviction(module, layer, hidden, kwargs, count)
            return
        keep_rows = self.config.chunked and not self.config.progressive
        if keep_rows:
            self._remember_queries(module, hidden, kwargs, layer)
            return
        if count > 1 or layer.seen == 1:
            self._evict(module, layer, self._queries_of(module, hidden, kwargs, layer))

    def _after_eviction(
        self, module: nn.Module, layer: NaclCacheLayer, hidden: Tensor, kwargs: dict, count: int
    ) -> None:
        c = self.config
        if count > 1 and (c.evict_on_append or c.progressive):
            self._evict(module, layer, self._queries_of(module, hidden, kwargs, layer), again=True)
        elif c.decode_interval is not None:
            recent = self._remember_queries(module, hidden, kwargs, layer, c.decode_interval)
            if layer.appended >= c.decode_interval:
                self._evict(module, layer, recent, again=True)
                self._queries.pop(module.layer_idx, None)

    def _waiting(self, layer: NaclCacheLayer) -> bool:
        return self.config.chunked and not self.config.progressive and not layer.evicted

    def finish(self, cache: Any) -> None:
        """Evicts now what a chunked prefill has collected (else the first single-token step does).

        Raises RuntimeError if the cache was evicted already and ``evict_on_append`` is off.
        """
        if self._model is None:
            raise RuntimeError("finish() must be called inside `with press(model):`")
        for module in hf.attention_layers(self._model):
            layer = cache.layers[module.layer_idx]
            if getattr(layer, "evicted", False) and not self.config.evict_on_append:
                raise RuntimeError(
                    "this cache is evicted already; set evict_on_append=True to evict it again"
                )
            self._evict(module, layer, self._queries.pop(module.layer_idx, None),
                        again=layer.evicted)  # fmt: skip

    @torch.no_grad()
    def evict_prefilled(self, model: nn.Module, prefill: Prefill) -> NaclCache:
        """Evicts a finished prefill without touching it: many rules can share one prompt run.

        Continue with the returned cache inside ``with press(model):``. Needs head_budget="uniform" or
        "adaptive" as usual; statistics and ``kept`` are those of this eviction.
        """
        self.stats, self.kept, self._model, self._mask = Stats(), {}, model, prefill.mask
        cache = self.new_cache(model)
        adaptive = self.config.head_budget == "adaptive"
        self._check_heads(hf.attention_layers(model))
        for module in hf.attention_layers(model):
            source = prefill.cache.layers[module.layer_idx]
            layer = hf.own_layer(
                cache, module.layer_idx, RaggedCacheLayer if adaptive else NaclCacheLayer
            )
            layer.lazy_initialization(source.keys, source.values)
            layer.keys, layer.values = source.keys, source.values
            layer.seen = source.keys.shape[-2]
            self._evict(module, layer, self._cut(layer, prefill.queries[module.layer_idx]))
        self._cache = cache
        return cache

    def _cut(self, layer: NaclCacheLayer, queries: Tensor) -> Tensor | None:
        """The newest of all prompt queries, as many as can be proxies."""
        rows = self._rows(layer, queries.shape[0])
        plan = self.plan(int(rows.lens.max())) if self.needs_scores else None
        if plan is None:
            return None
        all_of_them = rows.padded or self.config.proxy_span is not None
        want = layer.seen if all_of_them else plan.num_proxies
        if queries.shape[2] < want:
            raise ValueError(
                f"this rule looks at the queries of the last {want} tokens, but the prefill kept those of "
                f"{queries.shape[2]}: run it with proxies={want} or more, or without"
            )
        return queries if all_of_them else queries[:, :, -plan.num_proxies :]

    # -- queries ---------------------------------------------------------------------------------

    def _rows(self, layer: NaclCacheLayer, batch: int) -> _Rows:
        """Valid slots of each sequence, from the 2D attention mask (contiguous runs)."""
        physical = layer.physical
        valid = layer.valid
        if valid is None and self._mask is not None and not layer.evicted:
            valid = self._mask[:, :physical].bool()
        if valid is None:
            return _Rows(torch.zeros(batch, dtype=torch.int64), torch.full((batch,), physical))
        valid = valid.cpu()
        rows = _Rows(valid.to(torch.int8).argmax(1), valid.sum(1))
        slot = torch.arange(valid.shape[1])
        run = (slot >= rows.start[:, None]) & (slot < (rows.start + rows.lens)[:, None])
        if not torch.equal(run, valid):
            raise ValueError("attention_mask must have one unbroken run of ones in each row: a row's "
                             "padding stands before or after all of its tokens")  # fmt: skip
        return rows

    def _queries_of(
        self, module: nn.Module, hidden: Tensor, kwargs: dict, layer: NaclCacheLayer
    ) -> Tensor | None:
        """Post-RoPE queries of the newest tokens that can be proxies, [B, Hq, n, D]."""
        if not self.needs_scores:
            return None
        rows = self._rows(layer, hidden.shape[0])
        plans = [p for p in self._plans(layer, rows, layer.evicted) if p is not None]
        if not plans:
            return None
        want = max(plan.num_proxies for plan in plans)
        if rows.padded or self.config.proxy_span is not None:
            want = hidden.shape[1]  # rows end at different slots: take them all, select below
        want = min(want, hidden.shape[1])
        return hf.queries(module, hidden[:, -want:], kwargs, want)

    def _remember_queries(
        self,
        module: nn.Module,
        hidden: Tensor,
        kwargs: dict,
        layer: NaclCacheLayer,
        most: int | None = None,
    ) -> Tensor | None:
        """Rolling buffer of the newest queries of a layer."""
        if not self.needs_scores:
            return None
        most = self.config.max_proxy if most is None else min(most, self.config.max_proxy)
        count = min(most, hidden.shape[1])
        new = hf.queries(module, hidden[:, -count:], kwargs, count)
        past = self._queries.get(module.layer_idx)
        both = new if past is None else torch.cat([past, new], 2)[:, :, -most:]
        self._queries[module.layer_idx] = both
        return both

    # -- eviction --------------------------------------------------------------------------------

    @torch.no_grad()
    def _evict(
        self, module: nn.Module, layer: NaclCacheLayer, queries: Tensor | None, again: bool = False
    ) -> None:
        begin = time.perf_counter()
        batch = layer.keys.shape[0]
        rows = self._rows(layer, batch)
        plans = self._plans(layer, rows, again)
        if all(p is None for p in plans) or (self.needs_scores and queries is None):
            return
        before = layer.cache_bytes()
        counts = torch.tensor(
            [[0, int(n), 0, 0] if p is None else p.counts for p, n in zip(plans, rows.lens)],
            dtype=torch.int32,
        )
        idx, new_lens = self._select(module, layer, queries, rows, plans, counts)
        inv_freq = hf.inv_freq(self._model, layer.keys) if self.config.rerotate else None
        start = rows.start.to(idx.device)
        if layer.lengths is None:
            layer.lengths = rows.lens
        layer.shrink(idx, new_lens, inv_freq, start if rows.padded else None, rows.lens)
        self.kept[module.layer_idx] = layer.kept
        self.stats.evict_seconds += time.perf_counter() - begin
        self.stats.evictions += 1
        self.stats.bytes_before += before
        self.stats.bytes_after += layer.cache_bytes()
        if len(self.stats.lengths) < batch:
            self.stats.lengths = [int(n) for n in rows.lens]

    def _plans(self, layer: NaclCacheLayer, rows: _Rows, again: bool) -> list[BudgetPlan | None]:
        """The plan of each sequence; a second eviction goes back to the budget of its own first one."""
        lens = [int(n) for n in rows.lens]
        if not again or self.config.progressive or layer.lengths is None:
            return [self.plan(n) for n in lens]
        plans: list[BudgetPlan | None] = []
        for first, length in zip((self.plan(int(n)) for n in layer.lengths), lens):
            if first is None or first.keep >= length:
                plans.append(None)
                continue
            proxies = min(first.num_proxies, length, self.config.decode_interval or length)
            plans.append(BudgetPlan(length, first.n_sink, first.n_recent, first.n_topk,
                                    first.n_random, proxies))  # fmt: skip
        return plans

    def _select(
        self,
        module: nn.Module,
        layer: NaclCacheLayer,
        queries: Tensor | None,
        rows: _Rows,
        plans: list[BudgetPlan | None],
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        c, keys = self.config, layer.keys
        layer.shared = shared = SharedSets.of(module)
        sets = keys.shape[1] if shared is None else shared.count
        scores = keys.new_zeros((keys.shape[0], sets, keys.shape[2]), dtype=torch.float32)
        where: dict[str, Any] = {}
        if rows.padded:
            where = {"kv_start": rows.start.to(keys.device, torch.int32),
                     "kv_lens": rows.lens.to(keys.device, torch.int32)}  # fmt: skip
        if queries is not None:
            scores, _ = ops.proxy_scores(
                queries, keys, scale=module.scaling, causal=c.causal, reduce=c.reduce,
                q_positions=self._proxy_slots(queries.shape[2], layer, rows, plans).to(keys.device),
                kmap=None if shared is None else module.key_map, **where,
            )  # fmt: skip
            scores = scores if shared is None else shared.pool(scores, c.reduce)
        if self.share_heads:
            scores = scores.mean(1, keepdim=True).expand_as(scores).contiguous()
        per_row = counts
        if c.head_budget == "adaptive":
            per_row = adaptive_counts(scores, counts, rows.start, rows.lens, c.head_floor)
        width = int(per_row.sum(-1).max())
        return ops.nacl_select(
            scores, 0, width, 0, 0, counts=per_row.to(keys.device), tau=c.re_temperature,
            logits=c.re_logits, seed=c.seed, layer=module.layer_idx, pool_kernel=c.pool_kernel,
            pool=c.pool, **where,
        )  # fmt: skip

    def _proxy_slots(
        self,
        num: int,
        layer: NaclCacheLayer,
        rows: _Rows,
        plans: list[BudgetPlan | None],
    ) -> Tensor:
        """Slot of every query row [B, num]; -1 where it is not a proxy of its sequence."""
        slot = torch.arange(layer.physical - num, layer.physical)
        out = torch.full((len(plans), num), -1, dtype=torch.int32)
        for b, plan in enumerate(plans):
            if plan is None:
                continue
            first, last = plan.length - plan.num_proxies, plan.length
            if not layer.evicted:
                first, last = self.config.proxies(plan.length, plan.num_proxies)
            first, last = first + int(rows.start[b]), last + int(rows.start[b])
            mine = (slot >= first) & (slot < last)
            out[b] = torch.where(mine, slot, -1).to(torch.int32)
        return out

    def cache_bytes(self) -> int:
        """Bytes of the cache in use (inside the context)."""
        return cache_bytes(self._cache)


@contextlib.contextmanager
def continuing(press: Press, model: nn.Module) -> Iterator[None]:
    """The press's context, keeping the statistics of the eviction that was just made."""
    stats, kept = press.stats, press.kept
    with press(model):
        press.stats, press.kept = stats, kept
        yield


class NaclPress(Press):
    """NACL: sinks, recents, proxy-token top scores and a score-driven random draw (arXiv 2408.03675).

    Takes the fields of :class:`NaclConfig` (``compression_ratio=0.8`` evicts 80 %), or ``config=``,
    or ``preset="repo" | "paper_20"``.
    """
