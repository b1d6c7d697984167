# SPDX-License-Identifier: Apache-2.0
"""CodeBLEU (arXiv 2009.10297): 0.25 each of BLEU, keyword-weighted BLEU, syntax match and data-flow match.

The package ``codebleu`` is used where it is installed. Else Python code, and only that, is scored here, by the standard
library's parser; the differences:

- Tokens are Python's (the package splits at whitespace), both BLEUs add 0.1 to counts of 0, as it does.
- Syntax trees are those of ``ast``, not of tree-sitter; of broken code, of what is left without the lines that the
  parser stumbles over.
- Data flow is of one pass in the order of the source: loops and branches are read once.
- Where no reference has any data flow, the other three parts weigh as much more (the package gives 0 for it).
"""

from __future__ import annotations

import ast
import importlib
import keyword
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tenfold.ernie_code.metrics import brevity_penalty, check_pairs, ngrams, token_bleu
from tenfold.training.checks import one_of

WEIGHTS = (0.25, 0.25, 0.25, 0.25)
PARTS = ("ngram_match", "weighted_ngram_match", "syntax_match", "dataflow_match")
BACKENDS = ("auto", "package", "ast")
_KEYWORD, _OTHER = 1.0, 0.2
_ORDER = 4

_TOKEN = re.compile(
    r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|\d[\w.]*|\w+|'
    r"\*\*=|//=|<<=|>>=|\.\.\.|->|:=|\*\*|//|<<|>>|[-+*/%&|^@=!<>]=|[^\w\s]"
)

Edge = tuple[str, str, tuple[str, ...]]


