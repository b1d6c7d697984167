// SPDX-License-Identifier: Apache-2.0
#include "optim/mask_args.h"

#include "core/tensor.h"

namespace tenfold {
namespace {

int64_t inner_of(const Tensor& t, MaskKind kind, int64_t block_size) {
  const int64_t dims = t.dim();
  switch (kind) {
    case MaskKind::row: return t.sizes()[0] ? t.numel() / t.sizes()[0] : 0;
    case MaskKind::col: return t.sizes()[dims - 1];
    case MaskKind::block: return block_size;
    default: return 1;
  }
}

}  // namespace

MaskKind to_mask_kind(const char* op, const std::string& kind) {
  constexpr const char* kNames[] = {"none", "row", "col", "block", "element"};
  for (int i = 0; i < 5; ++i)
    if (kind == kNames[i]) return static_cast<MaskKind>(i);
  raise(ErrorKind::value, "tenfold::", op,
        ": mask_kind must be none, row, col, block or element, got '", kind, "'");
}

void check_block_size(const char* op, int64_t block_size) {
  TENFOLD_CHECK_VALUE(block_size >= 32 && (block_size & (block_size - 1)) == 0, "tenfold::", op,
                      ": block_size must be a power of two >= 32, got ", block_size);
}

int64_t mask_units(const char* op, const char* arg, int64_t index, const Tensor& t, MaskKind kind,
                   int64_t block_size) {
  if (kind == MaskKind::row || kind == MaskKind::col) {
    const char* name = kind == MaskKind::row ? "row" : "col";
    TENFOLD_CHECK_VALUE(t.dim() >= 2 && t.is_contiguous(), "tenfold::", op, ": mask_kind='", name,
                        "' needs contiguous tensors of 2 or more dimensions, got ", arg, "[", index,
                        "] ", shape_str(t), t.is_contiguous() ? "" : ", not contiguous");
    return t.sizes()[kind == MaskKind::row ? 0 : t.dim() - 1];
  }
  if (kind == MaskKind::block) return (t.numel() + block_size - 1) / block_size;
  return kind == MaskKind::element ? t.numel() : 0;
}

Mask check_mask(const char* op, const char* arg, int64_t index, const Tensor& t,
                const std::optional<Tensor>& mask, MaskKind kind, int64_t block_size) {
  if (!mask) return {};
  TENFOLD_CHECK_VALUE(kind != MaskKind::none, "tenfold::", op, ": masks[", index,
                      "] is given, but mask_kind is 'none'");
  TENFOLD_CHECK_TYPE(mask->scalar_type() == ScalarType::Byte, "tenfold::", op, ": masks[", index,
                     "] must be uint8 (packed bits, see pack_mask), got ",
                     dtype_name(mask->scalar_type()));
  TENFOLD_CHECK_VALUE(mask->device() == t.device(), "tenfold::", op, ": masks[", index,
                      "] must be on the device of ", arg, "[", index, "], ", device_str(t),
                      ", got ", device_str(*mask));
  const int64_t units = mask_units(op, arg, index, t, kind, block_size);
  TENFOLD_CHECK_VALUE(mask->dim() == 1 && mask->is_contiguous() && mask->numel() == (units + 7) / 8,
                      "tenfold::", op, ": masks[", index, "] must be contiguous [", (units + 7) / 8,
                      "] (packed bits of ", units, " units of ", arg, "[", index, "] ",
                      shape_str(t), "), got ", shape_str(*mask));
  return {kind, data_as<const uint8_t>(*mask), inner_of(t, kind, block_size)};
}

}  // namespace tenfold
