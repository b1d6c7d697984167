# SPDX-License-Identifier: Apache-2.0
"""What is measured on test examples during a run: losses, BLEU and ROUGE-L of generated text, functions of the user's.

A metric has ``scales`` (name -> unit or range) and is called with (model in eval mode, numbers of tests); it gives
values
float32 [len(numbers)] by name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold import ops
from tenfold.training.checks import integers, one_of, positive

MEASURES = {"bleu": "0-100", "rougeL": "0-1"}
_PACKAGES = {"bleu": "sacrebleu", "rougeL": "rouge_score"}


class Metric(Protocol):
    """See the module."""

    @property
    def scales(self) -> Mapping[str, str]:
        """Unit or range of each."""

    def __call__(self, model: Any, tests: Sequence[int]) -> Mapping[str, Tensor]:
        """Values of some tests."""


class FunctionMetric:
    """A function (model, numbers of tests) -> values [len(numbers)] as a metric.

    Args:
        name: of the metric. function: see above. scale: its unit or range; runs of different scales are never mixed.
    """

    def __init__(
        self, name: str, function: Callable[[Any, Sequence[int]], Any], scale: str = ""
    ) -> None:
        self.scales = {name: scale}
        self._name, self._function = name, function

    def __call__(self, model: Any, tests: Sequence[int]) -> dict[str, Tensor]:
        """By its name."""
        return {self._name: torch.as_tensor(self._function(model, tests), dtype=torch.float32)}


class LossMetric:
    """Mean negative log-likelihood (nats) of the target tokens of each test, by a transformers causal LM.

    Args:
        rows: ``input_ids``, ``labels`` (-100: no target) and ``attention_mask`` [Q, L], padded on the right; or of
            them one dict per test,
            of any lengths. batch_size: tests at a time. name: of the metric.

    Raises ValueError for a test without a target.
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor] | Sequence[Mapping[str, Any]],
        batch_size: int = 32,
        name: str = "loss",
    ) -> None:
        self.rows = padded(rows)
        self.batch_size, self._name = batch_size, name
        integers(self, {"batch_size": 1})
        self.scales = {name: "nats"}
        empty = (self.rows["labels"][:, 1:] == -100).all(1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"test number {empty[0]} has no target token")
        self._lengths = self.rows["attention_mask"].sum(1)

    def __call__(self, model: Any, tests: Sequence[int]) -> dict[str, Tensor]:
        """Losses of some tests, by the metric's name."""
        device = next(model.parameters()).device
        at = torch.tensor(list(tests), dtype=torch.int64)
        made = torch.empty(len(at))
        # Tests of like length beside each other: less padding.
        for part in self._lengths[at].argsort(stable=True).split(self.batch_size):
            batch = trimmed({k: v[at[part]] for k, v in self.rows.items()})
            labels = batch.pop("labels").to(device)
            logits = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits
            total, count = ops.sequence_nll(logits[:, :-1], labels[:, 1:])
            made[part] = (total / count).cpu()
        return {self._name: made}


class GenerationMetric:
    """BLEU (0-100) and ROUGE-L (F, 0-1) of what a causal LM generates for each test.

    Args:
        tokenizer: of the model. prompts, references: texts [Q]. measures: of ``"bleu"``, ``"rougeL"``.
        max_new_tokens, top_p, temperature (0: greedy), batch_size. seed: the same draws at every measurement.

    Raises ModuleNotFoundError, with the command, without sacrebleu or rouge-score.
    """

    def __init__(
        self, tokenizer: Any, prompts: Sequence[str], references: Sequence[str],
        measures: Sequence[str] = ("bleu", "rougeL"), *, max_new_tokens: int = 64, top_p: float = 0.95,
        temperature: float = 0.2, batch_size: int = 32, seed: int = 0,
    ) -> None:  # fmt: skip
        if len(prompts) != len(references):
            raise ValueError(f"there are {len(prompts)} prompts and {len(references)} references")
        for name in measures:
            one_of("measures", name, tuple(MEASURES))
            if importlib.util.find_spec(_PACKAGES[name]) is None:
                raise ModuleNotFoundError(
                    f"{name} needs {_PACKAGES[name]}; install it with `pip install 'tenfold[gptfluence]'`"
                )
        self.max_new_tokens, self.batch_size, self.seed = max_new_tokens, batch_size, seed
        integers(self, {"max_new_tokens": 1, "batch_size": 1, "seed": 0})
        positive("top_p", top_p)
        self.tokenizer, self.prompts, self.references = tokenizer, list(prompts), list(references)
        sampled = {"do_sample": True, "top_p": top_p, "temperature": temperature}
        self._options = sampled if temperature > 0 else {"do_sample": False}
        self.scales = {name: MEASURES[name] for name in measures}
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def generate(self, model: Any, tests: Sequence[int]) -> list[str]:
        """What the model writes after these prompts."""
        texts: list[str] = []
        for at in range(0, len(tests), self.batch_size):
            asked = [self.prompts[i] for i in tests[at : at + self.batch_size]]
            batch = self.tokenizer(
                asked, return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            torch.manual_seed(self.seed)
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **self._options,
            )
            texts += self.tokenizer.batch_decode(
                made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return texts

    def __call__(self, model: Any, tests: Sequence[int]) -> dict[str, Tensor]:
        """Scores of some tests, by measure."""
        texts = self.generate(model, list(tests))
        pairs = [(text.strip(), self.references[i].strip()) for text, i in zip(texts, tests)]
        return {name: torch.tensor([_SCORES[name](*p) for p in pairs]) for name in self.scales}


def _bleu(text: str, reference: str) -> float:
    from sacrebleu import sentence_bleu

    return float(sentence_bleu(text, [reference]).score)


def _rouge(text: str, reference: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure)


_SCORES = {"bleu": _bleu, "rougeL": _rouge}


def padded(rows: Mapping[str, Tensor] | Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows as ``input_ids``, ``labels`` and ``attention_mask`` [Q, L], from the same or from one dict per row.

    Raises ValueError without rows or with other shapes.
    """
    if isinstance(rows, Mapping):
        made = dict(rows)
    else:
        parts = [
            {
                k: torch.as_tensor(v)
                for k, v in row.items()
                if k in ("input_ids", "labels", "attention_mask")
            }
            for row in rows
        ]
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        for part in parts:
            part.setdefault("attention_mask", torch.ones_like(part["input_ids"]))
        made = {
            k: torch.nn.utils.rnn.pad_sequence(
                [p[k] for p in parts], batch_first=True, padding_value=fill[k]
            )
            for k in (parts[0] if parts else ())
        }
    if not len(made.get("input_ids", ())):
        raise ValueError("there are no rows")
    made.setdefault("attention_mask", torch.ones_like(made["input_ids"]))
    made.setdefault("labels", made["input_ids"].masked_fill(made["attention_mask"] == 0, -100))
    for name, value in made.items():
        if value.shape != made["input_ids"].shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {list(made['input_ids'].shape)}, got {list(value.shape)}"
            )
    return made


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows without the columns that are padding in all of them."""
    longest = int(batch["attention_mask"].sum(1).max())
    return {k: v[:, :longest] for k, v in batch.items()}