def code_bleu(
    predictions: Sequence[str], references: Sequence[str], language: str = "python", *,
    weights: Sequence[float] = WEIGHTS, backend: str = "auto",
) -> dict[str, float]:  # fmt: skip
    """CodeBLEU and its parts, from 0 to 100, of a corpus: ``codebleu`` and ``PARTS``.

    Args:
        predictions, references: code. language: as the package names it; without the package, Python only.
        weights: of the four parts. backend: ``package``, ``ast`` (here, see the module), or ``auto``.

    Raises ValueError for another language without the package, ModuleNotFoundError for ``package`` without it.
    """
    check_pairs(predictions, references)
    one_of("backend", backend, BACKENDS)
    if len(weights) != len(PARTS) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must be four numbers >= 0, some positive, got {list(weights)}")
    package = None if backend == "ast" else _package(backend == "package")
    if package is not None:
        return _by_package(package, predictions, references, language, weights)
    if language.lower() != "python":
        raise ValueError(
            f"CodeBLEU of {language!r} needs the package codebleu (`pip install codebleu`); without it, only Python"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes of generated code
        parts = _parts(predictions, references)
    known = [(w, parts[name]) for w, name in zip(weights, PARTS) if not math.isnan(parts[name])]
    total = sum(w for w, _ in known)
    return {"codebleu": sum(w * s for w, s in known) / total if total else 0.0, **parts}


def _package(needed: bool) -> Any:
    try:
        return importlib.import_module("codebleu")
    except ModuleNotFoundError:
        if needed:
            raise ModuleNotFoundError("install the package with `pip install codebleu`") from None
        return None


def _by_package(
    package: Any, predictions: Sequence[str], references: Sequence[str], language: str, weights: Sequence[float]
) -> dict[str, float]:  # fmt: skip
    made = package.calc_codebleu(
        list(references), list(predictions), lang=language.lower(), weights=tuple(weights)
    )
    return {"codebleu": 100.0 * made["codebleu"]} | {p: 100.0 * made[f"{p}_score"] for p in PARTS}


def python_tokens(code: str) -> list[str]:
    """Tokens of Python code, also where it is broken; strings are one token, comments are words."""
    return _TOKEN.findall(code)


def _parts(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    own, wanted = ([python_tokens(c) for c in texts] for texts in (predictions, references))
    syntax, flow = [0, 0], [0, 0]
    for p, r in zip(predictions, references):
        trees = parse(p), parse(r)
        for sums, made in ((syntax, _syntax(*trees)), (flow, _flow(*trees))):
            sums[0] += made[0]
            sums[1] += made[1]
    return {
        "ngram_match": token_bleu(own, wanted, "epsilon"),
        "weighted_ngram_match": weighted_bleu(own, wanted),
        "syntax_match": 100.0 * syntax[0] / syntax[1] if syntax[1] else 0.0,
        "dataflow_match": 100.0 * flow[0] / flow[1] if flow[1] else math.nan,
    }


def weighted_bleu(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:  # fmt: skip
    """BLEU of the n-grams of the references that are found; of single tokens, keywords weigh 1 and others 0.2."""
    total = 0.0
    for order in range(1, _ORDER + 1):
        found = count = 0.0
        for p, r in zip(predictions, references):
            own = ngrams(p, order)
            for gram, times in ngrams(r, order).items():
                weight = 1.0 if order > 1 else _KEYWORD if keyword.iskeyword(gram[0]) else _OTHER
                found += weight * min(times, own[gram])
                count += weight * times
        if found == 0:
            found, count = 0.1, max(count, 1.0)
        total += math.log(found / count)
    return 100.0 * math.exp(total / _ORDER) * brevity_penalty(predictions, references)


def parse(code: str) -> ast.AST | None:
    """The syntax tree of code; of broken code, of what is left without the lines that the parser stumbles over.

    None where nothing is left. A block whose head is missing gets one.
    """
    lines = textwrap.dedent(code).split("\n")
    for _ in range(2 * len(lines) + 1):
        try:
            tree = ast.parse("\n".join(lines))
        except SyntaxError as error:
            at = min(max(error.lineno or 1, 1), len(lines)) - 1
            if error.msg == "unexpected indent":
                lines.insert(at, _margin(lines[:at]) + "if _:")
                continue
            if error.msg.startswith("expected an indented block"):
                at = max((i for i in range(at) if lines[i].strip()), default=at)
            del lines[at]
        except (ValueError, RecursionError, MemoryError):
            return None
        else:
            return tree if tree.body else None
    return None


def _margin(lines: Sequence[str]) -> str:
    """What the last line with anything in it begins with."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last[: len(last) - len(last.lstrip())]


def subtrees(tree: ast.AST) -> list[str]:
    """Every inner node of a tree with all below it, as text: kinds of nodes, no names and no values."""
    found: list[str] = []

    def text(node: ast.AST) -> str:
        below = [text(c) for c in ast.iter_child_nodes(node) if not isinstance(c, ast.expr_context)]
        made = f"({type(node).__name__} {' '.join(below)})" if below else type(node).__name__
        if below:
            found.append(made)
        return made

    text(tree)
    return found


def _syntax(own: ast.AST | None, wanted: ast.AST | None) -> tuple[int, int]:
    """(subtrees of the reference that the prediction has, all of them)."""
    if wanted is None:
        return 0, 0
    there = set(subtrees(own)) if own is not None else set()
    all_of = subtrees(wanted)
    return sum(s in there for s in all_of), len(all_of)


class _Flow(ast.NodeVisitor):
    """Edges (variable, kind, what it is from) in the order of the source."""

    def __init__(self) -> None:
        self.edges: list[Edge] = []
        self.defined: set[str] = set()

    def bind(self, target: ast.AST, sources: Sequence[str]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                if sources:
                    self.edges.append((node.id, "computedFrom", tuple(sources)))
                self.defined.add(node.id)
            elif isinstance(node, ast.Name):
                self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in self.defined:
            self.edges.append((node.id, "comesFrom", (node.id,)))

    def visit_arg(self, node: ast.arg) -> None:
        self.defined.add(node.arg)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.bind(target, _names(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self.bind(node.target, _names(node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        self.bind(node.target, [*_names(node.target), *_names(node.value)])

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.bind(node.target, _names(node.value))

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self.bind(node.target, _names(node.iter))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    visit_AsyncFor = visit_For

    def visit_withitem(self, node: ast.withitem) -> None:
        self.visit(node.context_expr)
        if node.optional_vars is not None:
            self.bind(node.optional_vars, _names(node.context_expr))

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        self.bind(node.target, _names(node.iter))
        for condition in node.ifs:
            self.visit(condition)

    def visit_ListComp(self, node: Any) -> None:
        # What is computed comes first in the source, what it is computed of later.
        for generator in node.generators:
            self.visit(generator)
        for part in ("elt", "key", "value"):
            if hasattr(node, part):
                self.visit(getattr(node, part))

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp


def _names(node: ast.AST) -> list[str]:
    return list(dict.fromkeys(n.id for n in ast.walk(node) if isinstance(n, ast.Name)))


def data_flow(tree: ast.AST) -> Iterator[Edge]:
    """The edges of a program's data flow, variables numbered in the order in which edges name them."""
    walker = _Flow()
    walker.visit(tree)
    numbers: dict[str, str] = {}
    for name, kind, sources in walker.edges:
        for known in (*sources, name):
            numbers.setdefault(known, f"var_{len(numbers)}")
        yield numbers[name], kind, tuple(numbers[s] for s in sources)


def _flow(own: ast.AST | None, wanted: ast.AST | None) -> tuple[int, int]:
    """(edges of the reference that the prediction has, all of them); each edge matches once."""
    if wanted is None:
        return 0, 0
    edges = Counter(data_flow(wanted))
    there = Counter(data_flow(own)) if own is not None else Counter()
    return sum((edges & there).values()), sum(edges.values())
