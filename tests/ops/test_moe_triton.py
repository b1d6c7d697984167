# SPDX-License-Identifier: Apache-2.0
"""The Triton provider of grouped_gemm (bench/moe_triton.py), by Triton's interpreter on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_expert_cases import TRITON_GROUPS, groups, triton_layouts

from tenfold import reference
from tenfold.testing import DTYPES, assert_close_to_ref

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, HERE / "triton_calls.py", path], cwd=HERE, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("case", range(len(TRITON_GROUPS)))
def test_matches_the_definition(results, case, gathered, dtype):
    """Rows past the last group are 0."""
    a, w, offsets, gather = groups(*TRITON_GROUPS[case], dtype, gathered)
    exact = reference.grouped_gemm(a.double(), w.double(), offsets, True, gather)
    for trans_w in triton_layouts(dtype, gathered):
        got = results[case, dtype, gathered, trans_w]
        assert got.dtype == dtype
        # Sums are float32 and rounded once.
        low = reference.grouped_gemm(a, w, offsets, True, gather)
        assert_close_to_ref(got, exact, low)
        assert not got[int(offsets[-1]) :].any()
