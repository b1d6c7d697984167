# SPDX-License-Identifier: Apache-2.0
"""``tenfold themis``: data, training, scores, evaluation of three forms, the server, reports; and what they refuse."""

import functools
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import themis_models as models
from cli_calls import fails, succeeds, tenfold_
from test_ma_rlhf_cli import save_tokenizer

from tenfold.ma_rlhf.inputs import named_reward
from tenfold.report import Page
from tenfold.themis import demo, inputs, serve, small
from tenfold.themis.client import RemoteScorer
from tenfold.themis.config import ThemisConfig
from tenfold.themis.data import read_tara, write_tara
from tenfold.themis.loop import ToolLoop
from tenfold.themis.rewards import ThemisReward
from tenfold.themis.synthetic import synthetic_pairs
from tenfold.themis.tools import Toolbox
from tenfold.themis.traces import Query, TraceFormat
from tenfold.themis.training import ThemisRecord

FEW = ["--steps", "2", "--batch-size", "4", "--quiet"]
# A random model writes nonsense; it need not write much of it.
SHORT = ["--max-new-tokens", "4", "--max-iterations", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base model and pairs of two kinds."""
    folder = tmp_path_factory.mktemp("themis")
    models.llama().save_pretrained(folder / "base")
    models.TOKENIZER.save_pretrained(folder / "base")
    pairs = synthetic_pairs("calendar", 10) + synthetic_pairs("calculator", 6)
    write_tara(pairs, folder / "train.jsonl")
    write_tara(pairs[:3] + pairs[-2:], folder / "test.jsonl")
    return folder


def train(place, name, *more):
    return succeeds("themis", "train", "--model", place / "base", "--data", place / "train.jsonl", "--out",
                    place / name, "--max-length", "900", *FEW, *more)  # fmt: skip


@pytest.fixture(scope="module")
def run(place):
    """(folder, result) of a trained model."""
    found = train(
        place, "run", "--validation", place / "test.jsonl", "--set", "center=0.01", "--json"
    )
    return place / "run", json.loads(found)


@pytest.fixture(scope="module")
def plain(place, run):
    train(place, "plain", "--plain", "--held-out", "0")
    return place / "plain"


class TestBuildData:
    def test_synthetic(self, tmp_path):
        found = json.loads(succeeds("themis", "build-data", "--kinds", "calendar, calculator", "--count", "5", "--test",
                                    "2", "--out", tmp_path, "--json"))  # fmt: skip
        assert found["counts"] == {
            "train": {"calendar": 5, "calculator": 5},
            "test": {"calendar": 2, "calculator": 2},
        }
        train, test = (read_tara(tmp_path / f"{n}.jsonl") for n in ("train", "test"))
        assert len(train) == 10 and not {p.question for p in train} & {p.question for p in test}
        said = succeeds("themis", "build-data", "--kinds", "calendar", "--count", "3", "--test", "0", "--out", tmp_path,
                        "--quiet")  # fmt: skip
        assert "calendar" in said and f"data: {tmp_path}" in said

    def test_files(self, place, tmp_path):
        lines = (place / "train.jsonl").read_text().splitlines()
        (tmp_path / "in.jsonl").write_text("\n".join([*lines, '{"id": "bad"}']))
        command = [
            "themis",
            "build-data",
            "--from",
            tmp_path / "in.jsonl",
            "--held-out",
            "0.25",
            "--out",
            tmp_path,
        ]
        assert "line 17, example 'bad'" in fails(*command)
        found = json.loads(succeeds(*command, "--skip", "--json"))
        assert found["skipped"] == {"malformed": 1}
        assert (
            sum(found["counts"]["train"].values()) == 12
            and sum(found["counts"]["test"].values()) == 4
        )
        assert "left out: 1 (malformed)" in succeeds(*command, "--skip")


class TestTrain:
    def test_run(self, run):
        folder, found = run
        record = ThemisRecord.read(folder / "themis.json")
        assert found["steps"] == 2 == len(record.curve) and found["config"]["center"] == 0.01
        assert found["config"]["inputs"] == "trace" and found["pairs"] == 16
        assert found["before"] != found["after"] and Path(found["report"]).is_file()
        assert {"training.png", "index.html"} <= {p.name for p in (folder / "report").iterdir()}
        assert inputs.recorded(str(folder)) == {"inputs": "trace", "max_length": 900}

    def test_plain(self, plain):
        assert inputs.recorded(str(plain))["inputs"] == "plain"
        with inputs.load_judge(str(plain)) as loaded:
            (found,) = loaded.judge.judge([Query("q", "a")])
        assert found.text == "Question: q\nAnswer: a</s>" and found.finish == "no_rationale"

    def test_goes_on_from_a_reward_model(self, place, run):
        """With the head of before; as a table."""
        said = succeeds("themis", "train", "--model", run[0], "--data", place / "train.jsonl", "--out", place / "more",
                        "--max-length", "900", "--validation", place / "test.jsonl", *FEW, "--beta", "0",
                        "--lm-reduce", "component_sum")  # fmt: skip
        assert "accuracy" in said and f"reward model: {place / 'more'}" in said
        record = ThemisRecord.read(place / "more" / "themis.json")
        assert record.before["margin"] == pytest.approx(run[1]["after"]["margin"], abs=1e-4)
        assert record.config["beta"] == 0 and record.config["lm_reduce"] == "component_sum"

    def test_defaults_fit_together(self, tmp_path, monkeypatch):
        """What build-data writes is what train takes, with no option but the sizes."""
        monkeypatch.setattr(
            small, "small_model", functools.partial(small.small_model, layers=1, heads=2)
        )
        succeeds("themis", "build-data", "--kinds", "calculator,multi", "--count", "2", "--test", "1", "--out",
                 tmp_path, "--quiet")  # fmt: skip
        found = json.loads(succeeds("themis", "train", "--data", tmp_path / "train.jsonl", "--out", tmp_path / "run",
                                    "--validation", tmp_path / "test.jsonl", "--steps", "1", "--batch-size", "1",
                                    "--on-bad", "skip", "--json"))  # fmt: skip
        assert found["config"]["max_length"] == 1024 and found["config"]["on_bad"] == "skip"


class TestScore:
    def test_one_question(self, run):
        command = [
            "themis",
            "score",
            run[0],
            "-q",
            "Which day?",
            "-a",
            "Monday",
            "-a",
            "<start_work>",
            *SHORT,
        ]
        found = json.loads(succeeds(*command, "--json"))
        assert len(found) == 2 and all(isinstance(f["reward"], float) for f in found)
        assert "Answer: <start_work>\n" in found[1]["text"]
        said = succeeds(*command)
        assert said.count("reward ") == 2 and "### ASSISTANT:" in said
        better = max(found, key=lambda f: f["reward"])["text"].split("Answer: ")[1].split("\n")[0]
        assert said.endswith(f"preferred: {better}\n")
        assert "### ASSISTANT:" not in succeeds(*command, "--no-trace")

    def test_a_file(self, run, tmp_path):
        rows = [
            {"question": "q", "answer": "a", "context": "c", "test_list": ["assert 1"]},
            {"question": "q", "answer": ""},
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = json.loads(succeeds("themis", "score", run[0], "--data", tmp_path / "rows.jsonl", *SHORT, "--json",
                                    "--no-trace", "--tools", "none"))  # fmt: skip
        assert len(found) == 2 and "text" not in found[0]

    def test_cache(self, run, tmp_path):
        succeeds("themis", "score", run[0], "-q", "q", "-a", "a", *SHORT, "--cache", tmp_path / "c.jsonl",
                 "--cache-mode", "record")  # fmt: skip


class TestEval:
    def test_pairs(self, place, run, plain):
        command = ["themis", "eval", f"Themis={run[0]}", f"plain={plain}", "--data", place / "test.jsonl", "--out",
                   place / "eval", "--swap", *SHORT]  # fmt: skip
        found = json.loads(succeeds(*command, "--json"))["models"]
        assert (
            list(found) == ["Themis", "plain"] and found["Themis"]["accuracy"]["all"]["count"] == 5
        )
        assert found["plain"]["finish"] == {"no_rationale": 10} and found["plain"]["swapped"] == 1.0
        assert {"index.html", "evaluation.json", "accuracy.png"} <= {
            p.name for p in (place / "eval").iterdir()
        }
        page = json.loads(
            succeeds("themis", "report", run[0], place / "eval", "--out", place / "page", "--json")
        )
        text = Path(page["report"]).read_text()
        assert "Training" in text and "Tool-augmented" in text and "Calibration" in text

    def test_table(self, place, plain):
        said = succeeds("themis", "eval", plain, "--data", place / "test.jsonl", "--out", place / "eval-plain",
                        "--limit", "3", "--swap", "--quiet")  # fmt: skip
        assert (
            "calculator" in said
            and "all (micro average)" in said
            and "100.0 % the same in reverse order" in said
        )

    def test_rewardbench(self, plain, tmp_path):
        rows = [{"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "subset": "mt-bench-easy"},
                {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "other"}]  # fmt: skip
        (tmp_path / "rb.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = [
            "themis",
            "eval",
            plain,
            "--data",
            tmp_path / "rb.jsonl",
            "--form",
            "rewardbench",
        ]
        found = json.loads(succeeds(*command, "--json"))[str(plain)]
        assert set(found["sections"]) == {"Chat", "other"}
        assert "all sections" in succeeds(*command, "--ties", "share", "--quiet")

    def test_choices(self, plain, tmp_path):
        row = {"question": "q", "choices": ["a", "b", "c"], "label": 1}
        (tmp_path / "c.jsonl").write_text(json.dumps(row))
        command = ["themis", "eval", plain, "--data", tmp_path / "c.jsonl", "--form", "choices"]
        assert json.loads(succeeds(*command, "--json"))[str(plain)]["count"] == 1
        assert "Questions answered right" in succeeds(*command)


class TestServe:
    def test_serves(self, plain, tmp_path, monkeypatch):
        """In this process, until SIGTERM; answers are kept in a file."""
        seen = []

        def client(url):
            with RemoteScorer(url, "a-token-of-twenty-ch") as remote:
                seen.extend(remote.score_many([Query("q", "a"), Query("q", "<start_tool>")]))
            os.kill(os.getpid(), signal.SIGTERM)

        own = serve.serve

        def run(scorer, host, port, token, limits, missing, ready):
            def both(server):
                ready(server)
                threading.Thread(target=client, args=(server.url,)).start()

            own(scorer, host, port, token, limits, missing, both)

        monkeypatch.setattr(serve, "serve", run)
        monkeypatch.setenv("TENFOLD_THEMIS_TOKEN", "a-token-of-twenty-ch")
        status, out, err = tenfold_(
            "themis", "serve", plain, "--port", "0", "--log", tmp_path / "log.jsonl"
        )
        assert status == 0 and out == "" and err.startswith("listening on http://127.0.0.1:"), err
        assert len(seen) == 2 and all(abs(f.score) <= 5 for f in seen)
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert sorted(x["answer"] for x in lines) == ["<start_tool>", "a"]
        assert sorted(x["reward"] for x in lines) == sorted(f.reward for f in seen)


class TestDemo:
    @pytest.fixture(scope="class")
    def found(self):
        """Of ten steps."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "TRAIN", 8)
            patch.setattr(demo, "TEST", 2)
            patch.setattr(demo, "SETTINGS", demo.SETTINGS | {"steps": 10, "batch_size": 2})
            said = []
            made = demo.run_demo(said.append, seed=2)
            assert len(said) == 2 * 10 // demo.TELL + len(demo.NAMES) + 2
        return made

    def test_page_and_tables(self, found):
        judges, traces, scores, kernel = demo.tables(found)
        assert [r[0] for r in judges.rows] == list(demo.NAMES)
        assert traces.prose and len(traces.rows) == 2 and scores.rows[0][0] == "4"
        assert kernel.rows[0][2] == f"{found.kernel.ratio:.2f}"
        assert all(len(r) == len(t.columns) for t in demo.tables(found) for r in t.rows)
        page = Page("t")
        demo.add_demo_section(found, page)
        text = page.render()
        assert "Themis: a reward model that asks a tool" in text and "Calibration" in text
        assert text.count("<h2") == 1 and "Traces of" not in text and kernel.rows[0][3] in text

    def test_headline_is_what_was_found(self, found, monkeypatch):
        shares = zip(demo.NAMES, (0.5, 0.98, 0.25, 0.03))
        monkeypatch.setattr(
            found, "found", {n: {"accuracy": {"all": {"value": v}}} for n, v in shares}
        )
        line = demo.headline(found)
        assert line.result == "98 % ranked right with the tool; 50 % without, 3 % if it lies"
        assert "8 pairs" in line.ran and line.speed is found.kernel

    def test_speed_up_is_of_equal_results(self, found, monkeypatch):
        assert found.kernel.ratio > 0 and 0 < found.apart < 1e-4
        model, tokenizer = small.small_model(layers=1, heads=1)
        loop = ToolLoop(model, TraceFormat(tokenizer, max_length=256, escape=True), Toolbox([]))
        config = ThemisConfig.from_preset("small", batch_size=2, max_length=256)
        assert demo.weighted_loss(loop, demo.problems(2, 0), config)[1] < 1e-4
        cross_entropy = demo.F.cross_entropy
        monkeypatch.setattr(
            demo.F, "cross_entropy", lambda *args, **options: 2 * cross_entropy(*args, **options)
        )
        assert demo.weighted_loss(loop, demo.problems(2, 0), config)[1] > 0.4

    def test_seeds(self):
        first = {p.question for p in demo.problems(50, 0)}
        assert first == {p.question for p in demo.problems(50, 0)}
        assert first != {p.question for p in demo.problems(50, 2)}

    @pytest.mark.slow
    def test_what_it_claims(self):
        """Right with the tool, at chance without or if it fails, wrong if it lies; everything answered."""
        found = demo.run_demo().to_json()
        values = {n: e["accuracy"]["all"]["value"] for n, e in found["evaluations"].items()}
        plain, right, fails, lies = values.values()
        assert right >= 0.95 and plain <= 0.65 and fails <= 0.65 and lies <= 0.05
        assert found["speed"]["answered"] == found["speed"]["requests"]


@pytest.mark.parametrize(
    "command, message",
    [
        (["build-data", "--kinds", "calendar,poetry", "--out", "x"], "--kinds must be one of calculator"),
        (["build-data", "--from", "none.jsonl", "--out", "x"], "No such file"),
        (["train", "--data", "train.jsonl", "--out", "x", "--preset", "huge"], "preset must be one of"),
        (["train", "--data", "train.jsonl", "--out", "x", "--held-out", "1"], "--held-out must be in [0, 0.9], got 1"),
        (["train", "--data", "train.jsonl", "--out", "x", "--beta", "-1"], "beta must be a number >= 0"),
        (["train", "--data", "train.jsonl", "--out", "x", "--set", "gamma=1"], "--set takes FIELD=VALUE"),
        (["train", "--data", "train.jsonl", "--out", "x", "--model", "./none"], "no model folder at"),
        (["train", "--data", "train.jsonl", "--out", "x", "--device", "tpu"], "--device takes"),
        (["score", "run"], "give --data, or --question and --answer"),
        (["score", "run", "-q", "q"], "give --data, or --question and --answer"),
        (["score", "./none", "-q", "q", "-a", "a"], "no model folder at './none'; `tenfold themis train` makes one"),
        (["score", "run", "-q", "q", "-a", "a", "--tools", "all"], "tools must be one of default, synthetic, none"),
        (["score", "run", "-q", "q", "-a", "a", "--tools", "none", "--tool-data", "."], "tool data are for the"),
        (["score", "run", "-q", "q", "-a", "a", "--tool-data", "none"], "data must be a folder"),
        (["eval", "run", "--data", "test.jsonl", "--form", "xml"], "--form must be one of tara, rewardbench, choices"),
        (["eval", "run", "run", "--data", "test.jsonl"], "two models are called 'run'"),
        (["eval", "run", "--data", "test.jsonl", "--form", "rewardbench"], "row 1 needs prompt, chosen, rejected"),
        (["serve", "run", "--host", "0.0.0.0"], "can be reached from other machines: give a token"),
        (["serve", "run", "--token-file", "short"], "token must have at least 16"),
        (["serve", "run", "--clip", "0"], "clip must be a positive number"),
        (["report", "."], "has no themis.json"),
        (["report", "train.jsonl"], "is no result of"),
    ],
)  # fmt: skip
def test_refused(place, run, monkeypatch, command, message):
    monkeypatch.chdir(place)
    (place / "short").write_text("secret\n")
    assert message in fails("themis", *command)
    assert not (place / "x" / "config.json").exists()


def test_no_reward_model(place):
    """A causal LM, and a reward model whose tokenizer lacks the special tokens."""
    said = fails("themis", "score", place / "base", "-q", "q", "-a", "a")
    assert "has no value head; `tenfold themis train` makes" in said
    models.reward_model().save_pretrained(place / "other")
    save_tokenizer(place / "other")
    said = fails("themis", "score", place / "other", "-q", "q", "-a", "a")
    assert "is no model of `tenfold themis train`" in said and "<start_tool>" in said


def test_as_a_reward_by_name(run, plain):
    """`tenfold ma-rlhf train --reward`: the folder of a reward model that calls tools, or a server."""
    for folder in (plain, run[0]):
        reward = named_reward(str(folder), None, ["prompt"])
        assert isinstance(reward, ThemisReward)
        if folder is plain:
            with inputs.load_judge(str(folder)) as loaded:
                (want,) = loaded.judge.judge([Query("q", "a")])
            assert reward(["q"], ["a"]) == [pytest.approx(want.reward, abs=1e-5)]
    remote = named_reward("http://127.0.0.1:9", None, [])
    assert isinstance(remote, ThemisReward) and isinstance(remote.scorer, RemoteScorer)
