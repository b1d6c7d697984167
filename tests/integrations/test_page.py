# SPDX-License-Identifier: Apache-2.0
"""What docs/integrations.md shows: blocks run as they stand, in their host where they need one; its table is true."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.testing import processes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
SECTIONS = {
    part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    for part in PAGE.read_text().split("\n## ")[1:]
}
START = "What the examples start from"
HOSTS = {
    "kvpress": "kvpress",
    "verl": "verl",
    "OpenRLHF": "openrlhf",
    "SkyRL": "skyrl",
    "TRL": "trl",
}
SERVED = "Themis as a reward"
OURS = [s for s in SECTIONS if SECTIONS[s] and s not in (START, SERVED, *HOSTS)]
# What hosts need before they can be imported here; see their own tests.
BEFORE = {
    "openrlhf": "import test_openrlhf\ntest_openrlhf.put_stubs()\n",
    "skyrl": "import test_skyrl\ntest_skyrl.imported()\n",
    "trl": "import test_trl\ntokenizer = test_trl.word_tokenizer()\n",
}


def code_of(section, before=""):
    (block,) = SECTIONS[section]
    path = f"import sys; sys.path[:0] = [{str(PAGE.parents[1] / 'tests' / 'integrations')!r}]\n"
    return "\n".join([path, before, SECTIONS[START][0], block])


def test_every_section_has_one_block():
    counts = {section: len(blocks) for section, blocks in SECTIONS.items()}
    assert set(HOSTS) | {START, SERVED} <= set(counts) and len(OURS) >= 7
    assert set(counts.values()) <= {0, 1}, counts
    long = [s for s, blocks in SECTIONS.items() for b in blocks
            if len([x for x in b.splitlines() if x.strip() and "import" not in x]) > 12]  # fmt: skip
    assert long == []


@pytest.mark.parametrize("section", OURS)
def test_in_this_environment(section, tmp_path):
    done = processes.python("-c", code_of(section), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_themis_serves(tmp_path, monkeypatch):
    from themis_judges import Gives

    from tenfold.themis.scorer import Scorer
    from tenfold.themis.serve import Server

    server = Server(Scorer(Gives({"2": 1.5}), max_wait=0.0)).start()
    monkeypatch.setenv("TENFOLD_THEMIS_URL", server.url)
    names: dict = {}
    try:
        exec(compile(SECTIONS[SERVED][0], str(PAGE), "exec"), names)
        assert names["found"]["score"] == 1.5
        assert names["trl_reward"](prompts=["1 + 1?"], completions=["2"]) == [1.5]
    finally:
        server.stop()
        server.scorer.close(timeout=5)


@pytest.mark.parametrize("section", [
    pytest.param("kvpress", marks=pytest.mark.host_kvpress),
    pytest.param("verl", marks=pytest.mark.host_verl),
    pytest.param("OpenRLHF", marks=pytest.mark.host_openrlhf),
    pytest.param("SkyRL", marks=pytest.mark.host_skyrl),
    pytest.param("TRL", marks=[pytest.mark.host_trl, pytest.mark.host_trl_ppo]),
])  # fmt: skip
def test_in_a_host(section, tmp_path):
    host = HOSTS[section]
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"needs {host} (make test-hosts)")
    # An interpreter of its own: some hosts start threads when they are imported, which must not be forked.
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code_of(section, BEFORE.get(host, ""))]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_tables_versions_are_those_tested():
    """What an adapter refuses is what the page says that it does not know."""
    from tenfold.integrations import openrlhf, skyrl, trl, verl

    rows = {
        r[0]: r
        for r in re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", PAGE.read_text(), re.M)
    }
    for name, module in {"verl": verl, "OpenRLHF": openrlhf, "SkyRL": skyrl, "TRL": trl}.items():
        assert rows[name][3] == ", ".join(module.TESTED)
    wanted = {"attention": r"(\d+), (\d+)", "experts": r"(\d+), (\d+)"}
    for name, version in wanted.items():
        source = inspect.getsource(importlib.import_module(f"tenfold.integrations.{name}"))
        major, minor = re.search(
            rf"hf\.require\(\"tenfold\.integrations\.{name}\", {version}", source
        ).groups()
        assert f"transformers >= {major}.{minor}" in rows[f"transformers: {name}"][3]


def test_pairs_exist():
    from tenfold.integrations import attention, experts, openrlhf, skyrl, verl

    for module in (attention, experts):
        assert {"patch", "unpatch", "register", "unregister"} <= set(vars(module))
    assert {"register", "unregister"} <= set(vars(skyrl))
    assert "install" in vars(verl) and "install" in vars(openrlhf)
