# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks: shards of a module with a scalar, tied and frozen weights, and back."""

from pathlib import Path

from ranks import MODES

from tenfold.testing import processes


def test_shards_are_the_module(tmp_path):
    script = Path(__file__).resolve().parent / "sharding_ranks.py"
    done = processes.ranks(script, tmp_path, env=MODES["fsdp2"])
    assert done.returncode == 0, done.stderr[-4000:]
