# SPDX-License-Identifier: Apache-2.0
"""The machine code of the built library: spills, sizes of blocks, and the instructions that the sources are about.

Without a GPU this is the only look at what a GPU would run. Kernels of 16-bit types and of float32 are told apart by
their template arguments.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold import _load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_binary  # noqa: E402

ARCH = "sm_90a"
REGISTERS, STATIC_SHARED = 65536, 48 * 1024  # of a multiprocessor; of a block
# Bytes of local memory, exactly. Not spills: the array of the exact reduction of huge angles, a branch of CUDA's sine
# and cosine in double that no angle of these ops comes near.
STACK = {"kv_move_kernel": 40, "slerp_weights_kernel": 40}
# These spill. Attention's hold sums and tiles in all 255 registers that a thread can have; the optimiser's could have
# more of them, for a block less on a multiprocessor.
_BACKWARD = "dha_attention_backward_kernel<{}>(BackwardArgs)"
_FORWARD = "dha_attention_kernel<{}>(OnDevice<AttentionForward>)"
SPILLS = {
    _BACKWARD.format("bf16_t, 128, (Grad)0, true"): 8, _BACKWARD.format("fp16_t, 128, (Grad)0, true"): 8,
    _BACKWARD.format("bf16_t, 128, (Grad)1, true"): 16, _BACKWARD.format("fp16_t, 128, (Grad)1, true"): 16,
    _FORWARD.format("bf16_t, 128, false"): 8, _FORWARD.format("fp16_t, 128, false"): 8,
    "masked_adamw_8bit_kernel<float>(AdamwTable<Adamw8Tensor>, AdamwScalars const*, AdamwOptions, float const*,"
    " float const*)": 16,
}  # fmt: skip
# ldmatrix and cp.async feed the tensor cores; the kernels of the second line load their tiles by themselves.
PIPELINED = {"dha_attention_backward_kernel", "dha_attention_kernel", "dha_decode_kernel",
             "grouped_product_kernel", "grouped_wgrad_kernel", "lce_deltas_kernel",
             "lce_hidden_kernel", "lce_sums_kernel", "lce_weight_kernel", "outer_dot_kernel",
             "wgrad_mma_kernel"}  # fmt: skip
TENSOR_CORES = PIPELINED | {"cka_mma_kernel", "proxy_columns_kernel", "proxy_lse_kernel"}
ASYNC_COPIES = PIPELINED | {"wgrad_fma_kernel"}
# Kernels that memory limits: all their instances load and store 16 bytes at a time where addresses allow it.
WIDE = {"combine_grad_kernel", "combine_kernel", "delta_merge_kernel", "dha_append_kernel",
        "fir_copy_kernel", "gated_act_grad_kernel", "gated_act_kernel", "gn1_gelu_grad_kernel",
        "gn1_gelu_kernel", "kv_move_kernel", "masked_adamw_kernel", "masked_adamw_8bit_kernel",
        "masked_copy_kernel", "seed_grad_kernel", "seed_kernel", "ties_merge_kernel",
        "vdiff_noise_kernel", "vdiff_step_kernel", "weighted_sum_kernel"}  # fmt: skip
# The same where the instances for unaligned rows are kernels of their own: half of them.
WIDE_HALF = {"mix_heads_kernel", "rms_norm_grad_kernel", "rms_norm_kernel"}
# These read wide and write little, or the other way round.
WIDE_LOADS = {"dha_attention_backward_kernel": "STG", "dha_attention_kernel": "STG",
              "gn1_moments_kernel": "LDG", "gn1_sums_kernel": "LDG", "logit_grad_kernel": "LDG",
              "logit_sums_kernel": "LDG", "norms_kernel": "LDG", "patchify_kernel": "STG",
              "pack_kernel": "LDG", "ragged_decode_kernel": "LDG", "square_sum_kernel": "LDG",
              "sum_slots_kernel": "LDG", "ties_count_kernel": "LDG", "ties_tiles_kernel": "LDG",
              "unpack_kernel": "STG", "vdiff_loss_kernel": "LDG"}  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    found = cuda_binary.read(_load.PATH, ARCH)
    if not found:
        pytest.skip(f"the library has no CUDA code for {ARCH}")
    return found


def arguments(kernel):
    """The template arguments of a kernel."""
    return kernel.signature.partition("(")[0].partition("<")[2]


def is_half(kernel):
    return re.search(r"\b(?:bf16|fp16)_t\b", arguments(kernel)) is not None


def named(kernels, names):
    """The kernels of these names, of which each must be there."""
    found = [k for k in kernels if k.name in names]
    assert {k.name for k in found} == set(names)
    return found


def test_no_kernel_spills(kernels):
    allowed = {k.signature: SPILLS.get(k.signature, STACK.get(k.name, 0)) for k in kernels}
    assert {(k.signature, k.stack) for k in kernels if k.stack != allowed[k.signature]} == set()
    assert set(SPILLS) <= set(allowed) and set(STACK) <= {k.name for k in kernels}
    spilling = {k.signature for k in kernels if k.counts.get("STL") and not allowed[k.signature]}
    assert spilling == set()


def test_blocks_fit_a_multiprocessor(kernels):
    assert [k.signature for k in kernels if k.threads is None] == []  # no launch bounds
    for k in kernels:
        registers = -(-k.registers // 8) * 8 * k.threads  # a warp takes them in units of 256
        assert registers <= REGISTERS and k.threads <= 1024, k
        assert k.shared <= STATIC_SHARED, k


def test_nothing_prints_or_aborts(kernels):
    """printf, assert, malloc and the like are functions outside of the kernel's file."""
    assert {k.name: k.outside for k in kernels if k.outside} == {}


