#include "loss/cpu/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>

#include "core/dispatch.h"
#include "core/parallel.h"

namespace tenfold::cpu {
namespace {

int64_t env(const char* name, int64_t x) {
  const char* v = std::getenv(name);
  return v ? std::atoll(v) : x;
}

constexpr double kFlopsPerMicro = 5e4;  // of a thread; for the size of tasks only

// [0, n) in `count` parts of whole units (the last may be shorter), as equal as can be.
struct Parts {
  int64_t n, unit, count;
  int64_t begin(int64_t i) const { return std::min(n, i * ((n + unit - 1) / unit) / count * unit); }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

// Rows of a chunk, packed.
struct LinearLoss::Chunk : LceChunk {
  int64_t first;  // of the rows that count
  std::optional<Scratch> lane_memory, col_memory;
  std::vector<float> of_rows;  // arrays of `pitch`

  float* array(int64_t i) { return of_rows.data() + i * pitch; }
};

// Tiles [first, first + tiles) of the vocabulary and what their gradients are packed into.
struct LinearLoss::Block {
  int64_t first, tiles, tokens, depth;  // of which `tokens`; room for `depth` words
  float *by_row, *weight;
};

// Sums of grad_weight of rows from `first` on: what is there before, and where they go.
struct LinearLoss::WeightSums {
  char* out;
  Dtype dtype;
  const float* before;
  int64_t first;
};

// Working memory of a task, in floats.
struct LinearLoss::TaskMemory {
  float *panels = nullptr, *staged = nullptr, *x = nullptr, *by_token = nullptr, *sums = nullptr;
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
      rows_(rows),
      num_rows_(c.rows),
      word_(TENFOLD_ISA_CALL_AS(isa_, lce_word, p_.dtype)),
      tiles_(ceil_div(c.vocab, kLceTile)),
      threads_(torch::stable::get_num_threads()),
      wants_entropy_(wants_entropy) {}

LinearLoss::~LinearLoss() = default;

double LinearLoss::micros(int64_t flops) const {
  return static_cast<double>(flops) / kFlopsPerMicro;
}

// Equal chunks.
void LinearLoss::plan(int64_t most_rows) {
  const int64_t chunks = std::max<int64_t>(1, ceil_div(count(), most_rows));
  chunk_rows_ = std::max<int64_t>(16, lce_whole(ceil_div(count(), chunks), 16));
}

std::unique_ptr<LinearLoss::Chunk> LinearLoss::pack(int64_t first, bool for_weight) const {
  auto c = std::make_unique<Chunk>();
  c->first = first;
  c->count = std::min(chunk_rows_, count() - first);
  c->pitch = lce_pitch(c->count);
  c->row = rows_.row.data() + first;
  c->target = rows_.target.data() + first;
  c->of_rows.assign(6 * c->pitch, 0.0f);
  c->lse = c->array(0), c->of_p = c->array(1), c->of_id = c->array(2);
  c->of_entropy = wants_entropy_ ? c->array(3) : nullptr;
  c->base = wants_entropy_ ? c->array(4) : nullptr;
  c->chosen = c->array(5);
  c->lanes = static_cast<float*>(
      c->lane_memory.emplace(4 * lce_lanes_size(c->count, words(p_.dim))).data());
  const int64_t staged = 8 * lce_whole(p_.dim, 16);
  parallel_for(ceil_div(c->count, kLceLanes), 1e-3 * kLceLanes * p_.dim,
               [&](int64_t begin, int64_t end) {
                 const Scratch room(4 * staged);
                 for (int64_t i = begin; i < end; ++i)
                   TENFOLD_ISA_CALL_AS(isa_, lce_pack_lanes, p_, *c, i,
                                       static_cast<float*>(room.data()));
               });
  if (!for_weight) return c;
  c->cols = static_cast<float*>(
      c->col_memory.emplace(4 * lce_lanes_size(p_.dim, words(c->count))).data());
  parallel_for(ceil_div(p_.dim, kLceLanes), 1e-3 * kLceLanes * c->count,
               [&](int64_t begin, int64_t end) {
                 const int64_t col = begin * kLceLanes;
                 TENFOLD_ISA_CALL_AS(isa_, lce_pack_cols, p_, *c, col,
                                     std::min(p_.dim, end * kLceLanes) - col);
               });
  return c;
}

// Step 1 of the whole vocabulary, kept in [vocab][pitch] if there is room; sums of the rows.
void LinearLoss::logits(Chunk& c, float* kept, RowSums* sums) const {
  const Scratch parts(4 * 3 * c.pitch * tiles_);
  auto* const of_tiles = static_cast<float*>(parts.data());
  const int64_t panels = lce_panels_size(kLceTile, words(p_.dim));
  const int64_t staged = 8 * lce_whole(p_.dim, 16);
  const int64_t room = kept != nullptr ? 0 : kLceTile * c.pitch;
  parallel_for(tiles_, micros(2 * kLceTile * c.count * p_.dim), [&](int64_t begin, int64_t end) {
    const Scratch memory(4 * (panels + staged + room));
    auto* const at = static_cast<float*>(memory.data());
    for (int64_t t = begin; t < end; ++t) {
      const int64_t v = t * kLceTile, n = std::min(kLceTile, p_.vocab - v);
      float* const x = kept != nullptr ? kept + v * c.pitch : at + panels + staged;
      TENFOLD_ISA_CALL_AS(isa_, lce_logits, p_, c, v, n, at, at + panels, x);
      TENFOLD_ISA_CALL_AS(isa_, lce_sums, p_, c, n, x, wants_entropy_, of_tiles + t * 3 * c.pitch);
    }
  });
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
    c.array(4)[m] = s.base;
  }
}

// Tiles whose gradients are packed at a time: as many as fit the last cache, the same number for
// every thread.
int64_t LinearLoss::block_tiles() const {
  const int64_t bytes = 4 * kLceTile * (chunk_rows_ + p_.dim) / word_;
  const int64_t most = env("LCE_BLOCK", int64_t{8} << 20) / bytes;
  return std::min(tiles_, std::max<int64_t>(1, most / threads_) * threads_);
}

// Step 2 of a block.
void LinearLoss::gradients(const Chunk& c, const Block& b, const float* kept,
                           const WeightSums& weight, float* hidden, bool add) const {
  const int64_t depth = words(p_.dim), stride = lce_panel_stride(b.depth);
  const int64_t col_parts = ceil_div(p_.dim, kLceCols);
  const Parts across{p_.dim, kLceLanes, col_parts};
  const int64_t widest = lce_whole(ceil_div(p_.dim, col_parts), kLceLanes) + kLceLanes;
  const bool for_weight = weight.out != nullptr;
  const int64_t sizes[] = {kept != nullptr ? 0 : lce_panels_size(kLceTile, depth),
                           kept != nullptr ? 0 : 8 * lce_whole(p_.dim, 16),
                           kept != nullptr ? 0 : kLceTile * c.pitch,
                           for_weight ? lce_panels_size(kLceTile, words(lce_whole(c.count, 16))) : 0,
                           for_weight ? kLceTile * lce_pitch(widest) : 0};
  const int64_t size = dtype_size(weight.dtype);
  parallel_for(b.tiles, micros(2 * kLceTile * c.count * p_.dim), [&](int64_t begin, int64_t end) {
    const Scratch memory(4 * std::accumulate(sizes, sizes + 5, int64_t{16}));
    float* at[5] = {static_cast<float*>(memory.data())};
    for (int i = 1; i < 5; ++i) at[i] = at[i - 1] + sizes[i - 1];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = t * kLceTile, v = b.first * kLceTile + from;
      const int64_t n = std::min(kLceTile, p_.vocab - v);
      const float* const x = kept != nullptr ? kept + v * c.pitch : at[2];
      if (kept == nullptr) TENFOLD_ISA_CALL_AS(isa_, lce_logits, p_, c, v, n, at[0], at[1], at[2]);
      TENFOLD_ISA_CALL_AS(isa_, lce_deltas, p_, c, v, n, x,
                          hidden != nullptr ? b.by_row + from / word_ * 8 : nullptr, stride,
                          for_weight ? at[3] : nullptr);
      if (hidden != nullptr)
        TENFOLD_ISA_CALL_AS(isa_, lce_pack_weight, p_, v, n, from / word_, b.depth, b.weight);
      for (int64_t i = 0; for_weight && i < col_parts; ++i) {
        const int64_t row = (v - weight.first) * p_.dim + across.begin(i);
        TENFOLD_ISA_CALL_AS(
            isa_, lce_weight_tile, c, p_.dtype,
            {n, across.begin(i), across.length(i), at[3], at[4],
             weight.before != nullptr ? weight.before + row : nullptr, p_.dim, weight.dtype,
             weight.out + row * size, p_.dim});
      }
    }
  });
  if (hidden != nullptr) hidden_tiles(c, b, hidden, add);
}

void LinearLoss::hidden_tiles(const Chunk& c, const Block& b, float* sums, bool add) const {
  const int64_t col_parts = ceil_div(p_.dim, kLceCols), panels = ceil_div(c.count, 8);
  const int64_t even = threads_ / std::gcd(threads_, col_parts);
  const int64_t row_parts = std::min(panels, ceil_div(ceil_div(panels, 16), even) * even);
  const Parts across{p_.dim, kLceLanes, col_parts}, down{c.count, 8, row_parts};
  const int64_t stride = lce_panel_stride(b.depth), pitch = hidden_pitch();
  parallel_for(row_parts * col_parts, micros(2 * c.count * p_.dim * b.tokens / row_parts),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t m = down.begin(i / col_parts), col = across.begin(i % col_parts);
                   TENFOLD_ISA_CALL_AS(isa_, lce_hidden_tile, p_.dtype,
                                       down.length(i / col_parts), across.length(i % col_parts),
                                       words(b.tokens), b.by_row + m / 8 * stride, stride, b.weight,
                                       b.depth, col, sums + m * pitch + col, pitch, add);
                 }
               });
}

