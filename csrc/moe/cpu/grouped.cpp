// SPDX-License-Identifier: Apache-2.0
#include "moe/cpu/grouped.h"

#include <algorithm>
#include <memory>

#include "core/cpu/past_caches.h"
#include "core/parallel.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kRoundFloats = int64_t{8} << 20;  // of rows that wait for their sum
// Tasks that keep many threads busy. Not the number of threads: partial sums belong to a block.
constexpr int64_t kEnoughTasks = 64;

// A thread's work is worth its waking; about 50 GFLOP/s (by AMX 1000) and 10 GB/s.
double micros(int64_t flops, int64_t bytes, bool by_tiles = false) {
  return static_cast<double>(flops) / (by_tiles ? 1e6 : 5e4) + static_cast<double>(bytes) / 1e4;
}

int64_t row_blocks(int64_t rows) {
  return ceil_div(rows, kMoeRows);
}

// Columns of a block of a product: fewer where there would not be enough tasks, but so many that
// packing the rows costs little.
Parts column_blocks(const GroupedProduct& p, const Groups& g, int64_t cols) {
  int64_t tasks = 0, most_rows = 0;
  for (int64_t i = 0; i < g.count; ++i) {
    tasks += row_blocks(g.length(i));
    most_rows = std::max(most_rows, g.length(i));
  }
  const bool side_by_side = p.parts == 2 && !p.together;
  int64_t width = side_by_side ? kMoeCols / 2 : kMoeCols;
  const int64_t least = most_rows > kMoeFewRows ? 2 * kMoeColUnit : kMoeColUnit;
  while (width > least && tasks * ceil_div(cols, width) < kEnoughTasks) width /= 2;
  return {cols, kMoeColUnit, std::max<int64_t>(1, ceil_div(cols, width))};
}

struct Task {
  int64_t group, row, rows, block, blocks;
};

// By AMX it is the rows that are packed: once for as many blocks as leave enough tasks. Else blocks
// of rows of a block of columns follow each other: its part of the matrix stays in a cache.
int64_t blocks_of_task(Isa isa, const GroupedProduct& p, const Groups& g, int64_t blocks) {
  if (!moe_by_tiles(isa, p.dtype) || !p.w[0].by_rows) return 1;
  int64_t rows = 0;
  for (int64_t i = 0; i < g.count; ++i) rows += row_blocks(g.length(i));
  return std::clamp<int64_t>(rows * blocks / kEnoughTasks, 1, blocks);
}

std::vector<Task> list_tasks(const Groups& g, int64_t blocks, int64_t of_task) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < g.count; ++i) {
    if (g.length(i) == 0) continue;
    const Parts down{g.length(i), kMoeRowUnit, row_blocks(g.length(i))};
    for (int64_t b = 0; b < blocks; b += of_task)
      for (int64_t r = 0; r < down.count; ++r)
        if (down.length(r) > 0)
          tasks.push_back(
              {i, g.offsets[i] + down.begin(r), down.length(r), b, std::min(of_task, blocks - b)});
  }
  return tasks;
}

class ProductWorker {
 public:
  ProductWorker(Isa isa, const GroupedProduct& p, const std::vector<Task>& tasks,
                const Parts& across, int64_t first, const Finish& finish)
      : isa_(isa),
        p_(p),
        tasks_(tasks),
        across_(across),
        first_(first),
        finish_(finish),
        memory_{kMoeSums, moe_product_room(isa, p.dtype, p.depth)} {}

  void operator()(int64_t item) const {
    const Task& t = tasks_[item];
    const MoeRows* packed = nullptr;
    for (int64_t b = t.block; b < t.block + t.blocks; ++b) run(t, b, &packed);
  }

 private:
  void run(const Task& t, int64_t block, const MoeRows** packed) const {
    const int64_t col = first_ + across_.begin(block), cols = across_.length(block);
    ProductTile tile{{t.row, t.rows, cols}, t.group, col, block, {}};
    for (int64_t i = 0; i < p_.parts; ++i) {
      const Matrices& w = p_.w[i];
      const int64_t at = t.group * w.group_stride + col * (w.by_rows ? w.stride : 1);
      float* const sums = memory_[0] + (i > 0 && !p_.together ? kMoeCols / 2 : 0);
      TENFOLD_ISA_CALL_AS(isa_, moe_product,
                          {p_.dtype, p_.a[i], t.row, t.rows,
                           static_cast<const char*>(w.data) + at * dtype_size(p_.dtype), w.stride,
                           w.by_rows, cols, p_.depth, i > 0 && p_.together,
                           *packed != nullptr && **packed == p_.a[i], sums, memory_[1]});
      *packed = &p_.a[i];
      tile.sums[i] = sums;
    }
    finish_(tile);
  }

  Isa isa_;
  const GroupedProduct& p_;
  const std::vector<Task>& tasks_;
  const Parts& across_;
  int64_t first_;
  const Finish& finish_;
  Floats memory_;
};

void for_tokens(int64_t tokens, int64_t k, int64_t cols,
                const std::function<void(int64_t, int64_t)>& f) {
  parallel_for(tokens, micros(0, (k + 1) * cols * 4), f);
}

}  // namespace

int64_t product_blocks(const GroupedProduct& p, const Groups& g, int64_t cols) {
  return column_blocks(p, g, cols).count;
}

