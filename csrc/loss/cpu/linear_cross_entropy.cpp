// SPDX-License-Identifier: Apache-2.0
#include "loss/cpu/linear_cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>

#include "core/cpu/past_caches.h"
#include "core/cpu/subnormals.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kRows = 512;  // of a chunk: a tile's logits fit the second cache
// Of kept logits: beside grad_weight, and where it is not wanted, nor its memory needed.
constexpr int64_t kWorkspaceBytes = int64_t{4} << 20, kFrozenBytes = int64_t{128} << 20;
constexpr int64_t kBlockBytes = int64_t{8} << 20;  // of packed operands of grad_hidden

constexpr double kLog2e = 1.4426950408889634;

double micros(int64_t flops) {
  return static_cast<double>(flops) / 5e4;  // of a thread; for the size of tasks only
}

template <class F>
void in_parallel(int64_t n, double micros_per_item, const F& f) {
  parallel_for(n, micros_per_item, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    f(begin, end);
  });
}

}  // namespace

struct LinearLoss::Chunk : LceChunk {
  int64_t index, first;  // the latter of the rows that count
  std::shared_ptr<Floats> packed;
  std::vector<float> of_rows;  // arrays of `pitch`

  float* array(int64_t i) { return of_rows.data() + i * pitch; }
};

// Tiles [first, first + tiles) of the vocabulary, `tokens` in all, and what their gradients are
// packed into: room for `depth` words.
struct LinearLoss::Block {
  int64_t first, tiles, tokens, depth;
  float *by_row, *weight;
};

// Rows of grad_weight from token `first` on: where they go (or null), and what is there before.
struct LinearLoss::WeightSums {
  void* out;
  Dtype dtype;
  const float* before;
  int64_t first;
  bool past;  // past the caches
};

LinearLoss::LinearLoss(const LinearLossCall& c, const CountedRows& rows, bool wants_entropy)
    : isa_(active_isa()),
      p_{c.hidden.data_ptr(),
         c.weight.data_ptr(),
         c.hidden_stride,
         c.weight_stride,
         c.dim,
         c.vocab,
         to_dtype(c.hidden.scalar_type()),
         c.softcap,
         1.0f / c.temperature},
      packing_(TENFOLD_ISA_CALL_AS(isa_, lce_packing, p_.dtype)),
      rows_(rows),
      num_rows_(c.rows),
      most_rows_(c.chunk > 0 ? std::min(kRows, lce_whole(c.chunk, 16)) : kRows),
      tiles_(ceil_div(c.vocab, kLceTile)),
      threads_(torch::stable::get_num_threads()),
      wants_entropy_(wants_entropy) {}

// Equal chunks, the same for all ways to a gradient of weight: its bits depend on them.
void LinearLoss::plan() {
  const int64_t parts = std::max<int64_t>(1, ceil_div(count(), most_rows_));
  chunk_rows_ = std::max<int64_t>(16, lce_whole(ceil_div(count(), parts), 16));
}

float* LinearLoss::kept_logits(const Kept& k, int64_t chunk) const {
  const int64_t i = chunk - k.first;
  return i >= 0 && i < k.chunks ? k.data + i * p_.vocab * k.pitch : nullptr;
}

LinearLoss::Chunk LinearLoss::pack(int64_t chunk, bool for_weight) const {
  Chunk c{};
  c.index = chunk, c.first = chunk * chunk_rows_;
  c.count = std::min(chunk_rows_, count() - c.first);
  c.pitch = lce_pitch(c.count);
  c.row = rows_.row.data() + c.first;
  c.target = rows_.target.data() + c.first;
  c.of_rows.assign(6 * c.pitch, 0.0f);
  c.lse = c.array(0), c.of_p = c.array(1), c.of_id = c.array(2);
  c.of_entropy = wants_entropy_ ? c.array(3) : nullptr;
  c.entropy = wants_entropy_ ? c.array(4) : nullptr;
  c.chosen = c.array(5);
  c.packed = std::make_shared<Floats>(
      std::initializer_list<int64_t>{lce_lanes_size(c.count, words(p_.dim)),
                                     for_weight ? lce_lanes_size(p_.dim, words(c.count)) : 0});
  c.lanes = (*c.packed)[0], c.cols = (*c.packed)[1];
  const double column_micros = 1e-3 * kLceLanes;
  in_parallel(ceil_div(c.count, kLceLanes), column_micros * static_cast<double>(p_.dim),
              [&](int64_t begin, int64_t end) {
                const Floats staged{8 * lce_whole(p_.dim, 16)};
                for (int64_t i = begin; i < end; ++i)
                  TENFOLD_ISA_CALL_AS(isa_, lce_pack_lanes, p_, c, i, staged[0]);
              });
  if (!for_weight) return c;
  in_parallel(ceil_div(p_.dim, kLceLanes), column_micros * static_cast<double>(c.count),
              [&](int64_t begin, int64_t end) {
                const int64_t col = begin * kLceLanes;
                TENFOLD_ISA_CALL_AS(isa_, lce_pack_cols, p_, c, col,
                                    std::min(p_.dim, end * kLceLanes) - col);
              });
  return c;
}

