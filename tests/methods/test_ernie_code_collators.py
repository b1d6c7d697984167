# SPDX-License-Identifier: Apache-2.0
"""Batches of both objectives: closed forms, inverses, the same rows in any batch, and bad input."""

import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from ernie_code_data import FIRST, Mt5Ids, files, rows_of, tokenizer, trimmed
from torch.utils.data import DataLoader

from tenfold import ops, reference
from tenfold.ernie_code.collators import (
    PivotTranslationCollator,
    SpanCorruptionCollator,
    TruncationWarning,
)
from tenfold.ernie_code.formatting import SPACE, UnformattedCodeWarning, decode_code, encode_text
from tenfold.ernie_code.mixture import Mixture, MixtureBatchSampler, MixtureDataset
from tenfold.ernie_code.packing import pack_texts, raw_length
from tenfold.ernie_code.pairs import Pair, PairRows


def test_closed_form_of_the_spec():
    collate = SpanCorruptionCollator(Mt5Ids())
    batch = collate([list(range(100, 110)), np.arange(100, 120), torch.arange(100, 101)])
    assert trimmed(batch, 0) == ([*range(100, 108), FIRST, 1], [FIRST, 108, 109, 1])
    assert trimmed(batch, 1) == ([*range(100, 117), FIRST, 1], [FIRST, 117, 118, 119, 1])
    assert trimmed(batch, 2) == ([100, 1], [1])
    assert {v.dtype for v in batch.values()} == {torch.int64}
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize(
    "inputs, length, targets, noise, spans",
    [(128, 141, 29, 21, 7), (256, 284, 58, 43, 14), (512, 568, 114, 85, 28), (1024, 1137, 229, 171, 57)],
)  # fmt: skip
def test_lengths_of_full_rows(inputs, length, targets, noise, spans):
    assert raw_length(inputs) == (length, targets)
    assert targets == noise + spans + 1 and inputs == length - noise + spans + 1
    collate = SpanCorruptionCollator(Mt5Ids(), max_inputs=inputs)
    batch = collate(rows_of(length, length))
    assert batch["input_ids"].shape == (2, inputs) and batch["labels"].shape == (2, targets)
    for i in range(2):
        source, target = trimmed(batch, i)
        marks = [FIRST - j for j in range(spans)]
        assert [t for t in source if t > 250_000] == marks == [t for t in target if t > 250_000]
    with pytest.raises(ValueError, match=f"row 1 has {length + 1} tokens.*at most {length} "):
        collate(rows_of(4, length + 1))


@pytest.mark.parametrize(
    "options", [{}, {"roll": True}, {"density": 0.5, "mean_span": 1.0}, {"final_sentinel": True}]
)
def test_restored(options):
    collate = SpanCorruptionCollator(Mt5Ids(), max_inputs=120, **options)
    most = min(collate.length, collate.most_tokens())
    draw = random.Random(1)
    examples = rows_of(*(draw.randrange(most + 1) for _ in range(60)), 0, 1, 2, most)
    batch = collate(examples)
    n_in, n_out = batch["attention_mask"].sum(1), (batch["labels"] != -100).sum(1)
    labels = batch["labels"].clamp(min=0)
    tokens, lengths = ops.span_restore(batch["input_ids"], n_in, labels, n_out, FIRST, 100, 1)
    for i, example in enumerate(examples):
        assert tokens[i, : lengths[i]].tolist() == example["input_ids"].tolist()


def test_equal_to_the_reference():
    for options in ({"roll": True, "aligned": False}, {"density": 0.3, "mean_span": 2.0}):
        collate = SpanCorruptionCollator(Mt5Ids(), max_inputs=64, seed=11, padding="max_length", **options)  # fmt: skip
        examples = rows_of(50, 40, 3, step=5)
        tokens = torch.zeros(3, 50, dtype=torch.int64)
        for row, e in zip(tokens, examples):
            row[: len(e["input_ids"])] = torch.from_numpy(e["input_ids"])
        lengths = torch.tensor([50, 40, 3])
        want = reference.span_corruption(
            tokens, lengths, collate.density, collate.mean_span, 11, 5 << 32, FIRST, 100, 1, 0, 64, collate.max_targets,
            options.get("roll", False), options.get("aligned", True), target_pad_id=-100,
        )  # fmt: skip
        batch = collate(examples)
        assert torch.equal(batch["input_ids"], want[0]) and torch.equal(batch["labels"], want[2])
        resident = collate.corrupt(tokens, lengths, step=5)
        assert all(torch.equal(resident[k], batch[k]) for k in batch)


