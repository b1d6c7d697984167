// Schemas and checks of span_mask, span_corrupt, span_corruption and span_restore.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "span_mask(Tensor lengths, int max_len, float density, float mean_span, int seed, "
      "int offset, bool roll=False) -> Tensor");
  m.def(
      "span_corrupt(Tensor tokens, Tensor lengths, Tensor mask, int first_sentinel, "
      "int num_sentinels, int eos_id, int pad_id, int max_inputs, int max_targets, "
      "bool aligned=True, bool final_sentinel=False, *, bool allow_sentinels=False, "
      "int? target_pad_id=None) -> (Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len)");
  m.def(
      "span_corruption(Tensor tokens, Tensor lengths, float density, float mean_span, int seed, "
      "int offset, int first_sentinel, int num_sentinels, int eos_id, int pad_id, int max_inputs, "
      "int max_targets, bool roll=False, bool aligned=True, bool final_sentinel=False, *, "
      "bool allow_sentinels=False, int? target_pad_id=None) "
      "-> (Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len)");
  m.def(
      "span_restore(Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len, "
      "int first_sentinel, int num_sentinels, int eos_id, *, int pad_id=0) "
      "-> (Tensor tokens, Tensor lengths)");
}
