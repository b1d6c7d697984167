# SPDX-License-Identifier: Apache-2.0
"""PixelGPT's classifier: a head on the last valid position of a strip, a text, or a pair."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from tenfold import ops
from tenfold.pixelgpt.config import PixelGPTConfig
from tenfold.pixelgpt.images import joint_mask
from tenfold.pixelgpt.model import PixelGPTModel, PixelGPTPreTrainedModel


class PixelGPTForSequenceClassification(PixelGPTPreTrainedModel):
    """The trunk with a head ``score`` [num_labels, D] without bias, on the last valid position of a row.

    That is the final black patch of a strip, the last token of a text or of a pair. ``num_labels == 1`` is regression.
    """

    def __init__(self, config: PixelGPTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = PixelGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        patch_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_patches: Any = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Class scores float32 [B, num_labels], and the loss.

        Args:
            input_ids, attention_mask, pixel_values, patch_mask: as :class:`PixelGPTModel` takes them. A
                segment without a mask has no padding.
            labels: int64 [B] (cross-entropy), or floating [B] where ``num_labels == 1`` (mean squared error).
            num_patches: what a processor gives beside the strips; not read.

        Raises:
            ValueError: as the trunk's; a row without a valid position. IndexError: a label outside the classes.

        Source:
            Section 3.8 of the method's specification; only one row per sample goes through the head.
        """
        kwargs.setdefault("use_cache", False)
        made = self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values,
            patch_mask=patch_mask, **kwargs,
        )  # fmt: skip
        hidden = made.last_hidden_state
        tokens = 0 if input_ids is None else input_ids.shape[1]
        mask = joint_mask(patch_mask, attention_mask, hidden.shape[1] - tokens, tokens, hidden)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        logits = ops.last_token_reward(hidden, mask, self.score.weight)
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=made.hidden_states, attentions=made.attentions
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.num_labels == 1:
            return F.mse_loss(logits[:, 0], labels.to(logits.dtype).reshape(-1))
        if labels.device.type == "cpu" and labels.numel():
            low, high = (int(x) for x in torch.aminmax(labels))
            if low < 0 or high >= self.config.num_labels:
                raise IndexError(
                    f"labels must be in [0, {self.config.num_labels}), got {low if low < 0 else high}"
                )
        return F.cross_entropy(logits, labels)


AutoModelForSequenceClassification.register(
    PixelGPTConfig, PixelGPTForSequenceClassification, exist_ok=True
)


def classifier_of(model: Any, num_labels: int, seed: int = 0) -> PixelGPTForSequenceClassification:
    """A classifier with a copy of a model's trunk and a new head N(0, 0.02).

    Args:
        model: a causal LM, or another classifier. num_labels: 1 for regression.
    """
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("id2label", "label2id")}
    config = type(model.config).from_dict(fields | {"num_labels": num_labels})
    config._attn_implementation = model.config._attn_implementation
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = PixelGPTForSequenceClassification(config).to(weight.device, weight.dtype)
    made.model.load_state_dict(model.model.state_dict())
    return made
