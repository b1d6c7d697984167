# SPDX-License-Identifier: Apache-2.0
"""PixelGPT's models as transformers classes: the trunk, with a pixel head and a token head.

    import tenfold.pixelgpt.model  # registers the model type "pixelgpt"
    model = PixelGPTForCausalLM.from_pretrained(folder)
    loss = model(pixel_values=strips, patch_mask=mask).loss

Inputs are tokens, patches, or both; then they stand as [patches ; tokens] and positions run through. The trunk is
``LlamaModel`` with a patch embedding beside its token embedding, under Llama's names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)

from tenfold import ops
from tenfold.integrations import attention as tenfold_attention
from tenfold.integrations import transformers as hf
from tenfold.pixelgpt.auto import register as register_processor
from tenfold.pixelgpt.config import PixelGPTConfig
from tenfold.pixelgpt.images import check_strips, joint_mask, without_eos
from tenfold.pixelgpt.layers import PatchEmbedding, PixelGPTDecoderLayer, PixelGPTRMSNorm

IGNORE = -100
# What this version of transformers calls the cache in outputs.
CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"  # fmt: skip


@dataclass
class PixelGPTOutput(CausalLMOutputWithPast):
    """A causal LM's output and that of the pixel head.

    Attributes:
        token_loss: next token prediction, mean over labels. pixel_loss: next patch prediction, mean over patches.
            ``loss`` is their sum.
        patches: [B, L, P] predictions of the pixel head, position i of patch i + 1, in the order (row, column,
            channel). per_patch: float32 [B, L], the loss of each prediction.
        logits: [B, n, V], where they were asked for.
    """

    token_loss: Tensor | None = None
    pixel_loss: Tensor | None = None
    patches: Tensor | None = None
    per_patch: Tensor | None = None


class PixelGPTPreTrainedModel(LlamaPreTrainedModel):
    """Base of the models: config class, default attention, initial weights."""

    config: PixelGPTConfig
    config_class = PixelGPTConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["PixelGPTDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": PixelGPTDecoderLayer,
        "attentions": LlamaAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # the patch embedding: Xavier-uniform on its [D, P] view
            bound = math.sqrt(6.0 / (module.weight.shape[0] + module.weight[0].numel()))
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
            return
        super()._init_weights(module)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Where nothing is asked for: tenfold's attention, which reads grouped heads as they are."""
        name = tenfold_attention.NAME if attn_implementation is None else attn_implementation
        return super()._check_and_adjust_attn_implementation(name, *args, **kwargs)