def test_rows_do_not_depend_on_their_batch():
    collate = SpanCorruptionCollator(Mt5Ids(), max_inputs=100, seed=2, decoder_input_ids=True)
    examples = rows_of(90, 17, 64, 90, 5, 33, 90, 71)
    whole = [trimmed(collate(examples), i) for i in range(8)]
    order = random.Random(0).sample(range(8), 8)
    shuffled = collate([examples[i] for i in order])
    for cuts in ([3, 8], [1, 2, 3, 4, 5, 6, 7, 8], [8]):
        start, made = 0, []
        for end in cuts:
            batch = collate(examples[start:end])
            made += [trimmed(batch, i) for i in range(end - start)]
            start = end
        assert made == whole
    assert [trimmed(shuffled, i) for i in range(8)] == [whole[i] for i in order]
    # Another step or seed: other masks; without step and row, the content decides, and the epoch.
    later = [{**e, "step": 4} for e in examples]
    assert [trimmed(collate(later), i) for i in range(8)] != whole
    bare = [e["input_ids"] for e in examples]
    first = collate(bare)
    again = [trimmed(collate([b]), 0) for b in bare]
    assert [trimmed(first, i) for i in range(8)] == again
    assert [trimmed(pickle.loads(pickle.dumps(collate))(bare), i) for i in range(8)] == again
    collate.epoch = 1
    assert [trimmed(collate(bare), i) for i in range(8)] != again
    shifted = first["decoder_input_ids"]
    assert (shifted[:, 0] == 0).all() and (shifted >= 0).all()
    assert torch.equal(shifted[:, 1:], first["labels"][:, :-1].clamp(min=0))


CODE = "def add(a, b):\n    return a + b\n"
PAIR = Pair("Return the sum.", CODE, "English", "Python", "x")


def example(pair=PAIR, **more):
    return {**PairRows([pair])[0], **more}


def test_translation_example():
    t = tokenizer()
    forward = PivotTranslationCollator(t, directions="forward")([example()])
    source, target = trimmed(forward, 0)
    assert t.decode(source) == "translate English to Python: \nReturn the sum.</s>"
    assert target[-1] == 1 and SPACE * 4 in t.convert_ids_to_tokens(target)
    assert decode_code(t, target) == CODE
    backward = PivotTranslationCollator(t, directions="backward")([example()])
    source, target = trimmed(backward, 0)
    assert decode_code(t, source) == "translate Python to English: \n" + CODE
    assert t.decode(target) == "Return the sum.</s>"
    both = PivotTranslationCollator(t, directions="both")([example()])
    assert trimmed(both, 0) == trimmed(forward, 0) and trimmed(both, 1) == trimmed(backward, 0)
    # Codes of catalogues are names in prompts; ids are taken as they are.
    codes = Pair("eins", "un", "de", "fr")
    made = PivotTranslationCollator(t, directions="forward")([example(codes)])
    assert t.decode(trimmed(made, 0)[0]).startswith("translate German to French: \neins")
    ids = {**example(codes), "source": encode_text(t, "eins"), "target": encode_text(t, "un")}
    given = PivotTranslationCollator(t, directions="forward")([ids])
    assert torch.equal(given["input_ids"], made["input_ids"])


def test_random_directions_by_step_and_row():
    collate = PivotTranslationCollator(tokenizer(), seed=4)
    examples = [example(step=s, row=r) for s in range(2) for r in range(20)]
    whole = collate(examples)
    rows = [trimmed(whole, i) for i in range(40)]
    assert [trimmed(collate([e]), 0) for e in examples] == rows
    assert 8 <= sum(r == rows[0] for r in rows) <= 32


