# SPDX-License-Identifier: Apache-2.0
"""Router vectors without training, as mergekit's gate modes define them: from prompts, or random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.training.checks import one_of
from tenfold.upit.expand import Child
from tenfold.upit.recipe import GATES, PROMPTED, Source


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    start = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids if start is None else [start, *ids]


@torch.inference_mode()
def _vectors(model: Any, tokenizer: Any, prompts: Sequence[str], mode: str) -> Tensor:
    """[L, d]: mean over prompts of what a mode takes of one."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([_ids(tokenizer, prompt)], device=next(model.parameters()).device)
        if ids.numel() == 0:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
        if mode == "cheap_embed":
            sums = model.get_input_embeddings()(ids)[0].float().sum(0)
            found.append(sums.expand(model.config.num_hidden_layers, -1))
            continue
        states = torch.stack(
            model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]
        )[:, 0]
        found.append((states.mean(1) if mode == "hidden_avg" else states[:, -1]).float())
    return torch.stack(found).mean(0).cpu()


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def prompt_gates(
    model: Any, tokenizer: Any, sources: Sequence[Source], mode: str, children: Sequence[Child] = ()
) -> Tensor:
    """Router vectors [n, L, d] of unit norm: positive less negative prompts, under the base model.

    Args:
        mode: ``"hidden"``: what layers read at a prompt's last token; ``"hidden_avg"``: at all its tokens on average;
            ``"cheap_embed"``: the sum of its token embeddings, for all layers.
        children: merged experts have the mean of their parents' vectors, by shares.
    """
    one_of("mode", mode, PROMPTED)
    model.eval()
    made = []
    for source in sources:
        vectors = _vectors(model, tokenizer, source.positive, mode)
        if source.negative:
            vectors = vectors - _vectors(model, tokenizer, source.negative, mode)
        made.append(_unit(vectors))
    for child in children:
        made.append(_unit(sum(w * made[p] for w, p in zip(child.shares, child.parents))))  # type: ignore[arg-type]
    return torch.stack(made)


def random_gates(experts: int, layers: int, width: int, mode: str, seed: int) -> Tensor:
    """Router vectors [n, L, d]: ``"random"`` N(0, 1), ``"uniform_random"`` as a linear layer begins."""
    one_of("mode", mode, tuple(set(GATES) - set(PROMPTED) - {"seed"}))
    made = torch.Generator().manual_seed(seed)
    if mode == "random":
        return torch.randn(experts, layers, width, generator=made)
    return (2 * torch.rand(experts, layers, width, generator=made) - 1) / width**0.5
