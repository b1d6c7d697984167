// SPDX-License-Identifier: Apache-2.0
// Schemas of the merge operations (the only ones) and the argument checks shared by both backends.
#include "merge/merge_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "core/contiguous.h"
#include "core/dispatch.h"
#include "core/overlap.h"
#include "core/scratch.h"

namespace tenfold {
namespace {

std::string item(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

// The shape, dtype and device of the first.
void check_alike(const char* op, const std::string& name, const Tensor& t, const char* first_name,
                 const Tensor& first) {
  TENFOLD_CHECK_VALUE(same_sizes(t, first), "tenfold::", op, ": ", name, " must have the shape of ",
                      first_name, ", ", shape_str(first), ", got ", shape_str(t));
  TENFOLD_CHECK_VALUE(t.scalar_type() == first.scalar_type(), "tenfold::", op, ": ", name,
                      " must have the dtype of ", first_name, ", ", dtype_name(first.scalar_type()),
                      ", got ", dtype_name(t.scalar_type()));
  TENFOLD_CHECK_VALUE(t.device() == first.device(), "tenfold::", op, ": ", name,
                      " must be on the device of ", first_name, ", ", device_str(first), ", got ",
                      device_str(t));
}

void check_list(const char* op, const char* name, const std::vector<Tensor>& list) {
  TENFOLD_CHECK_VALUE(!list.empty() && list.size() <= kMaxExperts, "tenfold::", op, ": ", name,
                      " must be 1 to ", kMaxExperts, " tensors, got ", list.size());
}

void check_numbers(const char* op, const char* name, const std::vector<double>& numbers,
                   const char* of, size_t count) {
  TENFOLD_CHECK_VALUE(numbers.size() == count, "tenfold::", op, ": ", name,
                      " must have one number per tensor of ", of, ", ", count, ", got ",
                      numbers.size());
  for (size_t i = 0; i < count; ++i)
    TENFOLD_CHECK_VALUE(std::isfinite(numbers[i]), "tenfold::", op, ": ", item(name, i),
                        " must be finite, got ", numbers[i]);
}

void check_finite(const char* op, const char* name, double x) {
  TENFOLD_CHECK_VALUE(std::isfinite(x), "tenfold::", op, ": ", name, " must be finite, got ", x);
}

// 1 unless the weights are to sum to one; their sum then.
double divisor(const char* op, const std::vector<double>& weights, bool normalize) {
  if (!normalize) return 1.0;
  double sum = 0.0;
  for (const double w : weights) sum += w;
  TENFOLD_CHECK_VALUE(sum != 0.0, "tenfold::", op,
                      ": weights must not sum to 0 with normalize=True");
  return sum;
}

void check_out(const char* op, const Tensor& out, const char* first_name, const Tensor& first) {
  check_alike(op, "out", out, first_name, first);
  TENFOLD_CHECK_VALUE(out.is_contiguous(), "tenfold::", op, ": out must be contiguous, got strides",
                      " of another order; merge into a contiguous tensor and copy it");
}

// Checks what `out` shares memory with (an input itself is fine), makes inputs contiguous,
// allocates.
MergeTensors gather(const char* op, const OptTensor& out, const char* list, const OptTensor& base,
                    const std::vector<Tensor>& experts) {
  if (out) {
    Memory memory(experts.size() + 2);
    memory.writes("out", 0, *out);
    const auto reads = [&](const char* name, size_t i, const Tensor& t) {
      if (t.is_contiguous() && t.data_ptr() != out->data_ptr()) memory.reads(name, i, t);
    };
    for (size_t i = 0; i < experts.size(); ++i) reads(list, i, experts[i]);
    if (base) reads("base", 0, *base);
    memory.check(op);
  }
  MergeTensors made{std::nullopt, {}, experts[0]};
  if (base) made.base = as_contiguous(*base);
  for (const Tensor& e : experts) made.experts.push_back(as_contiguous(e));
  if (out) {
    made.out = *out;
  } else {
    const Tensor& like = made.experts[0];
    made.out = torch::stable::new_empty(like, like.sizes());
    if (made.out.is_cpu())
      advise_huge_pages(made.out.data_ptr(),
                        made.out.numel() * static_cast<int64_t>(made.out.element_size()));
  }
  return made;
}

// Experts of weight 0 are left out: they are not even read.
DeltaMergeArgs delta_args(const char* op, const OptTensor& out, const Tensor& base,
                          const std::vector<Tensor>& experts, const std::vector<double>& weights,
                          bool elect, bool normalize, double lambda) {
  check_float_dtype(op, "base", base);
  check_list(op, "experts", experts);
  for (size_t i = 0; i < experts.size(); ++i)
    check_alike(op, item("experts", i), experts[i], "base", base);
  check_numbers(op, "weights", weights, "experts", experts.size());
  check_finite(op, "lambda_", lambda);
  const double sum = elect ? 1.0 : divisor(op, weights, normalize);
  if (out) check_out(op, *out, "base", base);
  DeltaMergeArgs args{gather(op, out, "experts", base, experts), {}, Rescale::inv_keep, {}};
  DeltaMerge& m = args.kernel;
  m.base = args.tensors.base->data_ptr();
  m.out = args.tensors.out.data_ptr();
  m.dtype = to_dtype(base.scalar_type());
  m.elect = elect;
  m.normalize = normalize;
  m.lambda = static_cast<float>(lambda);
  for (size_t i = 0; i < experts.size(); ++i) {
    if (weights[i] == 0.0) continue;
    m.expert[m.experts] = args.tensors.experts[i].data_ptr();
    m.number[m.experts] = static_cast<uint32_t>(i);
    m.share[m.experts] = static_cast<float>(weights[i]);
    m.weight[m.experts] = static_cast<float>(elect ? weights[i] : weights[i] * lambda / sum);
    ++m.experts;
  }
  return args;
}

Rescale to_rescale(const char* op, const std::string& name) {
  if (name == "inv_keep") return Rescale::inv_keep;
  if (name == "none") return Rescale::none;
  if (name == "l1") return Rescale::l1;
  if (name == "l2") return Rescale::l2;
  raise(ErrorKind::value, "tenfold::", op,
        ": rescale must be \"inv_keep\", \"none\", \"l1\" or \"l2\", got \"", name, "\"");
}

}  // namespace

DeltaMergeArgs check_dare_merge(const char* op, const OptTensor& out, const Tensor& base,
                                const std::vector<Tensor>& experts,
                                const std::vector<double>& weights, const std::vector<double>& drop,
                                int64_t seed, int64_t stream, int64_t offset,
                                const std::string& rescale_name, bool elect, bool normalize,
                                double lambda) {
  const Rescale rescale = to_rescale(op, rescale_name);
  check_numbers(op, "drop", drop, "experts", experts.size());
  for (size_t i = 0; i < drop.size(); ++i)
    TENFOLD_CHECK_VALUE(drop[i] >= 0.0 && drop[i] < 1.0, "tenfold::", op, ": ", item("drop", i),
                        " must be in [0, 1), got ", drop[i]);
  TENFOLD_CHECK_VALUE(offset >= 0 && offset + base.numel() <= kMaxElements, "tenfold::", op,
                      ": offset must be >= 0, and offset + numel at most 2^49, got ", offset);
  const bool by_norm = rescale == Rescale::l1 || rescale == Rescale::l2;
  TENFOLD_CHECK_VALUE(offset == 0 || !by_norm, "tenfold::", op,
                      ": offset must be 0 with rescale=\"", rescale_name,
                      "\", which needs the norm of the whole tensor, got ", offset);
  DeltaMergeArgs args = delta_args(op, out, base, experts, weights, elect, normalize, lambda);
  args.rescale = rescale;
  DeltaMerge& m = args.kernel;
  m.key = drop_key(seed, stream);
  m.offset = offset;
  m.pick = Pick::all;
  for (int e = 0; e < m.experts; ++e) {
    const double p = drop[m.number[e]];
    m.drop[e] = drop_limit(p);
    if (p > 0.0) m.pick = Pick::random;
    if (rescale == Rescale::inv_keep && p > 0.0) {
      const double w = weights[m.number[e]] / (1.0 - p);
      const double sum = elect || !normalize ? 1.0 : divisor(op, weights, true);
      m.weight[e] = static_cast<float>(elect ? w : w * lambda / sum);
    }
  }
  return args;
}

DeltaMergeArgs check_ties_merge(const char* op, const OptTensor& out, const Tensor& base,
                                const std::vector<Tensor>& experts,
                                const std::vector<double>& weights,
                                const std::vector<double>& density, bool normalize, double lambda) {
  check_numbers(op, "density", density, "experts", experts.size());
  for (size_t i = 0; i < density.size(); ++i)
    TENFOLD_CHECK_VALUE(density[i] >= 0.0 && density[i] <= 1.0, "tenfold::", op, ": ",
                        item("density", i), " must be in [0, 1], got ", density[i]);
  DeltaMergeArgs args = delta_args(op, out, base, experts, weights, true, normalize, lambda);
  DeltaMerge& m = args.kernel;
  m.pick = Pick::all;
  const int64_t n = base.numel();
  for (int e = 0; e < m.experts; ++e) {
    const double wanted = std::floor(density[m.number[e]] * static_cast<double>(n));
    args.kept.push_back(wanted >= static_cast<double>(n) ? n : static_cast<int64_t>(wanted));
    if (args.kept.back() < n) m.pick = Pick::largest;
  }
  return args;
}

WeightedSum weighted_sum_of(const MergeTensors& tensors, const std::vector<double>& weights) {
  WeightedSum m{};
  m.out = tensors.out.data_ptr();
  m.dtype = to_dtype(tensors.out.scalar_type());
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0.0) continue;  // not even read
    m.term[m.terms] = tensors.experts[i].data_ptr();
    m.weight[m.terms++] = static_cast<float>(weights[i]);
  }
  return m;
}

