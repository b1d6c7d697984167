# SPDX-License-Identifier: Apache-2.0
"""Which half trains: the draws of half fine-tuning, reproducible from (seed, round).

A category with c matrices in each of L layers has F = ceil((1 - ratio) * c * L - 1/2) frozen ones
(half rounds down). Every layer freezes F // L of them, and F % L layers, drawn first, one more. At
ratio 1/2: two of four attention matrices, one of two norms, and one of three FFN matrices, two in
every other layer.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.hft.architecture import CATEGORIES, Architecture, Ranges, Unit, describe
from tenfold.hft.plan import Part, Plan
from tenfold.training.checks import one_of

STRATEGIES = ("category", "layer", "model", "element", "importance")
BALANCES = ("matrices", "params")
# The subsets of layers that freeze one more are drawn in this order, before anything else.
_SUBSET_ORDER = ("ffn", "attention", "norm")


def check_ratio(ratio: float) -> float:
    """``ratio`` if it is a share; ValueError otherwise."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], the share that trains, got {ratio}")
    return float(ratio)


def generator(seed: int, round: int) -> random.Random:
    """The generator of a round's draw: the same on every rank and machine."""
    return random.Random(f"{seed}:{round}")


def frozen_count(ratio: float, matrices: int) -> int:
    """How many of so many matrices are frozen: (1 - ratio) * matrices, half rounds down."""
    # Rounded first: 0.3 * 10 must not become one more than 3.
    return max(0, math.ceil(round((1 - ratio) * matrices - 0.5, 9)))


def _quota(ratio: float, category: str, layers: list[list[Unit]], rng: Any) -> list[int]:
    """Frozen units per layer, by the rule above, among layers with the same number of units."""
    counts = [0] * len(layers)
    for size in dict.fromkeys(len(units) for units in layers):
        at = [i for i, units in enumerate(layers) if len(units) == size]
        if category == "norm" and size > 2:
            # Extra norms (of queries and keys, say): ceil of the trained share.
            for i in at:
                counts[i] = size - math.ceil(round(ratio * size, 9))
            continue
        total = frozen_count(ratio, size * len(at))
        each, more = divmod(total, len(at))
        extra = set(rng.sample(range(len(at)), more))
        for j, i in enumerate(at):
            counts[i] = each + (j in extra)
    return counts


def _by_category(made: Architecture, ratio: float, rng: random.Random) -> set[int]:
    """ids of the frozen units."""
    quotas = {c: _quota(ratio, c, [layer[c] for layer in made.layers], rng) for c in _SUBSET_ORDER}
    frozen: set[int] = set()
    for i, layer in enumerate(made.layers):
        for category in CATEGORIES:
            frozen.update(map(id, rng.sample(layer[category], quotas[category][i])))
    return frozen


def _nearest(units: list[Unit], target: float, rng: random.Random) -> tuple[list[Unit], int]:
    """Units in random order, each taken if that brings their total closer to ``target``."""
    taken: list[Unit] = []
    total = 0
    for unit in rng.sample(units, len(units)):
        if abs(total + unit.numel - target) < abs(total - target):
            taken.append(unit)
            total += unit.numel
    return taken, total


def _by_parameters(made: Architecture, ratio: float, rng: random.Random) -> set[int]:
    """As ``_by_category``, counting parameters; what a layer misses is made up by another."""
    frozen: set[int] = set()
    for category in CATEGORIES:
        owed = 0.0
        # In random order, or every other layer would always get the one more.
        for layer in rng.sample(made.layers, len(made.layers)):
            owed += (1 - ratio) * sum(u.numel for u in layer[category])
            taken, total = _nearest(layer[category], owed, rng)
            owed -= total
            frozen.update(map(id, taken))
    return frozen


def _by_layer(made: Architecture, ratio: float, balance: str, rng: random.Random) -> set[int]:
    layers = list(range(len(made.layers)))
    sizes = [sum(u.numel for c in CATEGORIES for u in made.layers[i][c]) for i in layers]
    if balance == "params":
        units = [Unit("", i, "", ()) for i in layers]
        frozen_layers, total = [], 0
        target = (1 - ratio) * sum(sizes)
        for unit in rng.sample(units, len(units)):
            if abs(total + sizes[unit.layer] - target) < abs(total - target):
                frozen_layers.append(unit.layer)
                total += sizes[unit.layer]
    else:
        frozen_layers = rng.sample(layers, frozen_count(ratio, len(layers)))
    return {id(u) for i in frozen_layers for c in CATEGORIES for u in made.layers[i][c]}


