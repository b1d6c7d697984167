# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel's portable path, emulated on the CPU under ASan and UBSan, against the reference."""

import functools
import os
import subprocess
from pathlib import Path

import pytest

from build import build
from tenfold.testing.processes import Server

# library -> checks of its script, those of a string in one process.
CHECKS = {
    "kernels_attention_prefill": [
        "forward_float32 forward_bfloat16 forward_float16 packed",
        "backward_float32 backward_bfloat16 backward_float16",
        "edges lowest_bias hidden_wild",
    ],
    "kernels_attention_decode": ["float32 edges append", "bfloat16 float16"],
    "kernels_attention_t5": ["float32 edges", "bfloat16 float16"],
    "kernels_attention_heads": ["mix_heads fuse_backward fusion_mse head_cka"],
    "kernels_rl": ["segments returns wrong", "prepare long", "losses"],
    "kernels_pixels": ["all"],
    "kernels_optim_masks": ["bits topk wgrad", "grad_norm masked_copy"],
    "kernels_optim_adamw": ["float32 many 8bit", "bfloat16 float16"],
    "kernels_loss": [
        "logprob logprob_alignment",
        "linear_limits linear_values linear_edges",
        "linear_rows linear_programs weighted",
    ],
    "kernels_loss_traces": ["all"],
    "kernels_moe_experts": ["values edges"],
    "kernels_moe_routing": ["all"],
    "kernels_influence": ["markov products"],
    "kernels_merge": ["all"],
    "kernels_corruption": ["all"],
    "kernels_diffusion": ["all"],
    "kernels_norm": ["all"],
    "kernels": ["template proxy_scores", "nacl_select kv_moves ragged_decode"],
}


@functools.cache
def server() -> Server:
    """A process with ASan loaded first, which the scripts' processes are copies of."""
    # libstdc++ too: else ASan does not know how torch throws.
    preload = [subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True)
               for name in ("libasan", "libstdc++")]  # fmt: skip
    env = os.environ | {"LD_PRELOAD": " ".join(p.stdout.strip() for p in preload),
                        "ASAN_OPTIONS": "detect_leaks=0",
                        "OMP_NUM_THREADS": "1"}  # fmt: skip
    # torch.testing imports the last to compare tensors.
    return Server(("pytest", "hypothesis", "tenfold.testing", "tenfold.reference",
                   "torch.distributed.tensor"), env)  # fmt: skip


def run(library: str, checks: str) -> subprocess.CompletedProcess:
    """Checks of ``emulated*.py`` in a process of their own."""
    build(library, "-shared", "-fPIC")
    script = Path(__file__).parent / f"{library.replace('kernels', 'emulated')}.py"
    return server().run([script, *checks.split()], timeout=900)


@pytest.mark.parametrize(
    ("library", "checks"), [(name, checks) for name in CHECKS for checks in CHECKS[name]]
)
def test_emulated(library, checks):
    done = run(library, checks)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-4000:]