DeltaMerge delta_sum_of(const MergeTensors& tensors, const std::vector<double>& weights) {
  const WeightedSum sum = weighted_sum_of(tensors, weights);
  DeltaMerge m{};
  m.base = tensors.base->data_ptr();
  m.out = sum.out;
  m.dtype = sum.dtype;
  m.pick = Pick::all;
  m.experts = sum.terms;
  for (int e = 0; e < sum.terms; ++e) {
    m.expert[e] = sum.term[e];
    m.weight[e] = sum.weight[e];
  }
  return m;
}

std::optional<WeightedSum> as_copy(const DeltaMerge& m) {
  if (m.elect || m.pick != Pick::all || m.experts != 1 || m.weight[0] != 1.0f) return std::nullopt;
  WeightedSum copy{};
  copy.out = m.out;
  copy.dtype = m.dtype;
  copy.terms = 1;
  copy.term[0] = m.expert[0];
  copy.weight[0] = 1.0f;
  return copy;
}

LinearMergeArgs check_linear_merge(const char* op, const OptTensor& out,
                                   const std::vector<Tensor>& tensors,
                                   const std::vector<double>& weights, bool normalize) {
  check_list(op, "tensors", tensors);
  check_float_dtype(op, "tensors[0]", tensors[0]);
  for (size_t i = 1; i < tensors.size(); ++i)
    check_alike(op, item("tensors", i), tensors[i], "tensors[0]", tensors[0]);
  check_numbers(op, "weights", weights, "tensors", tensors.size());
  const double sum = divisor(op, weights, normalize);
  if (out) check_out(op, *out, "tensors[0]", tensors[0]);
  LinearMergeArgs args{gather(op, out, "tensors", std::nullopt, tensors), {}};
  std::vector<double> shares = weights;
  for (double& w : shares) w /= sum;
  args.kernel = weighted_sum_of(args.tensors, shares);
  return args;
}

