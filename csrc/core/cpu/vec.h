// SPDX-License-Identifier: Apache-2.0
// One SIMD vocabulary for all CPU ISAs: VF (float32 lanes), VI (uint32 lanes), VM (lane mask).
// An ISA kernel source includes this header only, is compiled once per ISA, and puts its code in
// namespace tenfold::TENFOLD_ISA. Everything here has internal linkage: no weak symbol of one ISA
// can be picked by the linker for another.
//
// Every ISA provides: kWidth; load, load_n, store, store_n of float, bf16_t and fp16_t (rounding to
// nearest even); load_bytes, store_bytes, store_low_bytes, load_halves, store_quick, load_pair,
// store_pair; gather, lookup32, lookup256; set1, seti; + - * /; fma, fused (a b + c, rounded once
// on every ISA) and fused_from (c - a b); sqrt, inverse; vmax, vmin (if either argument is NaN, the
// *second* is returned); rint, ldexp; lt, gt, ge, eq, above, unordered masks; lanes_of, both, any,
// select, store_chosen, store_where, compress, expand; hsum, hmax, hsum4; bits_of, bits_of_bytes,
// store_bits_as_bytes for packed masks; VI arithmetic for Philox and float bits, store_by_four;
// ordered, signed_max, signed_min, unsigned_min for keys that sort as floats do; store_pairs.
#pragma once

#include "core/types.h"

#if defined(TENFOLD_ISA_AVX512)
#include "core/cpu/vec_avx512.h"
#elif defined(TENFOLD_ISA_AVX2)
#include "core/cpu/vec_avx2.h"
#else
#include "core/cpu/vec_scalar.h"
#endif

#define TENFOLD_ISA_BEGIN \
  namespace tenfold {     \
  namespace TENFOLD_ISA {

#define TENFOLD_ISA_END \
  }                     \
  }
