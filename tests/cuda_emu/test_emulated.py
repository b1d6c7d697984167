"""Every CUDA kernel's portable path, emulated on the CPU under ASan and UBSan, against the reference."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from build import build

CHECKS = {  # library -> checks of its script
    "kernels_attention_prefill": [
        *map("_".join, itertools.product(("forward", "backward"), ("float32", "bfloat16", "float16"))),
        "packed", "edges", "lowest_bias", "hidden_wild",
    ],
    "kernels_attention_decode": ["float32", "bfloat16", "float16", "edges", "append"],
    "kernels_attention_heads": ["mix_heads", "fuse_backward", "fusion_mse", "head_cka"],
    "kernels_rl": ["segments", "returns", "prepare", "losses", "long", "wrong"],
    "kernels_optim_masks": ["bits", "topk", "grad_norm", "masked_copy", "wgrad"],
    "kernels_optim_adamw": ["float32", "bfloat16", "float16", "many", "8bit"],
    "kernels_loss": [
        "logprob", "logprob_alignment", "linear_limits", "linear_values", "linear_rows",
        "linear_programs", "linear_edges",
    ],
    "kernels_moe_experts": ["values", "edges"],
    "kernels_moe_routing": ["all"],
    "kernels_merge": ["all"],
    "kernels": ["template", "proxy_scores", "nacl_select", "kv_moves", "ragged_decode"],
}  # fmt: skip


def run(library: str, check: str) -> subprocess.CompletedProcess:
    """One check of ``emulated*.py`` in a process of its own, with ASan loaded first."""
    build(library, "-shared", "-fPIC")
    # libstdc++ too: else ASan does not know how torch throws.
    preload = [subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True)
               for name in ("libasan", "libstdc++")]  # fmt: skip
    env = os.environ | {"LD_PRELOAD": " ".join(p.stdout.strip() for p in preload),
                        "ASAN_OPTIONS": "detect_leaks=0",
                        "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = Path(__file__).parent / f"{library.replace('kernels', 'emulated')}.py"
    return subprocess.run([sys.executable, str(script), check], env=env, capture_output=True,
                          text=True, timeout=900)  # fmt: skip


@pytest.mark.parametrize(
    ("library", "check"), [(name, check) for name in CHECKS for check in CHECKS[name]]
)
def test_emulated(library, check):
    done = run(library, check)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-4000:]