MergeTensors check_slerp_merge(const char* op, const OptTensor& out, const Tensor& v0,
                               const Tensor& v1, double t, const OptTensor& base,
                               double dot_threshold) {
  check_float_dtype(op, "v0", v0);
  check_alike(op, "v1", v1, "v0", v0);
  if (base) check_alike(op, "base", *base, "v0", v0);
  TENFOLD_CHECK_VALUE(t >= 0.0 && t <= 1.0, "tenfold::", op, ": t must be in [0, 1], got ", t);
  TENFOLD_CHECK_VALUE(dot_threshold >= 0.0 && dot_threshold <= 1.0, "tenfold::", op,
                      ": dot_threshold must be in [0, 1], got ", dot_threshold);
  if (out) check_out(op, *out, "v0", v0);
  return gather(op, out, "v", base, {v0, v1});
}

MergeTensors check_delta_gram(const char* op, const OptTensor& gram, const OptTensor& base,
                              const std::vector<Tensor>& experts) {
  check_list(op, "experts", experts);
  check_float_dtype(op, "experts[0]", experts[0]);
  for (size_t i = 1; i < experts.size(); ++i)
    check_alike(op, item("experts", i), experts[i], "experts[0]", experts[0]);
  if (base) check_alike(op, "base", *base, "experts[0]", experts[0]);
  const auto m = static_cast<int64_t>(experts.size());
  if (gram) {
    TENFOLD_CHECK_TYPE(gram->scalar_type() == ScalarType::Double, "tenfold::", op,
                       ": gram must be float64, got ", dtype_name(gram->scalar_type()));
    check_sizes(op, "gram", *gram, {m, m}, "[experts, experts]");
    check_same_device(op, "experts[0]", experts[0], "gram", *gram);
    TENFOLD_CHECK_VALUE(gram->is_contiguous(), "tenfold::", op, ": gram must be contiguous");
    Memory memory(experts.size() + 2);
    memory.writes("gram", 0, *gram);
    for (size_t i = 0; i < experts.size(); ++i)
      if (is_dense(experts[i])) memory.reads("experts", i, experts[i]);
    if (base && is_dense(*base)) memory.reads("base", 0, *base);
    memory.check(op);
  }
  MergeTensors made{std::nullopt, {}, gram ? *gram : experts[0]};
  if (!gram) made.out = torch::stable::new_zeros(experts[0], {m, m}, ScalarType::Double);
  if (base) made.base = as_contiguous(*base);
  for (const Tensor& e : experts) made.experts.push_back(as_contiguous(e));
  return made;
}

