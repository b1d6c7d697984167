# SPDX-License-Identifier: Apache-2.0
"""Hashes of a family's sources: what a result was measured on. Standard library only.

``measured_hash``: everything under ``csrc/<family>/`` and ``csrc/core/`` (a CPU result's sources).
``cuda_hash``: ``csrc/<family>/*.h``, ``csrc/<family>/cuda/`` and the ``csrc/core/`` files that these
include, directly or not (the GPU ledger's sources); a change of CPU code leaves it as it is.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SUFFIXES = frozenset({".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"})
LICENCE = b"// SPDX-License-Identifier: "  # a line that is no code
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def repository_root() -> Path | None:
    """Folder with ``csrc/`` above this file; None in an installed wheel, which has no sources."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "csrc").is_dir() else None


def families(root: Path) -> list[str]:
    """Names of all families: folders of ``csrc/`` with schemas (``*ops.cpp``), without ``_template``."""
    found = {p.parent.name for p in (root / "csrc").glob("*/*ops.cpp")}
    return sorted(name for name in found if not name.startswith("_"))


def _sources(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix in SUFFIXES]


def _digest(root: Path, files: set[Path]) -> str:
    """SHA-256 over relative names and contents but for the line of the licence, in the order of names."""
    total = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        content = path.read_bytes()
        if content.startswith(LICENCE):
            content = content.partition(b"\n")[2]
        total.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def measured_hash(root: Path, family: str) -> str:
    csrc = root / "csrc"
    return _digest(root, {*_sources(csrc / family), *_sources(csrc / "core")})


def _resolve(name: str, including: Path, csrc: Path) -> Path | None:
    """The file of this tree that an ``#include`` means: beside the including file, else under csrc/."""
    for base in (including.parent, csrc):
        path = (base / name).resolve()
        if path.is_file() and path.is_relative_to(csrc):
            return path
    return None


def cuda_sources(root: Path, family: str) -> set[Path]:
    """Files of the GPU ledger; empty if the family has no CUDA code."""
    csrc = (root / "csrc").resolve()
    home = csrc / family
    cuda = _sources(home / "cuda")
    if not cuda:
        return set()
    counted = {*cuda, *home.glob("*.h")}
    queue = sorted(counted)
    while queue:
        path = queue.pop()
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace")):
            found = _resolve(name, path, csrc)
            if found and found not in counted and (csrc / "core") in found.parents:
                counted.add(found)
                queue.append(found)
    return counted


def cuda_hash(root: Path, family: str) -> str | None:
    """Hash of the GPU ledger's files; None if the family has no CUDA code."""
    files = cuda_sources(root, family)
    return _digest(root.resolve(), files) if files else None
