// Schemas and checks of pair_pack and shift_right.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "pair_pack(Tensor source, Tensor source_offsets, Tensor target, Tensor target_offsets, "
      "Tensor? prefix, Tensor? prefix_offsets, int eos_id, int pad_id, int max_inputs, "
      "int max_targets, *, int? target_pad_id=None) "
      "-> (Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len, Tensor cut)");
  m.def(
      "shift_right(Tensor labels, int start_id=0, int pad_id=0, int ignore_index=-100) -> Tensor");
}