// Step 1 of the whole vocabulary.
void LinearLoss::logits(Chunk& c, const Kept& kept, RowSums* sums) const {
  const Floats parts{3 * c.pitch * tiles_};
  float* const keep = kept_logits(kept, c.index);
  in_parallel(tiles_, micros(2 * kLceTile * c.count * p_.dim), [&](int64_t begin, int64_t end) {
    const Floats at{lce_panels_size(packing_.tokens, words(p_.dim), packing_.panel),
                    8 * lce_whole(p_.dim, 16), kLceTile * c.pitch};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t v = t * kLceTile, n = std::min(kLceTile, p_.vocab - v);
      TENFOLD_ISA_CALL_AS(isa_, lce_logits, p_, c, v, n, at[0], at[1], at[2]);
      TENFOLD_ISA_CALL_AS(isa_, lce_sums, p_, c, n, at[2], wants_entropy_, LceExps{},
                          parts[0] + t * 3 * c.pitch);
      if (keep != nullptr)
        TENFOLD_ISA_CALL_AS(isa_, lce_keep, c, n, at[2], keep + v * kept.pitch, kept.pitch);
    }
  });
  add_up(c, parts[0], sums);
}

void LinearLoss::add_up(Chunk& c, float* of_tiles, RowSums* sums) const {
  TENFOLD_ISA_CALL_AS(isa_, lce_join, c, tiles_, wants_entropy_, of_tiles);
  for (int64_t m = 0; m < c.count; ++m) {
    const double top = of_tiles[m], sum = of_tiles[c.pitch + m];
    const double log_sum = std::isinf(top) && top > 0 ? 0.0 : std::log(sum);
    const double x = static_cast<double>(c.chosen[m]) * p_.scale;
    sums->lse[c.first + m] = static_cast<float>(top + log_sum);
    sums->logp[c.first + m] = static_cast<float>(x - top - log_sum);
    if (wants_entropy_)
      sums->entropy[c.first + m] = static_cast<float>(log_sum - of_tiles[2 * c.pitch + m] / sum);
  }
}

void LinearLoss::set_slopes(Chunk& c, const float* lse, const Slopes& slopes) const {
  for (int64_t m = 0; m < c.count; ++m) {
    const RowSlopes s = slopes(c.first + m);
    c.array(0)[m] = lse[c.first + m];
    c.array(1)[m] = s.of_p * p_.scale;
    c.array(2)[m] = s.of_id * p_.scale;
    c.array(3)[m] = s.of_entropy * p_.scale;
    c.array(4)[m] = s.entropy;
  }
}

// Tiles whose gradients are packed at a time: what the last cache holds, as many for every thread.
int64_t LinearLoss::block_tiles() const {
  const int64_t most = kBlockBytes / (4 * kLceTile * (chunk_rows_ + p_.dim) / packing_.word);
  return std::min(tiles_, std::max<int64_t>(1, most / threads_) * threads_);
}

