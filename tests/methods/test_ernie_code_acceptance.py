# SPDX-License-Identifier: Apache-2.0
"""Acceptance checks of ERNIE-Code's training (section 9 of its specification): 13, and its goal as a slow test."""

import pytest
import torch

from tenfold.ernie_code import CodeTrainConfig, build_model, train, train_tokenizer
from tenfold.ernie_code.evaluation import ranking
from tenfold.reference import span_corruption


def test_check_13_training_sanity():
    """64 rows of 40 random tokens, corrupted once: SCLM loss from about 21.6 to below 0.01 within 100 steps."""
    first, count, vocab = 204, 100, 205
    tokens = torch.randint(3, 105, (64, 40), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((64,), 40)
    ids, _, labels, _ = span_corruption(
        tokens, lengths, 0.15, 3.0, 0, 0, first, count, 1, 0, 40, 16, target_pad_id=-100
    )  # fmt: skip
    model = build_model("tiny", vocab_size=vocab, dropout_rate=0.0, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mask = (ids != 0).long()
    losses = []
    for _ in range(100):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(21.6, abs=3)
    assert losses[-1] < 0.01


def _pair(a, b, names):
    return {"source": a, "target": b, "source_language": names[0], "target_language": names[1]}


@pytest.mark.slow
def test_check_13_pivot():
    """Toy languages A, P, B over one set of words: A to P and P to B are trained, A to B is above chance."""
    draw = torch.Generator().manual_seed(0)
    words = [[f"{lead}{i:02d}" for i in range(24)] for lead in "xyz"]  # of A, P, B
    names = ("Alpha", "English", "Beta")

    def sentences(count):
        picks = torch.randint(24, (count, 3), generator=draw).tolist()
        return [tuple(" ".join(own[i] for i in pick) for own in words) for pick in picks]

    seen, held = sentences(600), sentences(48)
    corpora = {
        "A-P": [_pair(a, p, names[:2]) for a, p, _ in seen],
        "P-B": [_pair(p, b, names[1:]) for _, p, b in seen],
    }
    tokenizer = train_tokenizer((" ".join(s) for s in seen), 640)
    model = build_model(
        "tiny", vocab_size=len(tokenizer), dropout_rate=0.0, seed=0, head_std=64**-0.5
    )
    settings = CodeTrainConfig.from_preset(
        "small", steps=700, batch_size=32, rows_per_draw=16, max_inputs=48, max_targets=24, learning_rate=3e-3
    )  # fmt: skip
    train(model, tokenizer, corpora, settings)
    rows = [_pair(a, b, (names[0], names[2])) for a, _, b in held]
    found = ranking(model, tokenizer, rows, candidates=16)["all"]
    assert found["top1"] > 0.5, found  # chance is 1 / 16
