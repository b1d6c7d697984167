# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a dense model on disk: saving them complete or not at all, finding and choosing them, loading one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data.models import quiet_transformers
from tenfold.merge.checkpoint import Planned, write_shards
from tenfold.training.store import write_text
from tenfold.upit.adapters import is_adapter
from tenfold.upit.config import PICKS

_STEP = re.compile(r"checkpoint-(\d+)")
_MOST_BYTES = 5_000_000_000  # of a file
State = Mapping[str, Tensor]


def full_state(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All of a model's tensors on the CPU, floats in ``dtype``; of FSDP2's shards the whole (all ranks must call)."""
    made, seen = {}, dict[tuple[int, torch.Size], Tensor]()
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        key = (whole.data_ptr(), whole.shape)  # tied weights stay one tensor, which is written once
        if key not in seen or hasattr(value, "full_tensor"):
            seen[key] = whole.detach().to(
                "cpu", dtype if whole.is_floating_point() else whole.dtype
            )
        made[name] = seen[key]
    return made


def save_dense(model: Any, state: State, folder: Path, tokenizer: Any = None) -> Path:
    """Writes ``state`` as a folder that ``from_pretrained`` loads; it appears complete or not at all.

    Any of several processes may do it (transformers' own ``save_pretrained`` writes on the first alone).
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    named = {id(t): n for n, t in reversed(list(state.items()))}  # of tied weights the first name
    unique = {n: t.contiguous() for n, t in state.items() if named[id(t)] == n}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config.pop("torch_dtype", None)
    kinds = {t.dtype for t in unique.values() if t.is_floating_point()}
    config["dtype"] = str(kinds.pop())[6:] if len(kinds) == 1 else config.get("dtype")
    write_text(
        temporary / "config.json", json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(temporary)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(temporary)
    tensors = [Planned(n, t.dtype, tuple(t.shape)) for n, t in unique.items()]
    write_shards(temporary, tensors, _MOST_BYTES, lambda planned: unique[planned.name])
    os.replace(temporary, folder)
    return folder


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The ``checkpoint-N`` folders in a folder, as ``collect`` and transformers' Trainer name them, by N."""
    found = [(int(m[1]), p) for p in Path(folder).glob("checkpoint-*") if (m := _STEP.fullmatch(p.name))]  # fmt: skip
    return [p for _, p in sorted(found)]


def pick_checkpoints(
    paths: Sequence[Path],
    experts: int,
    pick: str | Sequence[int] = "last",
    keep: int | None = None,
) -> list[Path]:
    """Which of the checkpoints, oldest first, become experts.

    Args:
        experts: n. pick: ``"last"``, ``"even"`` (with the last one) or numbers from 0. keep: how many (None: all, at
            most n).

    Raises:
        ValueError: more are wanted than there are, or than n; a number out of range.
    """
    if not isinstance(pick, str):
        wrong = [i for i in pick if not 0 <= i < len(paths)]
        if wrong or (keep is not None and keep != len(pick)):
            raise ValueError(
                f"pick {list(pick)} must be {keep or 'some'} of the checkpoints 0 to {len(paths) - 1}"
            )
        count = len(pick)
    else:
        count = min(len(paths), experts) if keep is None else keep
    if not 1 <= count <= len(paths):
        raise ValueError(f"{count} checkpoints are to become experts, but there are {len(paths)}")
    if count > experts:
        raise ValueError(
            f"{count} saved experts are more than the {experts} experts that are wanted"
        )
    if not isinstance(pick, str):
        return [paths[i] for i in pick]
    if pick not in PICKS:
        raise ValueError(f"pick must be one of {', '.join(PICKS)}, got {pick!r}")
    if pick == "last":
        return list(paths[len(paths) - count :])
    return [paths[(i + 1) * len(paths) // count - 1] for i in range(count)]


def load_expert(
    expert: str | Path | State, base: Any = None, dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:  # fmt: skip
    """An expert as a dense causal LM in eval mode.

    Args:
        expert: a model's folder, the folder of a LoRA adapter (on ``base``), or a state dict (of the architecture of
            ``base``).
        base: a model or the folder of one. dtype: None: as it is stored.
    """
    from transformers import AutoModelForCausalLM

    kind: Any = "auto" if dtype is None else dtype

    def opened(path: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=kind)

    with quiet_transformers():
        if isinstance(expert, Mapping) or is_adapter(expert):
            if base is None:
                raise ValueError(
                    "an expert that is a LoRA adapter or a state dict needs its base model"
                )
            import copy

            model = opened(base) if isinstance(base, str | Path) else copy.deepcopy(base)
            if isinstance(expert, Mapping):
                model.load_state_dict(dict(expert), strict=False)
                model.tie_weights()
            else:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(expert), is_trainable=True)
        else:
            model = opened(expert)
    return model.to(device).eval()