class PixelGPTModel(PixelGPTPreTrainedModel, LlamaModel):
    """The trunk: ``LlamaModel`` for tokens, patches, or both."""

    def __init__(self, config: PixelGPTConfig) -> None:
        PreTrainedModel.__init__(self, config)  # LlamaModel's would make its own layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_patches = PatchEmbedding(config)
        self.layers = nn.ModuleList(
            PixelGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = PixelGPTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        patch_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, L + T, D] after the final norm.

        Args:
            input_ids: int64 [B, T]. attention_mask: [B, T], or of all tokens so far where there is a cache.
            pixel_values: [B, C, H, W] or [B, H, W, C], uint8 or floating in [0, 1]: L patches.
            patch_mask: [B, L], 1 up to the black patch that ends the text; needed beside tokens, and again
                with every later token of a cache that has patches.
            inputs_embeds: [B, S, D] in the place of both.
            position_ids: default: counted through, padding included, from the length of the cache on.

        Raises:
            ValueError: strips, masks, no input, a pair without a patch mask, more positions than the model has.
            TypeError: a strip that is no tensor.
        """
        cache = hf.get_cache(kwargs) if cache is None else cache
        kwargs = {k: v for k, v in kwargs.items() if k not in hf.CACHE_NAMES}
        past = 0 if cache is None else cache.get_seq_length()
        if inputs_embeds is not None:
            if input_ids is not None or pixel_values is not None:
                raise ValueError(
                    "give either inputs_embeds, or input_ids and pixel_values, not both"
                )
            mask = attention_mask
        else:
            inputs_embeds, mask = self._embedded(
                input_ids, attention_mask, pixel_values, patch_mask, past
            )
        self._check_positions(past + inputs_embeds.shape[1])
        return super().forward(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids,
            use_cache=use_cache, **{hf.cache_name(super()): cache}, **kwargs,
        )  # fmt: skip

    def _embedded(
        self, ids: Tensor | None, text_mask: Tensor | None, image: Tensor | None, pixel_mask: Tensor | None, past: int
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Embeddings of [patches ; tokens] and the mask over them and what the cache holds."""
        if ids is None and image is None:
            raise ValueError("give input_ids, pixel_values or both; got neither")
        if image is None:
            assert ids is not None
            before = 0 if pixel_mask is None else pixel_mask.shape[1]
            if before and not past:
                raise ValueError(
                    "patch_mask without pixel_values is for tokens after a cache that has "
                    "the patches; there is none"
                )
            tokens = past + ids.shape[1] - before
            return self.embed_tokens(ids), joint_mask(pixel_mask, text_mask, before, tokens, ids)
        if past:
            raise ValueError(
                "pixel_values come first in a sequence, but the cache has positions already"
            )
        patches = check_strips(
            image, self.embed_patches.patch_size, self.embed_patches.num_channels
        )
        if ids is None:
            return self.embed_patches(image), joint_mask(pixel_mask, None, patches, 0, image)
        if pixel_mask is None:
            raise ValueError("a batch of pairs needs patch_mask [B, L]: which patches are text")
        if ids.shape[0] != image.shape[0]:
            raise ValueError(f"a pair has a strip for every row of input_ids {list(ids.shape)}, got "
                             f"pixel_values {list(image.shape)}")  # fmt: skip
        both = torch.cat([self.embed_patches(image), self.embed_tokens(ids)], 1)
        return both, joint_mask(pixel_mask, text_mask, patches, ids.shape[1], ids)

    def _check_positions(self, count: int) -> None:
        most = self.config.max_position_embeddings
        if count > most:
            raise ValueError(
                f"a sequence of {count} patches and tokens is longer than the model's {most} positions "
                "(max_position_embeddings); rotary positions beyond would be extrapolated"
            )