// Step 2 of a block of tiles.
void LinearLoss::block_gradients(const Chunk& c, const Block& b, const Kept& kept,
                                 const WeightSums& weight, float* hidden, bool add) const {
  const int64_t stride = lce_panel_stride(b.depth, packing_.panel), size = dtype_size(weight.dtype);
  const Parts across{p_.dim, kLceLanes, ceil_div(p_.dim, kLceCols)};
  const int64_t widest = lce_whole(ceil_div(p_.dim, across.count), kLceLanes) + kLceLanes;
  const bool for_weight = weight.out != nullptr;
  const float* const keep = kept_logits(kept, c.index);
  const bool has_exps = kept.exps.data != nullptr && c.index == 0;
  const bool again = keep == nullptr && !has_exps;
  in_parallel(b.tiles, micros(2 * kLceTile * c.count * p_.dim), [&](int64_t begin, int64_t end) {
    const Floats at{
        again ? lce_panels_size(packing_.tokens, words(p_.dim), packing_.panel) : 0,
        again ? 8 * lce_whole(p_.dim, 16) : 0,
        again ? kLceTile * c.pitch : 0,
        for_weight ? lce_panels_size(kLceTile, words(lce_whole(c.count, 16)), packing_.panel) : 0,
        for_weight ? kLceTile * lce_pitch(widest) : 0,
        has_exps ? c.pitch : 0};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = t * kLceTile, v = b.first * kLceTile + from;
      const int64_t n = std::min(kLceTile, p_.vocab - v);
      if (again) TENFOLD_ISA_CALL_AS(isa_, lce_logits, p_, c, v, n, at[0], at[1], at[2]);
      if (has_exps) {
        const LceExps exps{kept.exps.data + v * kept.exps.pitch, kept.exps.pitch};
        TENFOLD_ISA_CALL_AS(isa_, lce_exps_by_token, p_, c, v, n, exps,
                            kept.tops + (b.first + t) * c.pitch, at[5], at[3]);
      } else {
        TENFOLD_ISA_CALL_AS(
            isa_, lce_deltas, p_, c, v, n, again ? at[2] : keep + v * kept.pitch,
            again ? c.pitch : kept.pitch,
            hidden != nullptr ? b.by_row + from / packing_.word * packing_.panel : nullptr, stride,
            for_weight ? at[3] : nullptr);
      }
      if (hidden != nullptr)
        TENFOLD_ISA_CALL_AS(isa_, lce_pack_weight, p_, v, n, from / packing_.word, b.depth,
                            b.weight);
      for (int64_t i = 0; for_weight && i < across.count; ++i) {
        const int64_t col = across.begin(i), out = (v - weight.first) * p_.dim + col;
        TENFOLD_ISA_CALL_AS(
            isa_, lce_weight_tile, c, p_.dtype,
            {n, col, across.length(i), at[3], at[4],
             weight.before != nullptr ? weight.before + out : nullptr, p_.dim, weight.dtype,
             static_cast<char*>(weight.out) + out * size, p_.dim, weight.past});
      }
    }
  });
  if (hidden != nullptr) hidden_tiles(c, b, hidden, add);
}

void LinearLoss::hidden_tiles(const Chunk& c, const Block& b, float* sums, bool add) const {
  // Tiles are so fast that what counts is how often a panel is read from beyond the second cache.
  const int64_t most_rows = by_tiles() ? 256 : 128, most_cols = (by_tiles() ? 2 : 1) * kLceCols;
  const int64_t col_parts = ceil_div(p_.dim, most_cols), panels = ceil_div(c.count, packing_.panel);
  const int64_t even = threads_ / std::gcd(threads_, col_parts);
  const int64_t row_parts = std::min(panels, ceil_div(ceil_div(c.count, most_rows), even) * even);
  const Parts across{p_.dim, kLceLanes, col_parts}, down{c.count, packing_.panel, row_parts};
  const int64_t stride = lce_panel_stride(b.depth, packing_.panel), pitch = hidden_pitch();
  const int64_t tasks = row_parts * col_parts;
  in_parallel(tasks, micros(2 * c.count * p_.dim * b.tokens / tasks),
              [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                  const int64_t m = down.begin(i / col_parts), col = across.begin(i % col_parts);
                  TENFOLD_ISA_CALL_AS(isa_, lce_hidden_tile, p_.dtype, down.length(i / col_parts),
                                      across.length(i % col_parts), words(b.tokens),
                                      b.by_row + m / packing_.panel * stride, stride, b.weight,
                                      b.depth, col, sums + m * pitch + col, pitch, add);
                }
              });
}

void LinearLoss::store_hidden(int64_t chunk, const float* sums, void* out) const {
  const int64_t size = dtype_size(p_.dtype) * p_.dim, pitch = hidden_pitch();
  const int64_t first = chunk * chunk_rows_, n = std::min(chunk_rows_, count() - first);
  in_parallel(n, 1e-4 * static_cast<double>(p_.dim), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      TENFOLD_ISA_CALL_AS(isa_, lce_store, sums + m * pitch, p_.dim, p_.dtype,
                          static_cast<char*>(out) + rows_.row[first + m] * size);
  });
}