def test_tensor_cores_where_values_have_16_bits_and_nowhere_else(kernels):
    for k in named(kernels, TENSOR_CORES):
        assert ("HMMA" in k.counts) == is_half(k), k
        if not is_half(k):
            assert k.counts["FFMA"] >= 16, k  # float32 is multiplied exactly
    assert {k.name for k in kernels if "HMMA" in k.counts} == TENSOR_CORES


def test_tiles_come_by_cp_async_and_ldmatrix(kernels):
    for k in named(kernels, ASYNC_COPIES):
        assert k.counts["LDGSTS"] == k.counts["LDGSTS.128"], k
        assert ("LDSM" in k.counts) == is_half(k), k
    assert {k.name for k in kernels if "LDGSTS" in k.counts} == ASYNC_COPIES
    assert {k.name for k in kernels if "LDSM" in k.counts} == PIPELINED


def test_loads_and_stores_are_wide(kernels):
    for k in named(kernels, WIDE):
        assert k.counts.get("LDG.128") and k.counts.get("STG.128"), k
    for k in named(kernels, set(WIDE_LOADS)):
        assert k.counts.get(f"{WIDE_LOADS[k.name]}.128"), k
    for name in WIDE_HALF:
        mine = named(kernels, {name})
        wide = [k for k in mine if k.counts.get("LDG.128") and k.counts.get("STG.128")]
        assert len(wide) * 2 == len(mine), name


def without(name):
    return lambda k: {"counts": {n: c for n, c in k.counts.items() if n != name}}


def with_one(name):
    return lambda k: {"counts": k.counts | {name: 1}}


@pytest.mark.parametrize(
    ("check", "start", "change"),
    [
        (test_no_kernel_spills, "gated_act_kernel<bf16_t", lambda k: {"stack": 8}),
        (test_no_kernel_spills, "kv_move_kernel<float", lambda k: {"stack": 48}),
        (test_no_kernel_spills, "rms_norm_kernel<float", with_one("STL")),
        (test_blocks_fit_a_multiprocessor, "gate_kernel<float", lambda k: {"threads": None}),
        (test_blocks_fit_a_multiprocessor, "cka_mma_kernel", lambda k: {"registers": 257}),
        (test_blocks_fit_a_multiprocessor, "scatter_kernel", lambda k: {"shared": 49168}),
        (test_nothing_prints_or_aborts, "gae_kernel", lambda k: {"outside": ("vprintf",)}),
        (test_tensor_cores_where_values_have_16_bits_and_nowhere_else,
         "dha_attention_kernel<bf16_t", without("HMMA")),
        (test_tensor_cores_where_values_have_16_bits_and_nowhere_else,
         "dha_attention_kernel<float", with_one("HMMA")),
        (test_tensor_cores_where_values_have_16_bits_and_nowhere_else,
         "gated_act_kernel<float", with_one("HMMA")),
        (test_tiles_come_by_cp_async_and_ldmatrix, "lce_sums_kernel<fp16_t", without("LDSM")),
        (test_tiles_come_by_cp_async_and_ldmatrix, "wgrad_fma_kernel", with_one("LDGSTS")),
        (test_tiles_come_by_cp_async_and_ldmatrix, "gated_act_kernel<float", with_one("LDGSTS")),
        (test_loads_and_stores_are_wide, "gated_act_kernel<float", without("STG.128")),
        (test_loads_and_stores_are_wide, "norms_kernel<bf16_t", without("LDG.128")),
        (test_loads_and_stores_are_wide, "dha_attention_kernel<float", without("STG.128")),
    ],
)  # fmt: skip
def test_the_checks_see_what_they_should(kernels, check, start, change):
    """A library in which one kernel is changed does not pass."""
    at = next(i for i, k in enumerate(kernels) if k.signature.startswith(start))
    changed = dataclasses.replace(kernels[at], **change(kernels[at]))
    with pytest.raises((AssertionError, KeyError)):
        check([*kernels[:at], changed, *kernels[at + 1 :]])


def test_counts_are_those_of_nvdisasm(kernels, tmp_path):
    """Of a kernel of each kind, so that every instruction that is counted is among them."""
    wanted = {"lce_weight_kernel<bf16_t", "outer_dot_kernel<float", "slerp_weights_kernel",
              "gated_act_kernel<bf16_t"}  # fmt: skip
    chosen = [next(k for k in kernels if k.signature.startswith(w)) for w in sorted(wanted)]
    seen = set()
    for path in cuda_binary.extract(_load.PATH, ARCH, tmp_path):
        parts = dict(cuda_binary.sections(path.read_bytes()))
        for kernel in chosen:
            if f".text.{kernel.symbol}" in parts:
                assert cuda_binary.disassembled(path, kernel.symbol) == kernel.counts
                seen |= set(kernel.counts)
    assert seen >= set(cuda_binary.OPCODES.values())


def test_a_library_without_cuda_has_no_kernels(tmp_path):
    source, library = tmp_path / "none.c", tmp_path / "none.so"
    source.write_text("int nothing(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    assert cuda_binary.read(library, ARCH) == []
