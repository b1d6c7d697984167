// SPDX-License-Identifier: Apache-2.0
// CPU registration of pack_mask, unpack_mask, mask_popcount and mask_prefix.
#include "optim/mask_bits.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "core/tensor.h"
#include "optim/masks_ops.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kBytes = 1 << 14;  // of a mask or of bools, per task: about half a microsecond
constexpr double kMicros = 0.6;

int64_t tasks_of(int64_t bytes) {
  return (bytes + kBytes - 1) / kBytes;
}

Tensor pack_mask_op(Tensor mask_in) {
  const int64_t n = check_pack_mask(mask_in);
  const Tensor mask = as_contiguous(mask_in);
  const Tensor out = new_output(mask, {(n + 7) / 8}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(mask.data_ptr());
  uint8_t* to = data_as<uint8_t>(out);
  parallel_for(tasks_of(n), kMicros, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBytes, last = std::min(n, end * kBytes);
    TENFOLD_ISA_CALL(mask_pack, from + first, last - first, to + first / 8);
  });
  return out;
}

Tensor unpack_mask_op(Tensor packed_in, int64_t n) {
  check_unpack_mask(packed_in, n);
  const Tensor packed = as_contiguous(packed_in);
  const Tensor out = new_output(packed, {n}, ScalarType::Bool);
  const uint8_t* from = data_as<uint8_t>(packed);
  auto* to = static_cast<uint8_t*>(out.data_ptr());
  parallel_for(tasks_of(n), kMicros, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBytes, last = std::min(n, end * kBytes);
    TENFOLD_ISA_CALL(mask_unpack, from + first / 8, last - first, to + first);
  });
  return out;
}

// Set bits of each task's bytes.
std::vector<int64_t> count_tasks(const uint8_t* bits, int64_t bytes, int64_t task_bytes) {
  std::vector<int64_t> counts((bytes + task_bytes - 1) / task_bytes);
  const double micros = kMicros * static_cast<double>(task_bytes) / kBytes;
  parallel_for(static_cast<int64_t>(counts.size()), micros, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      counts[i] = TENFOLD_ISA_CALL(mask_count, bits + i * task_bytes,
                                   std::min(task_bytes, bytes - i * task_bytes));
  });
  return counts;
}

Tensor mask_popcount_op(Tensor packed_in) {
  check_packed("mask_popcount", packed_in);
  const Tensor packed = as_contiguous(packed_in);
  const Tensor out = new_output(packed, {}, ScalarType::Long);
  int64_t total = 0;
  for (const int64_t c : count_tasks(data_as<uint8_t>(packed), packed.numel(), kBytes)) total += c;
  *data_as<int64_t>(out) = total;
  return out;
}

Tensor mask_prefix_op(Tensor packed_in, int64_t block) {
  const int64_t blocks = check_mask_prefix(packed_in, block);
  const Tensor packed = as_contiguous(packed_in);
  const Tensor out = new_output(packed, {blocks}, ScalarType::Int);
  const uint8_t* bits = data_as<uint8_t>(packed);
  int32_t* prefix = data_as<int32_t>(out);
  const int64_t bytes = packed.numel(), step = block / 8, task = std::max(kBytes, step);
  std::vector<int64_t> before = count_tasks(bits, bytes, task);
  int64_t sum = 0;
  for (int64_t& c : before) sum += std::exchange(c, sum);
  parallel_for(static_cast<int64_t>(before.size()), kMicros, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      TENFOLD_ISA_CALL(mask_prefix_steps, bits + i * task, std::min(task, bytes - i * task), step,
                       static_cast<int32_t>(before[i]), prefix + i * (task / step));
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&tenfold::cpu::pack_mask_op));
  m.impl("unpack_mask", TORCH_BOX(&tenfold::cpu::unpack_mask_op));
  m.impl("mask_popcount", TORCH_BOX(&tenfold::cpu::mask_popcount_op));
  m.impl("mask_prefix", TORCH_BOX(&tenfold::cpu::mask_prefix_op));
}
