# SPDX-License-Identifier: Apache-2.0
"""Traces as token ids: layout, round trips, classes, truncation, and texts that try to be special tokens."""

import copy
import functools
import pickle
import threading

import pytest
import themis_cases as cases
import torch
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tenfold import ops
from tenfold.themis.tokens import SPECIALS, PieceEncoder, byte_tokenizer
from tenfold.themis.traces import (
    ANSWER,
    EOS,
    IGNORE,
    NO_TOOL,
    OBSERVATION,
    RATIONALE,
    TOOL,
    Query,
    Step,
    Trace,
    TraceFormat,
    prepare_tokenizer,
)
from tenfold.themis.truncate import caps

kinds = pytest.mark.parametrize("kind", list(cases.TOKENIZERS))


@functools.cache
def make(kind="bytes", max_length=None, escape=False):
    return TraceFormat(cases.TOKENIZERS[kind](), max_length=max_length, escape=escape)


def small_lm(vocabulary):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    return LlamaForCausalLM(config)


def runs(made, form):
    """(class, text) of the runs of one class."""
    found = []
    for token, kind in zip(made.ids, made.classes):
        if not found or found[-1][0] != kind:
            found.append((kind, []))
        found[-1][1].append(token)
    return [(kind, form.decode(ids)) for kind, ids in found]


class TestLayout:
    @kinds
    def test_one_call(self, kind):
        form = make(kind)
        end = form.decode([form.ids.eos])
        made = form.assemble(cases.QUERY, cases.TRACE)
        assert form.decode(made.ids) == (
            "### USER:\nQuestion: What is 2 + 2?\nAnswer: It is 4.\n### ASSISTANT:\n"
            "<start_tool> Thought: I check it.\nAction: calculator\nAction Input: <<2+2=4>>4\n"
            "<start_observation> Observation: Both are right.\n<start_work> Work: The tool agrees."
            + end
        )
        assert runs(made, form) == [
            (IGNORE, "### USER:\nQuestion: What is 2 + 2?\nAnswer:"),
            (ANSWER, " It is 4.\n"),
            (TOOL, "### ASSISTANT:\n<start_tool> Thought: I check it.\nAction: calculator\n"
                   "Action Input: <<2+2=4>>4\n<start_observation>"),
            (OBSERVATION, " Observation: Both are right.\n"),
            (TOOL, "<start_work>"),
            (RATIONALE, " Work: The tool agrees."),
            (EOS, end),
        ]  # fmt: skip
        assert form.decode(made.ids[slice(*made.answer)]) == " It is 4."
        assert form.decode(made.ids[made.assistant :]).startswith("### ASSISTANT:\n<start_tool>")
        assert made.cut == 0

    def test_no_tool_and_context(self):
        form = make()
        query, trace = Query("q", "a", "c"), Trace((), NO_TOOL, "r")
        assert form.decode(form.assemble(query, trace).ids) == (
            "### USER:\nContext: c\nQuestion: q\nAnswer: a\n### ASSISTANT:\n<start_tool> Thought: Do I need to use a "
            "tool? No\nFinished.\n<start_work> Work: r</s>"
        )
        # The context is no target (the published code counts the ignored part without it).
        assert set(
            form.assemble(query, trace).classes[
                : len("### USER:\nContext: c\nQuestion: q\nAnswer:")
            ]
        ) == {0}

    @kinds
    def test_classes_are_those_of_the_op(self, kind):
        form = make(kind, escape=True)
        rows = [
            (Query(*cases.texts(i, 2), "c" if i % 2 else None), t)
            for i, t in enumerate(cases.traces(1))
        ]
        for made in form.assemble_all(rows):
            ids = torch.tensor([made.ids])
            cls = ops.trace_token_class(ids, torch.ones_like(ids), torch.tensor([made.assistant]),
                                        torch.tensor([made.answer[0]]), *form.ids[:4])  # fmt: skip
            assert cls[0].tolist() == made.classes

    @kinds
    def test_prompt_is_the_beginning_of_every_row(self, kind):
        form = make(kind)
        row = form.assemble(cases.QUERY, cases.TRACE).ids
        prompt = form.prompt(cases.QUERY)
        assert row[: len(prompt)] == prompt and prompt[-1] == form.ids.tool
        # And what a loop appends is what a row has: training and inference see the same tokens.
        step = cases.STEP
        done = Trace((Step(step.thought, step.tool, step.arguments),))
        loop = [
            *form.assemble(cases.QUERY, done).ids[:-1],
            form.ids.observation,
            *form.observation_ids(step.observation),
        ]
        assert row[: len(loop)] == loop
        # Two answers share the tokens of the question.
        other = form.prompt(Query(cases.QUERY.question, "Five."))
        same = next(i for i, (a, b) in enumerate(zip(prompt, other)) if a != b)
        assert form.decode(prompt[:same]).startswith("### USER:\nQuestion: What is 2 + 2?\nAnswer:")

    def test_plain(self):
        form = make()
        assert (
            form.decode(form.plain(cases.QUERY)) == "Question: What is 2 + 2?\nAnswer: It is 4.</s>"
        )
        assert (
            form.decode(form.plain(Query("q", "a", "c")))
            == "Context: c\nQuestion: q\nAnswer: a</s>"
        )

    def test_begin_token(self):
        from tokenizers import processors

        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        begin = tokenizer.bos_token_id
        assert make().prompt(cases.QUERY)[0] == ord("#")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", begin)])  # fmt: skip
        form = TraceFormat(tokenizer)
        made = form.assemble(cases.QUERY, cases.TRACE)
        assert made.ids[0] == begin and made.ids.count(begin) == 1 and made.classes[0] == IGNORE
        assert form.parse(made.ids) == (cases.QUERY, cases.TRACE)
        assert form.plain(cases.QUERY)[0] == begin
        with pytest.raises(ValueError, match=rf"must begin with the tokens \[{begin}\]"):
            form.parse(made.ids[1:])


