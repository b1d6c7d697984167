# SPDX-License-Identifier: Apache-2.0
"""Merge recipes: YAML (or a dictionary) with mergekit's field names.

    merge_method: dare_ties        # linear, task_arithmetic, ties, dare_linear, dare_ties, slerp
    base_model: base/              # folders with safetensors
    models:
      - model: expert-1/
        parameters: {weight: 0.5, density: 0.4}
      - model: expert-2/
        parameters: {weight: 0.5, density: 0.4}
    parameters: {normalize: false, lambda: 1.0, seed: 0}
    dtype: bfloat16                # what is computed with; out_dtype: what is written

A parameter is a number, a list of numbers (interpolated over the layers, first to last), or a list of
``{filter: part of a tensor's name, value: ...}`` of which the first that fits counts. One of a model comes before one
of the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIELDS = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"}
_REFUSED = {
    "slices": "layers cannot be taken from different models yet; list whole models under 'models'",
    "modules": "list whole models under 'models'",
    "tokenizer_source": "vocabularies are not merged; the tokenizer of base_model is copied",
    "tokenizer": "vocabularies are not merged; the tokenizer of base_model is copied",
    "chat_template": "that of base_model is copied; edit it in the merged folder",
}
_PER_MODEL = {"weight", "density"}
# Of a method: does it need a base model, its parameters, and their defaults (no default: required).
_NEED_BASE = {
    "linear": False,
    "task_arithmetic": True,
    "ties": True,
    "dare_linear": True,
    "dare_ties": True,
    "slerp": False,
}
_DELTA = {"lambda": 1.0, "int8_mask": False}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "task_arithmetic": {**_DELTA, "normalize": False},
    "ties": {**_DELTA, "normalize": True, "density": 1.0},
    "dare_linear": {**_DELTA, "normalize": False, "density": 1.0, "rescale": True, "seed": 0},
    "dare_ties": {**_DELTA, "normalize": False, "density": 1.0, "rescale": True, "seed": 0},
    "slerp": {"t": None},
}
METHODS = tuple(_PARAMETERS)


@dataclass(frozen=True)
class Source:
    """A model of a recipe: a folder (or the name of a state dict), and its own parameters."""

    model: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; made by :func:`load_recipe`.

    ``models`` are what is merged, without the base. For ``slerp`` the first is where t = 0.
    """

    method: str
    base: str | None
    models: tuple[Source, ...]
    parameters: Mapping[str, Any]
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    source: Mapping[str, Any]  # as it was read

    def value(self, name: str, tensor: str, depth: float, source: Source | None = None) -> Any:
        """The parameter ``name`` for a tensor at ``depth`` in [0, 1] of the model."""
        places = [source.parameters] if source else []
        for parameters in (*places, self.parameters):
            if name in parameters:
                found = _setting(parameters[name], tensor, depth)
                if found is not None:
                    return found
        default = _PARAMETERS[self.method].get(name)
        if default is None:
            whose = f"model {source.model!r}" if source else "parameters"
            raise ValueError(f"recipe: {whose} has no value of {name!r} for {tensor}")
        return default


def _setting(setting: Any, tensor: str, depth: float) -> Any:
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for case in setting:
            part = case.get("filter")
            if part in (None, "*") or part in tensor:
                return _setting(case["value"], tensor, depth)
        return None
    at = depth * (len(setting) - 1)
    low = int(at)
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (at - low) * (setting[high] - setting[low])


def _check_setting(where: str, name: str, setting: Any) -> None:
    if isinstance(setting, list):
        cases = [isinstance(x, Mapping) for x in setting]
        if not setting or any(cases) != all(cases):
            raise ValueError(f"{where}: {name} must be a value, numbers, or {{filter, value}} entries, "
                             f"got {setting!r}")  # fmt: skip
        for x in setting:
            if isinstance(x, Mapping):
                if "value" not in x or set(x) - {"filter", "value"}:
                    raise ValueError(
                        f"{where}: an entry of {name} must be {{filter, value}}, got {dict(x)!r}"
                    )
                _check_setting(where, name, x["value"])
            elif isinstance(x, bool) or not isinstance(x, int | float):
                raise ValueError(f"{where}: {name} must be numbers, got {x!r}")
        return
    if name in ("normalize", "int8_mask"):
        good, want = isinstance(setting, bool), "true or false"
    elif name == "rescale":
        good = isinstance(setting, bool) or setting in ("l1", "l2")
        want = "true, false, 'l1' or 'l2'"
    elif name == "seed":
        good, want = isinstance(setting, int) and not isinstance(setting, bool), "a whole number"
    else:
        good, want = isinstance(setting, int | float) and not isinstance(setting, bool), "a number"
    if not good:
        raise ValueError(f"{where}: {name} must be {want}, got {setting!r}")


