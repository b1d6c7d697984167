// SPDX-License-Identifier: Apache-2.0
// CPU instruction sets: found once at load, forced by TENFOLD_CPU_CAPABILITY or at run time.
// Every ISA kernel source is compiled into namespace tenfold::<isa> for each of them up to the one
// that its header names: TENFOLD_ISA_DECLARE up to avx512, _BF16 and _AMX up to those (which is
// where CMakeLists.txt reads it). They declare all copies, TENFOLD_ISA_CALL picks one.
#pragma once

namespace tenfold {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, avx512_amx = 4 };
constexpr int kNumIsa = 5;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this CPU, its OS and this build
Isa active_isa();

}  // namespace tenfold

// The highest instruction sets are for 16-bit numbers. What has no code of its own for them is not
// compiled again: their names of it are those of the level below.
#if defined(TENFOLD_X86)
namespace tenfold {
namespace avx512 {}
namespace avx512_bf16 {
using namespace avx512;
}
namespace avx512_amx {
using namespace avx512_bf16;
}
}  // namespace tenfold

#define TENFOLD_ISA_DECLARE(...) \
  namespace scalar {             \
  __VA_ARGS__;                   \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__;                   \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__;                   \
  }
#define TENFOLD_ISA_DECLARE_BF16(...) \
  TENFOLD_ISA_DECLARE(__VA_ARGS__)    \
  namespace avx512_bf16 {             \
  __VA_ARGS__;                        \
  }
#define TENFOLD_ISA_DECLARE_AMX(...)    \
  TENFOLD_ISA_DECLARE_BF16(__VA_ARGS__) \
  namespace avx512_amx {                \
  __VA_ARGS__;                          \
  }
#define TENFOLD_ISA_CALL_AS(isa, function, ...)                                    \
  ([&] {                                                                           \
    switch (isa) {                                                                 \
      case ::tenfold::Isa::scalar: return scalar::function(__VA_ARGS__);           \
      case ::tenfold::Isa::avx2: return avx2::function(__VA_ARGS__);               \
      case ::tenfold::Isa::avx512: return avx512::function(__VA_ARGS__);           \
      case ::tenfold::Isa::avx512_bf16: return avx512_bf16::function(__VA_ARGS__); \
      default: return avx512_amx::function(__VA_ARGS__);                           \
    }                                                                              \
  }())
#else
#define TENFOLD_ISA_DECLARE(...) \
  namespace scalar {             \
  __VA_ARGS__;                   \
  }
#define TENFOLD_ISA_DECLARE_BF16 TENFOLD_ISA_DECLARE
#define TENFOLD_ISA_DECLARE_AMX TENFOLD_ISA_DECLARE
#define TENFOLD_ISA_CALL_AS(isa, function, ...) ((void)(isa), scalar::function(__VA_ARGS__))
#endif

// Calls that must agree (memory sized by one, used by the next) take one `active_isa()`: another
// thread may force another ISA in between.
#define TENFOLD_ISA_CALL(function, ...) \
  TENFOLD_ISA_CALL_AS(::tenfold::active_isa(), function, __VA_ARGS__)