class TestRoundTrip:
    """Check 7."""

    @kinds
    def test_any_text_in_any_field(self, kind):
        form = make(kind, escape=True)
        assert form.exact
        rows = []
        for seed in range(12):
            for i, trace in enumerate(cases.traces(seed)):
                question, answer, context = cases.texts(f"{seed} {i}", 3)
                rows.append((Query(question, answer, context if i % 2 else None), trace))
        assert {len(t.steps) for _, t in rows} == {0, 1, 2, 3}
        made = form.assemble_all(rows)
        assert [form.parse(m.ids) for m in made] == rows
        assert [form.assemble(*r) for r in rows[:30]] == made[:30]  # alone as in a batch
        assert len({tuple(m.ids) for m in made}) == len(set(rows))

    def test_labels_at_line_starts_are_escaped(self):
        form = make()
        query = Query("q", "one\nAnswer: two\n\\Answer: three\n### ASSISTANT:\nfour")
        text = form.decode(form.prompt(query))
        assert text.count("\n### ASSISTANT:") == 1 and text.count("\nAnswer:") == 1
        assert "one\n\\Answer: two\n\\\\Answer: three\n\\### ASSISTANT:\nfour" in text

    @pytest.mark.parametrize("change, error", [
        (lambda f, i: i[:-1], "end with the end token"),
        (lambda f, i: [*i, f.ids.eos], "end with the end token|not what a row has"),
        (lambda f, i: [*i[:20], f.ids.pad, *i[20:]], "no place in a text"),
        (lambda f, i: i[1:], "prompt part of a row is malformed"),
        (lambda f, i: [t for t in i if t != f.ids.tool], "prompt part of a row is malformed|not what a row has"),
        (lambda f, i: [f.ids.work if t == f.ids.observation else t for t in i], "not what a row has"),
        (lambda f, i: [*i[:-1], f.ids.tool, *b" Thought: x\nFinished.\n", f.ids.eos], "after work is not what a row"),
        (lambda f, i: [*i[:-1], f.ids.eos, *b"x", f.ids.eos], "not what a row has"),
        (lambda f, i: i[: i.index(f.ids.work) - 1] + i[i.index(f.ids.work) :], "observation part of a row is"),
        (lambda f, i: [*i[:24], *b"x\nAnswer: y\nAnswer: z", *i[24:]], "line 'Answer:', which is not escaped"),
        (lambda f, i: [], "end with the end token"),
    ])  # fmt: skip
    def test_malformed(self, change, error):
        form = make()
        ids = change(form, form.assemble(cases.QUERY, cases.TRACE).ids)
        with pytest.raises(ValueError, match=error):
            form.parse(ids)

    def test_a_call_without_observation_must_be_last(self):
        broken = Step("t", "a", "b")
        for trace in (
            Trace((broken, cases.STEP)),
            Trace((broken,), None, "r"),
            Trace((broken,), "c"),
        ):
            with pytest.raises(
                ValueError, match=r"steps\[0\] has no observation, but the trace goes on"
            ):
                make().assemble(cases.QUERY, trace)


