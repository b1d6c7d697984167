// SPDX-License-Identifier: Apache-2.0
// The query heads of a decode block, and where the tokens of its sequence are.
#pragma once

#include "attention/cuda/decode_launch.h"

namespace tenfold::cuda {

constexpr int kDhaThreads = 128, kDhaWarps = kDhaThreads / 32;
constexpr int kDhaChunk = 128;     // keys whose logits are in shared memory at once
constexpr int kMaxBlockRows = 64;  // rows (query head, query) of a block

// Query heads that read one key (or value) head: rows [begin[g], begin[g + 1]) of an order.
struct HeadGroups {
  int* head;   // the key or value head
  int* begin;  // rows; one more than groups
  int count;
};

// A block's heads. Rows are (place in the block, query); places are in the order of the key heads,
// so that the rows of a key head are neighbours. value_row lists the rows by value head.
struct BlockHeads {
  HeadGroups keys, values;
  const int* query_head;  // of each place
  const int* value_row;
  int rows;
};

TENFOLD_HD int64_t head_index(const IntArray& map, int64_t h, int64_t heads) {
  const int64_t x = map[h];
  return x < 0 ? 0 : x >= heads ? heads - 1 : x;
}

// The block's heads in the order of (key head, value head, query head).
__device__ inline int find_heads(const DhaDecodeOnDevice& p, int64_t block, int* query_head) {
  const int64_t first = block * p.block_heads;
  const int64_t left = p.q_heads - first, count = left < p.block_heads ? left : p.block_heads;
  const auto place = [&](int64_t h) {
    return head_index(p.kmap, h, p.k_heads) * p.v_heads + head_index(p.vmap, h, p.v_heads);
  };
  for (int64_t h = threadIdx.x; h < p.q_heads; h += kDhaThreads) {
    const int64_t mine = place(h);
    int64_t before = 0;
    for (int64_t other = 0; other < p.q_heads; ++other) {
      const int64_t x = place(other);
      before += x < mine || (x == mine && other < h);
    }
    if (before >= first && before < first + count) query_head[before - first] = static_cast<int>(h);
  }
  __syncthreads();
  return static_cast<int>(count);
}

// Groups of equal heads among head_at(0 .. count - 1), each entry `queries` rows.
template <class F>
__device__ inline int group_rows(int count, int queries, F head_at, HeadGroups groups) {
  int found = 0;
  for (int i = 0; i < count; ++i) {
    const int head = head_at(i);
    if (found > 0 && groups.head[found - 1] == head) continue;
    groups.head[found] = head;
    groups.begin[found++] = i * queries;
  }
  groups.begin[found] = count * queries;
  return found;
}

// storage: 7 * kMaxBlockRows + 32 ints of shared memory.
__device__ inline BlockHeads describe_heads(const DhaDecodeOnDevice& p, int64_t block,
                                            int* storage) {
  int* const query_head = storage;
  int* const value_head = query_head + kMaxBlockRows;  // of each place
  int* const value_row = value_head + kMaxBlockRows;   // and 16 spare ones
  int* const counts = value_row + kMaxBlockRows + 16;
  const HeadGroups keys{counts + 2, counts + 2 + kMaxBlockRows, 0};
  const HeadGroups values{keys.begin + kMaxBlockRows + 1, keys.begin + 2 * kMaxBlockRows + 1, 0};
  const int count = find_heads(p, block, query_head), queries = static_cast<int>(p.num_queries);
  for (int i = threadIdx.x; i < count; i += kDhaThreads)
    value_head[i] = static_cast<int>(head_index(p.vmap, query_head[i], p.v_heads));
  for (int i = threadIdx.x; i < 16; i += kDhaThreads) value_row[count * queries + i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kDhaThreads) {
    int before = 0;
    for (int j = 0; j < count; ++j)
      before += value_head[j] < value_head[i] || (value_head[j] == value_head[i] && j < i);
    for (int s = 0; s < queries; ++s) value_row[before * queries + s] = i * queries + s;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    counts[0] = group_rows(
        count, queries,
        [&](int i) { return static_cast<int>(head_index(p.kmap, query_head[i], p.k_heads)); },
        keys);
    counts[1] = group_rows(
        count, queries, [&](int i) { return value_head[value_row[i * queries] / queries]; },
        values);
  }
  __syncthreads();
  return {{keys.head, keys.begin, counts[0]},
          {values.head, values.begin, counts[1]},
          query_head,
          value_row,
          count * queries};
}

constexpr int kHeadStorage = 7 * kMaxBlockRows + 32;

struct SequenceTokens {
  int64_t base, length;  // slot of token 0; tokens
};

TENFOLD_HD int64_t cut(int64_t x, int64_t lo, int64_t hi) {
  return x < lo ? lo : x > hi ? hi : x;
}

TENFOLD_HD SequenceTokens sequence_tokens(const DhaDecodeOnDevice& p, int64_t b) {
  int64_t base = 0, end = p.length;
  if (p.layout == CacheLayout::ragged) {
    base = cut(p.offsets[b], 0, p.length);
    end = cut(p.offsets[b + 1], base, p.length);
  } else if (p.kv_start.given()) {
    base = cut(p.kv_start[b], 0, p.length);
  }
  return {base, cut(p.kv_lens[b], 0, end - base)};
}

struct TokenPlace {
  int batch, token;  // in units of the cache's batch and token strides
};

// Places of tokens [first, first + kDhaChunk) of sequence b; those from `last` on are not read.
__device__ inline void find_tokens(const DhaDecodeOnDevice& p, int64_t b, int64_t base,
                                   int64_t first, int64_t last, TokenPlace* places) {
  for (int i = threadIdx.x; i < kDhaChunk; i += kDhaThreads) {
    if (first + i >= last) continue;
    const int64_t slot = base + first + i;
    if (p.layout == CacheLayout::paged) {
      const int64_t block = p.blocks[b * p.table_width + slot / p.block_size];
      places[i] = {static_cast<int>(cut(block, 0, p.num_blocks - 1)),
                   static_cast<int>(slot % p.block_size)};
    } else {
      places[i] = {static_cast<int>(b), static_cast<int>(slot)};
    }
  }
}

}  // namespace tenfold::cuda
