# SPDX-License-Identifier: Apache-2.0
"""What the command line names: prompts in files, rewards and policies by name, settings as text."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.ma_rlhf.rewards import ModelReward

REWARDS = ("spelling", "program")
_WORDS = {"none": None, "inf": None, "true": True, "false": False}
_PROBE = "Rewards, 10 of them: naïve, good & bad.\n"


def load_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file: objects with ``prompt`` (text or chat messages) and other columns, or texts.

    Raises ValueError with the line's number, or for an empty file.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
            raise ValueError(f"{path}, line {number}: needs a text, or an object with prompt")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def packaged_prompts(held_out: bool = False) -> list[str]:
    """Beginnings of paragraphs of the standard library's documentation, those of ``packaged_preferences``.

    ``held_out``: of other documents, without what the former have, too.
    """
    from tenfold.rlhf.preferences import packaged_preferences

    train, held = ({p.prompt: None for p in part} for part in packaged_preferences())
    return [p for p in held if p not in train] if held_out else list(train)


def named_object(name: str) -> Any:
    """What ``module:attribute`` names; modules of the current folder are found, too.

    Raises ValueError if there is none.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} names nothing that can be imported: {error}") from None
    finally:
        if added:
            sys.path.remove(here)
    return found


def load_reward_model(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """(reward model, its tokenizer) of a folder or hub id.

    Raises ValueError for a causal LM, whose reward would be a random head's.
    """
    from transformers import AutoConfig, AutoTokenizer

    from tenfold.rlhf.reward_model import RewardModel

    kinds = AutoConfig.from_pretrained(name).architectures or []
    if not any("SequenceClassification" in kind for kind in kinds):
        raise ValueError(
            f"{name} is no reward model but {', '.join(kinds) or 'of no known kind'}; "
            "`tenfold ma-rlhf rm` makes one of it"
        )
    return RewardModel.from_pretrained(name).to(device), AutoTokenizer.from_pretrained(name)


def same_tokens(a: Any, b: Any) -> bool:
    """Do two tokenizers give the same ids?"""
    return a.get_vocab() == b.get_vocab() and a(_PROBE)["input_ids"] == b(_PROBE)["input_ids"]


def named_reward(name: str, tokenizer: Any, columns: Sequence[str], device: str = "cpu") -> Any:
    """A reward by its name on the command line.

    Args:
        name: ``"spelling"`` (words of the standard library's documentation), ``"program"`` (needs the column
            ``tests``), ``module:function``, the folder or hub id of a reward model, or the address of a server of
            ``tenfold themis serve``.
        tokenizer: the policy's. columns: of the prompts. device: of a reward model.

    Raises:
        ValueError: nothing of that name, or it does not fit. SandboxError: no programs can be run here.
    """
    if name == "spelling":
        from tenfold.ma_rlhf.tasks import Spelling, vocabulary
        from tenfold.training.tiny import byte_stream

        return Spelling(vocabulary(bytes(byte_stream().tolist()).decode()))
    if name == "program":
        return _program_reward(columns)
    if os.path.isdir(name) or name.startswith(("http://", "https://")):
        from tenfold.themis.inputs import themis_reward

        if (asked := themis_reward(name, device)) is not None:
            return asked
    if os.path.isdir(name) or (":" not in name and "/" in name):
        model, own = load_reward_model(name, device)
        return ModelReward(model, None if same_tokens(own, tokenizer) else own)
    if ":" in name:
        found = named_object(name)
        if not callable(found):
            raise ValueError(f"the reward {name} must be callable, got {type(found).__name__}")
        return found
    raise ValueError(
        f"a reward is {', '.join(REWARDS)}, module:function, the folder or hub id of a reward model, or "
        f"http://host:port of `tenfold themis serve`; got {name!r}"
    )


def _program_reward(columns: Sequence[str]) -> Any:
    from tenfold.rlhf.programs import ProgramReward

    if "tests" not in columns:
        raise ValueError(
            f"the reward program needs prompts with a column tests; there are: {', '.join(columns)}"
        )
    reward = ProgramReward()
    reward.sandbox.run("", "compile")  # a machine without a sandbox is noticed here, not at step 1
    return reward


def named_paths(given: Sequence[str], what: str = "policy") -> dict[str, str]:
    """``NAME=PATH`` or ``PATH`` (its own name), in order. ValueError if a name comes twice; ``what``: has the name."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            path = name
        if not name or not path:
            raise ValueError(f"a {what} is NAME=PATH or PATH, got {text!r}")
        if name in found:
            plural = "policies" if what == "policy" else f"{what}s"
            raise ValueError(f"two {plural} are called {name!r}; give NAME=PATH")
        found[name] = path
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def named_settings(given: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    """``FIELD=VALUE`` texts as settings: numbers, words, ``none``, true, false, lists with commas.

    Raises ValueError for another field, or one that comes twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in fields:
            raise ValueError(
                f"--set takes FIELD=VALUE with a field of {', '.join(fields)}; got {text!r}"
            )
        if name in found:
            raise ValueError(f"--set {name} is given twice")
        found[name] = _value(value)
    return found
