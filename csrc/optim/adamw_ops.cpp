// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of the AdamW ops.
#include "optim/adamw_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dispatch.h"
#include "core/overlap.h"
#include "core/tensor.h"

namespace tenfold {
namespace {

constexpr auto kOp = "masked_adamw_";

struct Named {
  const char* name;
  const Tensor& t;
};

// What is asked of params[i] again and again: every question is a call into torch.
struct Param {
  size_t i;
  const Tensor& t;
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
  torch::stable::Device device;
  bool contiguous;

  Param(const Tensors& params, size_t at)
      : i(at), t(params[at]), sizes(t.sizes()), device(t.device()), contiguous(t.is_contiguous()) {}
};

void check_device(const char* op, const Param& p, const Named& x) {
  TENFOLD_CHECK_VALUE(x.t.device() == p.device, "tenfold::", op, ": ", x.name, "[", p.i,
                      "] must be on the device of params[", p.i, "], ", device_str(p.t), ", got ",
                      device_str(x.t));
}

// Size and order of a tensor that goes with params[i].
void check_like_param(const char* op, const Param& p, const Named& x) {
  const auto sizes = x.t.sizes();
  TENFOLD_CHECK_VALUE(
      sizes.size() == p.sizes.size() && std::equal(sizes.begin(), sizes.end(), p.sizes.begin()),
      "tenfold::", op, ": ", x.name, "[", p.i, "] must have the shape of params[", p.i, "] ",
      shape_str(p.t), ", got ", shape_str(x.t));
  TENFOLD_CHECK_VALUE((p.contiguous && x.t.is_contiguous()) || same_order(p.t, x.t),
                      "tenfold::", op, ": ", x.name, "[", p.i, "] must have the strides of params[",
                      p.i, "]: elements are taken in storage order");
}

void check_length(const char* op, const char* name, size_t got, size_t want, bool may_be_empty) {
  TENFOLD_CHECK_VALUE(got == want || (may_be_empty && got == 0), "tenfold::", op, ": ", name,
                      " must have one entry per tensor, ", want, may_be_empty ? ", or none" : "",
                      ", got ", got);
}

void check_scalar_tensor(const char* op, const char* name, const OptTensor& t,
                         const Tensors& params) {
  if (!t) return;
  TENFOLD_CHECK_TYPE(t->scalar_type() == ScalarType::Float, "tenfold::", op, ": ", name,
                     " must be float32, got ", dtype_name(t->scalar_type()));
  TENFOLD_CHECK_VALUE(t->numel() == 1, "tenfold::", op, ": ", name,
                      " must have one element, got shape ", shape_str(*t));
  TENFOLD_CHECK_VALUE(params.empty() || t->device() == params[0].device(), "tenfold::", op, ": ",
                      name, " must be on the device of the parameters, ",
                      params.empty() ? "" : device_str(params[0]), ", got ", device_str(*t));
}

}  // namespace

double read_scalar(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return *data_as<double>(t);
    case ScalarType::Float: return *data_as<float>(t);
    case ScalarType::BFloat16: {
      const uint32_t bits = static_cast<uint32_t>(*data_as<uint16_t>(t)) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    default: {  // float16
      const uint16_t h = *data_as<uint16_t>(t);
      const int exponent = (h >> 10) & 31, mantissa = h & 1023;
      const double sign = (h & 0x8000) != 0 ? -1.0 : 1.0;
      if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
      return sign * (exponent == 0 ? std::ldexp(mantissa, -24)
                                   : std::ldexp(1024 + mantissa, exponent - 25));
    }
  }
}

namespace {

AdamwOptions check_options(const char* op, const AdamwArgs& a) {
  TENFOLD_CHECK_VALUE(a.eps >= 0, "tenfold::", op, ": Invalid epsilon value: ", a.eps);
  TENFOLD_CHECK_VALUE(a.beta1 >= 0 && a.beta1 < 1, "tenfold::", op,
                      ": Invalid beta parameter at index 0: ", a.beta1);
  TENFOLD_CHECK_VALUE(a.beta2 >= 0 && a.beta2 < 1, "tenfold::", op,
                      ": Invalid beta parameter at index 1: ", a.beta2);
  TENFOLD_CHECK_VALUE(a.weight_decay >= 0, "tenfold::", op,
                      ": Invalid weight_decay value: ", a.weight_decay);
  const auto s = a.lr.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Double || s == ScalarType::Float || s == ScalarType::Half ||
                         s == ScalarType::BFloat16,
                     "tenfold::", op, ": lr must be a floating-point tensor, got ", dtype_name(s));
  TENFOLD_CHECK_VALUE(a.lr.numel() == 1, "tenfold::", op, ": lr must be 0-d, got shape ",
                      shape_str(a.lr));
  TENFOLD_CHECK_VALUE(
      a.lr.is_cpu() || a.params.empty() || a.lr.device() == a.params[0].device(), "tenfold::", op,
      ": lr must be on the CPU or on the device of the parameters, got ", device_str(a.lr));
  const double lr = a.lr.is_cpu() ? read_scalar(a.lr) : 0.0;
  TENFOLD_CHECK_VALUE(lr >= 0, "tenfold::", op, ": Invalid learning rate: ", lr);
  check_scalar_tensor(op, "grad_scale", a.grad_scale, a.params);
  check_scalar_tensor(op, "found_inf", a.found_inf, a.params);
  check_scalar_tensor(op, "clip_coef", a.clip_coef, a.params);
  return {lr,      a.beta1,
          a.beta2, a.weight_decay,
          a.eps,   a.maximize,
          false,   a.stochastic_round,
          false,   static_cast<uint64_t>(a.seed)};
}

// What both ops ask of params[i], its gradient, step and mask.
AdamwTensor check_tensor(const char* op, const AdamwArgs& a, MaskKind kind, const Param& param,
                         const torch::stable::Device& first) {
  const size_t i = param.i;
  const Tensor &p = param.t, &g = a.grads[i], &step = a.steps[i];
  const auto s = p.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half,
                     "tenfold::", op, ": params[", i,
                     "] must be float32, bfloat16 or float16, got ", dtype_name(s));
  TENFOLD_CHECK_VALUE(!a.stochastic_round || s != ScalarType::Half, "tenfold::", op,
                      ": stochastic_round needs bfloat16 parameters (float32 ones are left as they "
                      "are), got float16 in params[",
                      i, "]");
  TENFOLD_CHECK_KIND(ErrorKind::runtime, g.scalar_type() == s, "tenfold::", op, ": grads[", i,
                     "] must have the dtype of params[", i, "], ", dtype_name(s), ", got ",
                     dtype_name(g.scalar_type()));
  TENFOLD_CHECK_VALUE(param.device == first, "tenfold::", op, ": params[", i,
                      "] must be on the device of params[0], ", device_str(a.params[0]), ", got ",
                      device_str(p));
  check_device(op, param, {"grads", g});
  TENFOLD_CHECK_VALUE(param.contiguous || is_dense(p), "tenfold::", op, ": params[", i,
                      "] must be dense (no gaps, no overlap), got shape ", shape_str(p),
                      "; call .contiguous()");
  check_like_param(op, param, {"grads", g});
  check_device(op, param, {"steps", step});
  TENFOLD_CHECK_TYPE(step.scalar_type() == ScalarType::Float, "tenfold::", op, ": steps[", i,
                     "] must be float32, got ", dtype_name(step.scalar_type()));
  TENFOLD_CHECK_VALUE(step.numel() == 1, "tenfold::", op, ": steps[", i,
                      "] must be 0-d, got shape ", shape_str(step));
  AdamwTensor t{};
  t.param = p.data_ptr(), t.grad = g.data_ptr(), t.step = data_as<float>(step);
  t.numel = p.numel();
  t.dtype = to_dtype(s);
  const int64_t id = a.tensor_ids.empty() ? static_cast<int64_t>(i) : a.tensor_ids[i];
  TENFOLD_CHECK_VALUE(id >= 0 && id <= UINT32_MAX, "tenfold::", op, ": tensor_ids[", i,
                      "] must be in [0, 2^32), got ", id);
  t.id = static_cast<uint32_t>(id);
  if (!a.masks.empty()) t.mask = check_mask(op, "params", i, p, a.masks[i], kind, a.block_size);
  return t;
}