def _parameters(method: str, where: str, given: Any, per_model: bool) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: must be names and values, got {given!r}")
    known = set(_PARAMETERS[method]) | ({"weight"} if method != "slerp" else set())
    allowed = known & _PER_MODEL if per_model else known
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise ValueError(
            f"{where}: {unknown[0]!r} is not a parameter of {method!r} here; it has "
            f"{', '.join(sorted(allowed)) or 'none'}"
        )
    for name, setting in given.items():
        _check_setting(where, name, setting)
    return dict(given)


def _dtype(field: str, name: Any) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"recipe: {field} must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _read(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("reading a YAML recipe needs PyYAML: pip install pyyaml") from error
    return yaml.safe_load(path.read_text())


def load_recipe(recipe: str | Path | Mapping[str, Any]) -> Recipe:
    """Reads and checks a recipe: a YAML file, or a dictionary of its fields.

    Raises:
        ValueError: a field or parameter is unknown, missing, or not supported; the message says which and what is.
    """
    fields = recipe if isinstance(recipe, Mapping) else _read(Path(recipe))
    if not isinstance(fields, Mapping):
        raise ValueError(f"recipe: must be fields such as merge_method and models, got {fields!r}")
    for name, why in _REFUSED.items():
        if fields.get(name) is not None and not (
            name == "tokenizer_source" and fields[name] == "base"
        ):
            raise ValueError(f"recipe: {name} is not supported: {why}")
    unknown = sorted(set(fields) - _FIELDS - set(_REFUSED))
    if unknown:
        raise ValueError(
            f"recipe: unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}"
        )
    method = fields.get("merge_method")
    if method not in _PARAMETERS:
        raise ValueError(
            f"recipe: merge_method must be one of {', '.join(METHODS)}, got {method!r}"
        )
    listed = fields.get("models")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"recipe: models must be a list of models, got {listed!r}")
    sources = []
    for i, entry in enumerate(listed):
        if isinstance(entry, str):
            entry = {"model": entry}
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise ValueError(f"recipe: models[{i}] must be {{model, parameters}}, got {entry!r}")
        if extra := sorted(set(entry) - {"model", "parameters"}):
            raise ValueError(f"recipe: models[{i}] has an unknown field {extra[0]!r}")
        given = _parameters(
            method, f"recipe: models[{i}].parameters", entry.get("parameters"), True
        )
        sources.append(Source(entry["model"], given))
    base = fields.get("base_model")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"recipe: base_model must be a folder, got {base!r}")
    if base is None and _NEED_BASE[method]:
        raise ValueError(f"recipe: {method} needs base_model, what the models were tuned from")
    made = Recipe(
        method, base, _merged(method, base, sources),
        _parameters(method, "recipe: parameters", fields.get("parameters"), False),
        _dtype("dtype", fields.get("dtype")), _dtype("out_dtype", fields.get("out_dtype")),
        dict(fields),
    )  # fmt: skip
    if method == "slerp" and "t" not in made.parameters:
        raise ValueError("recipe: slerp needs parameters: {t: number in [0, 1]}")
    return made


def _merged(method: str, base: str | None, sources: list[Source]) -> tuple[Source, ...]:
    """What is merged: mergekit's recipes may list the base among the models."""
    if method == "slerp":
        # With the base among the two, it is where t = 0; with another base, deltas are interpolated.
        sources = sorted(sources, key=lambda s: s.model != base)
        if len(sources) != 2:
            raise ValueError(f"recipe: slerp merges 2 models, got {len(sources)}")
    elif method != "linear":
        sources = [s for s in sources if s.model != base]
    names = [s.model for s in sources]
    if not names:
        raise ValueError("recipe: models has nothing but base_model")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"recipe: models has {twice[0]!r} twice; give it one weight")
    return tuple(sources)
