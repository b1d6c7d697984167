# SPDX-License-Identifier: Apache-2.0
"""The benchmark kit: tables and pages made from results, and the runner."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest

import tenfold
from bench import report, results, runner, sources
from bench.__main__ import main as bench_main
from bench.case import (
    provider,
)
from bench.harness import Measured
from bench_cases import CEILINGS, ROOT, case, double, the_record


@pytest.fixture
def record():
    return the_record()


@pytest.fixture
def checkout(tmp_path, record):
    """A copy of what the generated tables are made from and stand in, with results of its own."""
    root = tmp_path / "checkout"
    for name in ("csrc", "docs", "bench"):
        ignore = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "README.md", root)
    results.save(record, root / "bench/results")
    study = {
        "setting": "a small model",
        "rows": [{"task": "needle", "length": 512, "budget": 0.2, "method": "nacl", "cases": 3,
                  "accuracy": 2 / 3, "log_prob": -0.5, "perplexity": None, "evict_ms": 3.2,
                  "cache_mb": 4.75}],
    }  # fmt: skip
    (root / "bench/results/nacl").mkdir()
    (root / "bench/results/nacl/summary.json").write_text(json.dumps(study))
    return root


class TestReport:
    @pytest.fixture
    def run(self, checkout, monkeypatch, capsys):
        monkeypatch.setattr(sources, "repository_root", lambda: checkout)

        def run(*arguments):
            status = report.main([*map(str, arguments)])
            return status, capsys.readouterr().out

        return run

    def test_readme(self, run, checkout, record):
        readme, study = checkout / "README.md", checkout / "docs/methods/nacl.md"
        before = readme.read_text()
        status, said = run("--readme", "--check")
        assert (
            status == 1 and "README.md: not up to date; run python -m bench.report --readme" in said
        )
        assert readme.read_text() == before  # a check changes nothing
        status, said = run("--readme")
        assert status == 0 and "README.md: renewed" in said and "nacl.md: renewed" in said
        assert run("--readme", "--check") == (0, "")
        text = readme.read_text()
        row = "| " + " | ".join(report.summary_rows(record)[0]) + " |"
        assert row in text and record["commit"][:10] in text
        row = "| " + " | ".join(report.row_of(record["cases"][0])) + " |"
        assert row in (checkout / "docs/benchmarks.md").read_text()
        assert (
            "| needle | 512 | 20 % | nacl | 3 | 0.67 | -0.500 | – | 3 | 4.8 |" in study.read_text()
        )
        # Only what stands between the marks was changed.
        cut = re.compile(r"<!-- summary:begin -->.*?<!-- summary:end -->", re.DOTALL)
        assert cut.sub("", text) == cut.sub("", before)

    @pytest.mark.parametrize("name", ["README.md", "docs/methods/nacl.md"])
    def test_an_edit_by_hand_fails_the_check(self, run, checkout, name):
        run("--readme")
        path = checkout / name
        good = path.read_text()
        blocks = re.findall(r":begin -->.*?:end -->", good, re.DOTALL)
        table = next(b for b in blocks if re.search(r"\d(?= \|)", b))
        spoiled = re.sub(r"\d(?= \|)", "9999", table, count=1)
        path.write_text(good.replace(table, spoiled))
        status, said = run("--readme", "--check")
        assert status == 1 and said.startswith(f"{name}: not up to date")
        run("--readme")
        assert path.read_text() == good

    def test_new_results_make_the_tables_stale(self, run, checkout, record):
        run("--readme")
        faster = copy.deepcopy(record)
        faster["cases"][0]["providers"]["tenfold"]["p50_s"] /= 10
        results.save(faster, checkout / "bench/results")
        assert run("--readme", "--check")[0] == 1

    def test_as_a_command(self, checkout):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [sys.executable, "-m", "bench.report", "--readme"]
        for extra, status in (([], 0), (["--check"], 0)):
            done = subprocess.run(
                [*command, *extra], cwd=checkout, env=env, capture_output=True, text=True
            )
            assert done.returncode == status, done.stderr
        assert (checkout / "README.md").read_text() != (ROOT / "README.md").read_text()

    def test_page(self, run, tmp_path):
        path = tmp_path / "page" / "results.html"
        status, said = run("--out", path)
        assert status == 0 and said.strip() == str(path)
        text = path.read_text()
        assert text.count("data:image/png;base64,iVBORw0KGgo") == 2
        for word in ("double/float32/n1000", "eager", "copy_", "ceilings measured in the same run"):
            assert word in text
        assert "Not for publication: quick run" not in text

    def test_page_says_what_is_wrong_with_a_run(self, record, tmp_path):
        path = report.write_page([record | {"quick": True, "void": "busy"}], tmp_path / "x.html")
        assert "Not for publication: quick run" in path.read_text()
        assert "Not for publication: void: busy" in path.read_text()

    def test_markdown(self):
        assert report.markdown(("a", "b", "c", "d"), [("1", "2", "3", "4")]) == (
            "| a | b | c | d |\n| --- | --- | --- | ---: |\n| 1 | 2 | 3 | 4 |"
        )

    def test_row(self, record):
        made = copy.deepcopy(record["cases"][0])
        made["shape"] = {"hq": 9, "hkv": 3, "d": 64, "l": 4096}
        made["ratios"] = {"eager": 2.0, "bound": 0.5, "best_other": 1.2}
        made["providers"]["tenfold"].update(p50_s=1.5e-3, gb_s=12.34, share=0.876)
        shape = "Hq 9, Hkv 3, D 64, L 4096"
        assert report.row_of(made) == [
            "double", shape, "float32", "1.5 ms", "12.3 GB/s", "88 %", "2.00×", "–", "0.50×"]  # fmt: skip
        made.update(bound="compute", variant="llama-ragged")
        made["providers"]["tenfold"].update(p50_s=42e-6, gflop_s=321.4)
        assert report.row_of(made)[1:5] == [f"{shape} (ragged)", "float32", "42 µs", "321 GFLOP/s"]
        made["providers"]["tenfold"].update(p50_s=None, status="disagrees")
        assert report.row_of(made)[3:] == ["disagrees", *["–"] * 5]

    def test_memory(self, record, checkout):
        made = copy.deepcopy(record["cases"][0])
        kinds = [("tenfold", 1.5, 1_260_000), ("eager", 2.0, 4_000_000), ("peer", 1.0, 9_000_000),
                 ("bound", 0.1, 0)]  # fmt: skip
        made["providers"] = {
            kind: asdict(Measured(kind, "ok", p50_s=t, gb_s=1.0, share=0.5, peak_bytes=peak))
            for kind, t, peak in kinds
        }
        assert report.memory_row(made)[3:] == ["1.3", "4.0", "9.0"]
        for p in made["providers"].values():
            del p["peak_bytes"]  # as in results from before peaks were measured
        assert report.memory_row(made)[3:] == ["–", "–", "–"]
        assert report.memory_block("loss")(checkout) == "No measurement has been committed."
        found = report.memory_block(record["family"])(checkout)
        assert "| double |" in found and report.MEMORY_COLUMNS[3] in found

    def test_study_of_macro_actions(self, checkout):
        """A method is compared with PPO of the same seeds, of which one may lack."""
        make = report.BLOCKS["ma-rlhf-study"]
        assert make(checkout) == "No study has been committed."
        setting = {
            "parent_steps": 400, "reward_model": {"after": {"accuracy": 0.876}},
            "ppo": {"steps": 40, "batch_size": 32, "minibatches": 2, "learning_rate": 2e-4,
                    "critic_learning_rate": 5e-4, "beta": 0.01, "lam": 0.95, "max_prompt": 32,
                    "max_response": 48},
        }  # fmt: skip
        ppo = {"reward": "model", "method": "ppo", "name": "PPO (n = 1)", "seeds": [0, 1], "final": [0.5, 0.7],
               "mean": [0.4, 0.6], "kl": [1.0, 2.0], "steps_to_ppo": [30, 38]}  # fmt: skip
        ours = ppo | {"method": "ma-ppo-5", "name": "MA-PPO, n = 5", "seeds": [0, 1, 2],
                      "final": [0.6, 0.65, 0.9], "mean": [0.5, 0.5, 0.8], "kl": [1.5, 2.5, 3.5],
                      "steps_to_ppo": [20, None, None]}  # fmt: skip
        path = checkout / "bench/results/ma_rlhf/study.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"setting": setting, "summary": [ppo, ours], "runs": []}))
        found = make(checkout)
        assert "40 steps of 32 responses of 48 bytes" in found and "88 % of held-out" in found
        assert found.splitlines()[-2:] == [
            "| model | PPO (n = 1) | 0.500, 0.700 | 0.600 | – | 30, 38 | 0.500 | 1.0, 2.0 |",
            "| model | MA-PPO, n = 5 | 0.600, 0.650, 0.900 | 0.717 | 1/2 | 20, –, – | 0.600 | 1.5, 2.5, 3.5 |",
        ]
        assert len(report.load_records(checkout)) == 1  # a study is no record of a benchmark

    def test_study_of_upcycling(self, checkout):
        """Means over the seeds that a method has; a run's other numbers of experts are other rows."""
        setting = {"model": "smollm2", "layers": 10, "heal": 200, "train": 128, "test": 32, "length": 128,
                   "batch": 16, "post_epochs": 2.0}  # fmt: skip
        losses = {
            "UpIT": {"code": 1.0, "german": 2.0, "mean": 1.5},
            "vanilla": {"code": 3, "german": 1, "mean": 2},
        }
        more = {"UpIT": {"code": 2.0, "german": 3.0, "mean": 2.5}}
        runs = [{"experts": n, "seed": seed, "setting": setting, "families": ["code", "german"], "losses": found}
                for n, seed, found in ((8, 0, losses), (4, 0, more), (8, 1, more))]  # fmt: skip
        path = checkout / "bench/results/upit/smollm2.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"about": {"threads": 2}, "runs": runs}))
        found = report.BLOCKS["upit-smollm2"](checkout)
        assert (
            "10 of its 30 layers, healed for 200 steps" in found
            and "seeds 0, 1, 2 threads" in found
        )
        assert found.splitlines()[-3:] == [
            "| 4 | UpIT | 2.000 | 3.000 | 2.500 | 2.500 |",
            "| 8 | UpIT | 1.500 | 2.500 | 2.000 | 1.500, 2.500 |",
            "| 8 | vanilla | 3.000 | 1.000 | 2.000 | 2.000 |",
        ]

    def test_smollm2_by_macro_actions(self, checkout):
        curve = [{"objective/scores": 0.1 * t, "objective/kl": float(t), "macro/length_mean": 4.75}
                 for t in range(10)]  # fmt: skip
        config = {
            "seed": 3,
            "batch_size": 8,
            "max_response": 24,
            "lora_rank": 16,
            "learning_rate": 3e-4,
        }
        run = {"name": "MA-PPO, n = 5", "config": config, "curve": curve,
               "seconds": [{"generate": 1.0, "update": 2.0}, {"generate": 3.0, "update": 4.0}]}  # fmt: skip
        path = checkout / "bench/results/ma_rlhf/smollm2.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"runs": [run], "reward": "judge", "threads": 2}))
        found = report.BLOCKS["ma-rlhf-smollm2"](checkout)
        row = "| MA-PPO, n = 5 | 3 | 10 | 0.200 | 0.700 | 7.00 | 4.8 | 5.0 |"
        assert found.splitlines()[-1] == row and "reward: judge; 2 threads" in found

    def test_needs_a_checkout(self, monkeypatch, capsys):
        monkeypatch.setattr(sources, "repository_root", lambda: None)
        assert report.main([]) == 2 and "checkout" in capsys.readouterr().err


