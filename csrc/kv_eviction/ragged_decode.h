// SPDX-License-Identifier: Apache-2.0
// ragged_decode: attention of the newest Sq tokens over one flat cache of per-(sequence, head)
// segments.
//
//   segment i = b * Hkv + h: rows [offsets[i], offsets[i] + n_i) of k [N, D] and v [N, DV]
//   out[b, hq, s] = softmax_j(scale * q . k_j) v_j over the first n_i - (Sq - 1 - s) rows, hq in
//   group h lse = natural log-sum-exp of the scaled logits; an empty row gives 0 and -inf.
//
// A long segment is split into chunks of keys; each gives (max, sum, weighted values) and the
// chunks of a row are combined in order. Traffic: k and v once, read by all G * Sq query rows of
// the head together. The CPU's inner kernel is that of dha_decode: core/cpu/decode.h.
#pragma once

#include "core/cpu/decode.h"