void LinearLoss::store_hidden(const Chunk& c, const float* sums, void* out) const {
  const int64_t size = dtype_size(p_.dtype) * p_.dim, pitch = hidden_pitch();
  parallel_for(c.count, 1e-4 * p_.dim, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      TENFOLD_ISA_CALL_AS(isa_, lce_store, sums + m * pitch, p_.dim, p_.dtype,
                          static_cast<char*>(out) + c.row[m] * size);
  });
}

// Zeros where nothing will be written: rows that do not count; weight if none does.
void LinearLoss::clear(const GradientsOut& out) const {
  const int64_t size = dtype_size(p_.dtype) * p_.dim;
  if (out.hidden != nullptr) {
    int64_t next = 0;
    for (int64_t i = 0; i < num_rows_; ++i) {
      if (next < count() && rows_.row[next] == i) {
        ++next;
      } else {
        std::memset(static_cast<char*>(out.hidden) + i * size, 0, size);
      }
    }
  }
  if (out.weight != nullptr && count() == 0)
    parallel_for(p_.vocab, 1e-4 * size, [&](int64_t begin, int64_t end) {
      std::memset(static_cast<char*>(out.weight) + begin * size, 0, (end - begin) * size);
    });
}

void LinearLoss::forward(RowSums* sums) {
  plan(env("LCE_ROWS", 512));
  for (int64_t first = 0; first < count(); first += chunk_rows_)
    logits(*pack(first, false), nullptr, sums);
}

