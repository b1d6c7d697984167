// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(TENFOLD_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tenfold {
namespace {

constexpr const char* kNames[kNumIsa] = {"scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx"};

#if defined(TENFOLD_X86)

// Register state that the OS saves: AVX needs bits 1-2 of XCR0, AVX-512 also bits 5-7,
// AMX bits 17-18.
uint64_t saved_register_state() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & (1u << 27)) == 0) return 0;  // OSXSAVE
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Linux lets a process use the AMX tile registers only after it has asked.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa find_best_isa() {
  uint32_t eax, ebx, ecx, edx, leaf1_ecx;
  if (!__get_cpuid(1, &eax, &ebx, &leaf1_ecx, &edx)) return Isa::scalar;
  const uint64_t xcr0 = saved_register_state();
  const bool fma = leaf1_ecx & (1u << 12), f16c = leaf1_ecx & (1u << 29);
  uint32_t leaf7_eax = 0, leaf7_ebx = 0, leaf7_edx = 0;
  __get_cpuid_count(7, 0, &leaf7_eax, &leaf7_ebx, &ecx, &leaf7_edx);
  const bool avx2 = leaf7_ebx & (1u << 5);
  if ((xcr0 & 0x6) != 0x6 || !avx2 || !fma || !f16c) return Isa::scalar;
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr uint32_t kAll = kF | kDq | kBw | kVl;
  if ((xcr0 & 0xE0) != 0xE0 || (leaf7_ebx & kAll) != kAll) return Isa::avx2;
  if (leaf7_eax < 1) return Isa::avx512;
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  if ((eax & (1u << 5)) == 0) return Isa::avx512;
  constexpr uint32_t kAmx = (1u << 22) | (1u << 24);  // AMX-BF16, AMX-TILE
  const bool amx = (leaf7_edx & kAmx) == kAmx && (xcr0 & 0x60000) == 0x60000;
  return amx && amx_permitted() ? Isa::avx512_amx : Isa::avx512_bf16;
}

#else

Isa find_best_isa() {
  return Isa::scalar;
}

#endif

Isa best_isa() {
  static const Isa best = find_best_isa();
  return best;
}

int find_isa(const char* name) {
  for (int i = 0; i < kNumIsa; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return i;
  return -1;
}

// A wrong TENFOLD_CPU_CAPABILITY must not stop an import: it is reported once and ignored.
Isa initial_isa() {
  const char* wanted = std::getenv("TENFOLD_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  const int isa = find_isa(wanted);
  if (isa >= 0 && isa <= static_cast<int>(best_isa())) return static_cast<Isa>(isa);
  std::fprintf(stderr,
               "tenfold: TENFOLD_CPU_CAPABILITY=%s is %s; using %s (known: scalar, avx2, avx512, "
               "avx512_bf16, avx512_amx)\n",
               wanted, isa < 0 ? "not a known name" : "not supported by this CPU",
               kNames[static_cast<int>(best_isa())]);
  return best_isa();
}

std::atomic<int>& active() {
  static std::atomic<int> isa{static_cast<int>(initial_isa())};
  return isa;
}

const int force_detection_at_load = active().load();

}  // namespace

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
  return static_cast<int>(isa) <= static_cast<int>(best_isa());
}

Isa active_isa() {
  return static_cast<Isa>(active().load(std::memory_order_relaxed));
}

}  // namespace tenfold

#define TENFOLD_EXPORT extern "C" __attribute__((visibility("default")))

TENFOLD_EXPORT const char* tenfold_cpu_capability() {
  return tenfold::isa_name(tenfold::active_isa());
}

// Name of the i-th supported ISA, weakest first; null past the end.
TENFOLD_EXPORT const char* tenfold_cpu_capability_at(int i) {
  if (i < 0 || i >= tenfold::kNumIsa) return nullptr;
  const auto isa = static_cast<tenfold::Isa>(i);
  return tenfold::isa_supported(isa) ? tenfold::isa_name(isa) : nullptr;
}

// Returns 0, or 1 if `name` is unknown or not supported here (then nothing changes).
TENFOLD_EXPORT int tenfold_set_cpu_capability(const char* name) {
  const int isa = tenfold::find_isa(name);
  if (isa < 0 || !tenfold::isa_supported(static_cast<tenfold::Isa>(isa))) return 1;
  tenfold::active().store(isa);
  return 0;
}