// Zeros where nothing will be written: rows that do not count; weight if none does.
void LinearLoss::clear(const GradientsOut& out) const {
  const int64_t size = dtype_size(p_.dtype) * p_.dim;
  const auto zero = [&](void* rows, int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(rows) + begin * size, 0, (end - begin) * size);
  };
  int64_t next = 0;
  for (int64_t i = 0; out.hidden != nullptr && i < num_rows_; ++i) {
    if (next < count() && rows_.row[next] == i) {
      ++next;
    } else {
      zero(out.hidden, i, i + 1);
    }
  }
  if (out.weight != nullptr && count() == 0)
    in_parallel(p_.vocab, 1e-4 * static_cast<double>(size),
                [&](int64_t begin, int64_t end) { zero(out.weight, begin, end); });
}

// Of what waits in a row of grad_weight.
int64_t LinearLoss::kept_row_bytes(const Kept& kept) const {
  if (kept.exps.data != nullptr) return 2 * chunk_rows_;
  return kept.inside ? 4 * chunk_rows_ : 0;
}

// Step 2 of chunks [first, last). What grad_weight holds from chunks before is added to.
void LinearLoss::gradients(int64_t first, int64_t last, const Kept& kept, const float* lse,
                           const Slopes& slopes, const GradientsOut& out) const {
  const bool for_weight = out.weight != nullptr, for_hidden = out.hidden != nullptr;
  const int64_t tiles = block_tiles(), depth = words(tiles * kLceTile), many = last - first;
  // Sums of more than one chunk cannot wait in 16 bits.
  const bool wide = for_weight && p_.dtype != Dtype::f32 && many > 1;
  const int64_t hidden_size = for_hidden ? lce_whole(chunk_rows_, 16) * hidden_pitch() : 0;
  const Floats memory{for_hidden ? lce_panels_size(chunk_rows_, depth, packing_.panel) : 0,
                      for_hidden ? lce_lanes_size(p_.dim, depth) : 0, many * hidden_size,
                      wide ? tiles * kLceTile * p_.dim : 0};
  // What waited in the rows of grad_weight has brought them into the caches.
  const int64_t row_bytes = p_.dim * dtype_size(p_.dtype), inside = 2 * kept_row_bytes(kept);
  const bool past = inside < row_bytes && past_caches(p_.vocab * row_bytes, true);
  std::optional<Chunk> c;
  for (int64_t t = 0; t < tiles_; t += tiles) {
    const int64_t n = std::min(tiles, tiles_ - t), v = t * kLceTile;
    const Block block{t, n, std::min(p_.vocab - v, n * kLceTile), depth, memory[0], memory[1]};
    void* const to =
        for_weight ? static_cast<char*>(out.weight) + v * p_.dim * dtype_size(p_.dtype) : nullptr;
    float* const floats = wide ? memory[3] : static_cast<float*>(to);
    for (int64_t i = first; i < last; ++i) {
      if (!c || many > 1) {
        c = pack(i, for_weight);
        set_slopes(*c, lse, slopes);
        if (kept.exps.data != nullptr && i == 0) std::copy_n(kept.logp, c->count, c->chosen);
      }
      const bool stored = i + 1 == last || !wide;
      const WeightSums weight{stored ? to : floats, stored ? p_.dtype : Dtype::f32,
                              for_weight && i > (wide ? first : 0) ? floats : nullptr, v,
                              stored && past && (wide || i == 0)};
      block_gradients(*c, block, kept, weight,
                      for_hidden ? memory[2] + (i - first) * hidden_size : nullptr, t > 0);
    }
  }
  for (int64_t i = first; for_hidden && i < last; ++i)
    store_hidden(i, memory[2] + (i - first) * hidden_size, out.hidden);
}

// -- gradients from exponentials ----------------------------------------------------------------
//
// Where d of a logit is its probability times a slope of the row, but for the target, grad_hidden
// needs no lse before its end: its sums are those of exponentials, as in attention. So weight is
// read once for the logits and for grad_hidden, while it is near; and the exponentials, rounded
// less than d will be, wait in the rows of grad_weight that will replace them.