// What both ops read and write, and must not be the same memory.
Memory memory_of(const AdamwArgs& a) {
  Memory memory(a.params.size() * 6);
  for (size_t i = 0; i < a.params.size(); ++i) {
    memory.writes("params", i, a.params[i]);
    memory.reads("grads", i, a.grads[i]);
    memory.writes("exp_avgs", i, a.exp_avgs[i]);
    memory.writes("exp_avg_sqs", i, a.exp_avg_sqs[i]);
    memory.writes("steps", i, a.steps[i]);
  }
  return memory;
}

void check_lengths(const char* op, const AdamwArgs& a) {
  const size_t n = a.params.size();
  check_length(op, "grads", a.grads.size(), n, false);
  check_length(op, "exp_avgs", a.exp_avgs.size(), n, false);
  check_length(op, "exp_avg_sqs", a.exp_avg_sqs.size(), n, false);
  check_length(op, "steps", a.steps.size(), n, false);
  check_length(op, "masks", a.masks.size(), n, true);
  check_length(op, "tensor_ids", a.tensor_ids.size(), n, true);
}

void check_state(const AdamwArgs& a, const Param& p, const Named& x, ScalarType dtype,
                 bool compact) {
  const size_t i = p.i;
  const auto s = x.t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || s == ScalarType::BFloat16 ||
                         (s == ScalarType::Half && p.t.scalar_type() == ScalarType::Half),
                     "tenfold::", kOp, ": ", x.name, "[", i,
                     "] must be float32 or bfloat16 (or float16 with float16 parameters), got ",
                     dtype_name(s));
  TENFOLD_CHECK_KIND(ErrorKind::runtime, s == dtype, "tenfold::", kOp, ": ", x.name, "[", i,
                     "] must have the dtype of exp_avgs[", i, "], ", dtype_name(dtype), ", got ",
                     dtype_name(s));
  check_device(kOp, p, x);
  if (!compact) return check_like_param(kOp, p, x);
  TENFOLD_CHECK_VALUE(x.t.is_contiguous(), "tenfold::", kOp, ": compact ", x.name, "[", i,
                      "] must be contiguous");
  TENFOLD_CHECK_VALUE(x.t.numel() == a.exp_avgs[i].numel(), "tenfold::", kOp, ": compact ", x.name,
                      "[", i, "] must have as many elements as exp_avgs[", i, "], ",
                      a.exp_avgs[i].numel(), ", got ", x.t.numel());
}

