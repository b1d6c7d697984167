# SPDX-License-Identifier: Apache-2.0
"""LoRA experts as PEFT stores them: reading, inner products of their updates, and the three ways to merge them.

An adapter's update of a linear layer is ``scale * B @ A`` (A [r, in], B [out, r]). Merging the factors, as is the
default, also multiplies one parent's B with the other's A; ``"delta"`` merges the updates themselves.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.merge.sources import check_alike
from tenfold.training.checks import one_of
from tenfold.upit.config import LORA_MERGES

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
State = Mapping[str, Tensor]
_A, _B = ".lora_A.weight", ".lora_B.weight"


def is_adapter(path: Any) -> bool:
    """Is this a folder of a PEFT adapter?"""
    return isinstance(path, str | Path) and (Path(path) / SETTINGS).is_file()


def load_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, settings) of an adapter's folder. ValueError for what is no plain LoRA."""
    from safetensors.torch import load_file

    folder = Path(path)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}; save the adapter with save_pretrained")
    settings = json.loads((folder / SETTINGS).read_text())
    state = load_file(folder / WEIGHTS)
    other = sorted(n for n in state if not n.endswith((_A, _B)))
    if settings.get("peft_type") != "LORA" or settings.get("use_dora") or other:
        more = f" (it has {', '.join(other[:3])})" if other else ""
        raise ValueError(f"{folder} is no plain LoRA adapter, which is what experts may be{more}")
    return state, settings


def save_adapter(path: str | Path, state: State, settings: Mapping[str, Any]) -> Path:
    """Writes an adapter's folder, which appears complete."""
    from safetensors.torch import save_file

    final = Path(path)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    plain = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    save_file(plain, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / SETTINGS).write_text(json.dumps(dict(settings), indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return final


def scale_of(settings: Mapping[str, Any]) -> float:
    """What an adapter's product is multiplied with."""
    rank = settings["r"]
    return settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def layers_of(state: State) -> list[str]:
    """Names of the adapted linear layers."""
    return sorted(n[: -len(_A)] for n in state if n.endswith(_A))


def update_gram(experts: Sequence[State], scales: Sequence[float]) -> Tensor:
    """Inner products of the experts' updates: ``G[j, k] = sum <s_j B_j A_j, s_k B_k A_k>``, float64 [m, m].

    Updates are never formed: ``<B_j A_j, B_k A_k> = sum((B_j^T B_k) * (A_j A_k^T))``.
    """
    check_alike(experts, [f"experts[{i}]" for i in range(len(experts))])
    count = len(experts)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for layer in layers_of(experts[0]):
        a = [e[layer + _A].double() for e in experts]
        b = [e[layer + _B].double() for e in experts]
        for j in range(count):
            for k in range(j + 1):
                inner = ((b[j].T @ b[k]) * (a[j] @ a[k].T)).sum()
                gram[j, k] += scales[j] * scales[k] * inner
    return gram.tril() + gram.tril(-1).T


def factor_gram(experts: Sequence[State]) -> Tensor:
    """Inner products of the stored factors, float64 [m, m]."""
    check_alike(experts, [f"experts[{i}]" for i in range(len(experts))])
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name in sorted(experts[0]):
        ops.delta_gram_(gram, None, [e[name] for e in experts])
    return gram


def _truncated(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) of the best approximation of that rank; signs are fixed."""
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    sign = torch.where(v.gather(1, v.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    root = s.sqrt()
    return sign * root[:, None] * v, sign.T * root * u


def merge_adapters(
    base: State,
    parents: Sequence[State],
    weights: Sequence[float],
    *,
    how: str = "factors",
    scale: float = 1.0,
    drop: float = 0.5,
    rescale: str = "inv_keep",
    lambda_: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """One adapter of several, all of one rank and scale.

    Args:
        base: the adapter as it was initialised (B = 0), of which ``"factors"`` takes differences.
        weights: shares of the parents.
        how: ``"factors"``: both factors relative to ``base``; ``"peft"``: both factors, weights are square roots
            (PEFT's ``dare_linear``; the scale stays that of the parents); ``"delta"``: the updates ``scale * B A``,
            cut to the rank by an SVD in float64.
        drop, rescale, lambda_, seed: of :func:`tenfold.ops.dare_merge`; ``"peft"`` scales by their square root, too.

    Raises:
        ValueError: ``how``; other tensors or shapes; ranks that differ.
    """
    one_of("lora_merge", how, LORA_MERGES)
    check_alike([base, *parents], ["the initial adapter", *(f"experts[{i}]" for i in range(len(parents)))])  # fmt: skip
    common: dict[str, Any] = {"rescale": rescale}
    if how == "factors":
        return {n: _dare(base[n], [p[n] for p in parents], weights, drop, seed, n, lambda_=lambda_, **common)
                for n in sorted(base)}  # fmt: skip
    if how == "peft":
        roots = [math.sqrt(w) for w in weights]
        return {n: _dare(torch.zeros_like(base[n]), [p[n] for p in parents], roots, drop, seed, n,
                         lambda_=math.sqrt(lambda_), **common) for n in sorted(base)}  # fmt: skip
    made = {}
    for layer in layers_of(base):
        kind, rank = base[layer + _A].dtype, len(base[layer + _A])
        updates = [scale * (p[layer + _B].float() @ p[layer + _A].float()) for p in parents]
        merged = _dare(torch.zeros_like(updates[0]), updates, weights, drop, seed, layer, lambda_=lambda_,
                       **common)  # fmt: skip
        a, b = _truncated(merged / scale, rank)
        made[layer + _A], made[layer + _B] = a.to(kind), b.to(kind)
    return made


def _dare(base: Tensor, experts: list[Tensor], weights: Sequence[float], drop: float, seed: int,
          name: str, **kwargs: Any) -> Tensor:  # fmt: skip
    from tenfold._load import call
    from tenfold.reference.random import name_stream

    # The op itself: square roots of shares do not sum to 1, and need no warning.
    made: Tensor = call(torch.ops.tenfold.dare_merge, base, experts, list(weights), [drop] * len(experts),
                        seed, name_stream(name), **kwargs)  # fmt: skip
    return made
