"""Typed faces of ``torch.ops.tenfold.*``: shapes, dtypes, errors and sources are in the docstrings.

They raise ValueError, IndexError or TypeError where ``torch.ops.tenfold.f`` raises RuntimeError
with the same text.
"""

from tenfold import _load

if _load.error is not None:
    raise _load.error

from tenfold.ops.attention import (
    allocate_heads,
    collapse_heads,
    dha_attention,
    dha_attention_backward,
    dha_cache_append_,
    dha_decode,
    fuse_heads,
    fuse_heads_backward,
    fusion_mse,
    fusion_mse_backward,
    group_heads,
    head_cka,
)
from tenfold.ops.kv_eviction import (
    kv_compact_,
    kv_gather,
    nacl_evict,
    nacl_select,
    proxy_scores,
    ragged_decode,
)
from tenfold.ops.loss import (
    linear_cross_entropy,
    linear_logprob,
    selective_logprob,
)
from tenfold.ops.merge import (
    dare_merge,
    dare_merge_,
    delta_gram,
    delta_gram_,
    linear_merge,
    linear_merge_,
    slerp_merge,
    slerp_merge_,
    ties_merge,
    ties_merge_,
)
from tenfold.ops.optim import (
    grad_norm,
    linear_wgrad_rows,
    mask_popcount,
    mask_prefix,
    mask_random,
    mask_topk,
    masked_adamw_,
    masked_adamw_8bit_,
    masked_copy_,
    pack_mask,
    unpack_mask,
)
from tenfold.ops.rl import (
    gae,
    ma_ppo_policy_loss,
    ma_ppo_prepare,
    ma_ppo_value_loss,
    macro_gae,
    macro_pool,
    macro_segment_fixed,
    macro_segment_lengths,
    macro_segment_ppl,
    macro_segment_starts,
)
from tenfold.ops.template import template_scale

__all__ = [
    "allocate_heads",
    "collapse_heads",
    "dare_merge",
    "dare_merge_",
    "delta_gram",
    "delta_gram_",
    "dha_attention",
    "dha_attention_backward",
    "dha_cache_append_",
    "dha_decode",
    "fuse_heads",
    "fuse_heads_backward",
    "fusion_mse",
    "fusion_mse_backward",
    "gae",
    "grad_norm",
    "group_heads",
    "head_cka",
    "kv_compact_",
    "kv_gather",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_merge",
    "linear_merge_",
    "linear_wgrad_rows",
    "ma_ppo_policy_loss",
    "ma_ppo_prepare",
    "ma_ppo_value_loss",
    "macro_gae",
    "macro_pool",
    "macro_segment_fixed",
    "macro_segment_lengths",
    "macro_segment_ppl",
    "macro_segment_starts",
    "mask_popcount",
    "mask_prefix",
    "mask_random",
    "mask_topk",
    "masked_adamw_",
    "masked_adamw_8bit_",
    "masked_copy_",
    "nacl_evict",
    "nacl_select",
    "pack_mask",
    "proxy_scores",
    "ragged_decode",
    "selective_logprob",
    "slerp_merge",
    "slerp_merge_",
    "template_scale",
    "ties_merge",
    "ties_merge_",
    "unpack_mask",
]
