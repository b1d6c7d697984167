# SPDX-License-Identifier: Apache-2.0
"""How long rows are after span corruption: of numbers, without a tensor."""

from __future__ import annotations

from tenfold.reference.corruption import span_counts


def _check(density: float, mean_span: float) -> None:
    if not 0.0 <= density < 1.0:
        raise ValueError(f"density must be in [0, 1), got {density}")
    if not mean_span >= 1.0:
        raise ValueError(f"mean_span must be at least 1, got {mean_span}")


def corrupted_sizes(
    length: int, density: float = 0.15, mean_span: float = 3.0, final_sentinel: bool = False, *, roll: bool = False,
    aligned: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """Tokens of a row's inputs and targets after :func:`tenfold.ops.span_corruption`, EOS included.

    Args:
        length: tokens of the row, at least 0.
        density, mean_span, final_sentinel, roll, aligned: as of :func:`tenfold.ops.span_corruption`.

    Returns:
        (inputs, targets): ``length - noise + spans + 1`` and ``noise + spans + 1``, and one more of targets with
        ``final_sentinel``. With ``roll`` that is at most one more on each side: a rolled mask may cut a span in two, or
        a run of kept tokens, of which targets that are not ``aligned`` have a sentinel. Those have one for a row of
        which nothing is masked, too.

    Raises:
        ValueError: length below 0; density or mean_span out of range.

    Source:
        ERNIE-Code (arXiv 2212.06742), section 3.3 of the method's specification.
    """
    _check(density, mean_span)
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    noise, spans = span_counts(length, density, mean_span) if length > 1 else (0, 0)
    marks = spans + int(roll) if spans else int(length > 0 and not aligned)
    inputs = length - noise + (marks if spans else 0) + 1
    return inputs, noise + marks + 1 + int(final_sentinel)


def longest_chunk(
    max_inputs: int, density: float = 0.15, mean_span: float = 3.0, final_sentinel: bool = False, *,
    roll: bool = False, aligned: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """The longest row whose corrupted inputs fit into ``max_inputs`` tokens, and the length of its targets.

    Args:
        max_inputs: at least 2, a token and EOS.
        density, mean_span, final_sentinel, roll, aligned: as of :func:`corrupted_sizes`.

    Returns:
        (length, targets): 512 gives (568, 114), 1024 gives (1137, 229) at a density of 0.15 in spans of 3.

    Raises:
        ValueError: max_inputs below 2; density or mean_span out of range.

    Source:
        ERNIE-Code (arXiv 2212.06742), section 3.3 of the method's specification, step 1.
    """
    _check(density, mean_span)
    if max_inputs < 2:
        raise ValueError(f"max_inputs must be at least 2, got {max_inputs}")

    def sizes(length: int) -> tuple[int, int]:
        return corrupted_sizes(
            length, density, mean_span, final_sentinel, roll=roll, aligned=aligned
        )

    low, high = 1, 2  # inputs never get shorter with the length
    while sizes(high)[0] <= max_inputs:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sizes(middle)[0] <= max_inputs else (low, middle)
    return low, sizes(low)[1]
