# SPDX-License-Identifier: Apache-2.0
"""Names of a stock Mixtral's tensors, in both layouts, and of the dense model's that they come from.

========  ======================================================  ==========================================
dense     ``model.layers.i.mlp.{gate,up,down}_proj.weight``
classic   ``model.layers.i.block_sparse_moe.gate.weight``         ``.block_sparse_moe.experts.e.w{1,3,2}.weight``
stacked   ``model.layers.i.mlp.gate.weight`` [n, d]               ``.mlp.experts.gate_up_proj`` [n, 2 f, d],
                                                                  ``.mlp.experts.down_proj`` [n, d, f]
========  ======================================================  ==========================================
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.merge.checkpoint import Checkpoint, Planned, write_shards
from tenfold.training.checks import one_of
from tenfold.training.store import write_text
from tenfold.upit.options import LAYOUTS

PARTS = ("gate", "up", "down")
_CLASSIC = {"gate": "w1", "up": "w3", "down": "w2"}  # Mixtral's names
_DENSE = re.compile(r"^(?P<layer>.*\.layers\.\d+)\.mlp\.(?P<part>gate|up|down)_proj\.weight$")
_SMALL = (".json", ".txt", ".model", ".jinja")  # tokenizers' and templates' files
_NOT_COPIED = ("config.json", "run.json", "assembly.json")
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "initializer_range", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "max_position_embeddings", "tie_word_embeddings",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "use_cache",
)  # fmt: skip
_BASES = ("llama", "mistral")  # attention without biases or norms: what a Mixtral has


def dense_part(name: str) -> tuple[str, str] | None:
    """(``model.layers.i``, gate, up or down) of a dense FFN's tensor, None of any other."""
    found = _DENSE.match(name)
    return (found["layer"], found["part"]) if found else None


def router_name(layer: str, layout: str) -> str:
    """Name of the router's matrix [n, d] of ``model.layers.i``."""
    return f"{layer}.{'block_sparse_moe' if layout == 'classic' else 'mlp'}.gate.weight"


def expert_name(layer: str, expert: int, part: str) -> str:
    """Name of an expert's matrix in the classic layout."""
    return f"{layer}.block_sparse_moe.experts.{expert}.{_CLASSIC[part]}.weight"


def stacked_names(layer: str) -> tuple[str, str]:
    """Names of ``gate_up_proj`` and ``down_proj``."""
    return f"{layer}.mlp.experts.gate_up_proj", f"{layer}.mlp.experts.down_proj"


def mixtral_config(dense: Any, experts: int, per_token: int, **more: Any) -> dict[str, Any]:
    """The configuration of the Mixtral that has the FFNs of ``experts`` models of configuration ``dense``.

    Raises:
        TypeError: a model that no Mixtral can hold (biases, norms in its attention, another activation).
    """
    given = dict(dense) if isinstance(dense, Mapping) else dense.to_dict()
    kind = given.get("model_type")
    wrong = [k for k in ("attention_bias", "mlp_bias") if given.get(k)]
    if kind not in _BASES or wrong or given.get("hidden_act", "silu") != "silu":
        what = (
            ", ".join(wrong)
            if kind in _BASES and wrong
            else f"model_type {kind!r}, hidden_act {given.get('hidden_act')!r}"
        )
        raise TypeError(
            f"a Mixtral cannot hold this model ({what}); supported: {', '.join(_BASES)} with hidden_act silu, "
            "without biases"
        )
    made = {k: given[k] for k in _KEPT if k in given}
    made.setdefault("sliding_window", None)
    if kind == "llama":
        made["sliding_window"] = None
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **made,
        "num_local_experts": experts, "num_experts_per_tok": per_token, "output_router_logits": False,
        "router_jitter_noise": 0.0, **more,
    }  # fmt: skip


def copy_small_files(source: Path, out: Path) -> None:
    """Tokenizer and generation settings of a model's folder."""
    for file in sorted(source.iterdir() if source.is_dir() else []):
        if (
            file.suffix in _SMALL
            and file.name not in _NOT_COPIED
            and not file.name.endswith(".index.json")
        ):
            shutil.copyfile(file, out / file.name)


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a folder; FileNotFoundError without one."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: it is no model folder of transformers"
        )
    return json.loads(file.read_text())