namespace {

struct BlockMemory {
  int64_t rows, cols;
  Scratch memory;
  BlockMemory(int64_t rows, int64_t cols) : rows(rows), cols(cols), memory(4 * (rows + cols + 16)) {}
  float* by_row() const { return static_cast<float*>(memory.data()); }
  float* weight() const { return by_row() + rows; }
};

}  // namespace

void LinearLoss::forward_gradients(RowSums* sums, const Slopes& slopes, const GradientsOut& out) {
  clear(out);
  if (count() == 0) return;
  const int64_t most = env("LCE_WS", int64_t{64} << 20) / (4 * p_.vocab) / 16 * 16;
  plan(std::clamp(most, kLceLanes, env("LCE_ROWS", 512)));
  const bool for_weight = out.weight != nullptr, for_hidden = out.hidden != nullptr;
  const int64_t pitch = lce_pitch(chunk_rows_), tiles = block_tiles();
  const int64_t depth = words(tiles * kLceTile);
  const Scratch kept(4 * p_.vocab * pitch);
  const BlockMemory block(for_hidden ? lce_panels_size(lce_whole(chunk_rows_, 16), depth) : 0,
                          for_hidden ? lce_lanes_size(p_.dim, depth) : 0);
  const Scratch hidden_sums(for_hidden ? 4 * lce_whole(chunk_rows_, 16) * hidden_pitch() : 64);
  const bool wide = for_weight && p_.dtype != Dtype::f32 && chunk_rows_ < count();
  const Scratch weight_sums(wide ? 4 * p_.vocab * p_.dim : 64);
  auto* const hidden = for_hidden ? static_cast<float*>(hidden_sums.data()) : nullptr;
  auto* const x = static_cast<float*>(kept.data());
  for (int64_t first = 0; first < count(); first += chunk_rows_) {
    const auto c = pack(first, for_weight);
    logits(*c, x, sums);
    set_slopes(*c, sums->lse.data(), slopes);
    const bool last = first + chunk_rows_ >= count();
    float* const floats = wide ? static_cast<float*>(weight_sums.data())
                               : static_cast<float*>(out.weight);
    const WeightSums weight{
        static_cast<char*>(!for_weight || last || !wide ? out.weight : floats),
        last ? p_.dtype : Dtype::f32, first > 0 && for_weight ? floats : nullptr, 0};
    for (int64_t t = 0; t < tiles_; t += tiles) {
      const int64_t n = std::min(tiles, tiles_ - t);
      const int64_t tokens = std::min(p_.vocab - t * kLceTile, n * kLceTile);
      gradients(*c, {t, n, tokens, depth, block.by_row(), block.weight()}, x, weight, hidden,
                t > 0);
    }
    if (for_hidden) store_hidden(*c, hidden, out.hidden);
  }
}

