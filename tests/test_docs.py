# SPDX-License-Identifier: Apache-2.0
"""What README and the examples show runs as it is shown, and what they name exists."""

import re
from pathlib import Path

import pytest

from tenfold.testing import processes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]


def run(*command, cwd=ROOT):
    done = processes.python(*command, cwd=cwd)
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


# Pages whose Python blocks are programs of their own; on the others they are parts of one.
WHOLE = [
    (page, at)
    for page in (
        "docs/tour.md",
        *(
            f"docs/ops/{name}.md"
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
        ),
    )
    for at in range(len(blocks(page)))
]


@pytest.mark.parametrize("page, at", WHOLE)
def test_the_code_of_a_page_runs(page, at, tmp_path):
    run("-c", blocks(page)[at], cwd=tmp_path)  # a block may write beside itself


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


def navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    return re.findall(r"^ +- [^:\n]+: (\S+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)


def test_the_navigation_has_every_page_once():
    listed = [page for page in navigation() if not page.startswith("repository/")]
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in ROOT.glob("docs/**/*.md")]
    assert sorted(listed) == sorted(pages)
    assert {p.name for p in ROOT.glob("*.md")} == {
        page.removeprefix("repository/") for page in navigation() if page not in listed
    }


def methods():
    """What `tenfold demo` runs."""
    return sorted(
        {p.parent.name for p in ROOT.glob("python/tenfold/*/demo.py")} - {"cli", "report"}
    )


def families():
    return {p.parent.name for p in ROOT.glob("csrc/*/*ops.cpp")} - {"_template"}


def test_every_family_and_method_has_a_page_that_the_index_names():
    assert len(families()) >= 12 and len(methods()) >= 9
    index = (ROOT / "docs/index.md").read_text()
    for page in [*(f"ops/{f}.md" for f in families()), *(f"methods/{m}.md" for m in methods())]:
        assert (ROOT / "docs" / page).is_file() and f"]({page})" in index, page


@pytest.mark.parametrize("method", methods())
def test_a_method_page_says_when_and_when_not(method):
    text = (ROOT / f"docs/methods/{method}.md").read_text()
    for section in ("When", ".*[Mm]easured", "(Limits|Not known)"):
        assert re.search(rf"^## {section}$", text, re.MULTILINE), section


def sections():
    """Of docs/performance.md: each family's tables, and by op the sentence on what limits it."""
    text = (ROOT / "docs/performance.md").read_text()
    parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)
    for family, part in zip(parts[1::2], parts[2::2]):
        tables, prose = part.split(f"<!-- performance-{family}:end -->")
        bullets = re.findall(r"^- \*\*(.*?)\*\*: (.*)$", prose, re.MULTILINE)
        yield (
            family,
            tables,
            {op: said for ops, said in bullets for op in re.findall(r"`(\w+)`", ops)},
        )


def test_the_performance_page_has_a_sentence_for_every_op_that_was_measured():
    assert {family for family, _, _ in sections()} == families()
    for family, tables, said in sections():
        ops = re.findall(r"^\| `(\w+)`", tables, re.MULTILINE)
        assert sorted(said) == sorted(ops), family
        assert ops or "No measurement" in tables, family


def test_the_performance_page_says_which_ops_are_behind_in_half_of_their_cases():
    rows = re.compile(r"^\| `(\w+)` .* (\d+) of (\d+) \|$", re.MULTILINE)
    behind = [
        (op, said[op])
        for _, tables, said in sections()
        for op, lost, cases in rows.findall(tables)
        if 0 < int(cases) <= 2 * int(lost)
    ]
    assert behind
    for op, sentence in behind:
        assert re.search(r"\*\*[^*]*behind", sentence, re.IGNORECASE), op


def environment_variables():
    """What the sources read: literals of Python, getenv of C++, options of CMake."""
    found = set()
    for folder in ("python", "bench", "tools"):
        for source in ROOT.glob(f"{folder}/**/*.py"):
            found |= set(re.findall(r"[\"'](TENFOLD_[A-Z_]+)[\"']", source.read_text()))
    for source in ROOT.glob("csrc/**/*.cpp"):
        found |= set(re.findall(r'getenv\("(TENFOLD_[A-Z_]+)"', source.read_text()))
    options = re.search(
        r"foreach\(option ([^)]*)\)\n *if\(DEFINED ENV", (ROOT / "CMakeLists.txt").read_text()
    )
    return found | set(options[1].split())


def test_every_environment_variable_is_explained():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    explained = set(re.findall(r"^\| `(TENFOLD_[A-Z_]+)` \|", page, re.MULTILINE))
    assert {"TENFOLD_CUDA", "TENFOLD_HOME", "TENFOLD_CPU_CAPABILITY"} < explained
    assert explained == environment_variables()


def test_every_line_of_doctor_is_explained():
    source = (ROOT / "python/tenfold/cli/doctor.py").read_text()
    lines = set(re.findall(r'\bline\(\s*"([^"]+)"', source)) | {"package"}
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert len(lines) >= 9
    for name in lines:
        assert f"\n| `{name}` |" in page, name