// What can be said without the mask's bits, which may be on a GPU.
void check_compact_size(size_t i, const AdamwTensor& t) {
  const bool whole =
      t.mask.kind == MaskKind::row ? t.state_numel % std::max<int64_t>(t.mask.inner, 1) == 0
      : t.mask.kind == MaskKind::col
          ? t.state_numel % std::max<int64_t>(t.numel / std::max<int64_t>(t.mask.inner, 1), 1) == 0
          : true;
  TENFOLD_CHECK_VALUE(whole && t.state_numel <= t.numel, "tenfold::", kOp, ": compact exp_avgs[", i,
                      "] must hold the trained elements of params[", i, "] and no others, got ",
                      t.state_numel, " elements of ", t.numel);
}

const int32_t* check_prefix(const MaskedAdamwArgs& a, MaskKind kind, const Param& p) {
  const size_t i = p.i;
  if (a.prefixes.empty() || !a.prefixes[i]) return nullptr;
  const Tensor& prefix = *a.prefixes[i];
  TENFOLD_CHECK_VALUE(!a.masks.empty() && a.masks[i], "tenfold::", kOp, ": prefixes[", i,
                      "] is given, but masks[", i, "] is not");
  TENFOLD_CHECK_VALUE(a.mask_scope == "all", "tenfold::", kOp,
                      ": mask_scope='param_only' updates all states, compact ones (prefixes[", i,
                      "]) have room for the trained elements only");
  TENFOLD_CHECK_TYPE(prefix.scalar_type() == ScalarType::Int, "tenfold::", kOp, ": prefixes[", i,
                     "] must be int32 (see mask_prefix), got ", dtype_name(prefix.scalar_type()));
  check_device(kOp, p, {"prefixes", prefix});
  const int64_t units = mask_units(kOp, "params", i, p.t, kind, a.block_size);
  const int64_t want = ((units + 7) / 8 * 8 + kPrefixBlock - 1) / kPrefixBlock;
  TENFOLD_CHECK_VALUE(prefix.dim() == 1 && prefix.is_contiguous() && prefix.numel() == want,
                      "tenfold::", kOp, ": prefixes[", i, "] must be contiguous [", want,
                      "] (mask_prefix of masks[", i, "], block ", kPrefixBlock, "), got ",
                      shape_str(prefix));
  return data_as<const int32_t>(prefix);
}

}  // namespace

