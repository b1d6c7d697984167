"""What README and the examples show runs as it is shown, and what they name exists."""

import re
from pathlib import Path

import pytest

from tenfold.testing import processes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]


def run(*command):
    done = processes.python(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def blocks(page="README.md"):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_has_a_model_example_of_ten_lines_and_an_op_example():
    model, ops, attention = blocks()
    code = [line for line in model.splitlines() if line.strip() and "import" not in line]
    assert len(code) <= 10 and "NaclPress" in model and "tenfold.ops" in ops
    assert "dha_attention" in attention and "flash_attn_func" in attention


@pytest.mark.parametrize("at", range(len(blocks())))
def test_readme_code_runs(at):
    out = run("-c", blocks()[at])
    if at == 0:
        before, after = map(int, re.search(r"cache: (\d+) -> (\d+) MB", out).groups())
        assert 0.15 * before < after < 0.25 * before


WHOLE = [
    (f"docs/ops/{name}.md", at)
    for name in (
        "corruption",
        "diffusion",
        "influence",
        "loss",
        "merge",
        "moe",
        "norm",
        "pixels",
        "rl",
    )
    for at in range(len(blocks(f"docs/ops/{name}.md")))
]


@pytest.mark.parametrize("page, at", WHOLE)
def test_the_code_of_a_page_runs(page, at):
    run("-c", blocks(page)[at])


def test_nacl_example():
    lines = run("examples/nacl.py", "--length", "1200").strip().splitlines()
    right = re.search(r"right answer is (\d+)", lines[0])[1]
    assert len(lines) == 3 and all(right in line for line in lines[1:])
    kept = [int(re.search(r"(\d+) tokens kept", line)[1]) for line in lines[1:]]
    assert kept == [1200, 240]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    roots = r"(?:csrc|python|bench|tests|examples|docs|requirements|tools)"
    for path in re.findall(rf"`({roots}/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^ {4}|`)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
