// SPDX-License-Identifier: Apache-2.0
// CPU kernel of dha_attention_backward: five products per tile, nothing of size Sq x Sk.
//
//   P = exp(logit - lse), dP = dO V^T, dS = P * (dP - delta + dlse), delta_i = dO_i . O_i
//   dV += P^T dO, dK += dS^T Q, dQ += dS K
//
// A task has one query head and some of its rows, kChunk at a time. For each block of keys that the
// chunk sees: k^T, v^T and k are packed; for each block of its queries P and dS of the tile are
// made in registers, kRows queries x kLanes keys, and stored once; then the three sums are added
// to. dQ of the chunk stays in this task's memory, dK and dV of the task in float32 rows that
// sum_gradient adds up over the heads that share them, so no product is computed twice (with one
// owner for each of dQ, dK and dV it would be eight products, not five).
// What causal masks and windows hide is left out in units of the register blocks.
#include "attention/cpu/dha_attention_backward.h"
#include "attention/cpu/dha_attention_backward_stage.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr float kInf = __builtin_inff();
constexpr float kHidden = -1.0f;  // no derivative of a softcap
constexpr double kLog2eExact = 1.4426950408889634;

// x as the sum of two floats; infinities and NaN stay what they are.
inline void split(double x, float* high, float* low) {
  *high = static_cast<float>(x);
  *low = __builtin_isfinite(*high) ? static_cast<float>(x - *high) : 0.0f;
}

// A tile: queries [i0, i0 + rows) of the sequence, which are rows [at, at + rows) of the chunk, and
// keys [j0, j0 + keys).
struct Tile {
  int64_t i0, at, rows, j0, keys;
};

struct Range {
  int64_t first, last;
};

// What is done to a product to make it a logit: scaled; and with a relative bias; anything.
enum class Logits { plain, relative, shaped };

inline Range clamp(int64_t first, int64_t last, int64_t lo, int64_t hi) {
  first = first < lo ? lo : first, last = last > hi ? hi : last;
  return last > first ? Range{first, last} : Range{0, 0};
}

template <class T, class M>
class Task {
  using Word = typename M::Word;

 public:
  Task(const AttentionBackward& p, const AttentionBackwardTask& t) : p_(p), t_(t) {
    lay_out(p, static_cast<uint32_t*>(t.scratch), &o_);
    const int64_t k_head = p.kmap[t.head], v_head = p.vmap[t.head];
    q_ = at(p.q, p.q_at, t.head, t.q_first), k_ = at(p.k, p.k_at, k_head, t.k_first);
    v_ = at(p.v, p.v_at, v_head, t.k_first), out_ = at(p.out, p.out_at, t.head, t.q_first);
    dout_ = at(p.dout, p.dout_at, t.head, t.q_first);
    dq_ = const_cast<T*>(at(p.dq, p.dq_at, t.head, t.q_first));
    lse_ = t.batch * p.lse_batch + t.head * p.lse_head + t.q_first;
    split(p.scale * kLog2eExact, &log2_scale_, &log2_scale_low_);
    offset_ = first_place(p.mask, t.num_queries, t.num_keys);
    depth_ = (p.head_dim + M::kDepth - 1) / M::kDepth;
    value_depth_ = (p.value_dim + M::kDepth - 1) / M::kDepth;
  }