def _by_model(made: Architecture, ratio: float, balance: str, rng: random.Random) -> set[int]:
    units = list(made.units())
    if balance == "params":
        return set(map(id, _nearest(units, (1 - ratio) * sum(u.numel for u in units), rng)[0]))
    return set(map(id, rng.sample(units, frozen_count(ratio, len(units)))))


def _by_score(made: Architecture, ratio: float, score: Callable[[Unit], float]) -> set[int]:
    """Quotas as ``_by_category``; the units with the lowest scores are frozen.

    The layers that freeze one more are those whose next unit scores lowest.
    """
    frozen: set[int] = set()
    for category in CATEGORIES:
        layers = [sorted(layer[category], key=score) for layer in made.layers]
        least = _quota(ratio, category, layers, _NoExtra())
        sizes = dict.fromkeys(len(units) for units in layers)
        for size in sizes:
            at = [i for i, units in enumerate(layers) if len(units) == size]
            for i in at:
                frozen.update(map(id, layers[i][: least[i]]))
            if category == "norm" and size > 2:
                continue
            more = frozen_count(ratio, size * len(at)) % len(at)
            following = sorted(
                at, key=lambda i: score(layers[i][least[i]]) if least[i] < size else 0.0
            )
            frozen.update(id(layers[i][least[i]]) for i in following[:more])
    return frozen


class _NoExtra:
    """Stands for a generator where the extra layers are not drawn."""

    def sample(self, population: Any, k: int) -> list[int]:
        return []


def _unit_score(scores: Mapping[str, Any]) -> Callable[[Unit], float]:
    def score(unit: Unit) -> float:
        total = 0.0
        for piece in unit.pieces:
            value = scores.get(piece.name)
            if value is None:
                continue
            value = torch.as_tensor(value)
            total += float(value.double().sum()) if value.ndim else float(value) * piece.numel
        return total / max(1, unit.numel)

    return score


def _element_parts(
    model: nn.Module, made: Architecture, ratio: float, seed: int, round: int,
    scores: Mapping[str, Tensor] | None,
) -> dict[str, Part]:  # fmt: skip
    """Element masks over every tensor in a unit: random, or the highest scores."""
    from tenfold import ops

    inside = {p.name for u in made.units() for p in u.pieces}
    mixed = int.from_bytes(hashlib.sha256(f"{seed}:{round}".encode()).digest()[:7], "big")
    parts = {}
    for stream, (name, parameter) in enumerate(model.named_parameters()):
        if name not in inside:
            continue
        if scores is None:
            parts[name] = Part("element", random=(ratio, mixed, stream))
        else:
            if name not in scores or scores[name].shape != parameter.shape:
                raise ValueError(
                    f"scores[{name!r}] must have the parameter's shape {list(parameter.shape)}"
                )
            parts[name] = Part.from_packed("element", ops.mask_topk(scores[name], ratio))
    return parts


def _merge(ranges: list[Ranges]) -> Ranges:
    flat = sorted(r for part in ranges for r in part)
    made: list[tuple[int, int, int]] = []
    for start, stop, step in flat:
        if made and step == made[-1][2] == 1 and start == made[-1][1]:
            made[-1] = (made[-1][0], stop, 1)
        else:
            made.append((start, stop, step))
    return tuple(made)


def plan_of(
    model: nn.Module,
    made: Architecture,
    frozen_units: set[int],
    freeze_embeddings: bool,
    **about: Any,
) -> Plan:
    """The Plan that freezes these units (and the embeddings and head, if asked for)."""
    trained_pieces: dict[str, list[Any]] = {}
    frozen_pieces: dict[str, list[Any]] = {}
    for unit in made.units():
        for piece in unit.pieces:
            kept = frozen_pieces if id(unit) in frozen_units else trained_pieces
            kept.setdefault(piece.name, []).append(piece)
    trained, frozen, partial = [], [], {}
    held = set(made.embeddings) if freeze_embeddings else set()
    for name, _ in model.named_parameters():
        if name in held or (name in frozen_pieces and name not in trained_pieces):
            frozen.append(name)
        elif name in frozen_pieces:
            pieces = trained_pieces[name]
            partial[name] = Part(pieces[0].kind, _merge([p.ranges for p in pieces]))
        else:
            trained.append(name)
    return _counted(model, made, trained, frozen, partial, about)