GramInput gram_input(const MergeTensors& tensors) {
  GramInput in{};
  in.base = tensors.base ? tensors.base->data_ptr() : nullptr;
  in.dtype = to_dtype(tensors.experts[0].scalar_type());
  for (const Tensor& e : tensors.experts) in.expert[in.experts++] = e.data_ptr();
  return in;
}

}  // namespace tenfold

// Each as a function and in a form that writes into a caller's tensor, which may be an input.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "dare_merge(Tensor base, Tensor[] experts, float[] weights, float[] drop, int seed, "
      "int stream=0, *, int offset=0, str rescale=\"inv_keep\", bool elect_sign=False, "
      "bool normalize=False, float lambda_=1.0) -> Tensor");
  m.def(
      "dare_merge_(Tensor(a!) out, Tensor base, Tensor[] experts, float[] weights, float[] drop, "
      "int seed, int stream=0, *, int offset=0, str rescale=\"inv_keep\", bool elect_sign=False, "
      "bool normalize=False, float lambda_=1.0) -> ()");
  m.def(
      "ties_merge(Tensor base, Tensor[] experts, float[] weights, float[] density, *, "
      "bool normalize=True, float lambda_=1.0) -> Tensor");
  m.def(
      "ties_merge_(Tensor(a!) out, Tensor base, Tensor[] experts, float[] weights, "
      "float[] density, *, bool normalize=True, float lambda_=1.0) -> ()");
  m.def("linear_merge(Tensor[] tensors, float[] weights, *, bool normalize=True) -> Tensor");
  m.def(
      "linear_merge_(Tensor(a!) out, Tensor[] tensors, float[] weights, *, bool normalize=True) "
      "-> ()");
  m.def(
      "slerp_merge(Tensor v0, Tensor v1, float t, *, Tensor? base=None, "
      "float dot_threshold=0.9995) -> Tensor");
  m.def(
      "slerp_merge_(Tensor(a!) out, Tensor v0, Tensor v1, float t, *, Tensor? base=None, "
      "float dot_threshold=0.9995) -> ()");
  m.def("delta_gram(Tensor? base, Tensor[] experts) -> Tensor");
  m.def("delta_gram_(Tensor(a!) gram, Tensor? base, Tensor[] experts) -> ()");
}