// Step 1 of a block, and its weight packed for grad_hidden while it is near.
void LinearLoss::exps_of_block(Chunk& c, const Block& b, const LceExps& exps, float* of_tiles,
                               bool for_hidden) const {
  in_parallel(b.tiles, micros(2 * kLceTile * c.count * p_.dim), [&](int64_t begin, int64_t end) {
    const Floats at{lce_panels_size(packing_.tokens, words(p_.dim), packing_.panel),
                    8 * lce_whole(p_.dim, 16), kLceTile * c.pitch};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = t * kLceTile, v = b.first * kLceTile + from;
      const int64_t n = std::min(kLceTile, p_.vocab - v);
      TENFOLD_ISA_CALL_AS(isa_, lce_logits, p_, c, v, n, at[0], at[1], at[2]);
      const LceExps to{exps.data != nullptr ? exps.data + from * exps.pitch : nullptr, exps.pitch};
      TENFOLD_ISA_CALL_AS(isa_, lce_sums, p_, c, n, at[2], false, to,
                          of_tiles + (b.first + t) * 3 * c.pitch);
      if (for_hidden)
        TENFOLD_ISA_CALL_AS(isa_, lce_pack_weight, p_, v, n, from / packing_.word, b.depth,
                            b.weight);
    }
  });
}

// sums += exps 2^-base weight of a block; base is raised first where it must be.
void LinearLoss::add_hidden(const Chunk& c, const Block& b, const LceExps& exps,
                            const float* of_tiles, std::vector<float>* base, float* sums) const {
  const auto top = [&](int64_t t) { return of_tiles + (b.first + t) * 3 * c.pitch; };
  for (int64_t m = 0; m < c.count; ++m) {
    float& low = (*base)[m];
    const float before = low;
    for (int64_t t = 0; t < b.tiles; ++t) {
      const double x = std::ceil(top(t)[m] * kLog2e);
      if (std::abs(x) < 1e30 && x > low) low = static_cast<float>(x);
    }
    if (b.first == 0 || low == before) continue;
    const float factor = std::ldexp(1.0f, static_cast<int>(std::max(before - low, -1000.0f)));
    for (int64_t i = 0; i < p_.dim; ++i) sums[m * hidden_pitch() + i] *= factor;
  }
  const int64_t stride = lce_panel_stride(b.depth, packing_.panel);
  in_parallel(
      b.tiles, 1e-3 * static_cast<double>(kLceTile * c.count), [&](int64_t begin, int64_t end) {
        const Floats factor{c.pitch};
        for (int64_t t = begin; t < end; ++t) {
          const int64_t from = t * kLceTile;
          const int64_t n = std::min(kLceTile, b.tokens - from), v = b.first * kLceTile + from;
          TENFOLD_ISA_CALL_AS(isa_, lce_row_factors, c, top(t), base->data(), factor[0]);
          TENFOLD_ISA_CALL_AS(isa_, lce_exps_by_row, p_.dtype, c, v, n,
                              LceExps{exps.data + from * exps.pitch, exps.pitch}, factor[0],
                              b.by_row + from / packing_.word * packing_.panel, stride);
        }
      });
  hidden_tiles(c, b, sums, b.first > 0);
}