def find_layout(names: Iterable[str]) -> str:
    """``classic`` or ``stacked``; ValueError if there are no experts of a Mixtral."""
    for name in names:
        if ".block_sparse_moe.experts." in name:
            return "classic"
        if name.endswith(".mlp.experts.gate_up_proj"):
            return "stacked"
    raise ValueError("no experts of a Mixtral among the tensors, in neither layout")


def check_mixtral(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """(layout, configuration) of a Mixtral's folder that has all its experts and routers.

    Raises:
        KeyError: a tensor is missing (with its full name). ValueError: not a Mixtral's tensors.
    """
    config = read_config(folder)
    with contextlib.closing(Checkpoint(folder)) as state:
        layout = find_layout(state)
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            wanted = [router_name(layer, layout)]
            if layout == "stacked":
                wanted += stacked_names(layer)
            else:
                wanted += [expert_name(layer, e, part) for e in range(config["num_local_experts"])
                           for part in PARTS]  # fmt: skip
            for name in wanted:
                if name not in state.entries:
                    raise KeyError(f"{folder} lacks {name}")
    return layout, config


def convert_layout(
    folder: str | Path,
    out: str | Path,
    layout: str = "stacked",
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a Mixtral's folder again with its experts in the other layout; values are copied, bit for bit.

    One output tensor is in memory at a time.

    Raises:
        ValueError: layout; ``out`` holds a model already. KeyError: a tensor of an expert is missing (its name).
    """
    one_of("layout", layout, LAYOUTS)
    target = Path(out).expanduser()
    if any(target.glob("*.safetensors")):
        raise ValueError(f"{target} holds a model already; give another folder, or remove it")
    found, config = check_mixtral(folder)
    with Checkpoint(folder) as state:
        makers = _restacked(state, config, found, layout)
        plans = [Planned(n, dtype, shape) for n, (dtype, shape, _) in makers.items()]
        target.mkdir(parents=True, exist_ok=True)
        write_shards(target, plans, max_shard_bytes, lambda planned: makers[planned.name][2]())
        copy_small_files(Path(folder), target)
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    return target


Maker = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]


def _restacked(
    state: Checkpoint, config: dict[str, Any], found: str, layout: str
) -> dict[str, Maker]:
    """Every tensor of the new layout: dtype, shape, and a function that makes it."""

    def copied(name: str) -> Maker:
        def make() -> Tensor:
            made = state[name].clone()
            state.release(name)
            return made

        return state.dtype(name), state.shape(name), make  # type: ignore[return-value]

    moved = re.compile(r"\.(block_sparse_moe|mlp)\.(gate|experts)\.")
    block = "block_sparse_moe" if layout == "classic" else "mlp"
    makers: dict[str, Maker] = {}
    for name in state:
        if found == layout or ".experts." not in name:
            makers[moved.sub(rf".{block}.\2.", name)] = copied(name)
    if found == layout:
        return makers
    experts = config["num_local_experts"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        up, down = stacked_names(layer)
        if layout == "stacked":
            first = expert_name(layer, 0, "gate")
            dtype, (f, d) = state.dtype(first), state.shape(first)
            assert dtype is not None
            makers[up] = dtype, (experts, 2 * f, d), _stack(state, layer, experts, ("gate", "up"))
            makers[down] = dtype, (experts, d, f), _stack(state, layer, experts, ("down",))
        else:
            dtype, (_, d, f) = state.dtype(up), state.shape(down)
            assert dtype is not None
            for e in range(experts):
                for part, name, rows, shape in (
                    ("gate", up, slice(0, f), (f, d)), ("up", up, slice(f, 2 * f), (f, d)),
                    ("down", down, slice(0, d), (d, f)),
                ):  # fmt: skip
                    makers[expert_name(layer, e, part)] = dtype, shape, _slice(state, name, e, rows)
    return makers


def _stack(
    state: Checkpoint, layer: str, experts: int, parts: tuple[str, ...]
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        names = [[expert_name(layer, e, part) for part in parts] for e in range(experts)]
        made = torch.stack([torch.cat([state[n] for n in some]) for some in names])
        for some in names:
            for name in some:
                state.release(name)
        return made

    return make


def _slice(state: Checkpoint, name: str, expert: int, rows: slice) -> Callable[[], Tensor]:
    return lambda: state[name][expert, rows].clone()