AdamwCall check_masked_adamw(const MaskedAdamwArgs& a) {
  check_lengths(kOp, a);
  const size_t n = a.params.size();
  check_length(kOp, "max_exp_avg_sqs", a.max_exp_avg_sqs.size(), n, !a.amsgrad);
  check_length(kOp, "prefixes", a.prefixes.size(), n, true);
  const MaskKind kind = to_mask_kind(kOp, a.mask_kind);
  check_block_size(kOp, a.block_size);
  TENFOLD_CHECK_VALUE(a.mask_scope == "all" || a.mask_scope == "param_only", "tenfold::", kOp,
                      ": mask_scope must be all or param_only, got '", a.mask_scope, "'");
  AdamwCall call{check_options(kOp, a), {}};
  call.options.amsgrad = a.amsgrad;
  call.options.param_only = a.mask_scope == "param_only";
  call.tensors.reserve(n);
  torch::stable::Device first(torch::headeronly::DeviceType::CPU);
  for (size_t i = 0; i < n; ++i) {
    const Param param(a.params, i);
    if (i == 0) first = param.device;
    AdamwTensor t = check_tensor(kOp, a, kind, param, first);
    t.prefix = check_prefix(a, kind, param);
    // Not told from the pointer: that of an empty prefix is null.
    const bool compact = !a.prefixes.empty() && a.prefixes[i];
    const Tensor &m = a.exp_avgs[i], &v = a.exp_avg_sqs[i];
    const ScalarType dtype = m.scalar_type();
    check_state(a, param, {"exp_avgs", m}, dtype, compact);
    check_state(a, param, {"exp_avg_sqs", v}, dtype, compact);
    t.exp_avg = m.data_ptr(), t.exp_avg_sq = v.data_ptr();
    if (a.amsgrad) {
      check_state(a, param, {"max_exp_avg_sqs", a.max_exp_avg_sqs[i]}, dtype, compact);
      t.max_exp_avg_sq = a.max_exp_avg_sqs[i].data_ptr();
    }
    t.state_dtype = to_dtype(dtype);
    t.state_numel = compact ? m.numel() : t.numel;
    if (compact) check_compact_size(i, t);
    call.tensors.push_back(t);
  }
  Memory memory = memory_of(a);
  if (a.amsgrad)
    for (size_t i = 0; i < n; ++i) memory.writes("max_exp_avg_sqs", i, a.max_exp_avg_sqs[i]);
  memory.check(kOp);
  return call;
}

