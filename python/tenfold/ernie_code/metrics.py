# SPDX-License-Identifier: Apache-2.0
"""How generated text and code are scored. All scores are from 0 to 100 and of the whole corpus.

Definitions: section 5 of the method's specification. BLEU and chrF are sacrebleu's, ROUGE-L is rouge-score's;
``codebleu`` has CodeBLEU.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tenfold.training.checks import one_of

_ORDER = 4
SMOOTHINGS = ("none", "epsilon")
_EPSILON = 0.1  # Chen and Cherry 2014, method 1


def check_pairs(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """ValueError unless there are as many predictions as references, and some."""
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"predictions and references must be as many and not none, got {len(predictions)} and {len(references)}"
        )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"this score needs {name}; install it with `pip install 'tenfold[ernie-code]'`"
        ) from None


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that are the reference but for whitespace at both ends and between tokens."""
    check_pairs(predictions, references)
    same = sum(p.split() == r.split() for p, r in zip(predictions, references))
    return 100.0 * same / len(predictions)


def bleu(predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> float:
    """sacrebleu's BLEU. tokenize: ``13a``, ``intl``, ``zh``, ``char``, ... Needs sacrebleu."""
    check_pairs(predictions, references)
    made = _module("sacrebleu").corpus_bleu(list(predictions), [list(references)], tokenize=tokenize)  # fmt: skip
    return float(made.score)


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """sacrebleu's chrF2. Needs sacrebleu."""
    check_pairs(predictions, references)
    return float(_module("sacrebleu").corpus_chrf(list(predictions), [list(references)]).score)


_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|"
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


class WordTokenizer:
    """Words in lower case, of any script; scripts that put no spaces between words by character."""

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text. (rouge-score's own tokenizer drops every letter that is not in a-z.)"""
        return _WORD.findall(text.lower())


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F-measure of ROUGE-L over ``WordTokenizer``'s words. Needs rouge-score."""
    check_pairs(predictions, references)
    scorer = _module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=WordTokenizer())
    scores = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references)]
    return 100.0 * sum(scores) / len(scores)


def ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each run of ``order`` tokens occurs."""
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def summary_tokens(text: str) -> list[str]:
    """Tokens of smoothed BLEU-4: lower case, every sign apart. An underscore is one, as in the published script."""
    return re.findall(r"[^\W_]+|[^\w\s]|_", text.lower())


def smoothed_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Smoothed BLEU-4 of CodeXGLUE's code summarisation: mean over sentences, x 100.

    A sentence has ``exp(1/4 sum_n log p_n + min(0, 1 - (r + 1) / (h + 1)))`` where ``p_1`` is the clipped precision of
    words, ``p_n = (matches + 1) / (n-grams + 1)`` for n > 1, and r and h are the lengths of reference and hypothesis.
    """
    check_pairs(predictions, references)
    scores = [_smoothed(summary_tokens(p), summary_tokens(r)) for p, r in zip(predictions, references)]  # fmt: skip
    return 100.0 * sum(scores) / len(scores)


def _smoothed(hypothesis: list[str], reference: list[str]) -> float:
    total = 0.0
    for order in range(1, _ORDER + 1):
        own, wanted = ngrams(hypothesis, order), ngrams(reference, order)
        more = int(order > 1)
        matches = sum((own & wanted).values()) + more
        count = max(len(hypothesis) - order + 1, 0) + more
        if matches == 0 and count > 0:
            return 0.0
        # An empty hypothesis: the published script's 0/0 is 1, and the brevity penalty decides.
        total += math.log(matches / count) if count else 0.0
    brevity = min(0.0, 1.0 - (len(reference) + 1) / (len(hypothesis) + 1))
    return math.exp(total / _ORDER + brevity)


def token_bleu(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], smoothing: str = "none"
) -> float:  # fmt: skip
    """Corpus BLEU-4 of tokens.

    Args:
        smoothing: ``none``: 0 where no 4-gram matches. ``epsilon``: counts of 0 are 0.1.
    """
    check_pairs(predictions, references)
    one_of("smoothing", smoothing, SMOOTHINGS)
    total = 0.0
    for order in range(1, _ORDER + 1):
        matches, count = 0.0, 0
        for p, r in zip(predictions, references):
            own = ngrams(p, order)
            matches += sum((own & ngrams(r, order)).values())
            count += sum(own.values())
        if matches == 0 and smoothing == "epsilon":
            matches, count = _EPSILON, max(count, 1)
        if matches == 0:
            return 0.0
        total += math.log(matches / count)
    return 100.0 * math.exp(total / _ORDER) * brevity_penalty(predictions, references)


def brevity_penalty(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> float:
    """BLEU's: 1 where the predictions have at least as many tokens as the references."""
    own, wanted = sum(map(len, predictions)), sum(map(len, references))
    if own >= wanted:
        return 1.0
    return math.exp(1.0 - wanted / own) if own else 0.0


def mconala_tokens(code: str) -> list[str]:
    """Code tokens of CoNaLa and MCoNaLa: every character but letters, digits and ``_`` apart, aB split, one quote."""
    apart = re.sub(r"([^A-Za-z0-9_])", r" \1 ", code)
    humps = re.sub(r"([a-z])([A-Z])", r"\1 \2", apart)
    return humps.replace('"', "`").replace("'", "`").split()


def mconala_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 of ``mconala_tokens``, not smoothed."""
    check_pairs(predictions, references)
    return token_bleu([mconala_tokens(p) for p in predictions], [mconala_tokens(r) for r in references])  # fmt: skip


def _code_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    from tenfold.ernie_code.codebleu import code_bleu

    return code_bleu(predictions, references)["codebleu"]


SCORES: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "chrf": chrf,
    "rouge_l": rouge_l,
    "smoothed_bleu": smoothed_bleu,
    "mconala_bleu": mconala_bleu,
    "codebleu": _code_bleu,
}

# What the tasks of the paper are measured by.
TASKS: Mapping[str, tuple[str, ...]] = {
    "summarise": ("smoothed_bleu", "rouge_l", "chrf"),
    "text-to-code": ("mconala_bleu", "exact_match", "codebleu"),
    "repair": ("bleu", "exact_match", "codebleu"),
    "translate": ("bleu", "chrf", "exact_match"),
}


def scores(
    predictions: Sequence[str], references: Sequence[str], names: str | Sequence[str]
) -> dict[str, float]:
    """Some scores by name.

    Args:
        names: of ``SCORES``, or a task of ``TASKS``.

    Raises ValueError for an unknown name, or numbers of texts that differ.
    """
    wanted = TASKS.get(names, (names,)) if isinstance(names, str) else tuple(names)
    for name in wanted:
        one_of("names", name, (*SCORES, *TASKS) if isinstance(names, str) else tuple(SCORES))
    return {name: SCORES[name](predictions, references) for name in wanted}
