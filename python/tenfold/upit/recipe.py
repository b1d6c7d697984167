# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML (or a dictionary) for ``tenfold upit run``; a recipe of mergekit-moe is one, too.

    base_model: smollm2              # a folder, a hub id, or 'smollm2'
    variant: ffn                     # or lora
    num_experts: 8                   # the same as expand: {to: 8}
    experts_per_token: 2
    seed: 0
    data:
      tasks: [docstring, german]     # packaged; or files: {code: code.jsonl} with prompt and answer per line
      train: 256                     # rows per family
      test: 64
    collect: {epochs: 2, save_every: 0.25, learning_rate: 2.0e-5}   # the stages' settings, see tenfold.upit.config
    expand: {drop: 0.5, policy: global}
    seeds: {fraction: 0.01}
    router: {}
    assembly: {}
    post: {epochs: 2}                # or false: no post-training
    lora: {}
    preset: paper                    # or small

With ``experts`` (folders, a folder of ``checkpoint-N``, or mergekit's ``{source_model, positive_prompts,
negative_prompts}``) nothing is tuned first. ``gate_mode``: ``seed`` trains routers on data; mergekit's ``hidden``,
``cheap_embed``, ``random`` and ``uniform_random`` make them without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.training.checks import one_of
from tenfold.upit.checkpoints import checkpoints_in
from tenfold.upit.config import GROUPS, UpITConfig

GATES = ("seed", "hidden", "hidden_avg", "cheap_embed", "random", "uniform_random")
PROMPTED = ("hidden", "hidden_avg", "cheap_embed")
_OWN = {"variant", "num_experts", "experts_per_token", "seed", "preset"}
_FIELDS = {"base_model", "experts", "gate_mode", "dtype", "architecture", "data", *_OWN, *GROUPS}
_EXPERT = {"source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"}
_REFUSED = {
    "shared_experts": "a Mixtral has no shared experts",
    "tokenizer_source": "vocabularies are not merged; the tokenizer of base_model is used",
}
_DATA = {"tasks", "files", "train", "test"}