def test_span_mode_restores_source_and_target():
    t = tokenizer()
    collate = PivotTranslationCollator(t, ptlm_mode="span", directions="forward", max_inputs=96)
    before = encode_text(t, "translate English to Python: \n")
    pair = Pair("Return the sum of two numbers, or of what else.", CODE, "English", "Python")
    batch = collate([example(pair, step=s, row=0) for s in range(6)])
    seen = set()
    for i in range(6):
        source, target = trimmed(batch, i)
        assert source[: len(before)] == before
        body = torch.tensor([source[len(before) :]])
        tokens, n = ops.span_restore(
            body, torch.tensor([body.shape[1]]), torch.tensor([target]), torch.tensor([len(target)]),
            collate.first_sentinel, 100, 1,
        )  # fmt: skip
        assert decode_code(t, tokens[0, : n[0]]) == pair.source + CODE
        seen.add(tuple(source))
    assert len(seen) > 1
    # Both directions of a pair: masks of their own, the same in any batch, in two calls of the op.
    double = PivotTranslationCollator(t, ptlm_mode="span", directions="both", max_inputs=96)
    given = [example(pair, step=2, row=r) for r in range(5)]
    calls = []
    corrupt = double._corrupt
    double._corrupt = lambda *args: calls.append(1) or corrupt(*args)
    whole = double(given)
    assert len(calls) == 2 and len(whole["input_ids"]) == 10
    alone = [trimmed(double([e]), i) for e in given for i in range(2)]
    assert [trimmed(whole, i) for i in range(10)] == alone
    once = collate(given)
    assert alone[::2] == [trimmed(once, i) for i in range(5)]
    same = Pair(
        "un deux trois quatre cinq six sept", "un deux trois quatre cinq six sept", "a", "b"
    )
    lengths = [
        tuple(x < collate.first_sentinel - 99 for x in trimmed(double([example(same, step=s, row=0)]), i)[0][-30:])
        for s in range(20) for i in range(2)
    ]  # fmt: skip
    assert any(a != b for a, b in zip(lengths[::2], lengths[1::2]))  # other places are masked
    for options in ({"aligned": False}, {"final_sentinel": True}):
        with pytest.raises(ValueError, match=r"no token .* labels have 2 tokens; max_targets = 1"):
            PivotTranslationCollator(t, ptlm_mode="span", max_targets=1, **options)([example(pair)])
    long = Pair("word " * 60, CODE * 8, "English", "Python")
    with pytest.warns(TruncationWarning):
        cut = collate([example(long)])
    assert cut["input_ids"].shape[1] <= 96 and trimmed(cut, 0)[0][-1] == 1
    assert cut["labels"].shape[1] <= collate.max_targets


def test_truncation_keeps_prompt_and_eos():
    t = tokenizer()
    collate = PivotTranslationCollator(t, max_inputs=32, max_targets=12, directions="forward")
    long = Pair("word " * 60, CODE * 4, "English", "Python")
    with pytest.warns(TruncationWarning, match=r"1 sources \(max_inputs = 32\) and 2 targets"):
        batch = collate([example(), example(long)])
    assert batch["input_ids"].shape == (2, 32) and batch["labels"].shape == (2, 12)
    source, target = trimmed(batch, 1)
    assert source[-1] == 1 and target[-1] == 1
    assert t.decode(source).startswith("translate English to Python: \nword word")
    assert collate.truncated == 2
    with pytest.raises(ValueError, match=r"the prompt .* does not fit into max_inputs = 8"):
        PivotTranslationCollator(t, max_inputs=8)([example()])


