# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: what methods share is in a shared package, and no method reaches into another."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "tenfold"
METHODS = {
    "nacl", "dha", "hft", "ma_rlhf", "upit", "themis", "pixelgpt", "gptfluence", "ernie_music", "ernie_code",
}  # fmt: skip
# From the lowest to the highest; each may import those before its own line, and nothing else.
LAYERS = (
    {"reference"}, {"ops"}, {"optim", "data", "report"}, {"training"}, {"merge", "sandbox", "testing"}, {"rlhf"},
)  # fmt: skip
SHARED = set().union(*LAYERS)
ABOVE = {
    "integrations",
    "cli",
}  # adapters of other libraries know the methods that they bring there

# One method that works on another's result, and where: NACL on a model that DHA has converted, a reward that is asked
# for by name, and the study of PPO with Themis as the reward.
TOGETHER = {
    ("nacl/heads.py", "dha"),
    ("ma_rlhf/inputs.py", "themis"),
    ("themis/study.py", "ma_rlhf"),
}


def imported(file):
    """Packages of tenfold that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("tenfold.")}
    return found


def test_the_packages_are_those_named_here():
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert folders == METHODS | SHARED | ABOVE


@pytest.mark.parametrize("package", sorted(METHODS | SHARED))
def test_layers(package):
    found = {
        (file.relative_to(PACKAGE).as_posix(), name)
        for file in (PACKAGE / package).rglob("*.py")
        for name in imported(file)
        if name in METHODS - {package}
    }
    assert found <= TOGETHER


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_shared_packages_import_those_below(level):
    below = set().union(*LAYERS[:level])
    for package in LAYERS[level]:
        found = set().union(*map(imported, (PACKAGE / package).rglob("*.py")))
        also = {"integrations"} if package == "rlhf" else set()  # transformers' switches of kernels
        assert found & (METHODS | SHARED | ABOVE) <= below | also | {package}


def test_exceptions_are_still_needed():
    assert all(name in imported(PACKAGE / file) for file, name in TOGETHER)