@dataclass(frozen=True)
class Source:
    """A ready expert, and the prompts that are to be routed to it."""

    model: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSpec:
    """Families of prompts and answers: packaged tasks, then JSON-lines files by name; rows of each."""

    tasks: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    train: int = 256
    test: int = 64


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; made by :func:`load_recipe`.

    ``experts`` is empty where they are to be collected. ``post``: is there post-training. ``source``: as it was read.
    """

    base: str
    config: UpITConfig
    experts: tuple[Source, ...]
    gate_mode: str
    data: DataSpec | None
    post: bool
    source: Mapping[str, Any]


def _read(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("reading a YAML recipe needs PyYAML: pip install pyyaml") from error
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"recipe: {where} must be the name of a model, got {value!r}")
    return value


def _prompts(where: str, value: Any) -> tuple[str, ...]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(p, str) for p in value):
        raise ValueError(f"recipe: {where} must be a list of texts, got {value!r}")
    return tuple(value)


def _expert(at: int, entry: Any) -> Source:
    where = f"experts[{at}]"
    if isinstance(entry, str):
        return Source(_text(where, entry))
    if not isinstance(entry, Mapping):
        raise ValueError(f"recipe: {where} must be a folder or {{source_model, positive_prompts, negative_prompts}}, "
                         f"got {entry!r}")  # fmt: skip
    if unknown := sorted(set(entry) - _EXPERT):
        raise ValueError(
            f"recipe: {where} has an unknown field {unknown[0]!r}; known: {', '.join(sorted(_EXPERT))}"
        )
    for name, plain in (("noise_scale", 0), ("residual_scale", 1)):
        if entry.get(name) not in (None, plain):
            raise ValueError(f"recipe: {where}.{name} is not supported (experts are used as they are), got "
                             f"{entry[name]!r}")  # fmt: skip
    return Source(
        _text(f"{where}.source_model", entry.get("source_model")),
        _prompts(f"{where}.positive_prompts", entry.get("positive_prompts")),
        _prompts(f"{where}.negative_prompts", entry.get("negative_prompts")),
    )


def _data(given: Any) -> DataSpec | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not set(given) & {"tasks", "files"}:
        raise ValueError(f"recipe: data must have tasks or files, got {given!r}")
    if unknown := sorted(set(given) - _DATA):
        raise ValueError(
            f"recipe: data has an unknown field {unknown[0]!r}; known: {', '.join(sorted(_DATA))}"
        )
    files = given.get("files") or {}
    if isinstance(files, list):
        files = {Path(str(f)).stem: f for f in files}
    if not isinstance(files, Mapping):
        raise ValueError(f"recipe: data.files must be names and files, got {files!r}")
    counts = {n: given.get(n, getattr(DataSpec, n)) for n in ("train", "test")}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"recipe: data.{name} must be a positive whole number, got {value!r}")
    tasks = _prompts("data.tasks", given.get("tasks"))
    return DataSpec(tasks, tuple((str(n), str(f)) for n, f in files.items()), **counts)


def _config(given: Mapping[str, Any], experts: tuple[Source, ...]) -> UpITConfig:
    groups: dict[str, Any] = {g: dict(given.get(g) or {}) if isinstance(given.get(g), Mapping | None) else given[g]
                              for g in GROUPS}  # fmt: skip
    own = {k: given[k] for k in _OWN if given.get(k) is not None}
    if given.get("dtype") is not None and isinstance(groups["assembly"], dict):
        groups["assembly"].setdefault("dtype", given["dtype"])
    if "num_experts" not in own and experts and not groups["expand"].get("to"):
        own["num_experts"] = max(2, len(experts))
    elif "num_experts" not in own and groups["expand"].get("to"):
        own["num_experts"] = groups["expand"]["to"]
    try:
        return UpITConfig.make(**(own | groups))
    except (ValueError, TypeError) as error:
        raise type(error)(f"recipe: {error}") from None


def _check_gates(gate: str, experts: tuple[Source, ...], data: DataSpec | None) -> None:
    if gate in PROMPTED:
        missing = [i for i, e in enumerate(experts) if not e.positive]
        if missing or not experts:
            raise ValueError(f"recipe: gate_mode {gate!r} needs positive_prompts of every expert; "
                             f"experts[{missing[0] if missing else 0}] has none")  # fmt: skip
        if len({(e.positive, e.negative) for e in experts}) == 1 and len(experts) > 1:
            raise ValueError(
                f"recipe: gate_mode {gate!r} cannot tell experts apart that all have the same prompts"
            )
    elif any(e.positive or e.negative for e in experts):
        raise ValueError(
            f"recipe: positive_prompts and negative_prompts are not used by gate_mode {gate!r}"
        )


def load_recipe(recipe: str | Path | Mapping[str, Any]) -> Recipe:
    """Reads and checks a recipe: a YAML file, or a dictionary of its fields.

    Raises:
        ValueError: a field is unknown, missing, not supported or out of range; the message says which and what is.
    """
    given = recipe if isinstance(recipe, Mapping) else _read(Path(recipe))
    if not isinstance(given, Mapping):
        raise ValueError(f"recipe: must be fields such as base_model and data, got {given!r}")
    for name, why in _REFUSED.items():
        if given.get(name) is not None:
            raise ValueError(f"recipe: {name} is not supported: {why}")
    if unknown := sorted(set(map(str, given)) - _FIELDS):
        raise ValueError(
            f"recipe: unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}"
        )
    base = _text("base_model", given.get("base_model"))
    architecture = given.get("architecture")
    if architecture not in (None, "mixtral"):
        raise ValueError(
            f"recipe: architecture must be mixtral, the layout that is written, got {architecture!r}"
        )
    listed = given.get("experts")
    if listed is not None and (not isinstance(listed, list | str) or not listed):
        raise ValueError(
            f"recipe: experts must be a list of models, or a folder of checkpoints, got {listed!r}"
        )
    named = isinstance(listed, list)
    if isinstance(listed, str):  # a folder of checkpoints
        listed = [str(p) for p in checkpoints_in(Path(listed).expanduser())] or [listed]
    listed = listed or []
    experts = tuple(_expert(i, e) for i, e in enumerate(listed))
    data = _data(given.get("data"))
    gate = given.get("gate_mode") or ("hidden" if any(e.positive for e in experts) else "seed")
    try:
        one_of("gate_mode", gate, GATES)
    except ValueError as error:
        raise ValueError(f"recipe: {error}") from None
    _check_gates(gate, experts, data)
    source = dict(given)
    post = given.get("post", True)
    if post is None or isinstance(post, bool):
        post, given = post is not False, {k: v for k, v in given.items() if k != "post"}
    else:
        post = True
    config = _config(given, experts)
    if named and len(experts) > config.num_experts:
        raise ValueError(f"recipe: {len(experts)} experts are more than the {config.num_experts} that are wanted "
                         "(num_experts, expand.to)")  # fmt: skip
    return Recipe(base, config, experts, gate, data, post, source)