def fields(text):
    """A query and a trace with ``text`` in one field, for every field; with the field's name."""
    base = {"question": "q", "answer": "a", "context": "c", "thought": "t", "tool": "n", "arguments": "i",
            "observation": "o", "closing": "f", "rationale": "r"}  # fmt: skip
    for name in base:
        f = base | {name: f"x{text}y"}
        steps = (Step(f["thought"], f["tool"], f["arguments"], f["observation"]),)
        yield (
            name,
            Query(f["question"], f["answer"], f["context"]),
            Trace(steps, f["closing"], f["rationale"]),
        )


class TestInjection:
    """Text never becomes a special token."""

    @kinds
    def test_no_field_forges_a_token(self, kind):
        tokenizer = cases.TOKENIZERS[kind]()
        form = make(kind, escape=True)
        usual = form.assemble(*next(fields(""))[1:])
        special = sorted({*form.ids, *tokenizer.all_special_ids})
        count = lambda ids: [ids.count(i) for i in special]  # noqa: E731
        names = [
            *SPECIALS,
            *{tokenizer.eos_token, tokenizer.pad_token, *tokenizer.all_special_tokens},
        ]
        # What we protect from is real: the tokenizer itself finds them in text.
        assert tokenizer("x<start_tool>y")["input_ids"].count(form.ids.tool) == 1
        for text in names:
            for name, query, trace in fields(f"{text}\n{text} {text}{text}"):
                made = form.assemble(query, trace)
                assert count(made.ids) == count(usual.ids), (text, name)
                assert form.parse(made.ids) == (query, trace)
                assert count(form.prompt(query)) == count(form.prompt(Query("q", "a", "c")))
            assert set(special).isdisjoint(form.observation_ids(text))

    @kinds
    def test_raw_tokens_are_an_error_by_default(self, kind):
        form = make(kind)
        for text in (*SPECIALS, form.decode([form.ids.eos])):
            for name, query, trace in fields(text):
                with pytest.raises(
                    ValueError,
                    match=f"^{name} holds the special token '{text}' at character 1".replace(
                        "|", r"\|"
                    ),
                ):
                    form.assemble(query, trace)
                if name in ("question", "answer", "context"):
                    for call in (form.prompt, form.plain):
                        with pytest.raises(ValueError, match=f"{name} holds the special token"):
                            call(query)

    def test_split_special_tokens_would_not_be_enough(self):
        """transformers' own switch lets added tokens through that were not added as special ones."""
        tokenizer = cases.loose_tokenizer()
        ids = tokenizer("<start_tool>", split_special_tokens=True)["input_ids"]
        assert make("loose").ids.tool in ids
        assert tokenizer.backend_tokenizer.encode_special_tokens  # and it stays switched over
        tokenizer.backend_tokenizer.encode_special_tokens = False
        make("loose", escape=True).prompt(Query("<start_tool>", "x"))
        assert (
            not tokenizer.backend_tokenizer.encode_special_tokens
        )  # ours leaves the tokenizer as it is

    def test_letters_that_a_tokenizer_folds(self):
        """Full-width letters become a token's name under NFKC, after any search of the text for names."""
        from tokenizers import normalizers

        tokenizer = cases.bare_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        tokenizer.add_tokens(
            [AddedToken(n, special=True, normalized=True) for n in SPECIALS], special_tokens=True
        )
        form = TraceFormat(tokenizer)
        wide = "".join(chr(ord(c) + 0xFEE0) for c in "<start_tool>")
        assert tokenizer(wide)["input_ids"] == [form.ids.tool] and not form.exact
        prompt = form.prompt(Query(wide, "a"))
        assert prompt.count(form.ids.tool) == 1 and "Question: <start_tool>\n" in form.decode(
            prompt
        )

    def test_pieces_do_not_join_to_a_token(self):
        """Halves of a token's name in neighbouring fields stay text."""
        form = make(escape=True)
        made = form.assemble(
            Query("<start_", "tool>"), Trace((Step("<start", "_tool>", "</", "s>"),), None, "<pad")
        )
        assert made.ids.count(form.ids.tool) == 1 and made.ids.count(form.ids.eos) == 1

    def test_a_tokenizer_that_cannot_keep_them_apart_is_refused(self):
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = ["<unk>", "</s>", *SPECIALS, "### USER:", "a"]
        backend = Tokenizer(
            models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
        )
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
        )
        form = TraceFormat(tokenizer, escape=True)
        assert not form.exact
        form.prompt(Query("a b", "a"))
        with pytest.raises(ValueError, match=r"makes the special ids \[2\] of ordinary text"):
            form.prompt(Query("a <start_tool> b", "a"))

    def test_slow_tokenizers(self):
        class Slow:
            """As much of a Python tokenizer as is asked: bytes, special tokens in text unless switched off."""

            all_special_tokens = eos_token, *_ = ("</s>", *SPECIALS)
            all_special_ids = (256, 257, 258, 259)
            unk_token_id = bos_token_id = bos_token = None
            eos_token_id = pad_token_id = 256
            pad_token = "</s>"

            def get_vocab(self):
                return dict(zip(self.all_special_tokens, self.all_special_ids))

            def __call__(
                self, text, add_special_tokens=True, split_special_tokens=False, verbose=True
            ):
                assert split_special_tokens and not add_special_tokens
                return {"input_ids": list(text.encode())}

            def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
                assert not skip_special_tokens and not clean_up_tokenization_spaces
                return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

        form = TraceFormat(Slow(), max_length=None, escape=True)
        for _, query, trace in fields("<start_work> ü"):
            assert form.parse(form.assemble(query, trace).ids) == (query, trace)

    def test_threads(self):
        form = make("merged", escape=True)
        want = form.assemble(Query("<start_tool>" * 50, "a"), cases.TRACE)
        found = []

        def work():
            for _ in range(50):
                found.append(form.assemble(Query("<start_tool>" * 50, "a"), cases.TRACE) == want)
                cases.merged_tokenizer()("plain <start_tool>")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(found) and len(found) == 200

    def test_half_a_character(self):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 3"):
            make().prompt(Query("ab\ud800", "x"))
        assert "ab?" in make().decode(make().observation_ids("ab\ud800"))


