"""The CUDA kernels of the head operations, emulated on the CPU under ASan and UBSan."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from build import build


@pytest.mark.parametrize("op", ["mix_heads", "fuse_backward", "fusion_mse", "head_cka"])
def test_emulated(op):
    build("kernels_attention_heads", "-shared", "-fPIC")
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    env = os.environ | {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0",
                        "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = Path(__file__).with_name("emulated_attention_heads.py")
    done = subprocess.run([sys.executable, str(script), op], env=env, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-4000:]
