// Vector part of nacl_select: sortable keys of the scores and of the noisy draw.
#include "core/cpu/math.h"
#include "kv_eviction/nacl_select.h"

TENFOLD_ISA_BEGIN

void nacl_topk_keys(const float* scores, int64_t n, uint32_t* keys) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(keys + i, sortable_key(load(scores + i)));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(keys + i, sortable_key(load_n(scores + i, left)), left);
  }
}

namespace {

inline VI draw_keys(const NaclSelectParams& p, VF score, uint32_t token, uint32_t head,
                    uint32_t row_id) {
  const VI word = philox_word0(p.layer, head, seti(token) + iota(), row_id, p.seed_lo, p.seed_hi);
  const VF logit = (p.log_score ? det_log(score) : score) / set1(p.tau);
  return sortable_key(logit + gumbel(word));
}

}  // namespace

void nacl_draw_keys(const NaclSelectParams& p, const float* scores, int64_t n, uint32_t first_token,
                    uint32_t head, uint32_t row_id, uint32_t* keys) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(keys + i,
          draw_keys(p, load(scores + i), first_token + static_cast<uint32_t>(i), head, row_id));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(keys + i,
            draw_keys(p, load_n(scores + i, left), first_token + static_cast<uint32_t>(i), head,
                      row_id),
            left);
  }
}

TENFOLD_ISA_END
