# SPDX-License-Identifier: Apache-2.0
"""What a release ships: one version, licences, the source distribution, the ends of the ranges of dependencies."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tenfold

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = ("Added", "Changed", "Fixed", "Removed")
GPL = re.compile(r"\b[AL]?GPL|General Public License", re.IGNORECASE)
EITHER = re.compile(r"\bOR\b")


class TestVersion:
    def test_is_written_in_one_place(self):
        assert tenfold.__version__ == PROJECT["version"]
        homes = [ROOT / "CMakeLists.txt", ROOT / "CITATION.cff"]
        homes += [*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("python/**/*.py")]
        number = re.compile(
            rf"version.*(?<![\d.]){re.escape(PROJECT['version'])}(?![\d.])", re.IGNORECASE
        )
        again = [str(p.relative_to(ROOT)) for p in homes if number.search(p.read_text())]
        assert again == []

    def test_the_changelog_begins_with_it(self):
        text = (ROOT / "CHANGELOG.md").read_text()
        releases = re.findall(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", text, re.MULTILINE)
        assert len(releases) == len(re.findall(r"^## ", text, re.MULTILINE))
        versions = [Version(v) for v, _ in releases]
        assert versions[0] == Version(PROJECT["version"]) and versions == sorted(
            versions, reverse=True
        )
        for release in text.split("\n## ")[1:]:
            parts = re.findall(r"^### (.*)$", release, re.MULTILINE)
            assert parts and set(parts) <= set(PARTS) and parts == sorted(parts, key=PARTS.index)


def test_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(found)  # what the format requires
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["authors"] == [{"name": "tenfold developers"}]
    assert found["license"] == PROJECT["license"]


def dependencies(name, extras):
    """The installed distributions that ``name[extras]`` needs at run time, by name; None: it is not installed."""
    found, left = {}, [(name, frozenset(extras))]
    seen = set()
    while left:
        name, extras = left.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            continue
        for text in found[name].requires or []:
            need = Requirement(text)
            given = [{"extra": e} for e in extras or {""}]
            if need.marker is None or any(need.marker.evaluate(e) for e in given):
                left.append((canonicalize_name(need.name), frozenset(need.extras)))
    return found


def licences(distribution):
    """What a distribution says of its licence, each statement by itself."""
    meta = distribution.metadata
    said = [meta.get("License-Expression"), *(meta.get_all("Classifier") or [])]
    said = [
        s for s in said if s and (s == meta.get("License-Expression") or s.startswith("License ::"))
    ]
    # The old field often holds the text of a licence; its first line is its name.
    return said or [(meta.get("License") or "").strip().partition("\n")[0]]


def test_nothing_at_run_time_is_under_the_gpl_or_lgpl():
    found = dependencies("tenfold", {"all"})
    assert {"torch", "numpy", "transformers", "spacy", "uharfbuzz", "matplotlib"} <= set(found)
    assert [name for name, d in found.items() if d is None and name != "tenfold"] == []
    said = {name: licences(d) for name, d in found.items() if d}
    assert [name for name, texts in said.items() if not any(texts)] == []  # each says something
    bad = {
        name: texts
        for name, texts in said.items()
        if any(GPL.search(t) and not EITHER.search(t) for t in texts)
    }
    assert bad == {}


def test_the_licence_check_sees_what_it_should():
    classifier = "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"
    for text in ("LGPL-2.1-or-later", classifier, "AGPL-3.0-only"):
        assert GPL.search(text) and not EITHER.search(text)
    assert EITHER.search("MIT OR LGPL-2.1-or-later") and not GPL.search("Apache-2.0 AND MIT")
    assert "soundfile" not in dependencies("tenfold", {"all"})  # its wheel carries libsndfile


def ranges():
    texts = [
        *PROJECT["dependencies"],
        *(t for group in PROJECT["optional-dependencies"].values() for t in group),
    ]
    return [Requirement(t) for t in texts if not t.startswith("tenfold[")]


def pins(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return {r.name: r for r in (Requirement(x) for x in lines if x and not x.startswith("#"))}


def test_both_ends_of_each_range_are_tested():
    """`make test` has the versions of run.txt, `make test-ranges` those of lowest.txt."""
    lowest, newest = pins("lowest.txt"), pins("run.txt") | pins("build.txt") | pins("dev.txt")
    for need in ranges():
        for name in {need.name} & set(newest):
            version = next(iter(newest[name].specifier)).version
            assert need.specifier.contains(version), f"{name}: {version} is not in {need}"
        floor = [s.version for s in need.specifier if s.operator == ">="]
        if need.name in lowest and floor:
            (pin,) = lowest[need.name].specifier
            assert Version(floor[0]) == Version(pin.version), f"{need}, but {need.name}{pin}"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Made of a clean checkout, as a release is."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = folder.glob("*.tar.gz")
    return made


class TestSourceDistribution:
    def test_holds_the_sources_and_nothing_made(self, sdist):
        assert (
            sdist.name == f"tenfold-{PROJECT['version']}.tar.gz"
            and sdist.stat().st_size < 5 * 2**20
        )
        with tarfile.open(sdist) as tar:
            names = {m.name.partition("/")[2] for m in tar.getmembers() if m.isfile()}
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        if tracked.returncode == 0:
            wanted = {
                n
                for n in tracked.stdout.splitlines()
                if not n.startswith(("bench/results/", ".ci/"))
            }
            wanted = {n for n in wanted if (ROOT / n).exists()}
            assert wanted <= names, sorted(wanted - names)
        for top in ("csrc/module.cpp", "python/tenfold/__init__.py", "tests/conftest.py", "bench/harness.py",
                    "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt"):  # fmt: skip
            assert top in names, top
        made = re.compile(
            r"__pycache__|_cache/|\.(so|o|pyc|whl|egg-info)$|^(build|dist|\.venv|bench/results|tenfold-report)/"
        )
        assert [n for n in names if made.search(n)] == []

    def test_cmake_finds_all_that_it_builds(self, sdist, tmp_path):
        with tarfile.open(sdist) as tar:
            tar.extractall(tmp_path, filter="data")
        (source,) = tmp_path.iterdir()
        bin = Path(sys.executable).parent
        command = ["cmake", "-S", source, "-B", tmp_path / "build", "-G", "Ninja", "-DTENFOLD_CUDA=OFF",
                   f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
        env = {"PATH": f"{bin}:/usr/local/bin:/usr/bin:/bin", "TENFOLD_CUDA": "OFF"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        command = ["ninja", "-C", tmp_path / "build", "-n", "all"]
        missing = subprocess.run(command, capture_output=True, text=True, env=env)
        assert missing.returncode == 0, missing.stdout[
            -3000:
        ]  # a header or source that is not there


SLASHES = (".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh")
SOURCES = dict.fromkeys(SLASHES, "//") | dict.fromkeys((".py", ".sh", ".yaml"), "#")


def test_every_source_names_its_licence():
    folders = ("python", "csrc", "bench", "tools", "tests", "examples")
    made = {"results", "__pycache__", "build"}
    paths = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in SOURCES]
    paths = [p for p in paths if not made & set(p.relative_to(ROOT).parts)]
    paths += [ROOT / "CMakeLists.txt", ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert len(paths) > 700
    without = []
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            head = [next(lines, ""), next(lines, "")]
        line = head[1] if head[0].startswith("#!") else head[0]
        if line != f"{SOURCES.get(path.suffix, '#')} SPDX-License-Identifier: Apache-2.0\n":
            without.append(str(path.relative_to(ROOT)))
    assert without == [], f"{len(without)}: {without[:20]}"
