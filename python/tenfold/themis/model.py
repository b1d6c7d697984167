# SPDX-License-Identifier: Apache-2.0
"""The tool-augmented reward model: a causal LM that writes the trace, and a value head on the same trunk.

The class of a model is its causal LM's class with a value head ``score`` beside the LM head, so that everything
that is made for such a model works (``generate``, PEFT, gradient checkpointing, sharding plans). A checkpoint is the
causal LM's with one tensor more: ``AutoModelForCausalLM`` loads it and writes traces,
``AutoModelForSequenceClassification`` loads it and scores them, and so do serving engines.

    hidden [B, S, H] = trunk(ids, mask)      reward[b] = score . hidden[b, last valid]      logits = lm_head(hidden)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tenfold.data.models import quiet_transformers
from tenfold.integrations import transformers as hf
from tenfold.ops import last_token_reward
from tenfold.rlhf.reward_model import draw_head, last_index, plain_padding, token_mask
from tenfold.rlhf.trunks import hidden_size, model_inputs, plain_face
from tenfold.themis.config import POOLING
from tenfold.training.checks import one_of

_ATTENTION = ("full_attention", "sliding_attention")


@dataclass
class ThemisOutput(CausalLMOutputWithPast):
    """A causal LM's output, and ``reward`` float32 [B]; ``logits`` [B, n, V] only where they were asked for."""

    reward: Tensor | None = None


@functools.cache
def _with_head(base: type) -> type:
    made = {"__module__": __name__, "config_class": base.config_class}  # type: ignore[attr-defined]
    return type(f"Themis{base.__name__}", (ThemisRewardModel, base), made)


