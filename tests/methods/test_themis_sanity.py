# SPDX-License-Identifier: Apache-2.0
"""Checks 17 and 18: a trace makes a ranking possible that is not without it, and it is the observation that decides."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tenfold.ops import lm_weight, trace_token_class
from tenfold.themis.config import ThemisConfig
from tenfold.themis.objective import joint_loss

CHARS = "0123456789+= abcdefghijklmnopqrstuvwxyz"
PAD, EOS, TOOL, OBS, WORK, ASSISTANT = range(6)
SIZE = 6 + len(CHARS)
SAID = WORDS = ("correct", "incorrect")


class Writer(nn.Module):
    """A GRU over characters, with both heads."""

    def __init__(self, seed, hidden=64):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.gru = nn.Embedding(SIZE, hidden), nn.GRU(hidden, hidden, batch_first=True)
        self.lm, self.value = nn.Linear(hidden, SIZE, bias=False), nn.Linear(hidden, 1, bias=False)
        # It keeps what it has read, as LSTMs do whose forget gates begin open.
        self.gru.bias_hh_l0.data[hidden : 2 * hidden] += 1

    def forward(self, ids):
        return self.gru(self.embed(ids))[0]


def encode(text):
    return [6 + CHARS.index(c) for c in text]


def sums(count, made):
    """(question, right answer, wrong answer) of two-digit sums."""
    found = []
    for _ in range(count):
        a, b = made.randrange(10, 90), made.randrange(10, 90)
        found.append((f"{a}+{b}=", str(a + b), str(a + b + made.choice((-10, -2, -1, 1, 2, 10)))))
    return found


def row(question, answer, said, words):
    """ids; where the answer and the trace begin. Without ``said`` there is no trace, without ``words`` no rationale."""
    q, head = encode(question), encode(question + answer)
    if said is None:
        return [*head, EOS], len(q), len(head)
    ids = [*head, ASSISTANT, TOOL, *encode("sum"), OBS, *encode(said), WORK]
    return ids + ([*encode(words), EOS] if words else []), len(q), len(head)


def padded(rows):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, PAD)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]


def batch(data, traces, config):
    rows = [row(q, (right, wrong)[i], SAID[i] if traces else None, WORDS[i])
            for i in range(2) for q, right, wrong in data]  # fmt: skip
    ids, mask = padded([r[0] for r in rows])
    answers, starts = (torch.tensor([r[i] for r in rows]) for i in (1, 2))
    cls = trace_token_class(ids, mask, starts, answers, TOOL, OBS, WORK, EOS)
    is_pos = torch.arange(len(rows)) < len(data)
    return {"ids": ids, "mask": mask, "cls": cls, "is_pos": is_pos,
            "weights": lm_weight(cls, is_pos, config.beta, config.omega, config.lm_on_positive),
            "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}  # fmt: skip


def train(traces, epochs, look=()):
    """The model, held-out sums, and its accuracy on them after the epochs ``look`` and the last."""
    made = random.Random(0)
    data, held_out = sums(256, made), sums(120, made)
    # The paper's sum of components: a rationale of few characters counts as much as a call of many.
    config = ThemisConfig(
        alpha=1.0 if traces else 0.0, lm_reduce="component_sum", require_trace=False
    )
    model, found = Writer(0), []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def loss_of(part):
        made = batch(part, traces, config)
        return joint_loss(model(made["ids"]), made, model.lm.weight, model.value.weight, config)

    for epoch in range(1, epochs + 1):
        made.shuffle(data)
        for at in range(0, 256, 32):
            loss = loss_of(data[at : at + 32]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in (*look, epochs):
            with torch.no_grad():
                found.append(loss_of(held_out).metrics()["accuracy"])
    return SimpleNamespace(model=model, held_out=held_out, accuracy=found)


@torch.no_grad()
def rewritten(trained, swap):
    """Rewards [pairs, 2] and rationales where the tool says its word, or the opposite, and the model goes on."""
    model = trained.model
    ids, mask = padded([row(q, a, SAID[i ^ swap], None)[0] for q, *answers in trained.held_out
                        for i, a in enumerate(answers)])  # fmt: skip
    state = model(ids)[torch.arange(len(ids)), mask.sum(1) - 1]
    rewards, texts = torch.full((len(ids),), torch.nan), [""] * len(ids)
    for _ in range(30):
        token = model.lm(state).argmax(1)
        state = model.gru(model.embed(token)[:, None], state[None])[0][:, 0]
        ended = (token == EOS) & rewards.isnan()
        rewards[ended] = model.value(state)[ended, 0]
        for i, t in enumerate(token.tolist()):
            texts[i] += CHARS[t - 6] if t >= 6 and rewards[i].isnan() else ""
    return rewards.view(-1, 2), texts


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return train(True, 14, look=(5,))


def test_a_trace_makes_the_ranking_possible(trained):
    assert trained.accuracy[0] >= 0.95  # after 5 epochs
    assert train(False, 15).accuracy[0] <= 0.65


def test_the_observation_decides(trained):
    rewards, texts = rewritten(trained, swap=0)
    assert (rewards[:, 0] > rewards[:, 1]).float().mean() >= 0.95
    assert set(texts) == set(WORDS)
    rewards, texts = rewritten(trained, swap=1)
    assert (rewards[:, 0] < rewards[:, 1]).float().mean() >= 0.95
    assert texts[:2] == [WORDS[1], WORDS[0]]
