"""The CUDA kernels of the attention family (prefill), emulated on the CPU under ASan and UBSan, against
the reference.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from build import build

CHECKS = [
    *(
        f"{way}_{dtype}"
        for way in ("forward", "backward")
        for dtype in ("float32", "bfloat16", "float16")
    ),
    "packed",
    "edges",
    "lowest_bias",
    "hidden_wild",
]


@pytest.mark.parametrize("check", CHECKS)
def test_emulated(check):
    build("kernels_attention_prefill", "-shared", "-fPIC")
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    env = os.environ | {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0",
                        "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = Path(__file__).with_name("emulated_attention_prefill.py")
    done = subprocess.run([sys.executable, str(script), check], env=env, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-4000:]
