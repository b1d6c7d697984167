"""The tool-augmented reward model: a causal LM that writes the trace, and a value head on the same trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class ThemisOutput(ModelOutput):
    """What a forward gives.

    Attributes:
        reward: float32 [B]. logits: [B, n, V], None unless asked for. cache: with ``use_cache``.
    """

    reward: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None


class ThemisRewardModel(PreTrainedModel):
    """A causal LM with a value head ``score`` [1, H] without bias."""

    @property
    def trunk(self) -> Any:
        """The network without heads."""
        return self.base_model

    @property
    def head(self) -> Any:
        """The value head, a linear layer [1, H]."""
        return self.score

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Final-norm hidden states [B, S, H]."""
        raise NotImplementedError

    def reward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Rewards [B], float32."""
        raise NotImplementedError
