# SPDX-License-Identifier: Apache-2.0
"""The critic, and policy and critic as the one module that is trained.

A value belongs to the state *before* a token: that of response token j is read at position P + j - 1, where
the prompt is P wide, as the logits of token j are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tenfold.ops import selective_logprob
from tenfold.rlhf.trunks import apply_head, model_inputs, trunk_of, value_head

HEAD_FILE = "value_head.safetensors"


class Critic(nn.Module):
    """A transformers network without LM head, and a linear head: a value per position.

    Args:
        trunk: called with ``input_ids``, ``attention_mask`` [B, S], gives ``last_hidden_state`` [B, S, H].
        head: [H] -> [1]; None for one of zeros without bias, so that all values begin at 0.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head if head is not None else value_head(trunk)

    def forward(self, ids: Tensor, mask: Tensor, keep: int | None = None) -> Tensor:
        """Values float32 [B, keep] at the last ``keep`` positions (default: all) of ids, mask [B, S]."""
        hidden = self.trunk(**model_inputs(self.trunk, ids, mask), use_cache=False)
        return apply_head(self.head, hidden.last_hidden_state, keep)

    @classmethod
    def from_policy(cls, policy: nn.Module) -> Critic:
        """A copy of the policy's network (before LoRA), with values of 0."""
        return cls(copy.deepcopy(trunk_of(policy)).requires_grad_(True))

    @classmethod
    def from_reward_model(cls, reward: nn.Module) -> Critic:
        """A copy of a reward model's network and head: values begin as the reward of what is there.

        Takes models with ``trunk`` and ``head``, and transformers' sequence classifiers with one label.
        Raises TypeError for others.
        """
        if isinstance(getattr(reward, "head", None), nn.Module) and hasattr(reward, "trunk"):
            trunk, head = reward.trunk, reward.head
        elif isinstance(getattr(reward, "score", None), nn.Linear) and hasattr(
            reward, "base_model"
        ):
            trunk, head = reward.base_model, reward.score
        else:
            raise TypeError(
                f"a critic can begin as a reward model with trunk and head, or as a transformers sequence "
                f"classifier; got {type(reward).__name__}"
            )
        if isinstance(head, nn.Linear) and head.out_features != 1:
            raise TypeError(
                f"the reward model must give one number, its head gives {head.out_features}"
            )
        return cls(*(copy.deepcopy(m).requires_grad_(True) for m in (trunk, head)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the trunk as transformers does, and the head beside it."""
        from safetensors.torch import save_file

        self.trunk.save_pretrained(folder)  # type: ignore[operator]
        head = {n: p.detach().cpu().contiguous() for n, p in self.head.state_dict().items()}
        save_file(head, Path(folder) / HEAD_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Critic:
        """Reads what :meth:`save_pretrained` wrote; ``kwargs`` go to ``AutoModel.from_pretrained``."""
        from safetensors.torch import load_file
        from transformers import AutoModel

        trunk = AutoModel.from_pretrained(folder, **kwargs)
        state = load_file(Path(folder) / HEAD_FILE)
        head = nn.Linear(state["weight"].shape[1], 1, bias="bias" in state)
        head.load_state_dict(state)
        return cls(trunk, head)


class Output(NamedTuple):
    """What a forward of :class:`ActorCritic` gives, float32 [B, R]: None what was not asked for."""

    logp: Tensor | None
    entropy: Tensor | None
    value: Tensor | None


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that data parallelism sees one forward for both losses.

    Its state dict has the parameters that train, and buffers.

    Args:
        policy: a transformers causal LM, possibly with PEFT adapters.
        critic: a :class:`Critic`; the head of a critic that shares the policy's trunk; None for none.
        temperature: logits are divided by it, as they were when tokens were drawn.
    """

    def __init__(
        self, policy: nn.Module, critic: Critic | nn.Linear | None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.policy, self.temperature = policy, temperature
        self.shared = critic is not None and not isinstance(critic, Critic)
        self.critic = critic
        self.register_state_dict_post_hook(_without_frozen)

    def forward(
        self, ids: Tensor, mask: Tensor, prompt: int, logp: bool = True, value: bool = True
    ) -> Output:
        """Log-probabilities and entropies of the response tokens, and the values before them.

        Args:
            ids, mask: [B, P + R]. prompt: P >= 1. logp, value: what is wanted.
        """
        (ids, mask, prompt), fill = _trimmed(ids, mask, prompt)
        keep = ids.shape[1] - prompt
        # The last token predicts nothing that is there: it is left out.
        ids, mask, target = ids[:, :-1], mask[:, :-1], ids[:, prompt:]
        made = self._read(ids, mask, target, keep, logp, value and self.critic is not None)
        return Output(*(None if x is None else nn.functional.pad(x, (0, fill)) for x in made))

    def _read(
        self, ids: Tensor, mask: Tensor, target: Tensor, keep: int, logp: bool, value: bool
    ) -> Output:
        values = None
        if value and not self.shared:
            assert self.critic is not None
            values = self.critic(ids, mask, keep)
        if not logp and not (value and self.shared):
            return Output(None, None, values)
        out = self.policy(
            **model_inputs(self.policy, ids, mask), use_cache=False,
            logits_to_keep=keep if logp else 1, output_hidden_states=value and self.shared,
        )  # fmt: skip
        if value and self.shared:
            assert self.critic is not None
            values = apply_head(self.critic, out.hidden_states[-1], keep)
        if not logp:
            return Output(None, None, values)
        logits = out.logits[:, out.logits.shape[1] - keep :]
        chosen, _, entropy = selective_logprob(logits, target, self.temperature)
        return Output(chosen, entropy, values)

    @torch.no_grad()
    def value_after(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The value [B] of the state after the last token of each row of ids, mask [B, S]."""
        if self.shared:
            out = self.policy(
                **model_inputs(self.policy, ids, mask), use_cache=False, logits_to_keep=1,
                output_hidden_states=True,
            )  # fmt: skip
            values = apply_head(self.critic, out.hidden_states[-1], None)  # type: ignore[arg-type]
        else:
            values = self.critic(ids, mask)  # type: ignore[misc]
        last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
        return values.gather(1, last[:, None])[:, 0]


def _without_frozen(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Checkpoints need not hold what does not train: below LoRA, nearly everything."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _trimmed(ids: Tensor, mask: Tensor, prompt: int) -> tuple[tuple[Tensor, Tensor, int], int]:
    """Rows without the columns at both ends that pad all of them, and how many went at the right.

    A token of the prompt and one of the response stay.
    """
    used = mask.any(0).nonzero()[:, 0]
    if len(used) == 0:
        return (ids, mask, prompt), 0
    left = min(int(used[0]), prompt - 1)
    right = max(int(used[-1]) + 1, prompt + 1)
    return (ids[:, left:right], mask[:, left:right], prompt - left), ids.shape[1] - right