void grouped_product(Isa isa, const GroupedProduct& p, const Groups& g, const Finish& finish) {
  grouped_product(isa, p, g, 0, p.cols, finish);
}

void grouped_product(Isa isa, const GroupedProduct& p, const Groups& g, int64_t first, int64_t cols,
                     const Finish& finish) {
  if (cols == 0) return;
  const Parts across = column_blocks(p, g, cols);
  const std::vector<Task> tasks =
      list_tasks(g, across.count, blocks_of_task(isa, p, g, across.count));
  int64_t active = 0;
  for (int64_t i = 0; i < g.count; ++i) active += g.length(i) > 0;
  const int64_t area = p.parts * cols * p.depth;
  for_each_task(
      static_cast<int64_t>(tasks.size()),
      micros(2 * g.rows() * area, active * area * dtype_size(p.dtype), moe_by_tiles(isa, p.dtype)),
      [&] { return ProductWorker(isa, p, tasks, across, first, finish); });
}

Finish store_as(Isa isa, Dtype dtype, const GroupedProduct& p, float scale, void* out,
                int64_t stride) {
  const int64_t parts = p.together ? 1 : p.parts, cols = p.cols, size = dtype_size(dtype);
  return [=](const ProductTile& t) {
    for (int64_t i = 0; i < parts; ++i)
      TENFOLD_ISA_CALL_AS(isa, moe_store, t.rows,
                          {t.sums[i], scale, nullptr, dtype,
                           static_cast<char*>(out) + (i * cols + t.col) * size, stride});
  };
}

void grouped_wgrad(Isa isa, Dtype dtype, const MoeRows& dy, int64_t dy_cols, const MoeRows& a,
                   int64_t a_cols, const Groups& g, void* out) {
  const Parts down{dy_cols, kMoeRowUnit, ceil_div(dy_cols, kMoeRows)};
  const Parts across{a_cols, kMoeColUnit, ceil_div(a_cols, kMoeCols)};
  const int64_t tiles = down.count * across.count, size = dtype_size(dtype);
  const int64_t area = dy_cols * a_cols, bytes = g.count * area * size;
  const bool past = past_caches(bytes, true);
  for_each_task(g.count * tiles, micros(2 * g.rows() * area, bytes, moe_by_tiles(isa, dtype)), [&] {
    return [&, memory = std::make_shared<Floats>(
                   std::initializer_list<int64_t>{kMoeSums, kMoeRoom})](int64_t item) {
      const int64_t group = item / tiles, row = item % tiles / across.count;
      const int64_t col = item % across.count, first_row = down.begin(row);
      const int64_t first_col = across.begin(col);
      const int64_t at = group * area + first_row * a_cols + first_col;
      TENFOLD_ISA_CALL_AS(
          isa, moe_wgrad,
          {dtype, dy, a, g.offsets[group], g.length(group), first_row, down.length(row), first_col,
           across.length(col), static_cast<char*>(out) + at * size, a_cols, past, (*memory)[0],
           (*memory)[1]});
    };
  });
}

int64_t round_cols(int64_t rows, int64_t cols) {
  const int64_t fits = kRoundFloats / std::max<int64_t>(rows, 1) / kMoeCols * kMoeCols;
  return std::min(cols, std::max(fits, kMoeCols));
}

void product_to_tokens(Isa isa, const GroupedProduct& p, const SortedSlots& slots, int64_t tokens,
                       int64_t k, const float* factor, const GroupedProduct* base, void* out) {
  const Groups groups{slots.offsets.data(), static_cast<int64_t>(slots.offsets.size()) - 1};
  const int64_t all[2] = {0, tokens}, rows = groups.rows(), size = dtype_size(p.dtype);
  const int64_t width = round_cols(rows + (base != nullptr ? tokens : 0), p.cols);
  const Floats memory{rows * width, base != nullptr ? tokens * width : 0};
  for (int64_t first = 0; first < p.cols; first += width) {
    const int64_t cols = std::min(width, p.cols - first);
    const auto keep = [&](float* to, const float* by) {
      return [=](const ProductTile& t) {
        TENFOLD_ISA_CALL_AS(isa, moe_store, t.rows,
                            {t.sums[0], 1.0f, by, Dtype::f32, to + t.col - first, width});
      };
    };
    grouped_product(isa, p, groups, first, cols, keep(memory[0], factor));
    if (base != nullptr)
      grouped_product(isa, *base, {all, 1}, first, cols, keep(memory[1], nullptr));
    for_tokens(tokens, k, cols, [&](int64_t begin, int64_t end) {
      const MoeBase added{base != nullptr ? memory[1] : nullptr, width};
      TENFOLD_ISA_CALL_AS(isa, moe_combine, {begin, end - begin, cols},
                          {slots.inverse.data(), k, rows, Dtype::f32, memory[0], width, added,
                           p.dtype, static_cast<char*>(out) + first * size, p.cols});
    });
  }
}

void slots_to_tokens(Isa isa, Dtype dtype, const SortedSlots& slots, int64_t tokens, int64_t k,
                     const void* in, int64_t cols, void* out) {
  for_tokens(tokens, k, cols, [&](int64_t begin, int64_t end) {
    TENFOLD_ISA_CALL_AS(
        isa, moe_combine, {begin, end - begin, cols},
        {slots.inverse.data(), k, slots.routed(), dtype, in, cols, {}, dtype, out, cols});
  });
}

}  // namespace tenfold::cpu
