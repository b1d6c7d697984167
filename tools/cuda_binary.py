# SPDX-License-Identifier: Apache-2.0
"""What a built library holds for a GPU: each kernel's registers, memory and instructions.

    python tools/cuda_binary.py python/tenfold/_ops.so sm_90a

NVIDIA's ``cuobjdump`` (``requirements/dev.txt``) takes the machine code out and says what each kernel uses;
instructions are counted here, since its disassembly of all kernels takes more than a minute. The codes of
``OPCODES`` are those of sm_80 to sm_90a; ``tests/test_cuda_binary.py`` compares the counts with ``nvdisasm``'s.
"""

from __future__ import annotations

import collections
import importlib.metadata
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The low 9 bits of an instruction of 16 bytes; the next three say where its operands are.
OPCODES = {
    0x023: "FFMA", 0x03B: "LDSM", 0x03C: "HMMA", 0x181: "LDG", 0x183: "LDL", 0x186: "STG",
    0x187: "STL", 0x1AE: "LDGSTS",
}  # fmt: skip
SIZED = ("LDG", "STG", "LDGSTS", "LDL", "STL")  # bits 73 to 75: 4, 5, 6 for 32, 64, 128 bits
RESERVED = 1024  # bytes of shared memory that the system takes of each block from sm_90 on
_MAX_THREADS = 0x05  # attribute of a kernel's .nv.info


@dataclass(frozen=True)
class Kernel:
    """A kernel; sizes in bytes."""

    symbol: str
    signature: str  # as it is written in C++
    registers: int
    stack: int  # local memory: arrays and spills
    shared: int  # static
    threads: int | None  # the most of a block, by its launch bounds
    counts: dict[str, int]  # instructions: HMMA, LDG, LDG.128 ...
    outside: tuple[str, ...]  # functions that are not in the file: printf and the like

    @property
    def name(self) -> str:
        """Without its template arguments."""
        return re.split(r"[<(]", self.signature, maxsplit=1)[0]


def tool(name: str) -> Path:
    """Path of ``cuobjdump`` or ``nvdisasm`` of their PyPI packages."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"{name} is not installed: pip install -r requirements/dev.txt"
        ) from None
    return next(Path(str(f.locate())) for f in files if f.name == name)


def _output(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the sections of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    heads = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    for head in heads:
        at = heads[names][4] + head[0]
        yield elf[at : elf.index(b"\0", at)].decode(), elf[head[4] : head[4] + head[5]]


def count(code: bytes) -> dict[str, int]:
    """How often each of ``OPCODES`` is in the code of a kernel; with sizes of 64 and 128 bits also by size."""
    words = np.frombuffer(code, dtype="<u8").reshape(-1, 2)
    opcodes, sizes = words[:, 0] & 0x1FF, words[:, 1] >> 9 & 7
    found: collections.Counter[str] = collections.Counter()
    for opcode, name in OPCODES.items():
        mine = opcodes == opcode
        found[name] += int(mine.sum())
        if name in SIZED:
            for bits, size in ((64, 5), (128, 6)):
                found[f"{name}.{bits}"] += int((mine & (sizes == size)).sum())
    return {name: n for name, n in found.items() if n}


def disassembled(cubin: Path, symbol: str) -> dict[str, int]:
    """What ``count`` says of a kernel, by ``nvdisasm``."""
    parts = dict(sections(cubin.read_bytes()))
    names, table = parts[".strtab"], parts[".symtab"]
    starts = [struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24)]
    index = [names[at : names.index(b"\0", at)].decode() for at in starts].index(symbol)
    text = _output(tool("nvdisasm"), "-c", "-fun", str(index), cubin)
    found: collections.Counter[str] = collections.Counter()
    for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", text):
        name, *how = opcode.split(".")
        if name in OPCODES.values():
            found[name] += 1
            for bits in {"64", "128"} & set(how if name in SIZED else ()):
                found[f"{name}.{bits}"] += 1
    return dict(found)


def _threads(info: bytes) -> int | None:
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if form == 4 and attribute == _MAX_THREADS:
            x, y, z = struct.unpack_from("<III", info, at + 4)
            return x * y * z
        at += 4 + (size if form == 4 else 0)
    return None


def _outside(parts: dict[str, bytes]) -> tuple[str, ...]:
    names, found = parts.get(".strtab", b""), []
    for at in range(0, len(parts.get(".symtab", b"")), 24):
        name, _, _, section = struct.unpack_from("<IBBH", parts[".symtab"], at)
        if name and section == 0:
            found.append(names[name : names.index(b"\0", name)].decode())
    return tuple(name for name in found if not name.startswith(".nv."))


def usage(library: Path, arch: str) -> dict[str, dict[str, int]]:
    """``cuobjdump``'s resource usage by kernel: REG, STACK, SHARED, LOCAL ..."""
    text = _output(tool("cuobjdump"), "-arch", arch, "-res-usage", library)
    lines = re.findall(r"^ Function (\S+):\n\s+(REG:.*)$", text, re.MULTILINE)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", uses)} for name, uses in lines}


def extract(library: Path, arch: str, folder: Path) -> list[Path]:
    """The machine code of a library as files in ``folder``; none if it has none."""
    command = [str(tool("cuobjdump")), "-xelf", arch, str(library.resolve())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    files = sorted(folder.glob("*.cubin"))
    if done.returncode != 0 and "does not contain device code" not in done.stdout + done.stderr:
        raise RuntimeError(f"cuobjdump failed: {(done.stderr or done.stdout)[-2000:]}")
    return files


def _readable(symbols: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    names = done.stdout.splitlines() if done.returncode == 0 else symbols
    strip = re.compile(r"tenfold::(?:cuda::)?|\(anonymous namespace\)::|^void |^static ")
    return [strip.sub("", name) for name in names]


def read(library: Path, arch: str = "sm_90a") -> list[Kernel]:
    """The kernels of a library for an architecture; none if it has none."""
    with tempfile.TemporaryDirectory() as folder:
        elves = [path.read_bytes() for path in extract(library, arch, Path(folder))]
    if not elves:
        return []
    uses, found = usage(library, arch), []
    for elf in elves:
        parts = dict(sections(elf))
        outside = _outside(parts)
        for section, code in parts.items():
            if not section.startswith(".text."):
                continue
            symbol = section.removeprefix(".text.")
            use = uses[symbol]
            shared = use["SHARED"] - (RESERVED if use["SHARED"] else 0)
            found.append((symbol, use["REG"], use["STACK"] + use["LOCAL"], shared,
                          _threads(parts.get(f".nv.info.{symbol}", b"")), count(code), outside))  # fmt: skip
    names = _readable([f[0] for f in found])
    return sorted((Kernel(f[0], name, *f[1:]) for f, name in zip(found, names, strict=True)),
                  key=lambda k: k.signature)  # fmt: skip


def main(library: str, arch: str = "sm_90a") -> None:
    """Prints a line for each kernel."""
    for k in read(Path(library), arch):
        counts = " ".join(f"{name} {n}" for name, n in sorted(k.counts.items()))
        threads = k.threads or "?"
        uses = f"{k.registers:4} registers x {threads:4} {k.stack:4} stack {k.shared:6} shared"
        print(f"{uses}  {k.signature}  [{counts}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