class PixelGPTForCausalLM(PixelGPTPreTrainedModel, GenerationMixin):
    """The trunk with a token head ``lm_head`` [V, D] and a pixel head ``pixel_head`` [P, D], both without bias.

    TextGPT, PixelGPT, MonoGPT and DualGPT are this class; what they were trained on differs.
    """

    def __init__(self, config: PixelGPTConfig) -> None:
        super().__init__(config)
        self.model = PixelGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.pixel_head = nn.Linear(config.hidden_size, config.patch_values, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        patch_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        token_count: Tensor | None = None,
        patch_count: Tensor | None = None,
        num_patches: Any = None,
        **kwargs: Any,
    ) -> PixelGPTOutput:
        """Predictions of the next patch and of the next token, and their losses.

        Args:
            input_ids ... use_cache: as :class:`PixelGPTModel` takes them. A strip given is a target, too.
            labels: int64 [B, T], unshifted; -100 is ignored. A label outside the vocabulary is an error on the CPU
                and undefined elsewhere.
            logits_to_keep: of the last tokens only (0: all). return_logits: default: where no labels are given.
            token_count, patch_count: 0-d or [1] floating, by which the losses are divided in the place of this batch's
                own counts, so that micro-batches and ranks add up to one mean.
            num_patches: what a processor gives beside the strips; the mask says as much, so it is not read.

        Returns:
            ``loss`` is next token prediction plus next patch prediction, as far as there are targets. Each is shifted
            inside its own segment: the last patch does not predict the first token.

        Raises:
            ValueError: as the trunk's; labels of another shape. IndexError: a label outside [0, V).

        Source:
            arXiv 2404.10710; sections 3.5 and 3.6 of the method's specification.
        """
        if use_cache is None and (labels is not None or self.training):
            use_cache = False
        made = self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values,
            patch_mask=patch_mask, position_ids=position_ids, cache=cache,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden = made.last_hidden_state
        tokens = 0 if input_ids is None else input_ids.shape[1]
        if inputs_embeds is not None:
            tokens = hidden.shape[1]
        patches = hidden.shape[1] - tokens
        out: dict[str, Any] = {}
        if patches:
            out |= self._pixels(hidden[:, :patches], pixel_values, patch_mask, patch_count)  # type: ignore[arg-type]
        if labels is not None:
            out["token_loss"] = self._token_loss(hidden, labels, tokens, token_count)
        losses = [out[name] for name in ("token_loss", "pixel_loss") if out.get(name) is not None]
        if losses:
            out["loss"] = losses[0] + losses[1] if len(losses) == 2 else losses[0]
        if tokens and (labels is None if return_logits is None else return_logits):
            kept = min(logits_to_keep, tokens) or tokens
            out["logits"] = self.lm_head(hidden[:, -kept:])
        return PixelGPTOutput(
            **out, hidden_states=made.hidden_states, attentions=made.attentions,
            **{CACHE: made.get(CACHE)},
        )  # fmt: skip

    def _pixels(
        self, hidden: Tensor, image: Tensor, mask: Tensor | None, count: Tensor | None
    ) -> dict[str, Tensor]:
        """Predictions of all patches, and their regression loss against the next patch."""
        config = self.config
        predicted = self.pixel_head(hidden)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if not config.eos_in_loss:
            mask = without_eos(mask)
        loss, per_patch, _ = ops.patch_mse(
            predicted, image, mask, config.patch_size, config.norm_pix_loss, config.norm_pix_eps, denom=count
        )  # fmt: skip
        return {"pixel_loss": loss, "patches": predicted, "per_patch": per_patch}

    def _token_loss(
        self, hidden: Tensor, labels: Tensor, tokens: int, count: Tensor | None
    ) -> Tensor:
        """Cross-entropy of the next token; patches, and the last token, have none."""
        if tuple(labels.shape) != (hidden.shape[0], tokens):
            raise ValueError(
                f"labels must be [{hidden.shape[0]}, {tokens}], as input_ids, got {list(labels.shape)}"
            )
        # Of all positions, so that the hidden states are read in place.
        target = labels.new_full(hidden.shape[:2], IGNORE)
        if tokens > 1:
            target[:, -tokens:-1] = labels[:, 1:]
        how = "mean" if count is None else "sum"
        loss, _ = ops.linear_cross_entropy(
            hidden, self.lm_head.weight, target, ignore_index=IGNORE, reduction=how
        )
        return loss if count is None else loss / count.reshape(()).to(loss.dtype).clamp(min=1)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, patch_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What ``generate`` calls a forward with: patches once, their mask always."""
        for name in (
            "position_ids",
            "num_patches",
        ):  # positions are counted through, padding included
            kwargs.pop(name, None)
        made = super().prepare_inputs_for_generation(input_ids, **kwargs)
        made.pop("position_ids", None)
        cache = hf.get_cache(made)
        if pixel_values is not None and (cache is None or cache.get_seq_length() == 0):
            made["pixel_values"] = pixel_values
            if patch_mask is None:
                raise ValueError(
                    "generate with pixel_values needs patch_mask [B, L]: which patches are text"
                )
        if patch_mask is not None:
            made["patch_mask"] = patch_mask
        return made


AutoModel.register(PixelGPTConfig, PixelGPTModel, exist_ok=True)
AutoModelForCausalLM.register(PixelGPTConfig, PixelGPTForCausalLM, exist_ok=True)
register_processor(PixelGPTConfig)


def make_model(config: PixelGPTConfig, seed: int = 0) -> PixelGPTForCausalLM:
    """A random model; the seed decides its weights, and the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PixelGPTForCausalLM(config)
