# SPDX-License-Identifier: Apache-2.0
"""Long real texts that are on the machine already, in an order that does not change between runs.

Python's own reference topics, documentation strings and sources are on every machine
(``PORTABLE_KINDS``); packaged licences, RFCs (Debian ``doc-rfc-*``) and manual pages are added
where they are found. Nothing is downloaded, imported or executed: sources are parsed, not run.
"""

from __future__ import annotations

import ast
import functools
import gzip
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.data.cache import remembered

PORTABLE_KINDS = ("reference", "docs", "source")
KINDS = (*PORTABLE_KINDS, "licence", "rfc", "manual")
_MAX_MANUALS = 24
_SHARE = Path("/usr/share")


@dataclass(frozen=True)
class Document:
    """One text: ``title`` names it on any machine, ``kind`` is one of ``KINDS``."""

    title: str
    kind: str
    text: str


def _read(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    return raw.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _reference() -> Iterator[Document]:
    from pydoc_data.topics import topics  # type: ignore[import-untyped]

    for name in sorted(topics):
        yield Document(f"Python reference: {name}", "reference", topics[name].strip() + "\n")


def library_files() -> Iterator[Path]:
    """Sources of Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = ("", "asyncio", "collections", "concurrent/futures", "email", "html", "http",
                "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml/dom",
                "xml/etree")  # fmt: skip
    for package in packages:
        for path in sorted((root / package).glob("*.py")):
            if not path.name.startswith(("_sysconfigdata", "test_")):
                yield path


def _module_name(path: Path) -> str:
    parts = path.relative_to(sysconfig.get_paths()["stdlib"]).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _docstrings(tree: ast.AST, prefix: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{prefix}.{node.name}"
        text = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            head = f"class {name}"
        else:
            head = f"{name}({ast.unparse(node.args)})"
        if text:
            yield f"{head}\n\n{text}"
        yield from _docstrings(node, name)


def _documentation_of(path: Path) -> str:
    """What the documentation strings of a module say."""
    name = _module_name(path)
    tree = ast.parse(_read(path))
    parts = [ast.get_docstring(tree) or "", *_docstrings(tree, name)]
    text = "\n\n\n".join(part for part in parts if part)
    return f"Module {name}\n\n{text}\n" if text else ""


@functools.cache
def _documentation() -> dict[str, str]:
    """By module. Parsing all of them takes seconds."""
    files = list(library_files())
    return remembered(
        "documentation", files, lambda: {_module_name(f): _documentation_of(f) for f in files}
    )


def _docs() -> Iterator[Document]:
    for name, text in _documentation().items():
        if text:
            yield Document(f"Python documentation: {name}", "docs", text)


def _source() -> Iterator[Document]:
    for path in library_files():
        yield Document(f"Python source: {_module_name(path)}", "source", _read(path))


def _licence() -> Iterator[Document]:
    seen = set()
    site = Path(sysconfig.get_paths()["purelib"])
    packaged = [
        path
        for path in site.glob("*.dist-info/**/*")
        if re.search(r"licen[sc]e|notice|copying", path.name, re.IGNORECASE) and path.is_file()
    ]
    common = [p for p in (_SHARE / "common-licenses").glob("*") if not p.is_symlink()]
    for path in [*sorted(common), *sorted(packaged)]:
        text = _read(path)
        key = re.sub(r"\s+", " ", text[:4000])
        if key not in seen:
            seen.add(key)
            inside = path.relative_to(site).as_posix() if site in path.parents else path.name
            yield Document(f"Licence: {inside}", "licence", text)


def _rfc() -> Iterator[Document]:
    files = (_SHARE / "doc" / "RFC").glob("**/rfc*.txt*")
    named = {path.name.split(".")[0]: path for path in sorted(files)}
    for name in sorted(named, key=lambda n: (len(n), n)):
        # Page breaks carry a footer and a header line each; they say nothing.
        text = re.sub(r"\n+[^\n]*\[Page \d+\]\n\f\n?[^\n]*\n+", "\n\n", _read(named[name]))
        yield Document(f"RFC {name[3:]}", "rfc", text)


_ROFF_FONT = re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&|^%/,)]")
_ROFF_WORDS = re.compile(r"^\.(?:B|I|BR|BI|IR|IB|RB|RI|SM|SB|Nm|Fl|Ar|Op|Pa|Xr|Dv|Em|Li|Ql) +(.*)$")


def plain_manual(roff: str) -> str:
    """Readable text of a manual page's roff source: words and headings, macros dropped."""
    lines = []
    body = re.sub(r"^\.(?:de1?|am|ig)\b.*?^\.\.$", "", roff, flags=re.MULTILINE | re.DOTALL)
    for line in body.splitlines():
        if line.startswith(('.\\"', "'\\\"", '\\"', "\\{")):
            continue
        heading = re.match(r"^\.(?:SH|SS|Sh|Ss) +\"?(.*?)\"?$", line)
        words = _ROFF_WORDS.match(line)
        if heading:
            line = f"\n{heading[1]}\n"
        elif words:
            line = words[1].replace('"', "")
        elif line.startswith((".", "'")):
            line = "" if re.match(r"^\.(?:PP|P|LP|TP|IP|Pp|It|sp)\b", line) else "\0"
        if line != "\0":
            line = line.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
            lines.append(_ROFF_FONT.sub("", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _manual() -> Iterator[Document]:
    files = [p for s in "1578" for p in (_SHARE / "man" / f"man{s}").glob("*.gz") if p.is_file()]
    files = list({path.resolve(): path for path in sorted(files)}.values())
    largest = sorted(files, key=lambda p: (-p.stat().st_size, p.name))[:_MAX_MANUALS]
    for path in sorted(largest, key=lambda p: p.name):
        yield Document(f"Manual: {path.name[:-3]}", "manual", plain_manual(_read(path)))


_FINDERS: dict[str, Callable[[], Iterator[Document]]] = {
    "reference": _reference,
    "docs": _docs,
    "source": _source,
    "licence": _licence,
    "rfc": _rfc,
    "manual": _manual,
}


def long_documents(
    kinds: Sequence[str] = KINDS, *, min_chars: int = 8000, limit: int | None = None
) -> list[Document]:
    """Real documents of at least ``min_chars`` characters, by kind and then by name.

    Args:
        kinds: any of ``KINDS``; ``PORTABLE_KINDS`` are on every machine with Python.
        min_chars: shorter texts are left out (1,000 tokens are about 4,000 characters).
        limit: at most this many of each kind.

    Returns:
        Documents in an order that depends on nothing but the files found.

    Raises:
        ValueError: an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in _FINDERS]
    if unknown:
        raise ValueError(f"unknown kinds of documents {unknown}; known: {', '.join(KINDS)}")
    found = []
    for kind in kinds:
        count = 0
        for document in _FINDERS[kind]():
            if limit is not None and count >= limit:
                break
            if len(document.text) >= min_chars:
                found.append(document)
                count += 1
    return found