  void run() {
    const int64_t pitch = backward_pitch(p_.head_dim), value_pitch = backward_pitch(p_.value_dim);
    clear_words(t_.dk, (t_.key_end - t_.key_begin) * pitch);
    clear_words(t_.dv, (t_.key_end - t_.key_begin) * value_pitch);
    if (t_.distances != nullptr) {
      clear_words(t_.distances, p_.relative.head);
      clear_words(o_.ds_floats - kMargin, kBlock * kTilePitch + kMargin);
    }
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kChunk) {
      const int64_t rows = t_.row_end - row < kChunk ? t_.row_end - row : kChunk;
      stage_chunk(row, rows);
      const int64_t lo = seen(row).first / kBlock * kBlock, hi = seen(row + rows - 1).last;
      for (int64_t j = lo; j < hi; j += kBlock) {
        const int64_t keys = hi - j < kBlock ? hi - j : kBlock;
        stage_keys(j, keys);
        for (int64_t at = 0; at < rows; at += kBlock) {
          const Tile tile{row + at, at, rows - at < kBlock ? rows - at : kBlock, j, keys};
          if (seen(tile.i0 + tile.rows - 1).last <= j || seen(tile.i0).first >= j + keys) continue;
          make_tile(tile);
          add_tile(tile);
          if (t_.distances != nullptr) add_distances(tile);
        }
      }
      write_queries(row, rows);
    }
  }

 private:
  const T* at(const void* data, const RowLayout& l, int64_t head, int64_t row) const {
    return static_cast<const T*>(data) + t_.batch * l.batch + head * l.head + row * l.row;
  }

  KeyRange seen(int64_t row) const {
    return visible_keys(p_.mask, row, t_.num_queries, t_.num_keys);
  }

  // Rows of the tile that see any of the keys [first, last), and keys that any of its rows
  // [first, last) sees; both relative to the tile.
  Range rows_that_see(const Tile& tile, int64_t first, int64_t last) const {
    return clamp(first - p_.mask.right - offset_ - tile.i0, last + p_.mask.left - offset_ - tile.i0,
                 0, tile.rows);
  }
  Range keys_seen(const Tile& tile, int64_t first, int64_t last) const {
    return clamp(seen(tile.i0 + first).first - tile.j0, seen(tile.i0 + last - 1).last - tile.j0, 0,
                 tile.keys);
  }

  void stage_chunk(int64_t row, int64_t rows) {
    const int64_t padded = round_up(rows, kRows);
    stage_rows(q_ + row * p_.q_at.row, p_.q_at.row, rows, padded, p_.head_dim, o_.q, o_.d_pitch,
               o_.q_rows, o_.rows_pitch);
    stage_rows(dout_ + row * p_.dout_at.row, p_.dout_at.row, rows, padded, p_.value_dim, o_.dout,
               o_.dv_pitch, o_.dout_rows, o_.rows_dv_pitch);
    clear_words(o_.dq, padded * o_.rows_pitch);
    for (int64_t r = 0; r < padded; ++r) {
      // exp2(x - inf) = 0: rows that see nothing, and those past the end.
      o_.lse2[r] = kInf, o_.lse2_low[r] = 0.0f, o_.delta[r] = 0.0f;
      if (r >= rows) continue;
      const float lse = p_.lse[lse_ + row + r];
      if (lse != -kInf) split(lse * kLog2eExact, o_.lse2 + r, o_.lse2_low + r);
      o_.delta[r] = row_dot(dout_ + (row + r) * p_.dout_at.row, out_ + (row + r) * p_.out_at.row);
      if (p_.dlse != nullptr) o_.delta[r] -= p_.dlse[lse_ + row + r];
    }
  }

  float row_dot(const T* a, const T* b) const {
    VF sum = set1(0.0f);
    int64_t d = 0;
    for (; d + kWidth <= p_.value_dim; d += kWidth) sum = fma(load(a + d), load(b + d), sum);
    const int n = static_cast<int>(p_.value_dim - d);
    if (n > 0) sum = fma(load_n(a + d, n), load_n(b + d, n), sum);
    return hsum(sum);
  }

  void stage_keys(int64_t j, int64_t keys) {
    const T *k = k_ + j * p_.k_at.row, *v = v_ + j * p_.v_at.row;
    if constexpr (M::kDepth == 1) {
      const int64_t pitch = o_.rows_pitch, value_pitch = o_.rows_dv_pitch;
      stage_rows(v, p_.v_at.row, keys, keys, p_.value_dim, o_.k_rows, value_pitch, o_.k_rows, 0);
      stage_panels(o_.k_rows, value_pitch, keys, p_.value_dim, o_.v_panels);
      stage_rows(k, p_.k_at.row, keys, keys, p_.head_dim, o_.k_rows, pitch, o_.k_rows, 0);
      stage_panels(o_.k_rows, pitch, keys, p_.head_dim, o_.k_panels);
    } else {
      stage_panels(v, p_.v_at.row, keys, p_.value_dim, o_.v_panels);
      stage_panels(k, p_.k_at.row, keys, p_.head_dim, o_.k_panels);
      stage_rows(k, p_.k_at.row, keys, keys, p_.head_dim, static_cast<Word*>(nullptr), 0, o_.k_rows,
                 o_.rows_pitch);
    }
  }

  // P and dS of a tile, panel by panel of keys.
  void make_tile(const Tile& tile) {
    if (p_.dropout.below != 0)
      draw_tile(p_.dropout, static_cast<uint32_t>(t_.batch * p_.q_heads + t_.head), tile.i0,
                tile.rows, tile.j0, tile.keys, o_.keep);
    for (int64_t j = 0; j < tile.keys; j += kLanes) {
      if (p_.bias.kind != BiasKind::none || p_.softcap > 0.0f) {
        make_panel<Logits::shaped>(tile, j);
      } else if (p_.relative.data != nullptr) {
        make_panel<Logits::relative>(tile, j);
      } else {
        make_panel<Logits::plain>(tile, j);
      }
    }
  }

  // What was dropped becomes 0, the rest larger.
  inline __attribute__((always_inline)) void drop(int64_t r, int64_t j,
                                                  VF (&acc)[kRows][kVecs]) const {
    const VF scale = set1(p_.dropout.scale), zero = set1(0.0f);
    const uint32_t* keep = o_.keep + r * kKeepPitch + j / kWidth;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v)
        acc[i][v] = select(lanes_of(keep[i * kKeepPitch + v]), acc[i][v] * scale, zero);
  }

  template <Logits kLogits>
  void make_panel(const Tile& tile, int64_t j) {
    const auto for_strips = [&](const auto& use) {
      for (int64_t r = 0; r < tile.rows; r += kRows) {
        const int64_t last = r + kRows < tile.rows ? r + kRows : tile.rows;
        const Range any = keys_seen(tile, r, last);
        use(r, last, any.first < j + kLanes && any.last > j);
      }
    };
    // A panel of float32 fills half of L1: first all products with k^T, then all with v^T.
    constexpr bool kTogether = M::kDepth > 1;
    for_strips([&](int64_t r, int64_t last, bool seen) {
      if (!seen) return clear_block(r, j);
      make_weights<kLogits>(tile, r, j, last);
      if constexpr (kTogether) make_logit_gradients<kLogits>(tile, r, j, last);
    });
    if constexpr (kTogether) return;
    for_strips([&](int64_t r, int64_t last, bool seen) {
      if (seen) make_logit_gradients<kLogits>(tile, r, j, last);
    });
  }

  void clear_block(int64_t r, int64_t j) {
    VF zero[kRows][kVecs];
    clear(zero);
    put_columns(zero, o_.p, r, j);
    put_columns(zero, o_.ds, r, j);
    if constexpr (M::kDepth > 1) {
      put_rows(zero, r, j);
      if (t_.distances != nullptr) put_floats(zero, r, j);
    }
  }

  // P of kRows queries x kLanes keys.
  template <Logits kLogits>
  void make_weights(const Tile& tile, int64_t r, int64_t j, int64_t last) {
    VF acc[kRows][kVecs];
    dot_rows<M>(o_.q + (tile.at + r) * o_.d_pitch, o_.d_pitch, o_.k_panels + j * depth_, depth_,
                acc);
    const float *lse2 = o_.lse2 + tile.at + r, *lse2_low = o_.lse2_low + tile.at + r;
    constexpr bool kShaped = kLogits == Logits::shaped;
    if constexpr (kShaped) {
      shape_logits(tile, r, j, last, acc);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVecs; ++v)
          acc[i][v] = exp2_below(acc[i][v] - set1(lse2[i]) - set1(lse2_low[i]));
    } else {
      // scale * log2(e) and lse * log2(e) in two parts each: their rounding would be the same for
      // all keys of a row, and so add up in its gradients.
      const VF high = set1(log2_scale_), low = set1(log2_scale_low_);
      [[maybe_unused]] const float* bias = nullptr;
      if constexpr (kLogits == Logits::relative)
        bias = p_.relative.data + t_.head * p_.relative.head + p_.relative.zero + tile.j0 + j -
               tile.i0 - r;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVecs; ++v) {
          VF x = fma(acc[i][v], high, set1(-lse2[i]));
          if constexpr (kLogits == Logits::relative)
            x = fma(load(bias - i + v * kWidth), set1(kLog2e), x);
          acc[i][v] = exp2_below(fma(acc[i][v], low, x) - set1(lse2_low[i]));
        }
    }
    if (needs_mask(tile, r, j, last)) hide(tile, r, j, last, acc);
    if constexpr (kShaped) hide(r, acc);
    float* prob = o_.prob + r * kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) store(prob + i * kLanes + v * kWidth, acc[i][v]);
    if (p_.dropout.below != 0) drop(r, j, acc);
    put_columns(acc, o_.p, r, j);
  }

  // dS of them.
  template <Logits kLogits>
  void make_logit_gradients(const Tile& tile, int64_t r, int64_t j, int64_t last) {
    VF acc[kRows][kVecs];
    dot_rows<M>(o_.dout + (tile.at + r) * o_.dv_pitch, o_.dv_pitch, o_.v_panels + j * value_depth_,
                value_depth_, acc);
    const float *delta = o_.delta + tile.at + r, *prob = o_.prob + r * kLanes;
    constexpr bool kShaped = kLogits == Logits::shaped;
    [[maybe_unused]] const float* slope = o_.slope + r * kLanes;
    if (p_.dropout.below != 0) drop(r, j, acc);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) {
        const int64_t at = i * kLanes + v * kWidth;
        acc[i][v] = load(prob + at) * (acc[i][v] - set1(delta[i]));
        if constexpr (kShaped) acc[i][v] = acc[i][v] * load(slope + at);
      }
    // Again, for 0 * NaN of a hidden value.
    if (needs_mask(tile, r, j, last)) hide(tile, r, j, last, acc);
    if constexpr (kShaped) hide(r, acc);
    put_columns(acc, o_.ds, r, j);
    if constexpr (M::kDepth > 1) {
      put_rows(acc, r, j);
      if (t_.distances != nullptr) put_floats(acc, r, j);
    }
  }

  // An lse that is not of these logits may lie below them: 2^128 is inf on every ISA, more is not.
  static inline VF exp2_below(VF x) { return exp2(vmin(set1(128.0f), x)); }

  // Logits in log2 units with softcap and bias. Keeps the derivative of the softcap (1 without), or
  // kHidden: a bias of -inf hides the key whatever its logit is.
  void shape_logits(const Tile& tile, int64_t r, int64_t j, int64_t last,
                    VF (&acc)[kRows][kVecs]) const {
    const float cap = p_.softcap;
    for (int i = 0; i < kRows; ++i) {
      float bias[kLanes];
      read_bias(tile, r + i < last ? r + i : r, j, bias);
      for (int v = 0; v < kVecs; ++v) {
        VF x = acc[i][v] * set1(p_.scale), slope = set1(1.0f);
        if (cap > 0.0f) {
          const VF t = tanh(x / set1(cap));
          x = t * set1(cap);
          slope = set1(1.0f) - t * t;
        }
        const VF b = load(bias + v * kWidth);
        acc[i][v] = (x + b) * set1(kLog2e);
        store(o_.slope + (r + i) * kLanes + v * kWidth,
              select(eq(b, set1(-kInf)), set1(kHidden), slope));
      }
    }
  }

  // Bias of row r of the tile at keys j..; 0 past the end.
  void read_bias(const Tile& tile, int64_t r, int64_t j, float (&to)[kLanes]) const {
    const AttentionBias& b = p_.bias;
    const int64_t first =
        t_.batch * b.batch + t_.head * b.head + (tile.i0 + r) * b.row + (tile.j0 + j) * b.key;
    const int n = static_cast<int>(tile.keys - j < kLanes ? tile.keys - j : kLanes);
    for (int i = n; i < kLanes; ++i) to[i] = 0.0f;
    switch (b.kind) {
      case BiasKind::none:
        for (int i = 0; i < n; ++i) to[i] = 0.0f;
        return;
      case BiasKind::boolean:
        for (int i = 0; i < n; ++i)
          to[i] = static_cast<const uint8_t*>(b.data)[first + i * b.key] != 0 ? 0.0f : -kInf;
        return;
      case BiasKind::f32: return widen_bias(static_cast<const float*>(b.data) + first, n, to);
      case BiasKind::bf16: return widen_bias(static_cast<const bf16_t*>(b.data) + first, n, to);
      case BiasKind::f16: return widen_bias(static_cast<const fp16_t*>(b.data) + first, n, to);
    }
  }

  template <class B>
  void widen_bias(const B* from, int n, float (&to)[kLanes]) const {
    if (p_.bias.key == 1 && n == kLanes) {
      for (int v = 0; v < kVecs; ++v) store(to + v * kWidth, load(from + v * kWidth));
      return;
    }
    for (int i = 0; i < n; ++i) store_n(to + i, load_n(from + i * p_.bias.key, 1), 1);
  }

  bool needs_mask(const Tile& tile, int64_t r, int64_t j, int64_t last) const {
    return tile.keys - j < kLanes || seen(tile.i0 + last - 1).first > tile.j0 + j ||
           seen(tile.i0 + r).last < tile.j0 + j + kLanes;
  }

  // 0 where a key is hidden, by its place or by its bias.
  inline __attribute__((always_inline)) void hide(const Tile& tile, int64_t r, int64_t j,
                                                  int64_t last, VF (&acc)[kRows][kVecs]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const KeyRange range = seen(tile.i0 + (r + i < last ? r + i : r));
      const Range lanes = clamp(range.first - tile.j0 - j, range.last - tile.j0 - j, 0,
                                tile.keys - j < kLanes ? tile.keys - j : kLanes);
      const VI before = seti(static_cast<uint32_t>(lanes.first - 1));
      const VI end = seti(static_cast<uint32_t>(lanes.last));
      for (int v = 0; v < kVecs; ++v) {
        const VI lane = iota() + seti(static_cast<uint32_t>(v * kWidth));
        acc[i][v] = select(both(lt(before, lane), lt(lane, end)), acc[i][v], set1(0.0f));
      }
    }
  }
  inline __attribute__((always_inline)) void hide(int64_t r, VF (&acc)[kRows][kVecs]) const {
    const float* slope = o_.slope + r * kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) {
        const VM hidden = eq(load(slope + i * kLanes + v * kWidth), set1(kHidden));
        acc[i][v] = select(hidden, set1(0.0f), acc[i][v]);
      }
  }

  // Into a tile whose summed dimension will be its rows.
  static inline __attribute__((always_inline)) void put_columns(VF (&acc)[kRows][kVecs], Word* tile,
                                                                int64_t r, int64_t j) {
    Word* to = tile + r / M::kDepth * kTilePitch + j;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i += M::kDepth, to += kTilePitch)
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (M::kDepth == 1) {
          store(to + v * kWidth, acc[i][v]);
        } else {
          store(to + v * kWidth, M::pair(acc[i][v], acc[i + 1][v]));
        }
      }
  }

  // Dot: into the tile whose summed dimension will be along its rows.
  void put_rows(VF (&acc)[kRows][kVecs], int64_t r, int64_t j) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v)
        M::store_pairs(o_.ds_rows + (r + i) * kDsPitch<M> + (j + v * kWidth) / 2, acc[i][v]);
  }

  // Into the tile whose diagonals will be summed.
  void put_floats(VF (&acc)[kRows][kVecs], int64_t r, int64_t j) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v)
        store(o_.ds_floats + (r + i) * kTilePitch + j + v * kWidth, acc[i][v]);
  }

  void add_distances(const Tile& tile) {
    sum_diagonals(o_.ds_floats, tile.rows, tile.keys,
                  t_.distances + p_.relative.zero + tile.j0 - tile.i0);
  }

  // dV += P^T dO, dK += dS^T Q, dQ += dS K
  void add_tile(const Tile& tile) {
    constexpr int kDepth = M::kDepth;
    const int64_t dim = backward_pitch(p_.head_dim), value_dim = backward_pitch(p_.value_dim);
    float* const dk = t_.dk + (tile.j0 - t_.key_begin) * dim;
    float* const dv = t_.dv + (tile.j0 - t_.key_begin) * value_dim;
    Range rows[kBlock / kRows], keys[kBlock / kRows];  // words of each strip's summed dimension
    const auto words = [](const Range& r) {
      return Range{r.first / kDepth, (r.last + kDepth - 1) / kDepth};
    };
    for (int64_t j = 0; j < tile.keys; j += kRows)
      rows[j / kRows] = words(rows_that_see(tile, tile.j0 + j, tile.j0 + j + kRows));
    for (int64_t r = 0; r < tile.rows; r += kRows)
      keys[r / kRows] = words(keys_seen(tile, r, r + kRows < tile.rows ? r + kRows : tile.rows));
    const auto add_columns = [&](const Word* weights, const Word* from, int64_t pitch, float* to,
                                 int64_t to_dim) {
      for_strips_and_panels(tile.keys, to_dim, [&](int64_t j, int64_t d) {
        const Range at = rows[j / kRows];
        add_rows<M, Along::columns>(weights + at.first * kTilePitch + j, kTilePitch,
                                    from + (tile.at / kDepth + at.first) * pitch + d, pitch,
                                    at.last - at.first, to + j * to_dim + d, to_dim, to_dim - d);
      });
    };
    add_columns(o_.p, o_.dout_rows, o_.rows_dv_pitch, dv, value_dim);
    add_columns(o_.ds, o_.q_rows, o_.rows_pitch, dk, dim);
    for_strips_and_panels(tile.rows, dim, [&](int64_t r, int64_t d) {
      const Range at = keys[r / kRows];
      add_rows<M, Along::rows>(o_.ds_rows + r * kDsPitch<M> + at.first, kDsPitch<M>,
                               o_.k_rows + at.first * o_.rows_pitch + d, o_.rows_pitch,
                               at.last - at.first, o_.dq + (tile.at + r) * o_.rows_pitch + d,
                               o_.rows_pitch, dim - d);
    });
  }

  // Calls use(strip, d) for strips of kRows and panels of kLanes columns. The operand of a float32
  // tile does not fit L1 whole: one panel of it at a time.
  template <class Use>
  static void for_strips_and_panels(int64_t rows, int64_t dim, const Use& use) {
    if constexpr (M::kDepth == 1) {
      for (int64_t d = 0; d < dim; d += kLanes)
        for (int64_t r = 0; r < rows; r += kRows) use(r, d);
    } else {
      for (int64_t r = 0; r < rows; r += kRows)
        for (int64_t d = 0; d < dim; d += kLanes) use(r, d);
    }
  }

  void write_queries(int64_t row, int64_t rows) {
    const VF scale = set1(p_.scale);
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = o_.dq + r * o_.rows_pitch;
      T* to = dq_ + (row + r) * p_.dq_at.row;
      int64_t d = 0;
      for (; d + kWidth <= p_.head_dim; d += kWidth) store(to + d, load(from + d) * scale);
      if (d < p_.head_dim)
        store_n(to + d, load(from + d) * scale, static_cast<int>(p_.head_dim - d));
    }
  }

  const AttentionBackward& p_;
  const AttentionBackwardTask& t_;
  Operands<M> o_{};
  const T *q_, *k_, *v_, *out_, *dout_;
  T* dq_;
  float log2_scale_, log2_scale_low_;
  int64_t lse_, offset_, depth_, value_depth_;
};

