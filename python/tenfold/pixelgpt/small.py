# SPDX-License-Identifier: Apache-2.0
"""Small models and packaged data that belong together: what the command line, the demo and the study begin with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.pixelgpt.config import PixelGPTConfig
from tenfold.pixelgpt.generate import reconstruct
from tenfold.pixelgpt.model import PixelGPTForCausalLM, make_model
from tenfold.pixelgpt.report import pairs_png
from tenfold.pixelgpt.streams import Streams, make_streams
from tenfold.pixelgpt.tasks import hub_rows
from tenfold.pixelgpt.texts import Document, documents, split_documents
from tenfold.pixelgpt.tokens import train_tokenizer
from tenfold.pixelgpt.train_config import PretrainConfig

LANGUAGES = ("en", "de", "fr", "es", "ru", "el")


@dataclass
class Corpus:
    """Documents with what reads them: ``train`` and ``held_out``, a renderer, a tokenizer made of ``train``."""

    train: list[Document]
    held_out: list[Document]
    processor: Any
    tokenizer: Any

    def streams(self, config: PretrainConfig) -> tuple[Streams, Streams]:
        """(training, held-out) streams of a variant."""
        made = [
            make_streams(d, config, self.processor, self.tokenizer)
            for d in (self.train, self.held_out)
        ]
        return made[0], made[1]


def packaged_processor() -> Any:
    """A renderer with the first default font alone, which every machine has: checkpoints load everywhere."""
    from tenfold.pixelgpt import PixelProcessor, default_fonts

    return PixelProcessor(default_fonts()[:1], on_missing="box")


def packaged_corpus(
    languages: Sequence[str] = LANGUAGES, *, per_language: int = 120, vocabulary: int = 1024, processor: Any = None
) -> Corpus:  # fmt: skip
    """Documents of packaged languages, with a renderer and byte-pair merges of the training ones.

    Raises MissingData without the wheel ``django``, ValueError for an unknown language.
    """
    return corpus_of(
        documents(languages, per_language), vocabulary=vocabulary, processor=processor or packaged_processor()
    )  # fmt: skip


def file_documents(paths: Sequence[str | Path], lines: int = 12) -> list[Document]:
    """Documents of UTF-8 text files: so many lines each, empty ones left out.

    Raises FileNotFoundError for a missing file, ValueError where no file has text.
    """
    made = []
    for path in map(Path, paths):
        found = [t for line in path.read_text(encoding="utf-8").splitlines() if (t := line.strip())]
        made += [Document("", tuple(found[at : at + lines])) for at in range(0, len(found), lines)]
    if not made:
        raise ValueError(f"no text in {', '.join(map(str, paths))}")
    return made


def hub_documents(
    name: str, *, column: str = "text", limit: int = 1000, lines: int = 12
) -> list[Document]:
    """Documents of the texts of a data set on the hub (``repository`` or ``repository:configuration``).

    Args:
        column: with the texts. limit: of them, at most. lines: of a document.

    Raises ModuleNotFoundError without the package ``datasets``, ValueError for a column that is not there.
    """
    repository, _, part = name.partition(":")
    made: list[Document] = []
    rows = hub_rows(repository, part or None, split="train", streaming=True)
    for row in itertools.islice(rows, limit):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{name} has no texts in column {column!r}; there are: {', '.join(row)}"
            )
        found = [t for line in row[column].splitlines() if (t := line.strip())]
        made += [Document("", tuple(found[at : at + lines])) for at in range(0, len(found), lines)]
    return made


def corpus_of(
    found: Sequence[Document], *, vocabulary: int = 1024, processor: Any = None, tokenizer: Any = None
) -> Corpus:  # fmt: skip
    """A corpus of documents; what is not given is made: the default renderer, and a tokenizer of the training part.

    Raises ValueError for fewer than two documents.
    """
    if len(found) < 2:
        raise ValueError(
            f"a corpus needs at least 2 documents, one of them held out; got {len(found)}"
        )
    train, held = split_documents(found)
    if processor is None:
        from tenfold.pixelgpt import PixelProcessor

        processor = PixelProcessor(on_missing="box")
    if tokenizer is None:
        tokenizer = train_tokenizer((d.text for d in train), vocabulary)
    return Corpus(train, held, processor, tokenizer)


def model_for(
    corpus: Corpus, size: str = "tiny", *, seed: int = 0, **changes: Any
) -> PixelGPTForCausalLM:
    """A random model of a size by name, with the corpus's vocabulary."""
    ids = corpus.tokenizer
    known = {"vocab_size": len(ids), "bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id,
             "pad_token_id": ids.pad_token_id, "patch_size": corpus.processor.settings.patch_size}  # fmt: skip
    return make_model(PixelGPTConfig.from_size(size, **(known | changes)), seed)


def pictures(
    model: Any, held_out: Streams, *, rows: int = 6, patches: int = 48
) -> dict[str, bytes]:
    """Captions and PNGs of held-out strips, each with what the model expected under it."""
    if not held_out.count("pixel"):
        return {}
    count = held_out.count("pixel")
    batch = held_out.batch("pixel", [i * count // rows for i in range(min(rows, count))])
    batch = {k: v.to(model.device) for k, v in batch.items()}
    expected = reconstruct(model, **batch)
    how = (
        " with the true brightness and contrast of each patch" if model.config.norm_pix_loss else ""
    )
    caption = f"Held-out strips, and under each what the model expected of every patch, given those before{how}."
    return {caption: pairs_png(batch["pixel_values"], expected, rows=rows, patches=patches)}
