# SPDX-License-Identifier: Apache-2.0
"""Every example runs from its first line to its last, with settings that take seconds, and writes what it says."""

import json
from pathlib import Path

import pytest

from tenfold.testing import processes

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py"))

# Arguments; {out} is a new folder. What must be in it afterwards.
RUNS = {
    "dha.py": ("--search 1 --steps 1 --recovery 1 --keep-layers 2 --force --json {out}/dha.json", "dha.json"),
    "dha_study.py": (
        "--seeds 1 --parent-steps 2 --search-steps 2 --fusion-steps 2 --recovery-steps 2 --held 8 --only DHA "
        "--out {out} --cache {out}/work",
        "study.json",
    ),
    "ernie_code.py": (
        "--steps 2 --batch 4 --languages de fr es it pt nl --vocab-size 600 --ranked 16 --generated 2 --width 64 "
        "--layers 1 --out {out} --work {out}/work",
        "study.json",
    ),
    "ernie_music.py": (
        "--steps 2 --batch 2 --clips 24 --length 1024 --composers mozart schumann_clara --languages en de --prompts 4 "
        "--guidance 1 --inference-steps 2 --sounds 1 --out {out} --work {out}/work",
        "study.json",
    ),
    "gptfluence.py": (
        "--runs 6 --parent-steps 2 --encoder bag --json {out}/gptfluence.json",
        "gptfluence.json",
    ),
    "gptfluence_study.py": (
        "--seeds 0 --layers 1 --heads 1 --parent-steps 2 --per-task 8 --tests-per-task 2 --runs 8 --test-runs 2 "
        "--methods default ridge mean --fit-epochs 5 --encoders bag --gradient-runs 1 --examples 8 "
        "--epochs 1 --sets 2 --out {out} --work {out}/work",
        "study.json",
    ),
    "hft.py": ("--steps 1 --tasks german --methods hft --keep-layers 2 --json {out}/hft.json", "hft.json"),
    "hft_study.py": (
        "--seeds 0 --parent-steps 2 --steps 1 --test 8 --only half --out {out} --cache {out}/work",
        "study.json",
    ),
    "ma_rlhf.py": (
        "--steps 1 --methods ma-ppo --keep-layers 2 --json {out}/ma_rlhf.json",
        "ma_rlhf.json",
    ),
    "ma_rlhf_study.py": (
        "--seeds 0 --rewards spelling --methods ma-ppo-5 --steps 1 --parent-steps 2 --reward-steps 2 --out {out} "
        "--cache {out}/work",
        "study.json",
    ),
    "nacl_ablation.py": ("--length 256 --depths 1 --keep-layers 2 --only default --out {out}", "cells.jsonl"),
    "pixelgpt.py": (
        "--steps 2 --tune-steps 2 --pixel-tune-steps 2 --seeds 0 --variants pixelgpt textgpt "
        "--tasks language --layers 1 --width 64 --length 16 --tune-length 16 --batch 2 --per-language 4 --train 4 "
        "--test 2 --out {out} --work {out}/work",
        "study.json",
    ),
    "themis.py": (
        "--kinds calculator --unseen none --train 8 --test 4 --variants themis --layers 1 --heads 2 --vocabulary 400 "
        "--no-rl --out {out} --work {out}/work",
        "bpe.json",
    ),
    "upit.py": (
        "--experts 4 --heads 2 --methods dense upit --parent-steps 2 --train 16 --test 4 --length 48 --batch 4 "
        "--post-epochs 1 --out {out} --work {out}/work",
        "bytes.json",
    ),
}  # fmt: skip


def test_every_example_is_run():
    assert (
        sorted([*RUNS, "nacl.py"]) == EXAMPLES
    )  # that one's answers are looked at in test_docs.py


@pytest.mark.parametrize("name", RUNS)
def test_example(name, tmp_path):
    arguments, result = RUNS[name]
    done = processes.python(
        ROOT / "examples" / name, *arguments.format(out=tmp_path).split(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / result).read_text()
    assert json.loads(text.splitlines()[0] if result.endswith("l") else text)
