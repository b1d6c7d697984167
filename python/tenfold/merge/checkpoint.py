# SPDX-License-Identifier: Apache-2.0
"""Models as safetensors on disk, one tensor at a time: reading through the page cache, writing whole shards.

A :class:`Checkpoint` maps its files; a tensor is a view of the file, and :meth:`Checkpoint.release` gives its pages
back, so that what is resident stays a few tensors whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.training.store import write_text

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Progress = Callable[[str, int, int], None]  # tensor that is done, bytes done, bytes in all
_MOST_HEADER = 100_000_000  # bytes; the limit of the format's own library


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes of the file
    end: int


def _entries(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"{file} is no safetensors file, or was cut short")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON") from error
    start, found = 8 + length, {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + x for x in about["data_offsets"])
        entry = Entry(file, about["dtype"], tuple(about["shape"]), begin, end)
        bits = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BOOL": 8, "I8": 8,
                "U8": 8}.get(entry.dtype, 8 if entry.dtype.startswith("F8") else 16)  # fmt: skip
        if not start <= begin <= end <= size or end - begin != entry_numel(entry) * bits // 8:
            raise ValueError(f"{file}: the data of {name} lies outside the file; was it cut short?")
        found[name] = entry
    return found


def entry_numel(entry: Entry) -> int:
    """Number of elements."""
    return torch.Size(entry.shape).numel()


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder with safetensors, sharded or not, or of one file.

    Tensors are views of the mapped files: valid until the checkpoint is closed, never to be written.

    Raises:
        FileNotFoundError: no such folder, or no safetensors in it. ValueError: a file is damaged, or the index
            names tensors that its shards do not have.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise FileNotFoundError(
                f"no model folder at {str(path)!r}; models are local folders with safetensors "
                "(download a hub model first)"
            )
        self._maps: dict[Path, mmap.mmap] = {}
        self.entries: dict[str, Entry] = {}
        for file in self.files():
            for name, entry in _entries(file).items():
                if name in self.entries:
                    raise ValueError(f"{self.path}: {name} is in two shards, {self.entries[name].file.name} "
                                     f"and {file.name}")  # fmt: skip
                self.entries[name] = entry
        index = self.path / INDEX
        if index.is_file():
            named = json.loads(index.read_text())["weight_map"]
            missing = sorted(set(named) - set(self.entries))
            if missing:
                raise ValueError(
                    f"{self.path}: {INDEX} names {', '.join(missing[:3])}, which no shard has"
                )
            self.entries = {n: e for n, e in self.entries.items() if n in named}

    def files(self) -> list[Path]:
        """Its safetensors files, by name."""
        if self.path.is_file():
            return [self.path]
        index, single = self.path / INDEX, self.path / SINGLE
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            found = [self.path / n for n in names]
            absent = [f.name for f in found if not f.is_file()]
            if absent:
                raise FileNotFoundError(f"{self.path}: shards {', '.join(absent[:3])} are missing")
        else:
            found = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if not found:
            raise FileNotFoundError(f"{self.path} has no safetensors; save the model with "
                                    "save_pretrained(..., safe_serialization=True)")  # fmt: skip
        return found

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise TypeError(f"{self.path}: {name} has dtype {entry.dtype}, which cannot be merged "
                            "(a quantised checkpoint?)")  # fmt: skip
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        count = entry_numel(entry)
        flat = torch.frombuffer(self._map(entry.file), dtype=dtype, count=count, offset=entry.begin)
        return flat.view(entry.shape)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:  # private: torch wants writable memory
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def release(self, name: str) -> None:
        """Gives the pages of a tensor back; reading it again is possible."""
        entry = self.entries[name]
        mapped = self._maps.get(entry.file)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED") and entry.end > entry.begin:
            begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def dtype(self, name: str) -> torch.dtype | None:
        """What :meth:`__getitem__` gives, without reading; None for what it refuses."""
        return _DTYPES.get(self.entries[name].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Likewise."""
        return self.entries[name].shape

    def close(self) -> None:
        """Unmaps the files of which no tensor is in use any more."""
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):
                mapped.close()
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    file: str
    tensors: tuple[Planned, ...]


def plan_shards(tensors: Sequence[Planned], most_bytes: int) -> list[Shard]:
    """Deals tensors, sorted by name, to files of at most ``most_bytes`` (or of one tensor)."""
    groups: list[list[Planned]] = [[]]
    filled = 0
    for t in sorted(tensors, key=lambda t: t.name):
        if groups[-1] and filled + t.bytes > most_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(t)
        filled += t.bytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]  # fmt: skip
    return [Shard(n, tuple(g)) for n, g in zip(names, groups)]


def _header(tensors: Sequence[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape),
                          "data_offsets": [at, at + t.bytes]}  # fmt: skip
        at += t.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(folder: Path, shard: Shard, make: Callable[[Planned], Tensor]) -> None:
    """Writes a shard, tensor by tensor; it appears under its name when it is complete."""
    tensors = sorted(shard.tensors, key=lambda t: (-t.dtype.itemsize, t.name))  # aligned
    temporary = folder / f".{shard.file}.tmp"
    with temporary.open("wb") as stream:
        stream.write(_header(tensors))
        for t in tensors:
            made = make(t)
            if t.bytes:
                stream.write(made.reshape(-1).view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, folder / shard.file)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of several shards; none for one."""
    if len(shards) > 1:
        weight_map = {t.name: s.file for s in shards for t in s.tensors}
        total = sum(t.bytes for s in shards for t in s.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_shards(
    folder: Path, tensors: Sequence[Planned], most_bytes: int, make: Callable[[Planned], Tensor],
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Writes tensors to as many shards as they need, then the index; shards that are there already stay as they are.

    ``progress``: called after every tensor with its name, the bytes done, and those in all.
    """
    shards = plan_shards(tensors, most_bytes)
    total = sum(t.bytes for t in tensors)
    done = 0

    def told(planned: Planned) -> Tensor:
        nonlocal done
        made = make(planned)
        done += planned.bytes
        if progress is not None:
            progress(planned.name, done, total)
        return made

    for shard in shards:
        if (folder / shard.file).exists():
            done += sum(t.bytes for t in shard.tensors)
        else:
            write_shard(folder, shard, told)
    write_index(folder, shards)
