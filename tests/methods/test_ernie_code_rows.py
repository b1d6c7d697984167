# SPDX-License-Identifier: Apache-2.0
"""Rows that the collators take: the longest ones, ids, dtypes, padding, and bad ones."""

import pytest
import torch
from ernie_code_data import FIRST, Mt5Ids, rows_of, trimmed

from tenfold.ernie_code.collators import PivotTranslationCollator, SpanCorruptionCollator
from tenfold.ernie_code.packing import raw_length


def test_resident_rows():
    """``corrupt`` of no rows, of int32, and of ids that the model has no row for (spec 8)."""
    collate = SpanCorruptionCollator(Mt5Ids(), decoder_input_ids=True)
    none = collate.corrupt(torch.zeros(0, 9, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), step=0)  # fmt: skip
    assert {len(v) for v in none.values()} == {0} and {v.dim() for v in none.values()} == {2}
    tokens = torch.randint(3, 900, (4, 30), generator=torch.Generator().manual_seed(0))
    tokens[:, :3] = torch.tensor([0, 1, 2])  # special tokens inside a text are text
    lengths = torch.tensor([30, 7, 0, 1])
    want = collate.corrupt(tokens, lengths, step=5)
    narrow = collate.corrupt(tokens.int(), lengths.int(), step=5)
    assert all(v.dtype == torch.int64 and torch.equal(v, want[k]) for k, v in narrow.items())
    tokens[1, 7:] = 250_105  # beyond the row
    assert torch.equal(collate.corrupt(tokens, lengths, step=5)["labels"], want["labels"])
    for wrong in (250_105, -1):
        tokens[1, 6] = wrong
        with pytest.raises(IndexError, match=rf"\[0, 250105\), the tokenizer's, got {wrong} in row 1"):  # fmt: skip
            collate.corrupt(tokens, lengths, step=5)
    with pytest.raises(TypeError, match=r"tokens.*float32"):
        collate.corrupt(tokens.float(), lengths, step=5)


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_longest_rows(roll, aligned, final):
    """Rows of ``length`` tokens always fit, whatever the limit is: inputs or sentinels."""
    options = {"roll": roll, "aligned": aligned, "final_sentinel": final}
    for width, tokenizer_options in (
        (2, {}), (3, {}), (4, {}), (64, {}), (2048, {}), (64, {"first_sentinel": 250_099, "num_sentinels": 3}),
        (64, {"first_sentinel": 250_099, "num_sentinels": 1}),
    ):  # fmt: skip
        collate = SpanCorruptionCollator(Mt5Ids(), max_inputs=width, **options, **tokenizer_options)
        assert collate.length == collate.most_tokens()
        for seed in range(4):
            collate(rows_of(*[collate.length] * 4, *range(min(collate.length, 3) + 1), step=seed))
        with pytest.raises(ValueError, match=rf"{collate.length + 1} tokens.*at most {collate.length}\b"):  # fmt: skip
            collate(rows_of(collate.length + 1))
    long = SpanCorruptionCollator(Mt5Ids(), max_inputs=2048, **options)
    assert (long.length == 2009) == (not roll and not final) and long.length <= 2009
    rows = rows_of(long.length)
    assert long(rows)["labels"].shape[1] <= long.max_targets <= 402 + final + roll
    # The rows that a rolling collator takes are packed by its own length.
    assert raw_length(512, roll=roll)[0] == SpanCorruptionCollator(Mt5Ids(), roll=roll).length


def test_bad_rows():
    with pytest.raises(ValueError, match="density must be in"):
        SpanCorruptionCollator(Mt5Ids(), density=1.0)
    with pytest.raises(ValueError, match="mean_span"):
        SpanCorruptionCollator(Mt5Ids(), mean_span=0.5)
    with pytest.raises(ValueError, match="both or neither"):
        SpanCorruptionCollator(Mt5Ids(), first_sentinel=5)
    with pytest.raises(ValueError, match="padding must be one of longest, max_length"):
        SpanCorruptionCollator(Mt5Ids(), padding="none")
    for cls in (SpanCorruptionCollator, PivotTranslationCollator):
        with pytest.raises(TypeError, match="max_inputs must be an integer, got '512'"):
            cls(Mt5Ids(), max_inputs="512")
        with pytest.raises(ValueError, match="max_inputs must be >= 2, got 1"):
            cls(Mt5Ids(), max_inputs=1, roll=True)
    with pytest.raises(TypeError, match="seed must be an integer"):
        SpanCorruptionCollator(Mt5Ids(), seed=0.5)
    collate = SpanCorruptionCollator(Mt5Ids(), max_inputs=2048)
    assert collate.most_tokens() == 2009
    with pytest.raises(ValueError, match=r"2010 tokens and needs 101 sentinels.* at most 2009"):
        collate(rows_of(2010))
    assert collate(rows_of(2009))["labels"].shape == (1, 402)
    for wrong in (-1, 250_105):
        with pytest.raises(IndexError, match=rf"\[0, 250105\), the tokenizer's, got {wrong} in row 1"):  # fmt: skip
            collate([[5], [7, wrong]])
    with pytest.raises(ValueError, match="sentinel"):
        collate([[5, 6, 250_050]])
    loose = SpanCorruptionCollator(Mt5Ids(), allow_sentinels=True)
    assert trimmed(loose([[5, 250_050, 6]]), 0)[0] == [5, 250_050, FIRST, 1]
    for rows, said in (([], "no rows"), ([[[1, 2]]], "token ids"), ([[0.5]], "token ids")):
        with pytest.raises(ValueError, match=said):
            collate(rows)
    with pytest.raises(ValueError, match="step must be in"):
        collate([{"input_ids": [5, 6], "step": -1, "row": 0}])
    empty = SpanCorruptionCollator(Mt5Ids(), density=0.0)([[5, 6, 7]])
    assert trimmed(empty, 0) == ([5, 6, 7, 1], [1])
    empty = SpanCorruptionCollator(Mt5Ids(), density=0.0, aligned=False)([[5, 6, 7], [8]])
    assert trimmed(empty, 0) == ([5, 6, 7, 1], [FIRST, 1])


def test_padding():
    collate = SpanCorruptionCollator(Mt5Ids(), max_inputs=64, pad_to_multiple_of=8)
    batch = collate(rows_of(20, 10))
    assert batch["input_ids"].shape == (2, 24) and batch["labels"].shape == (2, 8)
    assert collate(rows_of(collate.length))["input_ids"].shape == (1, 64)
    # The longest rows of a size that is no multiple: more columns, of padding.
    usual = SpanCorruptionCollator(Mt5Ids())(rows_of(568, 568))
    collate = SpanCorruptionCollator(Mt5Ids(), pad_to_multiple_of=48, decoder_input_ids=True)
    wide = collate(rows_of(568, 568))
    assert wide["input_ids"].shape == (2, 528) and wide["labels"].shape == (2, 144)
    assert (wide["input_ids"][:, 512:] == 0).all() and (wide["labels"][:, 114:] == -100).all()
    assert not wide["attention_mask"][:, 512:].any() and wide["decoder_input_ids"].shape == (2, 144)
    assert torch.equal(wide["input_ids"][:, :512], usual["input_ids"])
    assert torch.equal(wide["labels"][:, :114], usual["labels"])
    full = SpanCorruptionCollator(Mt5Ids(), max_inputs=64, padding="max_length")(rows_of(3))
    assert full["input_ids"].shape == (1, 64) and full["labels"].shape == (1, full["labels"].numel())  # fmt: skip
