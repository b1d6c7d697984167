// SPDX-License-Identifier: Apache-2.0
// group_heads (DHA section 3.3): H heads into N groups of equal size, with a small sum of distances
// between heads of one group. dist [H, H] -> groups [N, g] int32, heads of a group ascending,
// groups by their first head. Only (dist + dist^T) / 2 off the diagonal counts; float64 throughout.
//
//   swap:       descent by the best of all swaps of two heads, from the contiguous partition and
//               from restarts - 1 random ones; the lowest cost wins, the earlier start on a tie.
//   paper_sa:   the paper's annealing, one run from a random partition: temperature 100 to 0.001 by
//               0.9 a proposal, which is 110 proposals. Its score is -distance (the paper's text
//               wants near heads together; its algorithm box, taken literally, far ones).
//   contiguous: heads in order, as GQA does.
//
// The change of the cost by a swap is O(1): a table keeps every head's distance to every group.
#pragma once

namespace tenfold {

enum class GroupSolver : int { swap, paper_sa, contiguous };

}  // namespace tenfold
