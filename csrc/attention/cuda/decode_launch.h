// SPDX-License-Identifier: Apache-2.0
// Arguments and launchers of dha_decode and dha_cache_append_ on the device.
#pragma once

#include "attention/dha_decode.h"
#include "core/mma_tile.cuh"

namespace tenfold::cuda {

struct DhaDecodeOnDevice : DhaDecodeParams {
  const void *q_data, *k_data, *v_data;
  void* out;  // [B, H, Sq, DV] contiguous
  float* lse;
  float* partial;  // [B, H, Sq, splits, 2 + DV]; null: one split
  IntArray kmap, vmap, kv_lens, kv_start, offsets;
  IntArray blocks;            // [B, max_blocks], contiguous
  int64_t table_width;        // max_blocks
  int64_t block_heads;        // query heads of a block
  int64_t splits;             // of the keys of a sequence
  bool k_vectors, v_vectors;  // rows are whole, aligned 16-byte vectors
};

struct DhaAppendOnDevice : DhaAppendParams {
  const void *k_data, *v_data, *cos, *sin;
  void *k_to, *v_to;
  const void* slots;
  bool slots_wide;
  bool vectors;  // every row of every tensor is whole, aligned 16-byte vectors
};

// Fixes block_heads and splits, and returns the number of floats of `partial`.
template <class T, int kW>
int64_t plan_dha_decode(DhaDecodeOnDevice& p);

template <class T, int kW>
int64_t decode_blocks(const DhaDecodeOnDevice& p);

template <class T, int kW>
void launch_dha_decode(const DhaDecodeOnDevice& p, cudaStream_t stream);

}  // namespace tenfold::cuda
