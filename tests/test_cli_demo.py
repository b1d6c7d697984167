# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo``: processes, failures, tables and page. What the methods show is tested with each."""

import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from tenfold.cli import demo
from tenfold.cli.demo_method import peak_bytes, perform
from tenfold.cli.main import app

GOOD = """
import os, sys, time
from tenfold.report import Headline, Speedup, TextTable
STEPS = 3
class Found(dict):
    def to_json(self): return dict(self)
def run_demo(step=lambda text: None, seed=0):
    print("noise on stdout")
    os.write(1, b"more of it")
    step("one"); step("two")
    return Found(seed=seed, threads=os.environ["OMP_NUM_THREADS"])
def headline(found):
    return Headline(f"seed {found['seed']}", "it works", Speedup("an_op", "plain PyTorch", 3.456))
def tables(found):
    return [TextTable("Found", ("what", "value"), [[k, str(v)] for k, v in found.items()])]
def add_demo_section(found, page):
    page.section("A good method"); page.text(f"seed <{found['seed']}>")
"""
MODULES = {
    "good": GOOD,
    "bad": GOOD + "def run_demo(step, seed): raise ValueError('a bad\\nday')\n",
    "unready": GOOD + "from tenfold.data.models import MissingData\n"
    "def run_demo(step, seed): raise MissingData('no model: fetch it')\n",
    "killed": GOOD + "def run_demo(step, seed): os.kill(os.getpid(), 9)\n",
    "leaves": GOOD
    + "def run_demo(step, seed): print('last words', file=sys.stderr); os._exit(7)\n",
    "broken": "import no_such_module\n",
    "slow": GOOD + "def run_demo(step, seed): open('started', 'w').close(); time.sleep(600)\n",
}


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """Made-up methods instead of the real ones, in a folder of their own."""
    folder = tmp_path_factory.mktemp("methods")
    for name, text in MODULES.items():
        (folder / f"made_up_{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "METHODS", {name: f"made_up_{name}" for name in MODULES})
        patch.setattr(demo, "cores", lambda: 6)
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        yield folder


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def mixed(methods):
    """(what a run with failures shows, its page)."""
    done = run("leaves", "good", "killed", "good", "--seed", 5, "--out", methods / "page")
    return done, (methods / "page/index.html").read_text()


def test_a_failure_is_shown_and_the_others_run(mixed):
    done, page = mixed
    assert done.exit_code == 1
    assert "leaves failed: its process ended with status 7\nlast words" in done.stdout
    assert re.search(
        r"killed +failed +its process ended with signal SIGKILL +– +– +\d+ s", done.stdout
    )
    assert re.search(
        r"good +seed 5 +it works +an_op 3.46× plain PyTorch +0\.[1-9] GB +\d+ s", done.stdout
    )
    assert re.search(r"^seed +5$", done.stdout, re.M) and "noise" not in done.stdout
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", page)
    assert titles == ["All methods", "leaves: failed", "A good method", "killed: failed"]
    assert len(set(re.findall(r'<h2 id="([^"]*)"', page))) == 4
    assert (
        page.count('<p class="failed">') == 2 and "last words" in page and "seed &lt;5&gt;" in page
    )


def test_methods_at_a_time_share_the_cores(mixed):
    assert re.search(r"^threads +2$", mixed[0].stdout, re.M)  # three methods on six cores
    for jobs, threads in ((1, 6), (2, 3), (4, 1), (9, 1)):
        assert demo.Runner(["good"], 0, jobs, True).threads == threads


def test_progress_without_a_terminal(mixed):
    said = mixed[0].stderr
    assert re.search(r"^tenfold demo good: done \(\d+ s\)$", said, re.M)
    assert re.search(
        r"^tenfold demo killed: failed: its process ended with signal SIGKILL \(\d+ s\)$",
        said,
        re.M,
    )


def test_peak_memory_is_the_processs_own():
    """Not that of a large one that started it."""
    import torch

    large = torch.ones(1 << 28)  # 1 GB
    told = subprocess.run(
        [sys.executable, "-c", "from tenfold.cli.demo_method import peak_bytes; print(peak_bytes())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 50e6 < int(told.stdout) < 1e9 < peak_bytes() and large.numel()


def outcome(name):
    """What its process would pickle, and the progress it would tell."""
    told = []
    return perform(name, f"made_up_{name}", 3, told.append), told


def test_outcomes(methods):
    good, told = outcome("good")
    assert told == [{"steps": 3}, {"step": "one"}, {"step": "two"}]
    assert good.to_json() == {
        "seed": 3, "threads": os.environ["OMP_NUM_THREADS"],
        "headline": {"ran": "seed 3", "result": "it works",
                     "speedup": {"op": "an_op", "against": "plain PyTorch", "ratio": 3.456}},
        "seconds": round(good.seconds, 1), "peak_bytes": good.peak_bytes,
    }  # fmt: skip
    assert good.peak_bytes > 50e6 and pickle.loads(pickle.dumps(good)).headline == good.headline
    bad, unready, broken = (outcome(name)[0] for name in ("bad", "unready", "broken"))
    assert bad.to_json()["error"] == "ValueError: a bad\nday" and "in run_demo" in bad.details
    assert unready.error == "no model: fetch it" and unready.details == ""
    assert broken.error == "ModuleNotFoundError: No module named 'no_such_module'"


@pytest.mark.parametrize("names, status", [(["good"], 0), (["good", "bad"], 1)])
def test_json(methods, monkeypatch, names, status, tmp_path):
    made = [outcome(name)[0] for name in names]
    monkeypatch.setattr(demo.Runner, "run", lambda self: made)
    done = run(*names, "--json", "--seed", 3, "--out", tmp_path)
    found = json.loads(done.stdout)
    assert (
        done.exit_code == status
        and found["report"] == str(tmp_path / "index.html")
        and found["seed"] == 3
    )
    assert {name: found[name] for name in names} == {m.name: m.to_json() for m in made}
    assert ("All methods" in (tmp_path / "index.html").read_text()) == (len(names) > 1)


def test_an_interrupt_ends_the_processes(methods, tmp_path, monkeypatch):
    """Ctrl-C while a method runs: no process is left, and the page of an earlier run stays."""
    monkeypatch.chdir(tmp_path)
    program = (
        "import signal\n"  # a job in the background of a shell starts without
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tenfold.cli import demo\n"
        "demo.METHODS = {'slow': 'made_up_slow'}\n"
        "from tenfold.cli.main import app\n"
        "app(['demo', 'slow'])\n"
    )
    (tmp_path / "tenfold-report").mkdir()
    (tmp_path / "tenfold-report/index.html").write_text("earlier")
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (tmp_path / "started").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    child = [int(p) for p in os.listdir("/proc") if p.isdigit() and parent(p) == process.pid]
    assert len(child) == 1
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=30)[1] and process.returncode == 130
    assert not os.path.exists(f"/proc/{child[0]}")
    assert (tmp_path / "tenfold-report/index.html").read_text() == "earlier"


def parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return int(stat.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["alchemy"], "unknown method alchemy; there are: good, bad"),
        (["good", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["good", "--seed", "-1"], r"--seed must be in [0, 2^31), got -1"),
    ],
)
def test_bad_arguments(methods, tmp_path, arguments, words):
    done = run(*arguments, "--out", tmp_path)
    assert done.exit_code == 2 and words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", demo.METHODS.values())
def test_every_method_keeps_the_protocol(module):
    module = importlib.import_module(module)
    assert module.STEPS > 0
    for function in ("run_demo", "headline", "tables", "add_demo_section"):
        assert callable(getattr(module, function))
