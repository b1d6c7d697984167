# SPDX-License-Identifier: Apache-2.0
"""``PixelProcessor``: text to strips of patches, as a model takes them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tenfold.pixelgpt import saved as saved_file
from tenfold.pixelgpt.batches import Job, PixelBatch, jobs_of
from tenfold.pixelgpt.buffers import BufferPool
from tenfold.pixelgpt.fonts import FontChain, FontFile, default_fonts
from tenfold.pixelgpt.saved import RendererMismatch
from tenfold.pixelgpt.settings import RenderSettings
from tenfold.pixelgpt.strips import Strip, StripMaker, patch_mask, patch_spans
from tenfold.pixelgpt.typeset import Typesetter, clean
from tenfold.pixelgpt.wrapping import Wrapper
from tenfold.training.checks import integers, one_of

# Strips that are blanked by one call: long enough for other threads to run meanwhile, few enough for a cache.
_TOGETHER = 4
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_IGNORED = ("trust_remote_code", "code_revision", "_from_auto", "_from_pipeline", "_commit_hash")


class PixelProcessor:
    """Renders text to strips of patches: 16 pixels high, black on white, black patches as separators.

    Args:
        fonts: font files in order of preference (paths; ``file.ttc#1`` for a face of a collection), or one.
            Default: DejaVu Sans of matplotlib's wheel, then the Noto fonts found in Debian's folders and in those
            of the variable ``TENFOLD_FONTS``.
        settings: see ``RenderSettings``: ``font_size``, ``dpi``, ``patch_size``, ``max_patches``, ``mode``,
            ``channels``, ``foreground``, ``background``, ``on_missing``, ``direction``, ``features``.

    The same text, settings and font files give the same bytes in every process, on every number of threads and
    whatever else is installed. Words start on whole pixels and are not kerned against the spaces around
    them, so strips are not those of the reference's PyGame or Pango backends: do not mix them.

    Raises FileNotFoundError for a missing font, ImportError that names the extra where uharfbuzz, freetype-py or the
    default font is not installed. Source: PixelGPT (arXiv 2404.10710), spec sections 3.1, 3.2, 8.
    """

    model_input_names = ("pixel_values", "patch_mask")

    def __init__(
        self,
        fonts: str
        | os.PathLike[str]
        | FontFile
        | Sequence[str | os.PathLike[str] | FontFile]
        | None = None,
        **settings: Any,
    ) -> None:
        unknown = sorted(settings.keys() - RenderSettings.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(RenderSettings.__dataclass_fields__)
            raise TypeError(f"PixelProcessor has no setting {', '.join(unknown)}; it has {known}")
        self.settings = RenderSettings(**settings)
        if fonts is None:
            self.fonts = default_fonts()
        else:
            several = [fonts] if isinstance(fonts, str | os.PathLike | FontFile) else fonts
            self.fonts = [FontFile.of(f) for f in several]
        self._start()

    def _start(self) -> None:
        chain = FontChain(self.fonts, self.settings.mode == "rgb")
        self._typesetter = Typesetter(self.settings, chain)
        self._buffers = BufferPool()
        self._pool: tuple[int, int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "fonts": self.fonts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        return f"PixelProcessor({json.dumps(self.settings.to_json())}, {len(self.fonts)} fonts)"

    def __call__(
        self,
        text: Any,
        text_pair: str | Sequence[str] | None = None,
        *,
        is_split_into_words: bool = False,
        padding: str = "max_length",
        pad_to_multiple_of: int = 1,
        overflow: str = "clip",
        stride: int = 0,
        return_offsets_mapping: bool = False,
        return_sep_patches: bool = False,
        dtype: str = "uint8",
        return_tensors: str = "pt",
        num_threads: int | None = None,
    ) -> PixelBatch:
        """Renders one text or a batch.

        Args:
            text: a str; a (str, str) tuple, which is a pair; or a list of those. A list inside the list is a list of
                words, each of which starts on a patch; ``is_split_into_words`` says that a flat list is one.
            text_pair: second text of the pair, or a list of as many as ``text``.
            padding: ``max_length``: strips of ``max_patches``; ``longest``: of the longest in the batch, rounded up
                to ``pad_to_multiple_of`` patches.
            overflow: ``clip``: what does not fit is cut off, and the last patch is black; ``wrap``: it goes on
                on further strips, at spaces, of which up to ``stride`` patches come again. Of a pair the second
                text goes on. Word lists are clipped.
            return_offsets_mapping: adds ``offset_mapping`` and ``sequence_ids``.
            return_sep_patches: adds ``sep_patches`` and ``word_starts``, lists of lists.
            dtype: ``uint8`` (0 to 255) or ``float32`` (0 to 1, by division by 255).
            return_tensors: ``pt`` or ``np``.
            num_threads: default: ``torch.get_num_threads()``, which is 1 in a worker of a DataLoader.

        Returns:
            A dict with attributes. N strips of L patches of side p:
            ``pixel_values`` [N, C, p, p L] uint8 or float32; ``patch_mask`` [N, L] bool, true for the text and the
            patch that ends it; ``num_patches`` [N] int64, the index of that patch. With ``wrap``:
            ``overflow_to_sample_mapping`` [N] int64. ``offset_mapping`` [N, L, 2] int64: characters (first, end) of
            the text or word that a patch shows, (0, 0) for none; ``sequence_ids`` [N, L] int64: which text of
            the pair or which word it is, -1 for none.

        Raises TypeError for what is no text, ValueError for settings that do not exist and, with
        ``on_missing="error"``, for characters that no font has. A text that is drawn with no width is a strip with
        the end patch only, and a warning.
        """
        one_of("padding", padding, ("max_length", "longest"))
        one_of("overflow", overflow, ("clip", "wrap"))
        one_of("dtype", dtype, ("uint8", "float32"))
        one_of("return_tensors", return_tensors, ("pt", "np"))
        _integer("pad_to_multiple_of", pad_to_multiple_of, 1)
        _integer("stride", stride, 0)
        jobs = jobs_of(text, text_pair, is_split_into_words)
        if overflow == "wrap":
            jobs = [part for job in jobs for part in self._wrapped(job, stride)]
        maker = StripMaker(self.settings, self._typesetter, return_offsets_mapping)
        strips, out = self._render(
            maker, jobs, padding, pad_to_multiple_of, self._threads(num_threads)
        )
        self._typesetter.maker.shaper.warn()
        empty = [job.sample for job, strip in zip(jobs, strips) if not strip.drawn]
        if empty:
            warnings.warn(f"nothing is drawn of text {empty[0]}: its strip holds only the patch that ends it"
                          + (f" (so do {len(empty) - 1} others)" if len(empty) > 1 else ""), stacklevel=2)  # fmt: skip
        patches = out.shape[-1] // self.settings.patch_size
        counts = [s.num_patches for s in strips]
        found: dict[str, Any] = {
            "pixel_values": out if dtype == "uint8" else out.astype(np.float32) / np.float32(255),
            "patch_mask": patch_mask(counts, patches),
            "num_patches": np.array(counts, np.int64),
        }
        if overflow == "wrap":
            found["overflow_to_sample_mapping"] = np.array([j.sample for j in jobs], np.int64)
        if return_offsets_mapping:
            found |= self._offsets(jobs, strips, patches)
        if return_sep_patches:
            found |= {
                "sep_patches": [s.separators for s in strips],
                "word_starts": [s.starts for s in strips],
            }
        return PixelBatch(found).tensors() if return_tensors == "pt" else PixelBatch(found)

    render_batch = __call__

    def _threads(self, wanted: int | None) -> int:
        if wanted is None:
            import torch

            return torch.get_num_threads()
        _integer("num_threads", wanted, 1)
        return wanted

    def _render(
        self, maker: StripMaker, jobs: Sequence[Job], padding: str, multiple: int, threads: int
    ) -> tuple[list[Strip], np.ndarray]:
        """Strips, and their pixels."""
        settings, size = self.settings, len(jobs)
        strips: list[Any] = [None] * size
        out = np.empty(0)

        def room(patches: int) -> np.ndarray:
            width = patches * settings.patch_size
            return self._buffers.empty((size, settings.channels or 1, settings.patch_size, width))

        def lay(first: int, end: int) -> None:
            for i in range(first, end):
                strips[i] = jobs[i].lay(maker)

        def draw(first: int, end: int) -> None:
            maker.blank(out[first:end])
            for i in range(first, end):
                maker.draw(strips[i], out[i])

        def both(first: int, end: int) -> None:
            lay(first, end)
            draw(first, end)

        if padding == "max_length":
            out = room(settings.max_patches)
            self._spread(both, size, threads)
            return strips, out
        self._spread(lay, size, threads)
        longest = max((s.num_patches + 1 for s in strips), default=1)
        out = room(min(-(-longest // multiple) * multiple, settings.max_patches))
        self._spread(draw, size, threads)
        return strips, out

    def _spread(self, work: Callable[[int, int], None], size: int, threads: int) -> None:
        """Calls ``work`` for ranges of 0 to ``size``; each thread has a contiguous share."""
        threads = min(threads, size)

        def share(at: int) -> None:
            start, stop = at * size // threads, (at + 1) * size // threads
            for first in range(start, stop, _TOGETHER):
                work(first, min(first + _TOGETHER, stop))

        if threads < 2:
            if size:
                share(0)
            return
        process = os.getpid()  # threads do not live on in a forked process
        if self._pool is None or self._pool[:2] != (process, threads):
            self._pool = (process, threads, ThreadPoolExecutor(threads, "tenfold-render"))
        for done in [self._pool[2].submit(share, at) for at in range(threads)]:
            done.result()

    def _budget(self, start: int) -> int:
        """Pixels for a text that goes on (spec section 3.1, item 5: two patches less than there are)."""
        return self.settings.width - 2 * self.settings.patch_size - start

    def _wrapped(self, job: Job, stride: int) -> Iterator[Job]:
        if job.words is not None:
            yield job
            return
        start = 0
        if job.second is not None:
            maker = StripMaker(self.settings, self._typesetter)
            start = maker.second_start(job.first)
            if self._budget(start) < self.settings.patch_size:
                raise ValueError(f"the first text of pair {job.sample} leaves no room for the second on "
                                 f"{self.settings.max_patches} patches")  # fmt: skip
        long = job.first if job.second is None else job.second
        wrapper = Wrapper(self._typesetter, self._budget(start))
        for first, end in wrapper.ranges(long, stride * self.settings.patch_size):
            yield job.part(long[first:end], first)

    def _offsets(
        self, jobs: Sequence[Job], strips: Sequence[Strip], patches: int
    ) -> dict[str, np.ndarray]:
        both = [patch_spans(s, patches, self.settings.patch_size) for s in strips]
        offsets = np.stack([o for o, _ in both]) if both else np.zeros((0, patches, 2), np.int64)
        parts = np.stack([p for _, p in both]) if both else np.zeros((0, patches), np.int64)
        for i, job in enumerate(jobs):
            offsets[i][parts[i] == (job.second is not None)] += job.shift
        return {"offset_mapping": offsets, "sequence_ids": parts}

    def wrap(self, text: str, overlap: int = 0) -> list[str]:
        """The parts of a long text that fit on a strip each; ``overlap``: patches that come again at most."""
        wrapper = Wrapper(self._typesetter, self._budget(0))
        return [text[a:b] for a, b in wrapper.ranges(text, overlap * self.settings.patch_size)]

    def pack(self, lines: Iterable[str]) -> Iterator[str]:
        """Texts for full strips: whole lines joined by spaces; longer lines are cut (spec section 3.1, item 5)."""
        return Wrapper(self._typesetter, self._budget(0)).pack(lines)

    def width(self, text: str) -> int:
        """Pixels that a text takes, however long it is."""
        return self._typesetter.measure(clean(text))

    def to_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes."""
        return saved_file.to_json(self.settings, self.fonts)

    def to_json_string(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], copy_fonts: bool = False, **_: Any
    ) -> list[str]:
        """Writes ``processor_config.json``: settings, SHA-256 of the fonts, versions, hash of a rendered probe.

        ``copy_fonts`` puts the font files beside it (mind their licences), so that every machine has them.
        """
        return [str(saved_file.write(Path(save_directory), self.settings, self.fonts, copy_fonts))]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        fonts: Any = None,
        verify: str = "error",
        **kwargs: Any,
    ) -> PixelProcessor:
        """A saved processor, from a folder or a hub id, that draws what it drew.

        Font files are looked for by name beside the file, in matplotlib's wheel and where ``default_fonts`` looks, and
        must have the hash saved; then the probe must have its hash. ``verify``: ``error`` (RendererMismatch, a
        ValueError, says what differs), ``warn`` (what is here is used) or ``off``. ``fonts`` names files
        instead. Other keywords change settings.
        """
        one_of("verify", verify, ("error", "warn", "off"))
        hub = {k: kwargs.pop(k) for k in _HUB if k in kwargs}
        for name in _IGNORED:
            kwargs.pop(name, None)
        folder = saved_file.locate(pretrained_model_name_or_path, hub)
        saved = saved_file.read(folder / saved_file.FILE)
        settings = RenderSettings.from_json(saved["settings"])
        given = None if fonts is None else cls(fonts).fonts
        found, wrong = saved_file.fonts_of(saved, folder, given)
        if not wrong and verify != "off":
            wrong = saved_file.differences(saved, settings, found)
        if wrong and verify != "off":
            told = f"the renderer saved in {folder} is not the same here: {'; '.join(wrong)}"
            if verify == "error":
                raise RendererMismatch(f"{told}. verify='warn' goes on with what is here")
            warnings.warn(told, stacklevel=2)
        unknown = sorted(kwargs.keys() - RenderSettings.__dataclass_fields__.keys())
        if unknown:
            raise TypeError(f"PixelProcessor.from_pretrained has no argument {', '.join(unknown)}")
        if "mode" in kwargs:
            kwargs.setdefault("channels", None)
        return cls(found, **vars(replace(settings, **kwargs)))


def _integer(name: str, value: Any, least: int) -> None:
    integers(SimpleNamespace(**{name: value}), {name: least})
