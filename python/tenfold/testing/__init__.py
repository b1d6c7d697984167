# SPDX-License-Identifier: Apache-2.0
"""The test kit: what every op's tests share. Usable in other people's test suites too.

``check_op`` bundles the standing checks of an op; the pieces are public. The pytest part (device
fixture, skip policy) is ``tenfold.testing.plugin``.
"""

from tenfold.testing.checks import (
    check_compiles,
    check_cuda_graph,
    check_deterministic,
    check_errors,
    check_inputs_unmodified,
    check_isas_agree,
    check_op,
    check_opcheck,
    check_strides_equal_fake,
    forced_isa,
    peak_growth,
    poisoned_memory,
    threads,
)
from tenfold.testing.matrix import DTYPES, LAYOUTS, LENGTHS, VALUES, fill, layout, on
from tenfold.testing.tolerance import (
    PlainSums,
    assert_close_to_ref,
    assert_same_pattern,
    ulp_floor,
)

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "LENGTHS",
    "VALUES",
    "PlainSums",
    "assert_close_to_ref",
    "assert_same_pattern",
    "check_compiles",
    "check_cuda_graph",
    "check_deterministic",
    "check_errors",
    "check_inputs_unmodified",
    "check_isas_agree",
    "check_op",
    "check_opcheck",
    "check_strides_equal_fake",
    "fill",
    "forced_isa",
    "layout",
    "on",
    "peak_growth",
    "poisoned_memory",
    "threads",
    "ulp_floor",
]
