"""The definitions of all ops in readable PyTorch: the oracle of the tests, and the teaching text.

``tenfold.reference.f`` has the signature of ``tenfold.ops.f``. Nothing here is meant to be fast.
"""

from tenfold.reference.attention import (
    allocate_heads,
    collapse_heads,
    dha_attention,
    dha_attention_backward,
    dha_cache_append_,
    dha_decode,
    fuse_heads,
    fuse_states,
    fusion_mse,
    group_heads,
    head_cka,
)
from tenfold.reference.kv_eviction import (
    kv_compact_,
    kv_gather,
    nacl_evict,
    nacl_select,
    proxy_scores,
    ragged_decode,
)
from tenfold.reference.loss import (
    selective_logprob,
)
from tenfold.reference.optim import (
    dynamic_code,
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
from tenfold.reference.random import gumbel, philox4x32_10
from tenfold.reference.rl import (
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
from tenfold.reference.template import template_scale

__all__ = [
    "allocate_heads",
    "collapse_heads",
    "dha_attention",
    "dha_attention_backward",
    "dha_cache_append_",
    "dha_decode",
    "dynamic_code",
    "fuse_heads",
    "fuse_states",
    "fusion_mse",
    "gae",
    "grad_norm",
    "group_heads",
    "gumbel",
    "head_cka",
    "kv_compact_",
    "kv_gather",
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
    "philox4x32_10",
    "proxy_scores",
    "ragged_decode",
    "selective_logprob",
    "template_scale",
    "unpack_mask",
]
