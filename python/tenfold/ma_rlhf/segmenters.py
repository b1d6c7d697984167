"""Who cuts responses into macro actions: one callable per termination condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold.ma_rlhf.config import MARLHFConfig

Segments = tuple[Tensor, Tensor]


class Segmenter(Protocol):
    """Cuts the valid tokens of every row: (seg int32 [B, R], -1 at masked tokens; nseg int32 [B])."""

    def __call__(
        self, mask: Tensor, *, ids: Tensor | None = None, logp_ref: Tensor | None = None,
        texts: Sequence[str] | None = None, generator: torch.Generator | None = None,
        keys: Tensor | None = None,
    ) -> Segments: ...  # fmt: skip


def make_segmenter(
    config: MARLHFConfig, tokenizer: Any = None, *, parser: Callable[[str], Any] | None = None,
    callback: Callable[..., Tensor] | None = None,
) -> Segmenter:  # fmt: skip
    raise NotImplementedError