template <class T>
void sum_rows(const GradientSum& s) {
  const VF scale = set1(s.scale);
  for (int64_t r = s.row_begin; r < s.row_end; ++r)
    for (int64_t d = 0; d < s.dim; d += kWidth) {
      const int n = static_cast<int>(s.dim - d < kWidth ? s.dim - d : kWidth);
      VF sum = s.acc_in != nullptr ? load_n(s.acc_in + r * s.acc_row + d, n) : set1(0.0f);
      for (int64_t i = 0; i < s.num_shares; ++i)
        if (const GradientShare& g = s.shares[i]; r >= g.first && r < g.last)
          sum = sum + load(g.rows + (r - g.first) * s.pitch + d);
      if (s.acc_out != nullptr) {
        store_n(s.acc_out + r * s.acc_row + d, sum, n);
      } else {
        store_n(static_cast<T*>(s.out) + r * s.out_row + d, sum * scale, n);
      }
    }
}

template <class M>
int64_t scratch_of(const AttentionBackward& p) {
  Operands<M> o;
  return lay_out(p, nullptr, &o) * 4;
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackward& p) {
#if defined(TENFOLD_ISA_BF16)
  if (p.dtype == Dtype::bf16) return scratch_of<Dot>(p);
#endif
  return scratch_of<Fma>(p);
}

void attention_backward_task(const AttentionBackward& p, const AttentionBackwardTask& t) {
#if defined(TENFOLD_ISA_BF16)
  if (p.dtype == Dtype::bf16) return Task<bf16_t, Dot>(p, t).run();
#else
  if (p.dtype == Dtype::bf16) return Task<bf16_t, Fma>(p, t).run();
#endif
  if (p.dtype == Dtype::f32) return Task<float, Fma>(p, t).run();
  Task<fp16_t, Fma>(p, t).run();
}

void sum_gradient(const GradientSum& s) {
  if (s.dtype == Dtype::f32) return sum_rows<float>(s);
  if (s.dtype == Dtype::bf16) return sum_rows<bf16_t>(s);
  sum_rows<fp16_t>(s);
}

TENFOLD_ISA_END
