# SPDX-License-Identifier: Apache-2.0
"""Source code that is on the machine: Python's standard library, and what installed wheels carry in other languages.

Files are read and parsed, never imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, generated tables, programs' icons and demonstrations.
_SKIPPED = frozenset(
    {"test", "tests", "testing", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data", "turtledemo",
     "vendor", "node_modules", "lib2to3", "migrations", "_vendor"}
)  # fmt: skip
_LANGUAGES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "python": (("stdlib", ("*.py",)),),
    "javascript": tuple((p, ("*.js",)) for p in ("django", "matplotlib", "urllib3", "torch/utils")),
    "c++": (("torch/include/c10", ("*.h",)), ("torch/include/torch/csrc/api", ("*.h",))),
}  # fmt: skip
LANGUAGES = tuple(_LANGUAGES)


@dataclass(frozen=True)
class SourceFile:
    """A file: ``name`` is the same on any machine (``stdlib/json/decoder.py``)."""

    name: str
    language: str
    text: str


@dataclass(frozen=True)
class Function:
    """A function with its documentation.

    Attributes:
        file: name of the source file. name: with its class's, if it is a method.
        docstring: as written, indentation cleaned. code: from ``def`` on, without the docstring, not indented.
    """

    file: str
    name: str
    docstring: str
    code: str

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, in one line."""
        return " ".join(self.docstring.split("\n\n")[0].split())


def _root(package: str) -> Path | None:
    first, _, rest = package.partition("/")
    if first == "stdlib":
        folder = Path(sysconfig.get_paths()["stdlib"]) / rest
        return folder if folder.is_dir() else None
    spec = importlib.util.find_spec(first)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / rest).is_dir():
            return Path(place) / rest
    return None


def source_files(
    language: str = "python", packages: Iterable[str] | None = None, *, max_chars: int = 200_000
) -> list[SourceFile]:
    """Files of a language, sorted by name; tests, generated tables and minified files are left out.

    Args:
        language: of ``LANGUAGES``. packages: where to look: ``stdlib``, installed packages, or folders of them
            (``stdlib/json``); default: the standard library, and for other languages wheels that have some.
        max_chars: longer files are left out.

    Raises ValueError for another language.
    """
    if language not in _LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(_LANGUAGES)}, got {language!r}")
    patterns = _LANGUAGES[language][0][1]
    places = _LANGUAGES[language] if packages is None else [(p, patterns) for p in packages]
    found = {}
    for package, names in places:
        root = _root(package)
        if root is None:
            continue
        for path in (p for name in names for p in root.rglob(name)):
            inside = path.relative_to(root)
            if _SKIPPED.isdisjoint(inside.parts[:-1]) and _written(path):
                text = _read(path)
                if text is not None and 0 < len(text) <= max_chars and _hand_made(text):
                    name = f"{package}/{inside.as_posix()}"
                    found[name] = SourceFile(name, language, text)
    return [found[name] for name in sorted(found)]


def _written(path: Path) -> bool:
    name = path.name
    return not name.startswith(("_sysconfigdata", "test_")) and not name.endswith((".min.js", "_test.py"))  # fmt: skip


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def _hand_made(text: str) -> bool:
    return max(map(len, text.split("\n"))) <= 400


def functions(file: SourceFile) -> Iterator[Function]:
    """Functions and methods of a Python file that have a docstring and a body besides it, in order.

    Those inside functions are part of them; a file that this Python cannot parse has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes of old sources
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            return
        # ast's line numbers count these ends only; str.splitlines knows more.
        lines = file.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        yield from _functions(file.name, tree, "", lines)


def _functions(file: str, node: ast.AST, prefix: str, lines: list[str]) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(file, child, f"{prefix}{child.name}.", lines)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(child)
            code = _without_docstring(child, lines) if text and len(child.body) > 1 else None
            if text and code is not None:
                yield Function(file, prefix + child.name, text, code)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _functions(file, child, prefix, lines)


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The function's lines but for its docstring's; None where they share one, or cannot be moved to the left."""
    first, second = node.body[0], node.body[1]
    end, last = first.end_lineno or first.lineno, node.end_lineno or 0
    if first.lineno == node.lineno or second.lineno == end:
        return None
    # Moving a string of several lines to the left makes another string of it.
    if node.col_offset and any(
        isinstance(n, ast.Constant | ast.JoinedStr) and n.end_lineno != n.lineno
        for part in (node.args, *node.body[1:])
        for n in ast.walk(part)
    ):
        return None
    rest = lines[end:last]
    while rest and not rest[0].strip():
        rest = rest[1:]
    indent = lines[node.lineno - 1][: node.col_offset]
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *rest]
    moved = [
        line.removeprefix(indent) if line.startswith(indent) else line.lstrip() for line in kept
    ]
    return "\n".join(moved) + "\n"


def held_out(name: str, share: float = 0.1) -> bool:
    """Whether what has this name is kept for tests: by a hash of the name, the same everywhere."""
    value = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")  # fmt: skip
    return value < share * 2.0**64
