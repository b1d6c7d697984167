# SPDX-License-Identifier: Apache-2.0
"""Who cuts responses into macro actions: one callable per termination condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold import ops
from tenfold.ma_rlhf import parsers, parsing
from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.statements import statements
from tenfold.reference.random import philox4x32_10

Segments = tuple[Tensor, Tensor]
_DOMAIN = 0x3A0  # of this draw among the others with one seed


class Segmenter(Protocol):
    """Cuts the valid tokens of every row: (seg int32 [B, R], -1 at masked tokens; nseg int32 [B]).

    A segmenter of text may have an attribute ``fallback``, bool [B]: rows of its last call that it
    could not parse.
    """

    def __call__(
        self, mask: Tensor, *, ids: Tensor | None = None, logp_ref: Tensor | None = None,
        texts: Sequence[str] | None = None, generator: torch.Generator | None = None,
        keys: Tensor | None = None,
    ) -> Segments:  # fmt: skip
        """``mask`` bool [B, R]; the others as in :func:`tenfold.ma_rlhf.prepare`."""


def isolated(seg: Tensor, mask: Tensor) -> Segments:
    """The same segments, but the last valid token of every row is one of its own."""
    rank = mask.int().cumsum(1)
    last = mask & (rank == rank[:, -1:])
    before = torch.where(mask, seg, -1).cummax(1).values.roll(1, 1)
    before[:, :1] = -1
    return ops.macro_segment_starts((seg > before) | last, mask)


@dataclass(frozen=True)
class Fixed:
    """Every ``n`` tokens; None: the whole row, or with ``holes="split"`` a turn."""

    n: int | None
    isolate_last: bool = False
    holes: str = "bridge"

    def __call__(self, mask: Tensor, **_: Any) -> Segments:
        """Cuts ``mask``; nothing else is looked at."""
        return ops.macro_segment_fixed(mask, self.n, self.isolate_last, holes=self.holes)


@dataclass(frozen=True)
class Randomised:
    """``lengths``, each ``repeat`` times, in an order drawn for every row."""

    lengths: tuple[int, ...]
    repeat: int
    tail: str = "one_segment"
    isolate_last: bool = False
    holes: str = "bridge"
    seed: int = 0

    def draw(self, rows: int, generator: torch.Generator | None, keys: Tensor | None) -> Tensor:
        """Shuffled lengths, int32 [rows, len(lengths) * repeat], on the CPU.

        Of ``keys`` (one number per row) and ``seed`` alone, else the next numbers of ``generator``.
        """
        base = torch.tensor(self.lengths * self.repeat, dtype=torch.int32)
        if keys is not None:
            if keys.shape != (rows,) or keys.is_floating_point():
                raise ValueError(
                    f"keys must be integers [{rows}], got {keys.dtype} {list(keys.shape)}"
                )
            key = keys.cpu().long()[:, None]
            place = torch.arange(len(base))[None]
            high, low, *_ = philox4x32_10((key, key >> 32, place, torch.tensor(_DOMAIN)), self.seed)
            order = ((high << 31) ^ low).argsort(dim=1, stable=True)
        elif generator is not None:
            if generator.device.type != "cpu":
                raise ValueError(
                    f"generator must be of the CPU, got {generator.device}: the draw is made there"
                )
            order = torch.rand(rows, len(base), generator=generator, dtype=torch.float64).argsort(1)
        else:
            raise ValueError("random macro actions need keys (a number per row) or a CPU generator")
        return base[order]

    def __call__(
        self, mask: Tensor, *, generator: torch.Generator | None = None, keys: Tensor | None = None,
        **_: Any,
    ) -> Segments:  # fmt: skip
        """Cuts ``mask`` by lengths drawn from ``keys`` or ``generator``."""
        lengths = self.draw(mask.shape[0], generator, keys).to(mask.device)
        return ops.macro_segment_lengths(
            mask, lengths, self.tail, isolate_last=self.isolate_last, holes=self.holes
        )


@dataclass(frozen=True)
class Perplexity:
    """Where the response becomes less likely under the reference model."""

    mode: str
    isolate_last: bool = False
    holes: str = "bridge"

    def __call__(self, mask: Tensor, *, logp_ref: Tensor | None = None, **_: Any) -> Segments:
        """Cuts ``mask`` by the token log-probabilities ``logp_ref`` [B, R]."""
        if logp_ref is None:
            raise ValueError("termination='ppl' needs logp_ref [B, R]")
        made = ops.macro_segment_ppl(-logp_ref, mask, self.mode, holes=self.holes)
        return isolated(made[0], mask) if self.isolate_last else made


@dataclass(frozen=True)
class Custom:
    """Where a callback says: ``callback(mask, ids=, logp_ref=, texts=)`` gives starts, bool [B, R]."""

    callback: Callable[..., Tensor]
    isolate_last: bool = False
    holes: str = "bridge"

    def __call__(
        self, mask: Tensor, *, ids: Tensor | None = None, logp_ref: Tensor | None = None,
        texts: Sequence[str] | None = None, **_: Any,
    ) -> Segments:  # fmt: skip
        """Cuts ``mask`` where the callback says; the first valid token always begins one."""
        starts = self.callback(mask, ids=ids, logp_ref=logp_ref, texts=texts)
        if not isinstance(starts, Tensor) or starts.is_floating_point():
            got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
            raise TypeError(f"the callback must give a bool tensor of starts, got {got}")
        if starts.shape != mask.shape:
            raise ValueError(
                f"the callback's starts must be {list(mask.shape)}, got {list(starts.shape)}"
            )
        seg, nseg = ops.macro_segment_starts(starts.to(mask.device), mask, holes=self.holes)
        return isolated(seg, mask) if self.isolate_last else (seg, nseg)


@dataclass
class Text:
    """Where the text says: ``cut(pieces)`` gives the tokens at which macro actions begin.

    ``pieces`` is the text of every valid token. A row for which ``cut`` raises ``parsing.Mismatch`` is cut
    every ``n`` tokens and noted in ``fallback``, or is an error.
    """

    cut: Callable[[Sequence[str]], Sequence[int]]
    tokenizer: Any
    n: int | None
    on_mismatch: str = "fixed"
    isolate_last: bool = False
    holes: str = "bridge"
    fallback: Tensor | None = field(default=None, init=False)

    def __call__(self, mask: Tensor, *, ids: Tensor | None = None, **_: Any) -> Segments:
        """Cuts ``mask`` by the text of ``ids`` [B, R]."""
        if ids is None:
            raise ValueError("macro actions of text need ids [B, R]")
        if ids.shape != mask.shape:
            raise ValueError(f"ids must be {list(mask.shape)} as the mask, got {list(ids.shape)}")
        on, tokens = mask.cpu() != 0, ids.cpu()
        starts = torch.zeros_like(on)
        failed = torch.zeros(len(on), dtype=torch.bool)
        for b in on.any(1).nonzero()[:, 0].tolist():
            places = on[b].nonzero()[:, 0]
            pieces = parsing.token_pieces(self.tokenizer, tokens[b, places].tolist())
            try:
                begin = list(self.cut(pieces))
            except parsing.Mismatch as error:
                if self.on_mismatch == "error":
                    raise ValueError(f"row {b}: {error}") from error
                failed[b] = True
                begin = list(range(0, len(places), self.n or len(places)))
            starts[b, places[begin]] = True
        self.fallback = failed
        seg, nseg = ops.macro_segment_starts(starts.to(mask.device), mask, holes=self.holes)
        return isolated(seg, mask) if self.isolate_last else (seg, nseg)


def make_segmenter(
    config: MARLHFConfig, tokenizer: Any = None, *, parser: Callable[[str], Any] | None = None,
    callback: Callable[..., Tensor] | None = None,
) -> Segmenter:  # fmt: skip
    """The segmenter of ``config.termination``.

    Args:
        tokenizer: the policy's, with ``decode(ids)``: for ``"parsing"``, ``"sentence"``, ``"statement"``.
        parser: for ``"parsing"``: of a sentence, gives its constituency tree (see
            :func:`tenfold.ma_rlhf.parsing.as_tree`); default: :func:`tenfold.ma_rlhf.parsers.default_parser`.
        callback: for ``"custom"``, see :class:`Custom`; a tensor of starts at hand is
            ``lambda mask, **_: starts``.

    Raises:
        ValueError: what the termination needs is missing. ImportError: a parser of the extra ``parse``.
    """
    common: dict[str, Any] = {"isolate_last": config.isolate_last, "holes": config.holes}
    kind = config.termination
    if kind == "fixed":
        return Fixed(config.n, **common)
    if kind == "turn":
        return Fixed(None, isolate_last=config.isolate_last, holes="split")
    if kind == "random":
        return Randomised(config.lengths, config.repeat, config.tail, seed=config.seed, **common)
    if kind == "ppl":
        return Perplexity(config.ppl_mode, **common)
    if kind == "custom":
        if callback is None:
            raise ValueError("termination='custom' needs callback=")
        return Custom(callback, **common)
    if tokenizer is None:
        raise ValueError(f"termination={kind!r} needs the policy's tokenizer")
    cuts = {
        "parsing": lambda: parsing.constituents(
            parser or parsers.default_parser(), config.parsing_cutoff, config.splitter
        ),
        "sentence": lambda: parsing.sentences(config.splitter),
        "statement": lambda: statements,
    }
    return Text(cuts[kind](), tokenizer, config.n, config.on_mismatch, **common)