void LinearLoss::gradients_by_exps(RowSums* sums, const Slopes& slopes, const GradientsOut& out) {
  const bool for_hidden = out.hidden != nullptr;
  const bool inside = out.weight != nullptr && chunk_rows_ <= p_.dim;
  const int64_t pitch = lce_pitch(chunk_rows_);
  const int64_t tiles = for_hidden ? block_tiles() : tiles_, depth = words(tiles * kLceTile);
  const Floats memory{for_hidden ? lce_panels_size(chunk_rows_, depth, packing_.panel) : 0,
                      for_hidden ? lce_lanes_size(p_.dim, depth) : 0,
                      for_hidden ? lce_whole(chunk_rows_, 16) * hidden_pitch() : 0,
                      3 * tiles_ * pitch,
                      inside ? tiles_ * pitch : 0,
                      for_hidden ? tiles * kLceTile * pitch / 2 : 0};
  float* const of_tiles = memory[3];
  for (int64_t i = 0; i < chunks(); ++i) {
    Chunk c = pack(i, false);
    const bool keep = inside && i == 0;
    std::vector<float> base(c.pitch, -1e30f);
    for (int64_t t = 0; t < tiles_; t += tiles) {
      const int64_t n = std::min(tiles, tiles_ - t), v = t * kLceTile;
      const Block b{t, n, std::min(p_.vocab - v, n * kLceTile), depth, memory[0], memory[1]};
      LceExps exps{};
      if (keep) {
        exps = {static_cast<uint16_t*>(out.weight) + v * p_.dim, p_.dim};
      } else if (for_hidden) {
        exps = {reinterpret_cast<uint16_t*>(memory[5]), pitch};
      }
      exps_of_block(c, b, exps, of_tiles, for_hidden);
      if (for_hidden) add_hidden(c, b, exps, of_tiles, &base, memory[2]);
    }
    for (int64_t t = 0; keep && t < tiles_; ++t)
      std::copy_n(of_tiles + t * 3 * c.pitch, c.pitch, memory[4] + t * c.pitch);
    add_up(c, of_tiles, sums);
    if (!for_hidden) continue;
    set_slopes(c, sums->lse.data(), slopes);
    std::atomic<bool> strange = false;
    in_parallel(c.count, 1e-4 * static_cast<double>(p_.dim), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const double factor = std::exp2(base[m] - c.lse[m] * kLog2e) * c.of_p[m];
        const double of_target = std::exp(double{sums->logp[c.first + m]}) * c.of_p[m] + c.of_id[m];
        const bool finite =
            TENFOLD_ISA_CALL_AS(isa_, lce_finish_row, p_, c.target[m], static_cast<float>(factor),
                                static_cast<float>(of_target), memory[2] + m * hidden_pitch());
        if (!finite && std::isfinite(c.lse[m])) strange = true;
      }
    });
    // An infinite weight of the target: not p times it plus 1 times it.
    if (strange) {
      gradients(i, i + 1, {}, sums->lse.data(), slopes, {out.hidden, nullptr});
    } else {
      store_hidden(i, memory[2], out.hidden);
    }
  }
  if (out.weight == nullptr) return;
  auto* const exps = inside ? static_cast<uint16_t*>(out.weight) : nullptr;
  gradients(0, chunks(), {nullptr, 0, 0, 0, inside, {exps, p_.dim}, memory[4], sums->logp.data()},
            sums->lse.data(), slopes, {nullptr, out.weight});
}

void LinearLoss::forward(RowSums* sums) {
  plan();
  for (int64_t i = 0; i < chunks(); ++i) {
    Chunk c = pack(i, false);
    logits(c, {}, sums);
  }
}

void LinearLoss::backward(const float* lse, const Slopes& slopes, const GradientsOut& out) {
  clear(out);
  plan();
  if (count() == 0) return;
  if (!by_exps()) return gradients(0, chunks(), {}, lse, slopes, out);
  const auto n = static_cast<size_t>(count());
  RowSums again{std::vector<float>(n), std::vector<float>(n), {}};  // the same bits
  gradients_by_exps(&again, slopes, out);
}

// The logits of the first chunk may wait in the rows of grad_weight that will replace them: all of
// them where there is one chunk. Else those of a chunk may have room in the workspace; it goes
// chunk by chunk then, where sums of grad_weight can wait in it, as floats. What has no room is
// multiplied again, block by block of the vocabulary.
void LinearLoss::forward_gradients(RowSums* sums, const Slopes& slopes, const GradientsOut& out) {
  clear(out);
  if (count() == 0) return;
  plan();
  if (by_exps()) return gradients_by_exps(sums, slopes, out);
  const int64_t row_bytes = p_.dim * dtype_size(p_.dtype), row_floats = row_bytes / 4;
  const int64_t pitch = lce_pitch(chunk_rows_), size = p_.vocab * pitch;
  const bool inside = out.weight != nullptr && row_bytes % 4 == 0 && chunk_rows_ <= row_floats;
  const int64_t fit = (out.weight != nullptr ? kWorkspaceBytes : kFrozenBytes) / (4 * size);
  const bool by_chunk = !inside && fit > 0 && (p_.dtype == Dtype::f32 || out.weight == nullptr);
  Kept kept{};
  kept.pitch = inside ? row_floats : pitch;
  kept.chunks = inside || by_chunk ? 1 : std::min(fit, chunks());
  kept.inside = inside;
  const Floats workspace{inside ? 0 : kept.chunks * size};
  kept.data = inside ? static_cast<float*>(out.weight) : workspace[0];
  for (int64_t i = 0; i < chunks(); ++i) {
    if (by_chunk) kept.first = i;
    Chunk c = pack(i, false);
    logits(c, kept, sums);
    if (by_chunk) gradients(i, i + 1, kept, sums->lse.data(), slopes, out);
  }
  if (!by_chunk) gradients(0, chunks(), kept, sums->lse.data(), slopes, out);
}

}  // namespace tenfold::cpu