def themis_class(config: Any) -> type[ThemisRewardModel]:
    """The class of an architecture's reward models. Raises ValueError if it has no causal LM."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"a Themis reward model needs a causal LM; transformers has none for {type(config).__name__}"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _with_head(found[0] if isinstance(found, list | tuple) else found)


class ThemisRewardModel(PreTrainedModel):
    """A causal LM with a value head ``score`` [1, H] without bias.

    Models are made by :meth:`from_pretrained` or :meth:`from_model`, or from a config alone; they are instances of
    this class and of their causal LM's class.
    """

    score: nn.Linear

    def __new__(cls, config: Any = None, *inputs: Any, **kwargs: Any) -> Any:
        """A model of the config's architecture."""
        return object.__new__(themis_class(config) if cls is ThemisRewardModel else cls)

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        settings = {"pooling": "last"} | (getattr(config, "themis", None) or {})
        one_of("pooling", settings["pooling"], POOLING)
        config.num_labels, config.themis = (
            1,
            settings,
        )  # stock classes score rows with one label, too
        super().__init__(config, *inputs, **kwargs)
        self.score = nn.Linear(hidden_size(self.base_model), 1, bias=False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *args: Any, seed: int = 0, pooling: str | None = None, **options: Any
    ) -> Any:
        """Loads a model, or puts a new value head on a causal LM.

        Args:
            name: a folder or hub id: what ``save_pretrained`` wrote, or a causal LM. seed: of a new head,
                N(0, 1 / (H + 1)). pooling: ``"last"`` or ``"mean"`` (default: the checkpoint's, else ``"last"``).
            options: of transformers' ``from_pretrained`` (``dtype``, ``device_map``, ...).

        Raises:
            ValueError: an architecture without causal LM, or a checkpoint that lacks other weights than the head.
        """
        from transformers import AutoConfig

        config = options.pop("config", None) or AutoConfig.from_pretrained(name)
        if pooling is not None:
            config.themis = {"pooling": pooling}
        kind = themis_class(config) if cls is ThemisRewardModel else cls
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            load = super(ThemisRewardModel, kind).from_pretrained
            model, report = load(
                name,
                *args,
                config=config,
                output_loading_info=True,
                **({"dtype": "auto"} | options),
            )
        missing = set(report["missing_keys"])
        if missing - {"score.weight"}:
            raise ValueError(
                f"{name} is no checkpoint of a causal LM with a value head: it lacks {sorted(missing)[:5]}"
            )
        if missing:
            draw_head(model.score.weight, seed)
        return model.eval()

    @classmethod
    def from_model(cls, model: Any, *, seed: int = 0, pooling: str = "last") -> Any:
        """A reward model around the weights of a causal LM, which it shares, and a new head."""
        model = plain_face(model)
        one_of("pooling", pooling, POOLING)
        config, weight = model.config, next(model.parameters())
        kind = themis_class(config)
        config.themis = {"pooling": pooling}
        with torch.device("meta"):
            made = kind(config)
        for name, child in model.named_children():
            setattr(made, name, child)
        if hasattr(model, "generation_config"):
            made.generation_config = model.generation_config
        head = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        made.score = nn.utils.skip_init(nn.Linear, hidden_size(made.base_model), 1, **head)
        draw_head(made.score.weight, seed)
        return made.train(model.training)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Writes config and safetensors, in the causal LM's layout; options are transformers' own."""
        with quiet_transformers():
            super().save_pretrained(save_directory, *args, **options)
        # By the name of its causal LM other engines know what to do with it.
        base = type(self).__mro__[2].__name__
        if options.get("is_main_process", True) and self.config.architectures != [base]:
            self.config.architectures = [base]
            self.config.save_pretrained(save_directory)

    @property
    def trunk(self) -> Any:
        """The network without heads."""
        return self.base_model

    @property
    def head(self) -> nn.Linear:
        """The value head, a linear layer [1, H]."""
        return self.score

    @property
    def pooling(self) -> str:
        """``"last"`` or ``"mean"``."""
        return self.config.themis["pooling"]

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Final-norm hidden states [B, S, H] of whole rows.

        Args:
            input_ids: int64 [B, S]; padding may be on either side and hold anything.
            attention_mask: [B, S], bool or integers, 1 for tokens. None: what the config's padding token fills at
                both ends of a row is padding; ValueError if that is the end token, too, and stands there.

        Raises:
            ValueError: shapes; a row without tokens; padding that cannot be told.
        """
        mask = token_mask(self.config, input_ids, attention_mask)
        last_index(mask)
        ids = plain_padding(self.config, input_ids, mask)
        inputs = model_inputs(self.trunk, ids, mask.long())
        return self.trunk(**inputs, use_cache=False).last_hidden_state

    def packed_hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [1, N, H] of rows behind one another, [1, N]: each begins where its position is 0.

        ValueError for models with other layers than attention, whose state would go over from row to row.
        """
        types = set(getattr(self.config.get_text_config(), "layer_types", None) or ())
        if types - set(_ATTENTION):
            raise ValueError(
                f"packed rows need layers of {' and '.join(_ATTENTION)}; {type(self).__name__} has "
                f"{', '.join(sorted(types - set(_ATTENTION)))}"
            )
        # Without a mask, transformers reads from the positions where a row ends.
        made = self.trunk(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return made.last_hidden_state

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Rewards [B], float32, of hidden states [B, S, H] and mask [B, S]."""
        return last_token_reward(hidden, mask.bool(), self.score.weight[0], self.pooling)

    def reward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Rewards [B], float32; arguments and errors as of :meth:`hidden`."""
        mask = token_mask(self.config, input_ids, attention_mask)
        return self.pooled(self.hidden(input_ids, mask), mask)

    def _logit_scale(self) -> float:
        text = self.config.get_text_config()  # Cohere, Falcon-H1, Granite
        scale = (getattr(text, "logit_scale", None) or 1.0) / (
            getattr(text, "logits_scaling", None) or 1.0
        )
        return scale * (getattr(text, "lm_head_multiplier", None) or 1.0)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], as the causal LM makes them."""
        logits, scale = self.get_output_embeddings()(hidden), self._logit_scale()
        logits = logits if scale == 1 else logits * scale
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x [..., H'], W [V, H'], v [H']) for losses that hold no logits: these are ``x W^T``, and rewards ``x v``.

        They are the hidden states and the two heads but where logits are scaled or have a bias. ValueError where
        they are capped (Gemma 2).
        """
        head, scale, v = self.get_output_embeddings(), self._logit_scale(), self.score.weight[0]
        if getattr(self.config.get_text_config(), "final_logit_softcapping", None):
            raise ValueError(
                f"{type(self).__name__} caps its logits, which the language model's loss cannot"
            )
        weight = head.weight if scale == 1 else head.weight * scale
        if getattr(head, "bias", None) is None:
            return hidden, weight, v
        weight = torch.cat([weight, head.bias[:, None] * scale], 1)
        return (
            torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], -1),
            weight,
            nn.functional.pad(v, (0, 1)),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> ThemisOutput:
        """Rewards, and logits if ``logits_to_keep`` is given (0: all positions) or ``labels`` are.

        A causal LM's forward otherwise: ``generate`` works. A row's reward is read at its last token here, or over
        all tokens here, where ``attention_mask`` [B, past + S] says which they are.
        """
        cache = cache if cache is not None else hf.get_cache(kwargs)
        for name in hf.CACHE_NAMES:
            kwargs.pop(name, None)
        found: dict[str, Any]
        if input_ids is not None and cache is None and not use_cache and position_ids is None:
            mask = token_mask(self.config, input_ids, attention_mask)
            ids = plain_padding(self.config, input_ids, mask)
            found = model_inputs(self.trunk, ids, mask.long())
        else:
            found = {"input_ids": input_ids, "attention_mask": attention_mask,
                     "position_ids": position_ids, "inputs_embeds": inputs_embeds}  # fmt: skip
            if cache is not None:
                found[hf.cache_name(self.trunk)] = cache
            found = {k: v for k, v in found.items() if v is not None}
        out = self.trunk(**found, use_cache=bool(use_cache), **kwargs)
        hidden = out.last_hidden_state
        mask = found.get("attention_mask")
        if mask is None or mask.ndim != 2:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        logits: Tensor | None = None
        loss = None
        if labels is not None or logits_to_keep is not None:
            keep = logits_to_keep or 0
            kept = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
            logits = self.lm_logits(kept if labels is None else hidden)
        if labels is not None and logits is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        made = {f.name: out.get(f.name) for f in fields(ThemisOutput)}
        reward = self.pooled(hidden, mask[:, -hidden.shape[1] :])
        return ThemisOutput(**(made | {"loss": loss, "logits": logits, "reward": reward}))


def check_embeddings(model: Any, format: Any) -> None:
    """ValueError, naming the tokens, if a model has no embeddings for the ids of a ``TraceFormat``'s special tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    heads = model.get_output_embeddings().weight.shape[0]
    wrong = {n: i for n, i in format.ids._asdict().items() if not 0 <= i < min(rows, heads)}
    if wrong:
        raise ValueError(
            f"the model has {rows} embeddings and {heads} outputs, but the tokenizer's special tokens are "
            f"{wrong}; resize it with prepare_tokenizer(tokenizer, model)"
        )