# -- commands ----------------------------------------------------------------------------------------


class TestRunner:
    def test_every_family_has_cases_that_quick_runs_cover(self):
        for family in runner.FAMILIES:
            every = runner.cases_of(family)
            names = [c.name for c in every]
            assert len(set(names)) == len(names)  # results are matched by name
            assert {c.op for c in every if c.quick} == {c.op for c in every}
            for c in every:
                assert {"tenfold", "eager"} <= {p.kind for p in c.providers}, c.name
                assert c.bytes(c.shape, c.dtype.itemsize) > 0, c.name
                assert (c.flops(c.shape) > 0) == (c.peak is not None), c.name

    def test_every_op_is_measured(self):
        ops = {c.op for family in runner.FAMILIES for c in runner.cases_of(family)}
        assert ops == set(tenfold.ops.__all__) - {"template_scale"}

    def test_choice(self):
        some = runner.choose("kv_eviction", False, "GATHER")
        assert some and all("gather" in c.name for c in some)
        quick = runner.choose("kv_eviction", True, "")
        assert len(quick) < len(runner.choose("kv_eviction", False, ""))
        assert runner.families_with(runner.FAMILIES, True, "nacl_select") == ["kv_eviction"]
        assert runner.families_with(runner.FAMILIES, True, "decode") == ["attention", "kv_eviction"]

    def test_wrong_arguments(self, capsys, tmp_path):
        for arguments, words in (
            (
                ["nothing"],
                "unknown family 'nothing'; there are: attention, corruption, diffusion, influence, kv_eviction",
            ),
            (
                ["--select", "nothing-like-this"],
                "no case of attention, corruption, diffusion, influence, kv_eviction, loss, merge, moe, norm, optim, "
                "pixels, rl contains",
            ),
            (["--quick", "--select", "32768"], "no quick case"),
            (["--device", "abacus"], "--device takes cpu or cuda, got 'abacus'"),
        ):
            assert bench_main([*arguments, "--out", str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert words in said.splitlines()[-1] and "Traceback" not in said

    def test_a_kernel_that_is_wrong_fails_the_run(self, monkeypatch, tmp_path, capsys):
        """Status 1, the case is named, and the results are still written."""
        broken = case(provider("tenfold", lambda i: i.x[1:] * 2), provider("eager", double))
        monkeypatch.setattr(runner, "cases_of", lambda family: [broken])
        monkeypatch.setattr(runner, "settle", lambda device: None)  # it touches half of the memory
        monkeypatch.setattr(runner, "measure_ceilings", lambda device: CEILINGS)
        assert runner.run(["kv_eviction"], out=tmp_path) == 1
        said = capsys.readouterr().out
        assert "double/float32/n1000: disagrees" in said
        assert "not for publication: double/float32/n1000: tenfold disagrees" in said
        assert runner.run(["kv_eviction"], out=tmp_path, json=True) == 1
        (printed,) = json.loads(capsys.readouterr().out)
        assert printed["cases"][0]["providers"]["tenfold"]["status"] == "disagrees"
        (loaded,) = results.load_all(tmp_path)
        assert results.wrong(loaded) and (tmp_path / "index.html").is_file()

    def test_out_is_checked_before_measuring(self, monkeypatch, tmp_path):
        monkeypatch.setattr(runner, "measure_ceilings", lambda device: pytest.fail("measured"))
        monkeypatch.setattr(runner, "settle", lambda device: pytest.fail("settled"))
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError):
            runner.run(["kv_eviction"], quick=True, out=tmp_path / "file", quiet=True)

    def test_pytest_collects_the_same_cases(self):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "bench", "--collect-only", "-p", "no:cacheprovider"],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        listed = re.findall(r"test_case\[kv_eviction/(.+)\]", done.stdout)
        assert listed == [c.name for c in runner.choose("kv_eviction", True, "")]