def _counted(
    model: nn.Module, made: Architecture, trained: list[str], frozen: list[str],
    partial: dict[str, Part], about: dict[str, Any],
) -> Plan:  # fmt: skip
    parameters = dict(model.named_parameters())
    inside = {p.name for u in made.units() for p in u.pieces}

    def active(name: str) -> int:
        part = partial.get(name)
        n = parameters[name].numel()
        if part is None:
            return 0 if name in gone else n
        units = part.units(parameters[name])
        if part.random is not None:
            return math.floor(part.random[0] * units) * (n // units)
        if part.ranges is not None:
            return sum(len(range(*r)) for r in part.ranges) * (n // units)
        return math.floor(about["ratio"] * units)

    gone = set(frozen)
    counts = {n: active(n) for n in parameters}
    total = sum(p.numel() for p in parameters.values())
    layer_total = sum(parameters[n].numel() for n in inside)
    return Plan(
        tuple(trained), tuple(frozen), partial, architecture=made.name,
        layer_fraction=sum(counts[n] for n in inside) / max(1, layer_total),
        fraction=sum(counts.values()) / max(1, total), **about,
    )  # fmt: skip


def select(
    model: nn.Module,
    round: int = 0,
    seed: int = 0,
    *,
    strategy: str = "category",
    ratio: float = 0.5,
    balance: str = "matrices",
    scores: Mapping[str, Any] | None = None,
    freeze_embeddings: bool = False,
) -> Plan:
    """Draws what trains in a round.

    Args:
        model: a transformer; :func:`tenfold.hft.architecture.describe` must find its layers.
        round, seed: the draw is a function of both.
        strategy: ``"category"`` (the paper's), ``"layer"`` (whole layers), ``"model"`` (matrices of
            any layer and category), ``"element"`` (a random part of the elements of every layer tensor) or
            ``"importance"``.
        ratio: the share of the layers' matrices that trains.
        balance: ``"matrices"`` counts matrices, as the paper; ``"params"`` approaches the share of
            parameters where matrices differ in size (GQA).
        scores: of ``"importance"``: a number or tensor per name; what scores highest trains. Tensors of the
            parameters' shapes for all layer tensors select elements, anything else selects matrices
            with the quotas of ``"category"``.
        freeze_embeddings: freeze embeddings and head, too (the paper trains them).

    Returns:
        The Plan.

    Raises:
        ValueError: a setting that cannot be, an unknown architecture, or nothing left to train.
    """
    one_of("strategy", strategy, STRATEGIES)
    one_of("balance", balance, BALANCES)
    ratio = check_ratio(ratio)
    if (strategy == "importance") != (scores is not None):
        raise ValueError("scores are needed for strategy 'importance', and only there")
    made = describe(model)
    rng = generator(seed, round)
    about = {"strategy": strategy, "ratio": ratio, "balance": balance, "seed": seed, "round": round}
    inside = {p.name for u in made.units() for p in u.pieces}
    elements = strategy == "element" or (
        scores is not None
        and all(isinstance(s, Tensor) and s.ndim for s in scores.values())
        and inside <= set(scores)
    )
    if elements and 0 < ratio < 1:
        parts = _element_parts(model, made, ratio, seed, round, scores)
        held = set(made.embeddings) if freeze_embeddings else set()
        rest = [n for n, _ in model.named_parameters() if n not in parts]
        plan = _counted(model, made, [n for n in rest if n not in held],
                        [n for n in rest if n in held], parts, about)  # fmt: skip
    else:
        if elements:
            frozen = set() if ratio == 1 else set(map(id, made.units()))
        elif scores is not None:
            frozen = _by_score(made, ratio, _unit_score(scores))
        elif strategy == "layer":
            frozen = _by_layer(made, ratio, balance, rng)
        elif strategy == "model":
            frozen = _by_model(made, ratio, balance, rng)
        elif balance == "params":
            frozen = _by_parameters(made, ratio, rng)
        else:
            frozen = _by_category(made, ratio, rng)
        plan = plan_of(model, made, frozen, freeze_embeddings, **about)
    if not plan.trainable or plan.fraction == 0:
        raise ValueError(
            f"nothing is left to train: ratio {ratio}, embeddings "
            f"{'frozen' if freeze_embeddings else 'none'}"
        )
    return plan
