# SPDX-License-Identifier: Apache-2.0
"""The reward model: a causal LM's trunk, a linear head without bias, the score at the last token.

Stored as transformers' own ``...ForSequenceClassification`` with one label, so that such checkpoints load
here and ours load there (``AutoModelForSequenceClassification``, serving engines). Read otherwise: where a
row ends is said by the attention mask and never by the padding token, on whichever side it is, and whether
or not it is also the end token.

    hidden [B, S, H] = trunk(ids, mask)      values [B, S] = hidden @ head [H]      score[b] = values[b, last valid]
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data.models import quiet_transformers
from tenfold.rlhf.trunks import apply_head, hidden_size, model_inputs, trunk_of


def _classifier_class(config: Any) -> type[Any]:
    """The architecture's class for sequence classification with a head called ``score``.

    One is made for architectures that have none, in the same layout.
    """
    from transformers import MODEL_MAPPING, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"a reward model needs a causal LM; {type(config).__name__} belongs to no known trunk"
        )
    trunk = MODEL_MAPPING[type(config)]
    trunk = trunk[0] if isinstance(trunk, list | tuple) else trunk
    base = next(c for c in trunk.__mro__[1:] if issubclass(c, PreTrainedModel))
    return type(
        f"{trunk.__name__.removesuffix('Model')}ForSequenceClassification",
        (GenericForSequenceClassification, base),
        {},
    )


def last_index(mask: Tensor) -> Tensor:
    """Column [B] of each row's last valid token. Raises ValueError for a row without any."""
    held = mask.bool()
    if mask.numel() == 0 or not bool(held.any(1).all()):
        rows = (~held.any(1)).nonzero().flatten().tolist() if mask.numel() else []
        raise ValueError(
            f"attention_mask: rows {rows[:8]} of {list(mask.shape)} have no valid token, so no score"
        )
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(held, columns, -1).amax(1)


def token_mask(config: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which of ids [B, S] are tokens, bool.

    Args:
        config: of the model. mask: [B, S], 1 for tokens. None: what the config's padding token fills at both ends
            of a row is padding.

    Raises:
        ValueError: shapes; no mask, and the padding token is the end token, too, and stands at an end of a row.
    """
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids must be integers [B, S], got {ids.dtype} {list(ids.shape)}")
    if mask is not None:
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {list(ids.shape)} as input_ids, got {list(mask.shape)}"
            )
        return mask.to(ids.device) != 0
    text = config.get_text_config()
    pad, end = text.pad_token_id, text.eos_token_id
    if pad is None or ids.numel() == 0:
        return torch.ones_like(ids, dtype=torch.bool)
    token = ids != pad
    ends = end if isinstance(end, list) else [end]
    if pad in ends and not bool(token[:, [0, -1]].all()):
        raise ValueError(
            f"the padding token {pad} is the end token, too: where rows end cannot be told; give attention_mask"
        )
    # From the first to the last token that is not padding: the same id inside a row is a token.
    return token.cummax(1).values & token.flip(1).cummax(1).values.flip(1)


def plain_padding(config: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """``ids`` with one valid token in all padding: whatever stood there, the trunk reads the same."""
    text = config.get_text_config()
    pad = text.pad_token_id if text.pad_token_id is not None and text.pad_token_id >= 0 else 0
    return ids.masked_fill(~mask, pad if pad < text.vocab_size else 0)


@torch.no_grad()
def draw_head(weight: Tensor, seed: int) -> None:
    """Fills a head [1, H] from N(0, 1 / (H + 1)), drawn in float32 and so the same for every dtype."""
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.copy_(drawn * (weight.shape[1] + 1) ** -0.5)


class RewardModel(nn.Module):
    """Scores sequences.

    Args:
        model: a transformers ``...ForSequenceClassification`` of a decoder, with one label, its head a
            linear layer ``score`` without bias.

    Raises:
        ValueError: a head of another kind.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
            raise ValueError(
                f"a reward model's head must be a linear layer `score` with one output and no bias; "
                f"{type(model).__name__} has {head}"
            )
        self.model = model
        self.train(model.training)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, seed: int = 0, **options: Any) -> RewardModel:
        """Loads a reward model, or puts a new head on a causal LM.

        Args:
            name: a folder or hub id: what :meth:`save_pretrained` wrote, any sequence classifier with one
                label, or a causal LM. seed: of a new head, N(0, 1 / (H + 1)).
            options: of transformers' ``from_pretrained`` (``dtype``, ``device_map``, ...).
        """
        from transformers import AutoConfig

        config = options.pop("config", None) or AutoConfig.from_pretrained(name)
        config.num_labels = 1
        kind = _classifier_class(config)
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, report = kind.from_pretrained(
                name, config=config, output_loading_info=True, **({"dtype": "auto"} | options)
            )
        missing = set(report["missing_keys"])
        if missing - {"score.weight"}:
            raise ValueError(
                f"{name} is no checkpoint of {kind.__name__}: it lacks {sorted(missing)[:5]}"
            )
        made = cls(model.eval())
        if missing:
            draw_head(made.head.weight, seed)
        return made

    @classmethod
    def from_model(cls, policy: Any, *, seed: int = 0) -> RewardModel:
        """A reward model with a copy of a causal LM's trunk and a new head."""
        trunk: Any = copy.deepcopy(trunk_of(policy)).requires_grad_(True)
        config = copy.deepcopy(trunk.config)
        config.num_labels = 1
        weight = next(trunk.parameters())
        with torch.device("meta"):
            model = _classifier_class(config)(config)
        setattr(model, model.base_model_prefix, trunk)
        head = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        model.score = nn.utils.skip_init(nn.Linear, hidden_size(trunk), 1, **head)
        made = cls(model.eval())
        draw_head(made.head.weight, seed)
        return made

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Writes config and safetensors, in transformers' layout; options are its own."""
        with quiet_transformers():
            self.model.save_pretrained(folder, **options)

    @property
    def trunk(self) -> Any:
        """The transformers model below the head."""
        return self.model.base_model

    @property
    def head(self) -> nn.Linear:
        """The linear layer [1, H]."""
        return self.model.score

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.weight.device

    def values(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The head's output at every position [B, S], float32; what it is at padding means nothing.

        Arguments as of :meth:`forward`.
        """
        return self(input_ids, attention_mask, values=True)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, values: bool = False
    ) -> Tensor:
        """Scores [B], float32; with ``values`` the head's output [B, S] at every position.

        Args:
            input_ids: int64 [B, S]; padding may be on either side and hold anything.
            attention_mask: [B, S], bool or integers, 1 for tokens. None: what the config's padding
                token fills at both ends of a row is padding; ValueError if that is the end token, too,
                and stands at an end of a row.

        Raises:
            ValueError: shapes; a row without tokens; padding that cannot be told.
        """
        mask = token_mask(self.config, input_ids, attention_mask)
        at = last_index(mask)
        ids = plain_padding(self.config, input_ids, mask)
        hidden = self.trunk(**model_inputs(self.trunk, ids, mask.long()), use_cache=False)
        found = apply_head(self.head, hidden.last_hidden_state, None)
        return found if values else found.gather(1, at[:, None]).squeeze(1)
