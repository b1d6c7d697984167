// SPDX-License-Identifier: Apache-2.0
// The backward of bf16 attention by AMX tiles. A tile of scores is 96 queries x 96 keys, made as
// two halves of 48 queries, which are the lanes:
//   S^T = K Q^T, dP^T = V dO^T    left: panels of keys; right: lanes of queries
//   P^T and dS^T lane by lane; their rows, rounded to bf16, are the left operands of
//   dV += P^T dO, dK += dS^T Q    right: pairs of queries, the lanes are dims
//   dQ^T += K^T dS^T              left: panels of dims; right: pairs of keys
// Hidden pairs are multiplied too, as zeros, so what they meet must be finite: only calls that say
// so come here (AttentionBackward::by_tiles). No soft cap, no bias but a relative one.
#include "attention/cpu/dha_attention_backward.h"
#include "core/cpu/packed.h"

#if defined(TENFOLD_ISA_AMX)
TENFOLD_ISA_BEGIN
namespace {

class AmxTask {
  static constexpr int64_t kSide = kBackwardBlock, kHalf = kTileRows, kHalves = 10;
  static constexpr int64_t kQueries = kHalves * kHalf;  // staged at a time
  static constexpr int64_t kPitch = kHalf + kWidth;     // of a score tile: zeros between its rows
  static constexpr int64_t kRowPitch = kSide + 16;      // bf16, of the left operands
  static constexpr int64_t kPairs = kSide / 2;
  static_assert(kSide == 2 * kHalf && kSide % kAmxBlock == 0);

 public:
  AmxTask(const AttentionBackward& p, const AttentionBackwardTask& t) : p_(p), t_(t) {
    lay_out(static_cast<float*>(t.scratch));
  }

  static int64_t scratch(const AttentionBackward& p) {
    const AttentionBackwardTask none{};
    return AmxTask(p, none).words_ * 4;
  }

  void run() {
    const AmxTiles registers;
    clear(t_.dk, (t_.key_end - t_.key_begin) * backward_pitch(p_.head_dim));
    clear(t_.dv, (t_.key_end - t_.key_begin) * backward_pitch(p_.value_dim));
    if (t_.distances != nullptr) clear(t_.distances, p_.relative.head);
    clear(grads_ - kWidth, kSide * kPitch + kWidth);
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kQueries) {
      const int64_t rows = t_.row_end - row < kQueries ? t_.row_end - row : kQueries;
      stage_queries(row, rows);
      const int64_t lo = seen(row).first / kSide * kSide, hi = seen(row + rows - 1).last;
      for (int64_t j = lo; j < hi; j += kSide) {
        const int64_t keys = hi - j < kSide ? hi - j : kSide;
        stage_keys(j, keys);
        for (int64_t at = 0; at < rows; at += kSide) {
          const int64_t n = rows - at < kSide ? rows - at : kSide;
          if (seen(row + at + n - 1).last > j && seen(row + at).first < j + keys)
            add_tile(row + at, at, n, j, keys);
        }
      }
      write_queries(row, rows);
    }
  }

 private:
  void lay_out(float* at) {
    const float* const start = at;
    const auto take = [&](int64_t words) {
      float* const here = at;
      at += round_up(words, 16);
      return here;
    };
    depth_ = amx_words(p_.head_dim), value_depth_ = amx_words(p_.value_dim);
    dims_ = round_up(p_.head_dim, 16);
    q_lanes_ = take(kHalves * depth_ * kHalf), dout_lanes_ = take(kHalves * value_depth_ * kHalf);
    q_stride_ = kPairs * kTileRows;
    q_pairs_size_ = (p_.head_dim + kTileRows - 1) / kTileRows * q_stride_;
    dout_pairs_size_ = (p_.value_dim + kTileRows - 1) / kTileRows * q_stride_;
    q_pairs_ = take(kHalves / 2 * q_pairs_size_);
    dout_pairs_ = take(kHalves / 2 * dout_pairs_size_);
    dq_ = take(kHalves * dims_ * kHalf);
    lse2_ = take(kQueries), delta_ = take(kQueries);
    k_panels_ = take(kSide * depth_), v_panels_ = take(kSide * value_depth_);
    k_columns_ = take(kPairs * dims_);
    scores_ = take(kSide * kPitch);
    take(kWidth);
    grads_ = take(kSide * kPitch);
    weights_ = reinterpret_cast<bf16_t*>(take(kSide * kRowPitch / 2));
    ds_rows_ = reinterpret_cast<bf16_t*>(take(kSide * kRowPitch / 2));
    ds_pairs_ = take(kPairs * kHalf);
    words_ = at - start;
  }