def test_empty_pairs():
    empty = {**example(), "target": " \n"}
    collate = PivotTranslationCollator(tokenizer(), directions="forward")
    assert len(collate([example(), empty, {**example(), "source": []}])["input_ids"]) == 1
    assert collate.skipped == 2
    with pytest.raises(ValueError, match="none of the 1 pairs"):
        collate([empty])
    with pytest.raises(ValueError, match="pair 1 has an empty target"):
        PivotTranslationCollator(tokenizer(), strict=True)([example(), empty])
    nameless = {k: v for k, v in example().items() if k != "source_language"}
    with pytest.raises(ValueError, match="pair 1 has no source_language; it has source, target"):
        collate([example(), nameless])
    for change, said in (
        ({"source": None}, "source of pair 1 must be a text or token ids, got None"),
        ({"target": 5}, "target of pair 1 must be a text or token ids, got 5"),
        ({"target_language": None}, "target_language of pair 1 must be a name, got None"),
    ):
        with pytest.raises(TypeError, match=said):
            collate([example(), example(**change)])
    rows = PairRows([PAIR, Pair("", "x", "English", "Python")])
    assert len(rows) == 1 and rows.skipped == 1
    with pytest.raises(ValueError, match="pair 1 has an empty"):
        PairRows([PAIR, Pair("x", " ", "English", "Python")], strict=True)


def test_unformatted_code_warns():
    t = tokenizer()
    collate = PivotTranslationCollator(t, directions="forward", formatted=True)
    with pytest.warns(UnformattedCodeWarning, match="raw spaces"):
        raw = collate([example()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = collate([{**example(), "target": CODE.replace("    ", SPACE * 4)}])
        usual = PivotTranslationCollator(t, directions="forward")([example()])
    assert torch.equal(made["labels"], usual["labels"]) and torch.equal(raw["labels"], usual["labels"])  # fmt: skip


class Dispatch:
    """One collator per task, by what the examples hold."""

    def __init__(self):
        self.spans = SpanCorruptionCollator(tokenizer(), max_inputs=64, seed=9)
        self.pairs = PivotTranslationCollator(tokenizer(), max_inputs=64, seed=9)

    def __call__(self, examples):
        return (self.pairs if "source" in examples[0] else self.spans)(examples)


def world():
    rows = pack_texts(tokenizer(), files(8)[:3], raw_length(64)[0], code=True)
    pairs = [
        Pair(f"Return {i}.", f"def f():\n    return {i}\n", "English", "Python") for i in range(9)
    ]
    data = MixtureDataset({"Python": rows, "English-Python": PairRows(pairs)})
    return data, Mixture(data.sizes, 6, seed=1)


def same(a, b):
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


def test_workers_ranks_and_resume_give_the_same_batches():
    data, mixture = world()
    sampler = MixtureBatchSampler(mixture, 8)
    want = list(DataLoader(data, batch_sampler=sampler, collate_fn=Dispatch()))
    assert len(want) == 8 and {len(b["input_ids"]) for b in want} == {6}
    workers = DataLoader(data, batch_sampler=sampler, collate_fn=Dispatch(), num_workers=2)
    assert same(want, list(workers))
    # Resumed in the middle, with collators and a mixture that have read nothing.
    fresh_data, fresh = world()
    start = fresh.load_state_dict(mixture.state_dict(5))
    left = MixtureBatchSampler(fresh, 8, start=start)
    assert same(want[5:], list(DataLoader(fresh_data, batch_sampler=left, collate_fn=Dispatch())))
    for step in range(8):
        parts = []
        for rank in range(3):
            own = MixtureBatchSampler(mixture, step + 1, start=step, rank=rank, world_size=3)
            (batch,) = DataLoader(data, batch_sampler=own, collate_fn=Dispatch())
            parts += [trimmed(batch, i) for i in range(2)]
        assert parts == [trimmed(want[step], i) for i in range(6)]


def test_trainer_and_accelerate_take_them(tmp_path):
    from accelerate import Accelerator
    from transformers import MT5Config, MT5ForConditionalGeneration, Trainer, TrainingArguments

    data, mixture = world()
    loader = DataLoader(data, batch_sampler=MixtureBatchSampler(mixture, 2), collate_fn=Dispatch())
    assert same(list(loader), list(Accelerator(cpu=True).prepare(loader)))
    model = MT5ForConditionalGeneration(
        MT5Config(vocab_size=len(tokenizer()), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )  # fmt: skip
    settings = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, report_to=[], save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model, settings, train_dataset=data.corpora["Python"], data_collator=Dispatch().spans
    )
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