void LinearLoss::backward(const float* lse, const Slopes& slopes, const GradientsOut& out) {
  clear(out);
  if (count() == 0) return;
  plan(env("LCE_ROWS", 512));
  const bool for_weight = out.weight != nullptr, for_hidden = out.hidden != nullptr;
  const int64_t tiles = block_tiles(), depth = words(tiles * kLceTile);
  const int64_t chunks = ceil_div(count(), chunk_rows_);
  const BlockMemory block(for_hidden ? lce_panels_size(lce_whole(chunk_rows_, 16), depth) : 0,
                          for_hidden ? lce_lanes_size(p_.dim, depth) : 0);
  const int64_t chunk_sums = lce_whole(chunk_rows_, 16) * hidden_pitch();
  const Scratch hidden_sums(for_hidden ? 4 * chunks * chunk_sums : 64);
  const bool wide = for_weight && p_.dtype != Dtype::f32 && chunks > 1;
  const Scratch weight_sums(wide ? 4 * tiles * kLceTile * p_.dim : 64);
  const int64_t row_bytes = p_.dim * dtype_size(p_.dtype);
  std::unique_ptr<Chunk> c;
  for (int64_t t = 0; t < tiles_; t += tiles) {
    const int64_t n = std::min(tiles, tiles_ - t), v = t * kLceTile;
    const int64_t tokens = std::min(p_.vocab - v, n * kLceTile);
    char* const to = for_weight ? static_cast<char*>(out.weight) + v * row_bytes : nullptr;
    auto* const floats = wide ? static_cast<float*>(weight_sums.data())
                              : reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < chunks; ++i) {
      if (c == nullptr || chunks > 1) {
        c = pack(i * chunk_rows_, for_weight);
        set_slopes(*c, lse, slopes);
      }
      const bool last = i + 1 == chunks;
      const WeightSums weight{wide && !last ? reinterpret_cast<char*>(floats) : to,
                              last ? p_.dtype : Dtype::f32,
                              i > 0 && for_weight ? floats : nullptr, v};
      gradients(*c, {t, n, tokens, depth, block.by_row(), block.weight()}, nullptr, weight,
                for_hidden ? static_cast<float*>(hidden_sums.data()) + i * chunk_sums : nullptr,
                t > 0);
    }
  }
  for (int64_t i = 0; for_hidden && i < chunks; ++i) {
    const Chunk rows{{std::min(chunk_rows_, count() - i * chunk_rows_), 0,
                      rows_.row.data() + i * chunk_rows_, nullptr, nullptr, nullptr, nullptr,
                      nullptr, nullptr, nullptr, nullptr, nullptr},
                     0, {}, {}, {}};
    store_hidden(rows, static_cast<const float*>(hidden_sums.data()) + i * chunk_sums, out.hidden);
  }
}

}  // namespace tenfold::cpu
