# SPDX-License-Identifier: Apache-2.0
"""NACL, and any other rule of :mod:`tenfold.nacl`, as scorer presses of NVIDIA's kvpress (>= 0.5).

    from tenfold.integrations.kvpress import NaclScorerPress
    with NaclScorerPress(compression_ratio=0.8)(model):
        model.generate(...)

They run wherever kvpress takes a ``ScorerPress``: alone, in its pipeline, or inside its wrappers, which
stand for the settings of :class:`tenfold.nacl.NaclConfig` that are not offered here:
``KeyRerotationPress`` for ``rerotate``, ``DecodingPress`` for ``decode_interval``, ``AdaKVPress`` for
``head_budget="adaptive"``. How many tokens stay is kvpress's arithmetic, ``int(L * (1 - ratio))``, for
prompts of any length.

kvpress decodes padded batches wrongly (it masks slots that eviction has refilled);
:class:`tenfold.nacl.NaclPress` gets them right. Importing this module imports kvpress, which wraps the
attention functions of transformers; tenfold itself patches nothing.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NEEDS = "tenfold.integrations.kvpress needs kvpress >= 0.5"
_INSTALL = "`pip install 'kvpress>=0.5'` (kvpress itself needs transformers < 5.3)"

try:
    _version = importlib.metadata.version("kvpress")
except importlib.metadata.PackageNotFoundError:  # a source folder, or nothing at all
    _version = ""
if _version and tuple(map(int, re.findall(r"\d+", _version)[:2])) < (0, 5):
    raise ImportError(f"{_NEEDS}, found {_version}. Upgrade it with {_INSTALL}.", name="kvpress")
try:
    from kvpress import ScorerPress
except ModuleNotFoundError as error:
    if error.name != "kvpress":
        raise
    raise ModuleNotFoundError(
        f"{_NEEDS}, which is not installed. Install it with {_INSTALL}.", name="kvpress"
    ) from None

from tenfold import ops  # noqa: E402
from tenfold.integrations import transformers as hf  # noqa: E402
from tenfold.nacl import BudgetPlan, FullPress, NaclConfig, NaclPress, Press  # noqa: E402

__all__ = ["NaclScorerPress", "RuleScorerPress"]

# Settings of a rule that a score cannot express, and who does that here.
_ELSEWHERE = {
    "keep_tokens": "compression_ratio", "rerotate": "kvpress.KeyRerotationPress",
    "decode_interval": "kvpress.DecodingPress", "head_budget": "kvpress.AdaKVPress",
    "min_length": "the press for long prompts only", "chunked": "the tenfold press itself",
    "progressive": "the tenfold press itself", "evict_on_append": "the tenfold press itself",
}  # fmt: skip


class _TenfoldScorerPress(ScorerPress):
    """What both presses share; ``_rule`` names the rule with the settings of this moment."""

    def _rule(self) -> Press:
        raise NotImplementedError

    def _plan(self, length: int) -> tuple[Press, BudgetPlan | None]:
        """The rule set to kvpress's budget, and its integers (None: everything stays)."""
        keep = max(1, int(length * (1 - self.compression_ratio)))
        rule = copy(self._rule())
        rule.config = rule.config.with_changes(keep_tokens=keep, min_length=0)
        return rule, rule.plan(length) if keep < length else None

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores whose top ``int(L * (1 - compression_ratio))`` per head are exactly the rule's kept set.

        Within a head: protected > PTE (top scores) > RE (random draw) > the rest. The values of the last
        three are the head's own pooled attention shares in descending order, so heads stay comparable and
        wrappers that weigh heads or chunks (AdaKV, ChunkKV, CriticalKV) see real attention.

        Args:
            module: attention layer with ``q_proj``, ``scaling``, ``head_dim`` and ``layer_idx``.
            hidden_states: [B, S, hidden], the layer's input; its last tokens are the proxies. S is L,
                or less where only the newest tokens are at hand (decoding).
            keys, values: [B, Hkv, L, D], post-RoPE. attentions: not used.
            kwargs: the layer's keyword arguments; ``position_embeddings`` is required.

        Returns:
            [B, Hkv, L] float32, strictly ordered within a head but for the protected. All 0 where
            everything stays.

        Raises:
            ValueError: the settings do not fit L, with all integers. TypeError: unsupported layer.
        """
        rule, plan = self._plan(keys.shape[2])
        if plan is None:
            return keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        scores, before, proxies = self._scores(rule, plan, module, hidden_states, keys, kwargs)
        kept = _select(rule.config, plan, module, scores, before, plan.n_random)
        top = kept if plan.n_random == 0 else _select(rule.config, plan, module, scores, before, 0)
        return _tiered(rule.config, plan, scores.nan_to_num(nan=0.0) / proxies, kept, top)

    @torch.no_grad()
    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The kept tokens of ``keys`` and ``values``, as ``score`` ranks them, in their original order.

        Arguments and errors as in :meth:`score`; returns two [B, Hkv, C, D] tensors.
        """
        if self.compression_ratio == 0:
            return keys, values
        rule, plan = self._plan(keys.shape[2])
        if plan is None:
            return keys, values
        scores, before, _ = self._scores(rule, plan, module, hidden_states, keys, kwargs)
        kept = _select(rule.config, plan, module, scores, before, plan.n_random)
        return ops.kv_gather(keys, values, kept)

    def forward_hook(
        self, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        """kvpress's hook, under the argument names of every transformers 5.x."""
        cache = hf.get_cache(kwargs)
        if cache is None:
            return output
        kwargs = kwargs | {"past_key_values": cache}
        if kwargs.get("cache_position") is None:
            hidden, seen = kwargs["hidden_states"], cache.get_seq_length(module.layer_idx)
            kwargs["cache_position"] = torch.arange(seen - hidden.shape[1], seen)
        return super().forward_hook(module, input, kwargs, output)

    def _scores(
        self,
        rule: Press,
        plan: BudgetPlan,
        module: nn.Module,
        hidden: Tensor,
        keys: Tensor,
        kwargs: dict,
    ) -> tuple[Tensor, Tensor | None, int]:
        """Scores [B, Hkv, L]; tokens before slot 0, [B] or None; number of proxies."""
        if hasattr(module, "key_map"):
            raise TypeError(
                f"{type(module).__name__} has decoupled heads: kvpress keeps a set of tokens per key "
                "head, which their values cannot share; use tenfold.nacl.NaclPress"
            )
        count, length = hidden.shape[1], keys.shape[2]
        cos, sin, before = _rotary(module, hidden, keys, kwargs)
        if not rule.needs_scores:
            return keys.new_zeros(keys.shape[:3], dtype=torch.float32), before, 1
        if not hasattr(module, "q_proj"):
            raise TypeError(
                f"{type(module).__name__} has no q_proj; supported: attention layers with separate "
                "projections (Llama, Mistral, Qwen2, Qwen3, Gemma 3 and alike)"
            )
        first, last = count - min(plan.num_proxies, count), count
        if count == length:
            first, last = rule.config.proxies(length, plan.num_proxies)
        embeddings = (cos[:, first:last], sin[:, first:last])
        queries = hf.queries(
            module, hidden[:, first:last], {"position_embeddings": embeddings}, last - first
        )
        scores, _ = ops.proxy_scores(
            queries, keys, scale=module.scaling, reduce=rule.config.reduce,
            # Behind another press (ComposedPress) slots are no positions: every key is in the past.
            causal=rule.config.causal and count <= length,
            q_offset=max(first + length - count, 0),
        )  # fmt: skip
        if rule.share_heads:
            scores = scores.mean(1, keepdim=True).expand_as(scores).contiguous()
        return scores, before, last - first


@dataclass
class NaclScorerPress(_TenfoldScorerPress):
    """NACL (arXiv 2408.03675) as a kvpress press; fields and defaults of :class:`tenfold.nacl.NaclConfig`.

    The random draw is independent for every layer, head, chunk and decoding step under ``seed``.

    Attributes:
        compression_ratio: share of the cache evicted, [0, 1).
        protect_ratio: share of the budget protected at both ends; sink_tokens: how many of those at
            the start (at most half).
        random_ratio: share of the budget drawn at random (RE); the rest goes to top scores (PTE).
        proxy_ratio, max_proxy: proxy queries as a share of the prompt, and their cap.
        proxy_span: explicit proxies, tokens [start, stop) of the prompt (negative: from its end).
        causal: proxies see only earlier keys. reduce: over the query heads of a KV head.
        protect: ``"ends"``, or ``"proxies"`` keeps all.
        re_temperature, re_logits: the random draw. pool_kernel, pool: score pooling.
        seed: of the random draw.

    Raises:
        ValueError: a value out of range, by name.
    """

    compression_ratio: float = NaclConfig.compression_ratio
    protect_ratio: float = NaclConfig.protect_ratio
    sink_tokens: int = NaclConfig.sink_tokens
    random_ratio: float = NaclConfig.random_ratio
    proxy_ratio: float = NaclConfig.proxy_ratio
    max_proxy: int = NaclConfig.max_proxy
    proxy_span: tuple[int, int] | None = None
    causal: bool = NaclConfig.causal
    reduce: str = NaclConfig.reduce
    protect: str = NaclConfig.protect
    re_temperature: float = NaclConfig.re_temperature
    re_logits: str = NaclConfig.re_logits
    pool_kernel: int = NaclConfig.pool_kernel
    pool: str = NaclConfig.pool
    seed: int = NaclConfig.seed

    def __post_init__(self) -> None:
        self._rule()
        super().__post_init__()

    def _rule(self) -> Press:
        names = [f.name for f in fields(NaclScorerPress)]
        return NaclPress(NaclConfig(**{name: getattr(self, name) for name in names}))


@dataclass
class RuleScorerPress(_TenfoldScorerPress):
    """Any eviction rule of :mod:`tenfold.nacl` as a kvpress press.

    ``RuleScorerPress(0.8, nacl.SnapKVPress(window_size=32))``,
    ``RuleScorerPress(0.8, nacl.NaclPress(preset="paper_20"))``.

    Attributes:
        compression_ratio: share of the cache evicted, [0, 1); replaces the rule's own budget.
        rule: a :class:`tenfold.nacl.Press`; it is read, never changed.

    Raises:
        ValueError: ``compression_ratio`` out of range, or a rule with a setting that a score cannot express
            (the message says who does that), or with its own budget (FullPress, preset ``"repo"``).
    """

    compression_ratio: float = NaclConfig.compression_ratio
    rule: Press = field(default_factory=NaclPress)

    def __post_init__(self) -> None:
        config = self.rule.config.with_changes(compression_ratio=self.compression_ratio)
        if config.preset == "repo" or isinstance(self.rule, FullPress):
            raise ValueError(f"rule {type(self.rule).__name__} (preset {config.preset!r}) sets its own "
                             "number of kept tokens; compression_ratio could not change it")  # fmt: skip
        for name, instead in _ELSEWHERE.items():
            value = getattr(config, name)
            if value != getattr(NaclConfig, name):
                raise ValueError(
                    f"rule has {name}={value!r}, which a kvpress score cannot express; use {instead}"
                )
        super().__post_init__()

    def _rule(self) -> Press:
        return self.rule


def _rotary(
    module: nn.Module, hidden: Tensor, keys: Tensor, kwargs: dict
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin [1 or B, S, D] of every row of ``hidden``; tokens before slot 0, int32 [B] or None.

    Wrappers hand over parts of the layer's input together with the embeddings of all of it.
    """
    if kwargs.get("position_embeddings") is None:
        raise TypeError(
            f"{type(module).__name__} got no position_embeddings: only models with rotary position "
            "embeddings are supported"
        )
    cos, sin = kwargs["position_embeddings"]
    batch, count = hidden.shape[:2]
    whole, first = kwargs.get("hidden_states"), None
    if whole is not None and (
        hidden.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    ):
        first = (hidden.storage_offset() - whole.storage_offset()) // whole.stride(1)  # ChunkPress
    if first is not None:
        before = torch.full((batch,), first, dtype=torch.int32, device=keys.device)
        return cos[:, first : first + count], sin[:, first : first + count], before
    positions = kwargs.get("position_ids")
    if positions is None:
        return cos[:, -count:], sin[:, -count:], None
    newest = positions[:, -1:].to(keys.device)
    before = (newest[:, 0] + 1 - keys.shape[2]).clamp(min=0).to(torch.int32).expand(batch)
    if cos.shape[1] < count:  # DecodingPress: consecutive tokens, embeddings of the newest only
        steps = newest + torch.arange(1 - count, 1, device=keys.device)
        kind = "layer_type" in inspect.signature(module.rotary_emb.forward).parameters
        cos, sin = module.rotary_emb(hidden, steps, *([module.layer_type] if kind else []))
    return cos[:, -count:], sin[:, -count:], before.contiguous()


def _select(
    config: NaclConfig, plan: BudgetPlan, module: nn.Module, scores: Tensor, before: Tensor | None,
    n_random: int,
) -> Tensor:  # fmt: skip
    """Kept slots [B, Hkv, C], ascending."""
    return ops.nacl_select(
        scores, plan.n_sink, plan.n_recent, plan.n_topk, n_random, tau=config.re_temperature,
        logits=config.re_logits, seed=config.seed, layer=module.layer_idx, row_id=before,
        pool_kernel=config.pool_kernel, pool=config.pool,
    )[0]  # fmt: skip


def _tiered(
    config: NaclConfig, plan: BudgetPlan, shares: Tensor, kept: Tensor, top: Tensor
) -> Tensor:
    """Shares handed out anew within every head, largest first, by (tier, pooled share)."""
    inner = slice(plan.n_sink, plan.length - plan.n_recent)
    pooled = shares[..., inner]
    if config.pool_kernel > 1:
        pool = F.max_pool1d if config.pool == "max" else F.avg_pool1d
        pooled = pool(pooled, config.pool_kernel, 1, config.pool_kernel // 2)
    tier = torch.zeros_like(shares).scatter(-1, kept, 1.0)
    tier = tier.scatter(-1, top, 2.0)[..., inner]

    value, by_share = pooled.sort(dim=-1, descending=True, stable=True)
    by_tier = tier.gather(-1, by_share).argsort(dim=-1, descending=True, stable=True)
    order = by_share.gather(-1, by_tier)
    # Equal shares are moved apart by the least float step, so that the order is strict.
    step = torch.arange(value.shape[-1], device=value.device)
    bits = value.clamp(min=torch.finfo(torch.float32).tiny).view(torch.int32).long() + step
    bits = bits.flip(-1).cummax(-1).values.flip(-1) - step
    value = bits.to(torch.int32).view(torch.float32)

    scores = shares + (value.amax((1, 2), keepdim=True) + 1)
    scores[..., inner] = torch.zeros_like(pooled).scatter(-1, order, value)
    return scores
