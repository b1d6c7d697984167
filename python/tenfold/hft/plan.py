# SPDX-License-Identifier: Apache-2.0
"""A Plan: which tensors of a model train in a round, and which parts of tensors. It is plain JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.hft.architecture import Ranges

FORMAT = 1


@dataclass(frozen=True)
class Part:
    """The trained part of a tensor that trains in part.

    ``kind``: ``row`` (rows of the tensor seen as [numel / last dimension, last dimension]), ``col``
    (indices of the last dimension) or ``element``. One of ``ranges`` (start, stop, step),
    ``random`` (fraction, seed, stream: the bits of ``ops.mask_random``) and ``bits`` (packed bits,
    compressed and in base64) says which.
    """

    kind: str
    ranges: Ranges | None = None
    random: tuple[float, int, int] | None = None
    bits: str | None = None

    @classmethod
    def from_packed(cls, kind: str, packed: Tensor) -> Part:
        """A part by its packed mask (uint8, least significant bit first)."""
        raw = zlib.compress(packed.cpu().contiguous().numpy().tobytes())
        return cls(kind, bits=base64.b64encode(raw).decode())

    def units(self, parameter: Tensor) -> int:
        """How many bits the mask has."""
        if self.kind == "col":
            return parameter.shape[-1]
        if self.kind == "row":
            return parameter.numel() // max(1, parameter.shape[-1])
        return parameter.numel()

    def mask(self, parameter: Tensor) -> Tensor:
        """The packed mask (uint8) for a parameter, on its device."""
        from tenfold import ops

        n = self.units(parameter)
        if self.random is not None:
            fraction, seed, stream = self.random
            return ops.mask_random(n, fraction, seed, stream, device=parameter.device)
        if self.bits is not None:
            raw = bytearray(zlib.decompress(base64.b64decode(self.bits)))
            packed = torch.frombuffer(raw, dtype=torch.uint8)
            if packed.numel() != (n + 7) // 8:
                raise ValueError(f"a mask of {packed.numel()} bytes for {n} {self.kind}s")
            return packed.to(parameter.device)
        bits = torch.zeros(n, dtype=torch.bool)
        for start, stop, step in self.ranges or ():
            if stop > n:
                raise ValueError(
                    f"{self.kind} range {start}:{stop} in a tensor of {n} {self.kind}s"
                )
            bits[start:stop:step] = True
        return ops.pack_mask(bits.to(parameter.device))

    def to_json(self) -> dict[str, Any]:
        """Only what is set."""
        return {k: v for k, v in vars(self).items() if v is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Part:
        """The inverse of :meth:`to_json`."""
        ranges, random = values.get("ranges"), values.get("random")
        return cls(values["kind"], tuple(tuple(r) for r in ranges) if ranges is not None else None,
                   (float(random[0]), int(random[1]), int(random[2])) if random else None,
                   values.get("bits"))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One draw.

    Attributes:
        trained: names of tensors that train whole. frozen: names that do not. partial: the trained
            part of the others.
        layer_fraction: trained share of the parameters in layer matrices and norms; fraction: of all.
        strategy, ratio, balance, seed, round: what it was drawn with. architecture: the model's class.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    partial: dict[str, Part] = field(default_factory=dict)
    strategy: str = "category"
    ratio: float = 0.5
    balance: str = "matrices"
    seed: int = 0
    round: int = 0
    architecture: str = ""
    layer_fraction: float = 1.0
    fraction: float = 1.0

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of all tensors that need a gradient."""
        return (*self.trained, *self.partial)

    def check(self, model: nn.Module) -> None:
        """KeyError, with the first three names, unless the Plan was drawn for such a model."""
        have = {n for n, _ in model.named_parameters()}
        mine = {*self.trained, *self.frozen, *self.partial}
        for names, what in ((sorted(mine - have), "not in the model"),
                            (sorted(have - mine), "not in the Plan")):  # fmt: skip
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise KeyError(
                    f"the Plan was drawn for another model ({self.architecture}): "
                    f"{', '.join(names[:3])}{more} {what} ({type(model).__name__})"
                )

    def masks(self, model: nn.Module) -> dict[nn.Parameter, tuple[Tensor, str]]:
        """Packed mask and its kind for every parameter that trains in part."""
        parameters = dict(model.named_parameters())
        return {
            parameters[n]: (part.mask(parameters[n]), part.kind) for n, part in self.partial.items()
        }

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        values["partial"] = {n: p.to_json() for n, p in self.partial.items()}
        return {"format": FORMAT} | values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        plain = dict(values)
        if plain.pop("format", FORMAT) != FORMAT:
            raise ValueError(f"a Plan of format {values['format']}; this version reads {FORMAT}")
        plain["partial"] = {n: Part.from_json(p) for n, p in plain["partial"].items()}
        plain["trained"], plain["frozen"] = tuple(plain["trained"]), tuple(plain["frozen"])
        return cls(**plain)

    def digest(self) -> str:
        """Identifies what trains and what does not."""
        text = json.dumps(
            [self.trained, self.frozen, {n: p.to_json() for n, p in self.partial.items()}]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, path: str | Path) -> None:
        """Writes :meth:`to_json` to a file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Reads what :meth:`write` wrote."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
