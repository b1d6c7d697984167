# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks share batches and tests, and record one run."""

from pathlib import Path

import gptfluence_models as tiny
import gptfluence_ranks as cases
import pytest
import torch
from ranks import MODES

from tenfold.gptfluence import LossMetric, read_run, record_runs
from tenfold.gptfluence.curricula import make_curricula
from tenfold.testing import processes

HERE = Path(__file__).resolve().parent


def ranks(folder, what, mode="ddp", step=None):
    arguments = (what,) if step is None else (what, step)
    done = processes.ranks(HERE / "gptfluence_ranks.py", folder, *arguments, env=MODES[mode])
    if step is not None:
        assert done.returncode and "killed" in done.stdout, done.stderr[-4000:]
        return
    assert done.returncode == 0 and (folder / "done").exists(), done.stderr[-4000:]


@pytest.mark.parametrize("mode", MODES)
def test_our_loop_is_killed_and_records_what_one_process_records(tmp_path, mode):
    (tmp_path / "two").mkdir()
    ranks(tmp_path / "two", "loop", mode, step=2)
    assert any((tmp_path / "two" / "000" / "work").glob("run-*"))
    ranks(tmp_path / "two", "loop", mode)
    record_runs(tiny.tiny(3), tiny.rows(12), cases.TESTS, tmp_path / "one", cases.CONFIG)
    one, two = (read_run(tmp_path / n / "000") for n in ("one", "two"))
    assert torch.equal(one.order, two.order) and one.train_ids == two.train_ids
    assert [one.train_ids[i] for i in one.order[1].tolist()] == make_curricula(cases.CONFIG, 12)[
        0
    ].order[0].tolist()
    torch.testing.assert_close(one.values["loss"], two.values["loss"], rtol=1e-3, atol=1e-4)


def test_trainer_under_ddp(tmp_path):
    ranks(tmp_path, "trainer")
    run = read_run(tmp_path / "run")
    batches = [[run.train_ids[i] for i in batch] for batch in run.order[1:].tolist()]
    # Each step has the rows of both ranks, an epoch all of them once.
    assert [len(b) for b in batches] == [4] * 4 and len({i for b in batches[:3] for i in b}) == 12
    first = LossMetric(cases.TESTS)(tiny.tiny(3).eval(), range(5))["loss"]
    torch.testing.assert_close(run.values["loss"][0], first)
    assert run.values["loss"].isfinite().all() and len(run.steps) == 5
