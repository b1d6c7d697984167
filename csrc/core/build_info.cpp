// SPDX-License-Identifier: Apache-2.0
// What this binary was built from, as plain C so that Python can ask before (and without) torch.

#define TENFOLD_EXPORT extern "C" __attribute__((visibility("default")))

TENFOLD_EXPORT const char* tenfold_version() {
  return TENFOLD_VERSION;
}

// "CUDA 13.0.88 (80,90a)", or "" for a CPU-only build.
TENFOLD_EXPORT const char* tenfold_build_cuda() {
  return TENFOLD_BUILD_CUDA;
}

// The torch whose headers were used; any torch >= 2.10 can load the binary.
TENFOLD_EXPORT const char* tenfold_build_torch() {
  return TENFOLD_BUILD_TORCH;
}

TENFOLD_EXPORT const char* tenfold_build_compiler() {
  return "gcc " __VERSION__;
}
