# SPDX-License-Identifier: Apache-2.0
"""What Themis' tests share: tiny reward models over bytes, a scripted language model, and a box of stub tools."""

import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold.themis.data import Candidate, Pair
from tenfold.themis.decoding import make_rows
from tenfold.themis.model import ThemisRewardModel
from tenfold.themis.tokens import byte_tokenizer
from tenfold.themis.traces import FAILURE, Query, Step, Trace, TraceFormat

TOKENIZER = byte_tokenizer()


def format(max_length=512, **options):
    return TraceFormat(TOKENIZER, max_length=max_length, **options)


def encode(text):
    """Ids of a text, whatever words are in it."""
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def llama(seed=0, tied=False, hidden=16, layers=1, **changes):
    """A causal LM over bytes and the special tokens, sharp enough that greedy choices are no ties."""
    torch.manual_seed(seed)
    settings = {"vocab_size": len(TOKENIZER), "hidden_size": hidden, "intermediate_size": 2 * hidden,
                "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1,
                "max_position_embeddings": 4096, "tie_word_embeddings": tied, "bos_token_id": None,
                "eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    for name, weight in model.named_parameters():
        if "proj" in name or "embed" in name or "lm_head" in name:
            weight.data *= 6
    return model


def reward_model(seed=0, pooling="last", **changes):
    return ThemisRewardModel.from_model(llama(seed, **changes), seed=seed, pooling=pooling)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, atol):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol, rtol=1e-4) for k in a)


def query(n=0, answer="4", context=None):
    return Query(f"What is 2 + {n}?", answer, context)


class ScriptedRows:
    """Decodes a function of the ids so far; the reward is the number of tokens."""

    def __init__(self, lm, count):
        self.lm, self.fed = lm, []
        self.tokens, self.rewards = [[] for _ in range(count)], [[] for _ in range(count)]

    def feed(self, rows, chunks):
        logits = torch.zeros(len(rows), len(TOKENIZER))
        for i, (row, chunk) in enumerate(zip(rows, chunks)):
            self.tokens[row] += chunk
            self.rewards[row] += [float(len(self.tokens[row]))] * len(chunk)
            logits[i, self.lm.next(self.tokens[row])] = 1
        self.lm.forwards += 1
        self.lm.read += sum(map(len, chunks))
        return logits

    def share(self, source, target, length):
        self.tokens[target] = self.tokens[source][:length]
        self.rewards[target] = self.rewards[source][:length]

    def crop(self, row, length):
        del self.tokens[row][length:], self.rewards[row][length:]

    def keep(self, rows):
        self.tokens = [self.tokens[r] for r in rows]
        self.rewards = [self.rewards[r] for r in rows]


class Scripted:
    """A language model that writes parts: ``script(kind, n, ids)`` is the text of a part and the token after it.

    kind: "tool", "observation" or "work", by the last special token; n: observations before. What was put there by
    others (a real observation) is followed by the token that follows the scripted one.
    """

    def __init__(self, script, format):
        self.script, self.format, self.forwards, self.read = script, format, 0, 0

    def make_rows(self, count):
        return ScriptedRows(self, count)

    def next(self, ids):
        special = self.format.ids
        kinds = {special.tool: "tool", special.observation: "observation", special.work: "work"}
        at = max((i for i, t in enumerate(ids) if t in kinds), default=-1)
        if at < 0:
            return 65
        kind, done = kinds[ids[at]], list(ids[at + 1 :])
        text, then = self.script(kind, ids[:at].count(special.observation), ids)
        want = encode(text)
        if done == want[: len(done)] and len(done) < len(want):
            return want[len(done)]
        return getattr(special, then)


class Steered(Scripted):
    """The same words, by a real model's rows: its keys, values and rewards."""

    def __init__(self, script, format, model):
        super().__init__(script, format)
        self.model, self.config, self.pooling = model, model.config, model.pooling

    def make_rows(self, count):
        rows, steered = make_rows(self.model, count), self

        def feed(numbers, chunks):
            logits = type(rows).feed(rows, numbers, chunks)
            for i, row in enumerate(numbers):
                logits[i, steered.next(rows.tokens[row])] += 1e6
            return logits

        rows.feed = feed
        return rows


def call(tool="calculator", arguments="2+2", thought="let me see"):
    return f" Thought: {thought}\nAction: {tool}\nAction Input: {arguments}\n"


OBSERVED = (" Observation: made up\n", "work")
DONE = (" Work: it is right", "eos")


def calls(count, tool="calculator"):
    """A script of ``count`` calls and a rationale."""

    def script(kind, n, ids):
        if kind == "tool":
            return (call(tool, f"1+{n}"), "observation") if n < count else (" Thought: no\n", "eos")
        if kind == "observation":
            return OBSERVED[0], "tool" if n + 1 < count else "work"
        return DONE

    return script


class Box:
    """Stub tools: name -> text, a function of the arguments, None (fails), or an event to wait for.

    Unknown names get the failure sentence.
    """

    def __init__(self, **tools):
        self.tools, self.names, self.asked = tools, frozenset(tools), []
        self.pool = ThreadPoolExecutor(8)

    def submit(self, name, arguments, example=None, *, deadline=None):
        self.asked.append((name, arguments, example, deadline))
        if name not in self.tools:
            made = Future()
            made.set_result(
                SimpleNamespace(text=FAILURE, status="unknown_tool", seconds=0.0, cached=False)
            )
            return made
        return self.pool.submit(self._run, name, arguments)

    def _run(self, name, arguments):
        what, status = self.tools[name], "ok"
        if callable(what):
            what = what(arguments)
        if isinstance(what, threading.Event):
            what = "late" if what.wait(30) else None
        if what is None:
            what, status = FAILURE, "failed"
        return SimpleNamespace(text=what, status=status, seconds=0.0, cached=False)


def trace(question, answer, right):
    said = "correct" if right else "incorrect"
    return Trace(
        (Step("check it", "check", f"{question} {answer}", said),), None, f"so it is {said}"
    )


def pairs(count=16, seed=0, context=False, answer=None):
    """Sums, their right answer and a wrong one; texts of several lengths."""
    made = random.Random(seed)
    found = []
    for i in range(count):
        a, b = made.randrange(10, 99), made.randrange(1, 9 if i % 3 else 2000)
        question, right, wrong = f"{a}+{b}=?", str(a + b), str(a + b + made.choice((-2, 1, 10)))
        right = answer or right
        chosen = Candidate(right, trace(question, right, True), 1.0)
        rejected = Candidate(wrong, trace(question, wrong, False), -1.0)
        text = f"pair {i} " * (i % 4 + 1) if context else None
        found.append(Pair(f"s{seed}-{i}", question, text, chosen, rejected, "check"))
    return found