  static void clear(float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, set1(0.0f));
  }

  KeyRange seen(int64_t row) const {
    return visible_keys(p_.mask, row, t_.num_queries, t_.num_keys);
  }

  const bf16_t* row_of(const void* data, const RowLayout& l, int64_t head, int64_t row) const {
    return static_cast<const bf16_t*>(data) + t_.batch * l.batch + head * l.head + row * l.row;
  }

  void stage_queries(int64_t first, int64_t rows) {
    const auto q = [&](int64_t i) {
      return row_of(p_.q, p_.q_at, t_.head, t_.q_first + first + i);
    };
    const auto dout = [&](int64_t i) {
      return row_of(p_.dout, p_.dout_at, t_.head, t_.q_first + first + i);
    };
    const int64_t sides = (rows + kSide - 1) / kSide;
    for (int64_t half = 0; half < 2 * sides; ++half) {
      const bf16_t *q_rows[kHalf] = {}, *dout_rows[kHalf] = {};
      for (int64_t i = 0; i < kHalf && half * kHalf + i < rows; ++i)
        q_rows[i] = q(half * kHalf + i), dout_rows[i] = dout(half * kHalf + i);
      for (int64_t i = 0; i < kHalf; i += 16) {
        pack_lanes16(q_rows + i, p_.head_dim, q_lanes_ + half * depth_ * kHalf + i);
        pack_lanes16(dout_rows + i, p_.value_dim, dout_lanes_ + half * value_depth_ * kHalf + i);
      }
    }
    clear(q_pairs_, sides * q_pairs_size_);
    clear(dout_pairs_, sides * dout_pairs_size_);
    for (int64_t at = 0; at < rows; at += kSide) {
      const int64_t n = rows - at < kSide ? rows - at : kSide;
      pack_lanes<bf16_t, true>([&](int64_t i) { return q(at + i); }, n, p_.head_dim, q_stride_,
                               q_pairs_ + at / kSide * q_pairs_size_);
      pack_lanes<bf16_t, true>([&](int64_t i) { return dout(at + i); }, n, p_.value_dim, q_stride_,
                               dout_pairs_ + at / kSide * dout_pairs_size_);
    }
    clear(dq_, 2 * sides * dims_ * kHalf);
    const int64_t lse_at = t_.batch * p_.lse_batch + t_.head * p_.lse_head + t_.q_first + first;
    for (int64_t i = 0; i < kQueries; ++i) {
      lse2_[i] = __builtin_inff(), delta_[i] = 0.0f;  // exp2(x - inf) = 0: rows that see nothing
      if (i >= rows) continue;
      const float lse = p_.lse[lse_at + i];
      if (lse != -__builtin_inff()) lse2_[i] = lse * kLog2e;
      delta_[i] = dot(dout(i), row_of(p_.out, p_.out_at, t_.head, t_.q_first + first + i));
      if (p_.dlse != nullptr) delta_[i] -= p_.dlse[lse_at + i];
    }
  }

  float dot(const bf16_t* a, const bf16_t* b) const {
    VF sum = set1(0.0f);
    for (int64_t d = 0; d < p_.value_dim; d += kWidth)
      sum = fma(load_some(a + d, p_.value_dim - d), load_some(b + d, p_.value_dim - d), sum);
    return hsum(sum);
  }

  void stage_keys(int64_t j, int64_t keys) {
    const bf16_t* const k = row_of(p_.k, p_.k_at, p_.kmap[t_.head], t_.k_first + j);
    const bf16_t* const v = row_of(p_.v, p_.v_at, p_.vmap[t_.head], t_.k_first + j);
    for (int64_t at = 0; at < round_up(keys, kAmxBlock); at += kAmxRows) {
      const bf16_t *k_rows[kAmxRows] = {}, *v_rows[kAmxRows] = {};
      for (int64_t i = 0; i < kAmxRows && at + i < keys; ++i)
        k_rows[i] = k + (at + i) * p_.k_at.row, v_rows[i] = v + (at + i) * p_.v_at.row;
      pack_panel16(k_rows, p_.head_dim, k_panels_ + at * depth_);
      pack_panel16(v_rows, p_.value_dim, v_panels_ + at * value_depth_);
    }
    pack_columns16([&](int64_t i) { return k + i * p_.k_at.row; }, keys, p_.head_dim,
                   kPairs * kAmxRows, k_columns_);
  }

  // All that queries [i0, i0 + n), `at` in the staged ones, and keys [j0, j0 + keys) give.
  void add_tile(int64_t i0, int64_t at, int64_t n, int64_t j0, int64_t keys) {
    const auto nothing = [] {};
    const int64_t count = round_up(keys, kAmxBlock);
    for (int64_t first = 0; first < kSide; first += kHalf) {
      const int64_t rows = n - first < kHalf ? n - first : kHalf, half = (at + first) / kHalf;
      const bool some =
          rows > 0 && seen(i0 + first + rows - 1).last > j0 && seen(i0 + first).first < j0 + keys;
      if (!some) {
        for (int64_t j = 0; j < count; ++j) {
          __builtin_memset(weights_ + j * kRowPitch + first, 0, kHalf * 2);
          __builtin_memset(ds_rows_ + j * kRowPitch + first, 0, kHalf * 2);
        }
        continue;
      }
      multiply_block(left_panels(k_panels_, depth_ * kAmxRows), count,
                     q_lanes_ + half * depth_ * kHalf, 0, kHalf, depth_, depth_, scores_, kPitch,
                     false, nothing);
      multiply_block(left_panels(v_panels_, value_depth_ * kAmxRows), count,
                     dout_lanes_ + half * value_depth_ * kHalf, 0, kHalf, value_depth_,
                     value_depth_, grads_, kPitch, false, nothing);
      amx_fence();
      const bool edge = keys < count || seen(i0 + first + rows - 1).first > j0 ||
                        seen(i0 + first).last < j0 + count;
      make_half(i0 + first, at + first, first, j0, count, edge);
      multiply_block(left_panels(k_columns_, kPairs * kAmxRows), dims_, ds_pairs_, 0, kHalf,
                     count / 2, count / 2, dq_ + half * dims_ * kHalf, kHalf, true, nothing);
      amx_fence();
      if (t_.distances != nullptr) add_distances(i0 + first - j0, count);
    }
    constexpr int64_t kRow = kRowPitch * 2;  // bytes
    const int64_t words = round_up(words_of(n), kAmxWords), pair = at / kSide;
    const int64_t pitch = backward_pitch(p_.head_dim), value_pitch = backward_pitch(p_.value_dim);
    multiply_block({weights_, kRow, kAmxDepth * 2, kAmxRows * kRow}, count,
                   dout_pairs_ + pair * dout_pairs_size_, q_stride_, p_.value_dim, words, words,
                   t_.dv + (j0 - t_.key_begin) * value_pitch, value_pitch, true, nothing);
    multiply_block({ds_rows_, kRow, kAmxDepth * 2, kAmxRows * kRow}, count,
                   q_pairs_ + pair * q_pairs_size_, q_stride_, p_.head_dim, words, words,
                   t_.dk + (j0 - t_.key_begin) * pitch, pitch, true, nothing);
    amx_fence();
  }

  static int64_t words_of(int64_t n) { return (n + 1) / 2; }

  // P and dS of half a tile: queries from i0 on, which are `at` of the staged ones and columns from
  // `column` on of the rows.
  void make_half(int64_t i0, int64_t at, int64_t column, int64_t j0, int64_t count, bool edge) {
    for (int v = 0; v < kVecs; ++v) {
      if (p_.dropout.below != 0) {
        make_lanes<true>(i0, at, column, v, j0, count, edge);
      } else {
        make_lanes<false>(i0, at, column, v, j0, count, edge);
      }
    }
  }

  template <bool kDrops>
  void make_lanes(int64_t i0, int64_t at, int64_t column, int v, int64_t j0, int64_t count,
                  bool edge) {
    const int64_t lane = v * kWidth;
    alignas(64) uint32_t first[kWidth], last[kWidth];
    if (edge)
      for (int i = 0; i < kWidth; ++i) {
        const KeyRange range = seen(i0 + lane + i);
        first[i] = static_cast<uint32_t>(range.first), last[i] = static_cast<uint32_t>(range.last);
      }
    const VF unit = set1(p_.scale * kLog2e), zero = set1(0.0f), log2e = set1(kLog2e);
    const VF lse = load(lse2_ + at + lane), delta = load(delta_ + at + lane);
    const float* const bias =
        p_.relative.data == nullptr
            ? nullptr
            : p_.relative.data + t_.head * p_.relative.head + p_.relative.zero + i0 + lane - j0;
    const VI rows = seti(static_cast<uint32_t>(i0 + lane)) + iota();
    const VF keep = set1(p_.dropout.scale);
    VI words[4];
    VF weight[2], ds[2];
    for (int64_t j = 0; j < count; j += 2) {
      if (kDrops && j % 4 == 0) {
        words[0] = seti(static_cast<uint32_t>((j0 + j) / 4)), words[1] = rows;
        words[2] = seti(static_cast<uint32_t>(t_.batch * p_.q_heads + t_.head));
        words[3] = seti(p_.dropout.offset);
        philox_rounds(words, p_.dropout.key[0], p_.dropout.key[1]);
      }
      for (int i = 0; i < 2; ++i) {
        const int64_t here = (j + i) * kPitch + lane;
        const VF low = bias != nullptr ? fma(load(bias - j - i), log2e, zero - lse) : zero - lse;
        // An lse that is not of these logits may lie below them.
        VF p = exp2(vmin(set1(128.0f), fma(load(scores_ + here), unit, low)));
        VF grad = load(grads_ + here);
        weight[i] = p;
        if constexpr (kDrops) {
          const VM gone = above(seti(p_.dropout.below), words[(j + i) % 4]);
          weight[i] = select(gone, zero, p * keep), grad = select(gone, zero, grad * keep);
        }
        ds[i] = p * (grad - delta);
        if (edge) {
          const VI key = seti(static_cast<uint32_t>(j0 + j + i));
          const VM here_seen = lt(key, load(last)), before = lt(key, load(first));
          weight[i] = select(before, zero, select(here_seen, weight[i], zero));
          ds[i] = select(before, zero, select(here_seen, ds[i], zero));
        }
        store(grads_ + here, ds[i]);
        store(weights_ + (j + i) * kRowPitch + column + lane, weight[i]);
        store(ds_rows_ + (j + i) * kRowPitch + column + lane, ds[i]);
      }
      store(ds_pairs_ + j / 2 * kHalf + lane, to_pairs(ds[0], ds[1]));
    }
  }

  // Sums of dS over diagonals, kWidth of them at a time: of the next key they begin one place on.
  void add_distances(int64_t place, int64_t count) {
    float* const to = t_.distances + p_.relative.zero + place;
    for (int64_t d = -count; d < kHalf; d += kWidth) {
      const int64_t first = d + kWidth > 0 ? 0 : 1 - kWidth - d;
      const int64_t last = count < kHalf - d ? count : kHalf - d;
      const float* const from = grads_ + d;
      VF sums[4] = {load(to + d), set1(0.0f), set1(0.0f), set1(0.0f)};
      int64_t j = first;
      for (; j + 4 <= last; j += 4)
        for (int i = 0; i < 4; ++i) sums[i] = sums[i] + load(from + (j + i) * (kPitch + 1));
      for (; j < last; ++j) sums[0] = sums[0] + load(from + j * (kPitch + 1));
      store(to + d, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  }

  void write_queries(int64_t first, int64_t rows) {
    const VF scale = set1(p_.scale);
    for (int64_t i = 0; i < rows; ++i) {
      auto* const to =
          const_cast<bf16_t*>(row_of(p_.dq, p_.dq_at, t_.head, t_.q_first + first + i));
      const float* const from = dq_ + i / kHalf * dims_ * kHalf + i % kHalf;
      alignas(64) float row[256];
      for (int64_t d = 0; d < dims_; ++d) row[d] = from[d * kHalf];
      for (int64_t d = 0; d < p_.head_dim; d += kWidth) {
        const int64_t n = p_.head_dim - d;
        store_n(to + d, load(row + d) * scale, static_cast<int>(n < kWidth ? n : kWidth));
      }
    }
  }

  const AttentionBackward& p_;
  const AttentionBackwardTask& t_;
  int64_t depth_, value_depth_, dims_, q_stride_, q_pairs_size_, dout_pairs_size_;
  int64_t words_;
  float *q_lanes_, *dout_lanes_, *q_pairs_, *dout_pairs_, *dq_, *lse2_, *delta_;
  float *k_panels_, *v_panels_, *k_columns_, *scores_, *grads_, *ds_pairs_;
  bf16_t *weights_, *ds_rows_;
};

}  // namespace

int64_t attention_backward_tiles_scratch(const AttentionBackward& p) {
  return AmxTask::scratch(p);
}

void attention_backward_tiles_task(const AttentionBackward& p, const AttentionBackwardTask& t) {
  AmxTask(p, t).run();
}

bool all_finite(const bf16_t* row, int64_t n) {
  const __m512i exponent = _mm512_set1_epi16(0x7F80);
  __mmask32 found = 0;
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 here = n - i < 32 ? (__mmask32{1} << (n - i)) - 1 : ~__mmask32{0};
    const __m512i bits = _mm512_maskz_loadu_epi16(here, row + i);
    found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(bits, exponent), exponent);
  }
  return found == 0;
}

TENFOLD_ISA_END
#endif
