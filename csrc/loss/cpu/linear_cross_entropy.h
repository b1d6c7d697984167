// SPDX-License-Identifier: Apache-2.0
// The passes of linear_cross_entropy over chunks of rows and tiles of the vocabulary. No tensor is
// made here; results do not depend on the number of threads.
#pragma once

#include <functional>
#include <vector>

#include "core/floats.h"
#include "loss/cpu/linear_tiles.h"
#include "loss/linear_cross_entropy.h"
#include "loss/linear_ops.h"

namespace tenfold::cpu {

// The rows of a call that count, in order.
struct CountedRows {
  std::vector<int64_t> row, target;
  std::vector<float> weight;  // empty: all 1
};

// Of every row that counts.
struct RowSums {
  std::vector<float> lse, logp, entropy;
};

// Where gradients go, or null: [N, H] and [V, H], contiguous. All of them is written.
struct GradientsOut {
  void *hidden, *weight;
};

class LinearLoss {
 public:
  LinearLoss(const LinearLossCall& c, const CountedRows& rows, bool wants_entropy);

  // The slopes of row i of those that count, of which lse, logp and entropy are known.
  using Slopes = std::function<RowSlopes(int64_t i)>;

  void forward(RowSums* sums);
  void forward_gradients(RowSums* sums, const Slopes& slopes, const GradientsOut& out);
  void backward(const float* lse, const Slopes& slopes, const GradientsOut& out);

 private:
  // Logits of the first `chunks` chunks from `first` on: of each [vocab][pitch]. Or exps of the
  // first chunk, likewise, the maxima of its tiles and the targets' log-probabilities.
  struct Kept {
    float* data;
    int64_t pitch, first, chunks;
    bool inside;  // in grad_weight
    LceExps exps;
    const float *tops, *logp;
  };
  struct Chunk;
  struct Block;
  struct WeightSums;

  void plan();
  int64_t chunks() const { return (count() + chunk_rows_ - 1) / chunk_rows_; }
  float* kept_logits(const Kept& k, int64_t chunk) const;
  int64_t kept_row_bytes(const Kept& k) const;
  Chunk pack(int64_t chunk, bool for_weight) const;
  void logits(Chunk& c, const Kept& kept, RowSums* sums) const;
  void add_up(Chunk& c, float* of_tiles, RowSums* sums) const;
  void set_slopes(Chunk& c, const float* lse, const Slopes& slopes) const;
  void gradients_by_exps(RowSums* sums, const Slopes& slopes, const GradientsOut& out);
  void exps_of_block(Chunk& c, const Block& b, const LceExps& exps, float* of_tiles,
                     bool for_hidden) const;
  void add_hidden(const Chunk& c, const Block& b, const LceExps& exps, const float* of_tiles,
                  std::vector<float>* base, float* sums) const;
  void gradients(int64_t first, int64_t last, const Kept& kept, const float* lse,
                 const Slopes& slopes, const GradientsOut& out) const;
  void block_gradients(const Chunk& c, const Block& b, const Kept& kept, const WeightSums& weight,
                       float* hidden, bool add) const;
  void hidden_tiles(const Chunk& c, const Block& b, float* sums, bool add) const;
  void store_hidden(int64_t chunk, const float* sums, void* out) const;
  void clear(const GradientsOut& out) const;
  int64_t block_tiles() const;
  int64_t hidden_pitch() const { return lce_pitch(lce_whole(p_.dim, kLceLanes)); }
  int64_t count() const { return static_cast<int64_t>(rows_.row.size()); }
  int64_t words(int64_t n) const { return packing_.words(n); }
  bool by_exps() const { return p_.dtype == Dtype::bf16 && p_.softcap <= 0 && !wants_entropy_; }
  bool by_tiles() const { return packing_.unit > 1; }

  Isa isa_;  // one for all calls: they must agree on the panels
  LceProblem p_;
  LcePacking packing_;
  const CountedRows& rows_;
  int64_t num_rows_, most_rows_, tiles_, threads_, chunk_rows_ = 16;
  bool wants_entropy_;
};

}  // namespace tenfold::cpu