class TestTruncation:
    """Check 15."""

    LONG = Query("What?", "This one.", "w" * 5000)
    TAIL = Trace((Step("t", "n", "i", "seen"),), None, "And so it is.")

    def test_long_context(self):
        form = make(max_length=512)
        made = form.assemble(self.LONG, self.TAIL)
        text = form.decode(made.ids)
        assert len(made.ids) == 512 and made.cut > 4500 and made.ids[-1] == form.ids.eos
        for part in (
            "\nQuestion: What?\nAnswer: This one.\n### ASSISTANT:",
            "Observation: seen\n",
            "Work: And so it is.</s>",
        ):
            assert part in text
        query, trace = form.parse(made.ids)
        assert trace == self.TAIL and query.context == "w" * len(query.context) != ""
        assert runs(made, form)[1] == (ANSWER, " This one.\n")

    def test_two_answers_never_look_the_same(self):
        form = make(max_length=160)
        rows = [
            form.assemble(Query("What?", a, "w" * 5000), self.TAIL).ids
            for a in ("This one.", "That one.")
        ]
        assert rows[0] != rows[1] and [len(r) for r in rows] == [160, 160]
        rows = [form.plain(Query("What?", a, "w" * 5000)) for a in ("This one.", "That one.")]
        assert (
            rows[0] != rows[1]
            and [len(r) for r in rows] == [160, 160]
            and rows[0][-1] == form.ids.eos
        )

    def test_longest_is_cut_first(self):
        form = make(max_length=400)
        steps = (Step("t", "n", "i", "o" * 900), Step("t", "n", "i", "short one"))
        query, trace = form.parse(
            form.assemble(Query("q", "a", "c" * 300), Trace(steps, None, "r")).ids
        )
        assert trace.steps[1].observation == "short one"
        assert abs(len(query.context) - len(trace.steps[0].observation)) <= 1
        assert len(form.assemble(Query("q", "a", "c" * 300), Trace(steps, None, "r")).ids) == 400

    def test_fits_exactly(self):
        free = len(make().assemble(self.LONG, self.TAIL).ids)
        assert make(max_length=free).assemble(self.LONG, self.TAIL).cut == 0
        assert make(max_length=free - 1).assemble(self.LONG, self.TAIL).cut == 1

    def test_nothing_is_left(self):
        """Of context and observation not even the space before them, and the row can be read all the same."""
        empty = (
            Query("What?", "This one.", ""),
            Trace((Step("t", "n", "i", ""),), None, "And so it is."),
        )
        least = len(make().assemble(*empty).ids) - 2
        made = make(max_length=least).assemble(self.LONG, self.TAIL)
        assert len(made.ids) == least and make().parse(made.ids) == empty

    def test_too_long_without(self):
        query = Query("q" * 60, "a" * 60, "c" * 50)
        least = (
            len(make().assemble(Query("q" * 60, "a" * 60, ""), self.TAIL).ids) - 1 - len(" seen")
        )
        form = make(max_length=least)
        made = form.assemble(query, self.TAIL)
        assert len(made.ids) == least and "Context:\nQuestion" in form.decode(made.ids)
        form = make(max_length=least - 1)
        with pytest.raises(
            ValueError,
            match=rf"needs {least} tokens without context and observations, and max_length is {least - 1}; ",
        ):
            form.assemble(query, self.TAIL)

    def test_prompt_leaves_room(self):
        form = make(max_length=200)
        prompt = form.prompt(self.LONG, room=80)
        assert len(prompt) == 120 and form.decode(prompt).endswith(
            "Answer: This one.\n### ASSISTANT:\n<start_tool>"
        )
        with pytest.raises(ValueError, match="max_length is 200"):
            form.prompt(self.LONG, room=150)

    @pytest.mark.parametrize("kind", ["bytes", "smollm2"])
    def test_characters_stay_whole(self, kind):
        form = copy.copy(make(kind))
        free = len(form.assemble(Query("q", "a", ""), cases.TRACE).ids)
        for extra in range(1, 12):
            form.max_length = free + extra
            made = form.assemble(Query("q", "a", "\U0001f600東" * 50), cases.TRACE)
            assert free + extra - 3 <= len(made.ids) <= free + extra
            assert "\ufffd" not in form.decode(made.ids)

    def test_observation_limit(self):
        form = make()
        ids = form.observation_ids("o" * 100, limit=30)
        assert len(ids) == 30 and form.decode(ids) == " Observation: " + "o" * 15 + "\n"

    def test_caps(self):
        assert caps([5, 100, 7], 0) == [5, 100, 7]
        assert caps([5, 100, 7], 60) == [5, 40, 7]
        assert caps([5, 100, 70], 100) == [5, 35, 35]
        assert caps([5, 100, 70], 99) in ([5, 36, 35], [5, 35, 36])
        assert caps([5, 6], 11) == [0, 0] and caps([5, 6], 12) is None
        for excess in range(40):
            assert sum(caps([3, 20, 0, 9, 8], excess)) == 40 - excess


