# SPDX-License-Identifier: Apache-2.0
"""The work folder of a run: what one that was killed goes on from.

    run.json                    settings, model and data that the folder belongs to
    <stage>.json, .safetensors  results of finished stages
    <stage>-<step>/             the newest checkpoint of the stage under way (accelerate's state)

Everything appears complete or not at all: it is written beside its place and then renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

# Settings that may change between two runs on one folder: they change what is trained not at all, or
# (micro_batch_size) by rounding.
_FREE = ("force", "collapse_mse", "checkpoint_every", "micro_batch_size")


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class WorkFolder:
    """Reads and writes one work folder; only the main process of several writes."""

    def __init__(self, path: str | Path, main: bool = True) -> None:
        self.path = Path(path)
        self.main = main
        if main:
            self.path.mkdir(parents=True, exist_ok=True)

    def claim(self, identity: dict[str, Any]) -> None:
        """Makes the folder this run's; ValueError if it is another's."""
        file = self.path / "run.json"
        if not file.exists():
            if self.main:
                write_text(file, json.dumps(identity, indent=1))
            return
        old = json.loads(file.read_text())
        flat = [{**d.get("config", {}), **{k: v for k, v in d.items() if k != "config"}}
                for d in (old, json.loads(json.dumps(identity)))]  # fmt: skip
        wrong = [
            f"{k} {flat[0].get(k)!r} there, {flat[1].get(k)!r} here"
            for k in sorted(set(flat[0]) | set(flat[1]))
            if k not in _FREE and flat[0].get(k) != flat[1].get(k)
        ]
        if wrong:
            raise ValueError(
                f"the work folder {self.path} belongs to another run ({'; '.join(wrong)}); "
                "give another folder, or remove this one"
            )

    def release(self) -> None:
        """Ends the claim of a run that leaves nothing in the folder to go on from."""
        if self.main:
            (self.path / "run.json").unlink(missing_ok=True)

    def load(self, name: str) -> Any | None:
        """The JSON result ``name``, None if that stage has not finished."""
        file = self.path / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors stored beside the result ``name``."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")

    def save(self, name: str, value: Any, tensors: dict[str, Tensor] | None = None) -> None:
        """Stores a stage's result: tensors first, then the JSON file that makes it finished."""
        if not self.main:
            return
        if tensors is not None:
            from safetensors.torch import save_file

            temporary = self.path / f".{name}.tmp"
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary
            )
            os.replace(temporary, self.path / f"{name}.safetensors")
        write_text(self.path / f"{name}.json", json.dumps(value))

    def forget(self, name: str) -> None:
        """Removes the result ``name``."""
        if self.main:
            for suffix in ("json", "safetensors"):
                (self.path / f"{name}.{suffix}").unlink(missing_ok=True)

    def checkpoint(self, stage: str) -> tuple[int, Path] | None:
        """(step, folder) of the newest complete checkpoint of a stage."""
        found = [
            (int(m[1]), folder)
            for folder in self.path.glob(f"{stage}-*")
            if (m := re.fullmatch(rf"{re.escape(stage)}-(\d+)", folder.name))
        ]
        return max(found) if found else None

    def drop_checkpoints(self, stage: str, but: Path | None = None) -> None:
        """Removes a stage's checkpoints, complete or not."""
        if not self.main:
            return
        for folder in [*self.path.glob(f"{stage}-*"), *self.path.glob(f".{stage}-*")]:
            if folder != but and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
