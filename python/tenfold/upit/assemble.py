# SPDX-License-Identifier: Apache-2.0
"""Assembly (S5): dense experts and their routing vectors become one stock Mixtral checkpoint, tensor by tensor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.merge.checkpoint import Checkpoint, Planned, Progress, write_shards
from tenfold.merge.sources import State, check_alike, dtype_of, release, same_bytes, shape_of
from tenfold.training.batches import sample_digest
from tenfold.training.store import WorkFolder, write_text
from tenfold.upit import layout as names
from tenfold.upit.options import AssemblyConfig, check_experts

_RUN, _RECORD = "run.json", "assembly.json"


class _Assembly:
    """What is written, and how each tensor of it is made."""

    def __init__(
        self,
        experts: Sequence[State],
        routers: Tensor | None,
        config: AssemblyConfig,
        base: State | None,
    ) -> None:
        self.experts, self.config, self.base = experts, config, base
        first = experts[0]
        parts = {n: p for n in first if (p := names.dense_part(n))}
        self.layers = list(dict.fromkeys(layer for layer, _ in parts.values()))
        self.layers.sort(key=lambda layer: int(layer.rsplit(".", 1)[1]))
        if not self.layers:
            raise ValueError("the experts have no FFN (model.layers.i.mlp.gate_proj.weight ...); supported: "
                             "Llama-type models")  # fmt: skip
        self.dense = {(layer, part): name for name, (layer, part) in parts.items()}
        self.rest = [n for n in first if n not in parts and "rotary_emb.inv_freq" not in n]
        self.f, self.d = shape_of(first, self.dense[self.layers[0], "gate"])
        self.routers = self._rows(routers)
        self.wide = None if config.dtype is None else getattr(torch, config.dtype)
        self.dtype = self._kept(self.dense[self.layers[0], "gate"])
        self.saved = experts[: config.saved or len(experts)]
        self.planned: dict[str, Planned] = {}
        self.makers: dict[str, Callable[[], Tensor]] = {}
        for layer in self.layers:
            self._plan_layer(layer)
        for name in self.rest:
            self._plan(name, shape_of(first, name), partial(self._other, name), self._kept(name))

    def _kept(self, name: str) -> torch.dtype:
        """What a tensor is written in."""
        own = dtype_of(self.experts[0], name)
        return self.wide if self.wide is not None and own.is_floating_point else own

    def _plan(
        self, name: str, shape: tuple[int, ...], make: Callable[[], Tensor], dtype: torch.dtype
    ) -> None:
        self.planned[name] = Planned(name, dtype, shape)
        self.makers[name] = make

    def _rows(self, routers: Tensor | None) -> Tensor:
        """The routers [n, L, d] float32, checked or drawn."""
        config, n, layers = self.config, len(self.experts), len(self.layers)
        wanted = [n, layers, self.d]
        if routers is not None:
            if list(routers.shape) != wanted:
                raise ValueError(
                    f"routers must be [experts, layers, hidden size] = {wanted}, got {list(routers.shape)}"
                )
            if not bool(torch.isfinite(routers).all()):
                raise ValueError("routers have values that are not finite")
            return routers.detach().float().cpu()
        generator = torch.Generator().manual_seed(config.seed)
        if config.router_init == "normal":
            return torch.randn(wanted, generator=generator) * config.router_std
        return (2 * torch.rand(wanted, generator=generator) - 1) * config.router_std

    def _plan_layer(self, layer: str) -> None:
        n, f, d, which = len(self.experts), self.f, self.d, self.config.layout
        dtype, at = self._kept(self.dense[layer, "gate"]), self.layers.index(layer)
        self._plan(names.router_name(layer, which), (n, d),
                   lambda: self.routers[:, at].contiguous().to(dtype), dtype)  # fmt: skip
        if which == "stacked":
            up, down = names.stacked_names(layer)
            self._plan(
                up, (n, 2 * f, d), partial(self._stacked, layer, ("gate", "up"), dtype), dtype
            )
            self._plan(down, (n, d, f), partial(self._stacked, layer, ("down",), dtype), dtype)
            return
        for e in range(n):
            for part in names.PARTS:
                self._plan(names.expert_name(layer, e, part), (d, f) if part == "down" else (f, d),
                           partial(self._expert, layer, e, part, dtype), dtype)  # fmt: skip

    def _expert(self, layer: str, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        name = self.dense[layer, part]
        made = self.experts[expert][name].to(dtype, copy=True).contiguous()
        release([self.experts[expert]], name)
        return made

    def _stacked(self, layer: str, parts: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        rows = self.d if parts == ("down",) else self.f
        columns = self.f if parts == ("down",) else self.d
        out = torch.empty((len(self.experts), rows * len(parts), columns), dtype=dtype)
        for e in range(len(self.experts)):
            for i, part in enumerate(parts):
                out[e, i * rows : (i + 1) * rows] = self._expert(layer, e, part, dtype)
        return out

    def _other(self, name: str) -> Tensor:
        """Attention, norms, embeddings."""
        dtype, rule = self._kept(name), self.config.rest
        if rule == "mean" and dtype.is_floating_point:
            alike = dtype_of(self.saved[0], name) == dtype
            work = dtype if alike else torch.float32
            parts = [s[name].to(work) for s in self.saved]
            made = ops.linear_merge(parts, [1.0] * len(parts)).to(dtype)
            release(self.saved, name)
            return made
        source = self.base if rule == "base" else self.saved[-1]
        assert source is not None
        made = source[name].to(dtype, copy=True).contiguous()
        release([source], name)
        return made

    def all_identical(self) -> bool:
        """Are the FFNs of all experts the same; reads until the first difference."""
        for name in self.dense.values():
            first = self.experts[0][name]
            same = all(same_bytes(first, e[name]) for e in self.experts[1:])
            del first
            release(self.experts, name)
            if not same:
                return False
        return True


def _identity(state: State) -> Any:
    if isinstance(state, Checkpoint):
        return [str(state.path.resolve()), *([f.name, s.st_size, s.st_mtime_ns]
                for f in state.files() for s in [f.stat()])]  # fmt: skip
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        sample_digest(state[name], digest)
    return digest.hexdigest()


def _record(work: _Assembly, config: AssemblyConfig) -> dict[str, Any]:
    """What a folder is made of; by this a second call knows it."""
    digest = hashlib.sha256()
    sample_digest(work.routers, digest)
    return {"config": {k: str(v) for k, v in vars(config).items()}, "routers": digest.hexdigest(),
            "experts": [_identity(s) for s in work.experts],
            "base": None if work.base is None else _identity(work.base)}  # fmt: skip


def _finished(folder: Path, record: dict[str, Any]) -> bool:
    """Has this very mixture been written? ValueError if another model has."""
    file = folder / _RECORD
    if file.is_file() and json.loads(file.read_text()) == json.loads(json.dumps(record)):
        return True
    if not (folder / _RUN).exists() and any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds another model already; give another folder, or remove it")
    return False


def _check(
    states: list[State], labels: list[str], base: State | None, config: AssemblyConfig
) -> None:
    check_experts(len(states), config.experts_per_token)
    if config.saved is not None and config.saved > len(states):
        raise ValueError(f"saved={config.saved} checkpoints of only {len(states)} experts")
    if config.rest == "base" and base is None:
        raise ValueError("rest='base' needs base=, the model before instruction tuning")
    check_alike(
        states if base is None else [*states, base], labels if base is None else [*labels, "base"]
    )
    kinds = {
        name: {dtype_of(s, name) for s in states} for name in states[0]
    }  # refuses quantised ones
    mixed = sorted(n for n, k in kinds.items() if len(k) > 1)
    if mixed and config.dtype is None:
        raise ValueError(
            f"the experts have different dtypes at {', '.join(mixed[:3])}; set dtype to convert them"
        )
    others = [] if base is None else [n for n in states[0] if dtype_of(base, n) not in kinds[n]]
    if config.rest == "base" and others:
        warnings.warn(
            f"base and experts have different dtypes at {', '.join(sorted(others)[:3])}: converted",
            stacklevel=3,
        )


@torch.no_grad()
def assemble(
    experts: Sequence[State | str | Path],
    routers: Tensor | None,
    out: str | Path,
    *,
    config: AssemblyConfig | None = None,
    base: State | str | Path | None = None,
    model_config: Any = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a stock Mixtral checkpoint that transformers loads unchanged.

    FFNs of the dense models become experts, the rest is merged, and routing vectors become the rows of routers. What
    it needs of memory is one tensor of each expert, or a layer's stacked one. Shards appear when they are complete;
    the same call goes on after a kill, and does nothing when all is there (``assembly.json`` says of what it was made).

    Args:
        experts: n folders or state dicts of Llama-type models, the saved checkpoints first.
        routers: [n, L, d]; None draws them at random.
        config: see :class:`AssemblyConfig`. base: of ``rest="base"``.
        model_config: of the dense model (a dict, or transformers'), if no expert is a folder with one.
        progress: called after every tensor with its name, the bytes done, and those in all.

    Returns:
        ``out``. The tokenizer comes with the last expert that is a folder.

    Raises:
        ValueError: numbers of experts; experts of other tensors, shapes (three are named) or dtypes; identical ones;
            routers of other layers or sizes; ``out`` holds another model. TypeError: quantised experts, or a
            model that no Mixtral can hold. FileNotFoundError: no model there.

    Source:
        UpIT (arXiv 2410.01610), assembly.
    """
    config = config or AssemblyConfig()
    folder = Path(out).expanduser()
    check_experts(len(experts), config.experts_per_token)
    with contextlib.ExitStack() as stack:

        def opened(model: State | str | Path) -> State:
            if not isinstance(model, str | Path):
                return model
            made = stack.enter_context(Checkpoint(model))
            if folder.resolve() == made.path.resolve():
                raise ValueError(f"out must not be one of the models, got {folder}")
            return made

        states = [opened(e) for e in experts]
        origin = None if base is None else opened(base)
        _check(states, [f"experts[{i}]" for i in range(len(states))], origin, config)
        folders = [s.path for s in states if isinstance(s, Checkpoint) and s.path.is_dir()]
        given = model_config if model_config is not None else _config_of(folders)
        work = _Assembly(states, routers, config, origin)
        more = {} if config.renormalize else {"norm_topk_prob": False}
        about = names.mixtral_config(given, len(states), config.experts_per_token,
                                     router_aux_loss_coef=config.aux_coef,
                                     dtype=str(work.dtype)[6:], **more)  # fmt: skip
        record = _record(work, config)
        if _finished(folder, record):
            return folder
        if about["num_hidden_layers"] != len(work.layers):
            raise ValueError(
                f"the configuration has {about['num_hidden_layers']} layers, the experts {len(work.layers)}"
            )
        if not config.allow_identical and work.all_identical():
            raise ValueError(
                f"all {len(states)} experts are identical: the mixture is the dense model; allow_identical=True "
                "assembles it all the same"
            )
        claim = WorkFolder(folder)
        claim.claim(record)
        write_shards(
            folder, list(work.planned.values()), config.max_shard_bytes,
            lambda planned: work.makers[planned.name](), progress,
        )  # fmt: skip
        if folders:
            names.copy_small_files(folders[-1], folder)
        write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")
        write_text(folder / _RECORD, json.dumps(record, indent=1) + "\n")
        claim.release()
    return folder


def _config_of(folders: list[Path]) -> Mapping[str, Any]:
    if not folders:
        raise ValueError("state dicts have no configuration: pass model_config=")
    return names.read_config(folders[-1])