class TestGenerated:
    """What models write is read leniently."""

    def ids(self, form, *parts):
        made = []
        for p in parts:
            made += [p] if isinstance(p, int) else list(p.encode())
        return made

    def test_call(self):
        form = make()
        found = form.parse_steps(
            self.ids(
                form,
                " Thought: I look.\nAction: calculator\nAction Input: <<1+1=2>>2\n",
                form.ids.observation,
            )
        )
        assert (found.thought, found.tool, found.arguments) == (
            "I look.",
            "calculator",
            "<<1+1=2>>2",
        )
        assert not found.finished and not found.work and found.rationale is None

    @pytest.mark.parametrize("text, want", [
        ("Thought: a\nAction:calculator\n\nAction Input:  1\n2 ", ("a", "calculator", "1\n2")),
        ("free text\nAction: x\nAction Input: y", ("free text", "x", "y")),
        ("Thought: a\nAction: x\nAction Input: 1\nThought: b\nAction: y\nAction Input: 2", ("b", "y", "2")),
        ("Thought: a\nAction: x\nAction Input: 1\n\\Action: z", ("a", "x", "1\nAction: z")),
        ("Thought: a\nAction: x", ("a\nAction: x", None, None)),
        ("Thought: a\nAction: x\nAction Input:", ("a", "x", "")),
        ("", ("", None, None)),
    ])  # fmt: skip
    def test_lenient_calls(self, text, want):
        found = make().parse_steps(list(text.encode()))
        assert (found.thought, found.tool, found.arguments) == want

    def test_ends(self):
        form = make()
        found = form.parse_steps(
            self.ids(
                form,
                " Thought: No\nFinished.\n",
                form.ids.work,
                " Work: It is so.",
                form.ids.eos,
                "junk",
            )
        )
        assert (found.thought, found.finished, found.work, found.rationale) == (
            "No",
            True,
            True,
            "It is so.",
        )
        found = form.parse_steps(self.ids(form, "Thought: No\nFinished\n"))
        assert found.finished and not found.work and found.thought == "No"
        found = form.parse_steps(self.ids(form, "Thought: ok\nWork: it is so\nand more"))
        assert found.work and found.rationale == "it is so\nand more" and found.thought == "ok"
        found = form.parse_steps(self.ids(form, form.ids.work, " Work: short", form.ids.eos))
        assert found.work and found.rationale == "short" and found.tool is None
        # A hallucinated observation is not read as text of the call.
        found = form.parse_steps(
            self.ids(
                form,
                "Thought: a\nAction: x\nAction Input: 1\n",
                form.ids.observation,
                " Observation: Work: no",
            )
        )
        assert found.arguments == "1" and not found.work
        assert form.parse_steps(self.ids(form, "b\xff")) is not None

    def test_read(self):
        form = make(escape=True)
        for trace in cases.traces(5):
            assert form.read(form.assemble(cases.QUERY, trace).ids) == trace
        half = self.ids(
            form,
            *form.prompt(cases.QUERY),
            "Thought: a\nAction: x\nAction Input: 1\n",
            form.ids.observation,
        )
        assert form.read(half) == Trace((Step("a", "x", "1"),))
        assert form.read([]) == Trace()