namespace {

constexpr auto kOp8 = "masked_adamw_8bit_";

uint8_t* check_codes(const Param& p, const Named& x) {
  TENFOLD_CHECK_TYPE(x.t.scalar_type() == ScalarType::Byte, "tenfold::", kOp8, ": ", x.name, "[",
                     p.i, "] must be uint8 codes, got ", dtype_name(x.t.scalar_type()));
  check_device(kOp8, p, x);
  check_like_param(kOp8, p, x);
  return data_as<uint8_t>(x.t);
}

float* check_absmax(const Param& p, const Named& x) {
  const int64_t want = (p.t.numel() + kStateBlock - 1) / kStateBlock;
  TENFOLD_CHECK_TYPE(x.t.scalar_type() == ScalarType::Float, "tenfold::", kOp8, ": ", x.name, "[",
                     p.i, "] must be float32, got ", dtype_name(x.t.scalar_type()));
  check_device(kOp8, p, x);
  TENFOLD_CHECK_VALUE(x.t.dim() == 1 && x.t.is_contiguous() && x.t.numel() == want,
                      "tenfold::", kOp8, ": ", x.name, "[", p.i, "] must be contiguous [", want,
                      "], one per block of ", kStateBlock, " elements of params[", p.i, "], got ",
                      shape_str(x.t));
  return data_as<float>(x.t);
}

void check_code(const AdamwArgs& a, const Named& x) {
  TENFOLD_CHECK_TYPE(x.t.scalar_type() == ScalarType::Float, "tenfold::", kOp8, ": ", x.name,
                     " must be float32, got ", dtype_name(x.t.scalar_type()));
  TENFOLD_CHECK_VALUE(x.t.dim() == 1 && x.t.is_contiguous() && x.t.numel() == kCodes,
                      "tenfold::", kOp8, ": ", x.name, " must be contiguous [", kCodes, "], got ",
                      shape_str(x.t));
  TENFOLD_CHECK_VALUE(a.params.empty() || x.t.device() == a.params[0].device(), "tenfold::", kOp8,
                      ": ", x.name, " must be on the device of the parameters, ",
                      a.params.empty() ? "" : device_str(a.params[0]), ", got ", device_str(x.t));
}

}  // namespace

Adamw8bitCall check_masked_adamw_8bit(const MaskedAdamw8bitArgs& a) {
  check_lengths(kOp8, a);
  const size_t n = a.params.size();
  check_length(kOp8, "absmax1", a.absmax1.size(), n, false);
  check_length(kOp8, "absmax2", a.absmax2.size(), n, false);
  const MaskKind kind = to_mask_kind(kOp8, a.mask_kind);
  check_block_size(kOp8, a.block_size);
  Adamw8bitCall call{check_options(kOp8, a), {}};
  check_code(a, {"code1", a.code1});
  check_code(a, {"code2", a.code2});
  call.tensors.reserve(n);
  torch::stable::Device first(torch::headeronly::DeviceType::CPU);
  for (size_t i = 0; i < n; ++i) {
    const Param param(a.params, i);
    if (i == 0) first = param.device;
    Adamw8Tensor t{check_tensor(kOp8, a, kind, param, first), nullptr, nullptr};
    t.exp_avg = check_codes(param, {"exp_avgs", a.exp_avgs[i]});
    t.exp_avg_sq = check_codes(param, {"exp_avg_sqs", a.exp_avg_sqs[i]});
    t.absmax1 = check_absmax(param, {"absmax1", a.absmax1[i]});
    t.absmax2 = check_absmax(param, {"absmax2", a.absmax2[i]});
    call.tensors.push_back(t);
  }
  Memory memory = memory_of(a);
  for (size_t i = 0; i < n; ++i) {
    memory.writes("absmax1", i, a.absmax1[i]);
    memory.writes("absmax2", i, a.absmax2[i]);
  }
  memory.check(kOp8);
  return call;
}

}  // namespace tenfold

// A schema cannot have an empty list of tensors as a default: None stands for it.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor?[] masks, "
      "Tensor(f!)[]? max_exp_avg_sqs=None, Tensor?[]? prefixes=None, *, str mask_kind, Tensor lr, "
      "float beta1, float beta2, float weight_decay, float eps, bool maximize=False, "
      "bool amsgrad=False, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "Tensor? clip_coef=None, bool stochastic_round=False, int seed=0, str mask_scope=\"all\", "
      "int block_size=256, int[] tensor_ids=[]) -> ()");
  m.def(
      "masked_adamw_8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor?[] masks, Tensor(e!)[] absmax1, "
      "Tensor(f!)[] absmax2, Tensor code1, Tensor code2, *, str mask_kind, Tensor lr, "
      "float beta1, float beta2, float weight_decay, float eps, bool maximize=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? clip_coef=None, "
      "bool stochastic_round=False, int seed=0, int block_size=256, int[] tensor_ids=[]) -> ()");
}
