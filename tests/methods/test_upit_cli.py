# SPDX-License-Identifier: Apache-2.0
"""``tenfold upit``: a recipe in one go and stage by stage, evaluation, export, and what is refused."""

import json
from pathlib import Path

import pytest
import upit_dense as dense
from cli_calls import fails, succeeds
from transformers import AutoModelForCausalLM

RECIPE = """
base_model: {place}/base
preset: small
num_experts: 3
data:
  files: {{one: {place}/one.jsonl, two: {place}/two.jsonl}}
  train: 16
  test: 4
collect: {{batch_size: 8, sequence_length: 24, epochs: 1, save_every: 0.5}}
seeds: {{fraction: 1.0, min_bucket: 2}}
router: {{batch_size: 8, epochs: 1}}
post: {{batch_size: 8, epochs: 0.5}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model whose tokens are letters, two families, and a recipe."""
    folder = tmp_path_factory.mktemp("upit")
    dense.letters().save_pretrained(folder / "base")
    dense.llama().save_pretrained(folder / "base")
    for name, step in (("one", 1), ("two", 3)):
        rows = [{"prompt": f"{c}{name}", "answer": chr(97 + (i * step) % 26) * 4}
                for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(RECIPE.format(place=folder))
    return folder


@pytest.fixture(scope="module")
def out(place):
    """The same recipe, stage by stage: each goes on from the one before."""
    done = []
    for stage in ("collect", "expand", "seeds", "route", "assemble"):
        found = json.loads(
            succeeds("upit", stage, place / "recipe.yaml", "--out", place / "run", "--json")
        )
        done.append(stage)
        assert list(found["stages"]) == done
    return place / "run"


def test_run_goes_on_from_the_stages(place, out):
    said = succeeds("upit", "run", place / "recipe.yaml", "--out", out)
    assert "mixture, post-trained" in said and "one" in said and "report:" in said
    again = json.loads(succeeds("upit", "run", place / "recipe.yaml", "--out", out, "--json"))
    assert list(again["stages"])[-2:] == ["post-train", "report"]
    assert Path(again["stages"]["report"]["page"]).is_file()
    model = AutoModelForCausalLM.from_pretrained(again["stages"]["post-train"]["model"])
    assert type(model).__name__ == "MixtralForCausalLM" and model.config.num_local_experts == 3
    text = succeeds("upit", "expand", place / "recipe.yaml", "--out", out)
    assert "Merged experts" in text and "expert-02" in text
    assert "samples" in succeeds("upit", "seeds", place / "recipe.yaml", "--out", out)


def test_eval_and_export(place, out):
    data = [
        "--data",
        place / "one.jsonl",
        "--data",
        place / "two.jsonl",
        "--rows",
        "4",
        "--sequence-length",
        "24",
    ]
    found = json.loads(succeeds("upit", "eval", place / "base", *data, "--json"))["losses"]
    assert set(found[str(place / "base")]) == {"one", "two", "mean"}
    made = json.loads(succeeds("upit", "export", out / "moe", "--out", place / "classic", "--layout", "classic",
                               "--json"))  # fmt: skip
    assert made["model"] == str(place / "classic")
    for folder in (place / "classic", out / "moe"):
        dense.letters().save_pretrained(folder)
    both = json.loads(succeeds("upit", "eval", place / "classic", out / "moe", *data, "--json"))[
        "losses"
    ]
    assert both[str(place / "classic")] == pytest.approx(both[str(out / "moe")], abs=1e-5)
    assert "Loss per answer token" in succeeds("upit", "eval", place / "base", *data)


def test_refused(place, tmp_path):
    def bad(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return fails("upit", "run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")

    assert "no recipe at" in fails("upit", "run", tmp_path / "none.yaml")
    assert "unknown field 'basemodel'" in bad("basemodel: x")
    assert "needs data" in bad(f"base_model: {place / 'base'}")
    assert "experts[0].noise_scale is not supported" in bad(
        "base_model: b\nexperts: [{source_model: a, noise_scale: 1}, b]\n"
    )
    assert "drop must be in [0, 1)" in bad(
        "base_model: b\nexpand: {drop: 1}\ndata: {tasks: [topic]}\n"
    )
    assert "has no stage 'seeds'" in _fails_stage(place, tmp_path)
    assert "--device takes" in fails("upit", "run", place / "recipe.yaml", "--device", "tpu")
    assert "no model folder at" in fails("upit", "eval", tmp_path / "nothing")
    assert "layout must be one of" in fails(
        "upit", "export", place / "base", "--out", tmp_path / "x", "--layout", "flat"
    )


def _fails_stage(place, tmp_path):
    (tmp_path / "random.yaml").write_text(
        f"base_model: {place / 'base'}\nexperts: [a, b]\ngate_mode: random\n"
    )
    return fails("upit", "seeds", tmp_path / "random.yaml", "--out", tmp_path / "o")