class TestTokenizers:
    def test_missing_tokens(self):
        tokenizer = cases.bare_tokenizer()
        with pytest.raises(
            KeyError, match=r"no tokens <start_tool>, <start_observation>, <start_work>; .*prepare"
        ):
            TraceFormat(tokenizer)
        model = small_lm(len(tokenizer))
        before = list(tokenizer.all_special_tokens)
        assert prepare_tokenizer(tokenizer, model) == 3
        assert (
            model.get_input_embeddings().weight.shape[0]
            == len(tokenizer)
            == model.config.vocab_size
        )
        assert set(before) <= set(tokenizer.all_special_tokens)
        assert prepare_tokenizer(tokenizer, model) == 0
        assert TraceFormat(tokenizer).exact

    def test_embeddings_that_are_larger_stay(self):
        model = small_lm(512)
        assert prepare_tokenizer(byte_tokenizer(), model) == 0 and model.config.vocab_size == 512

    def test_no_end_token(self):
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no end token"):
            TraceFormat(tokenizer)
        with pytest.raises(ValueError, match="max_length must be >= 1 or None, got 0"):
            TraceFormat(byte_tokenizer(), max_length=0)

    def test_pad_is_eos(self):
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = None
        assert TraceFormat(tokenizer).ids.pad == tokenizer.eos_token_id

    def test_byte_tokenizer(self, tmp_path):
        tokenizer = byte_tokenizer()
        assert len(tokenizer) == 261 and tokenizer("aü\x00")["input_ids"] == [97, 195, 188, 0]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)
        assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [258, 259, 260]
        merged = cases.merged_tokenizer()
        assert 261 < len(merged) <= 300 and len(merged("Answer: It is")["input_ids"]) < 12
        for made in (tokenizer, merged):
            made.save_pretrained(tmp_path)
            again = AutoTokenizer.from_pretrained(tmp_path)
            rows = [TraceFormat(t).assemble(cases.QUERY, cases.TRACE) for t in (made, again)]
            assert rows[0] == rows[1] and TraceFormat(again).ids == TraceFormat(made).ids

    def test_pickle(self):
        form = pickle.loads(pickle.dumps(make("merged", escape=True)))
        for _, query, trace in fields("<start_tool>"):
            assert form.assemble(query, trace) == make("merged", escape=True).assemble(query, trace)

    def test_encoder_knows_no_added_tokens(self):
        tokenizer = byte_tokenizer()
        encoder = PieceEncoder(tokenizer, {257})
        assert encoder.encode(["</s>", ""]) == [list(b"</s>"), []] and encoder.encode([]) == []
