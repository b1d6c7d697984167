# SPDX-License-Identifier: Apache-2.0
"""PixelGPT's demo in a few steps: its line, its tables, its page, and what its speed-up compares."""

import dataclasses

import pytest
import torch

from tenfold.pixelgpt import demo
from tenfold.report import Page


@pytest.fixture(scope="module")
def found():
    few = {"steps": 2, "batch_size": 2, "length": 16, "eval_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PRETRAIN": demo.PRETRAIN | few, "FINETUNE": demo.FINETUNE | few, "PER_LANGUAGE": 4, "LINES": 2,
            "TESTS": 1, "TELL": 1,
        }.items():  # fmt: skip
            patch.setattr(demo, name, value)
        said = []
        made = demo.run_demo(said.append, seed=4)
    assert len(said) == 2 + 2 * (2 + 2)
    assert {r.config["seed"] for r in (*made.records.values(), *made.tuned.values())} == {4}
    return made


def test_headline_is_what_was_found(found):
    record, tuned = found.records["PixelGPT"], found.tuned["PixelGPT"]
    line = demo.headline(found)
    assert f"MSE {record.validation[-1]['pixel/npp']:.3f}, mean patch" in line.result
    assert f"{record.rows['pixel']} strips" in line.ran and line.speed is found.speed
    other = dataclasses.replace(
        found,
        records={"a": dataclasses.replace(record, validation=[{"pixel/npp": 0.5}], baselines={"mean": 0.75})},
        tuned={"a": dataclasses.replace(tuned, scores={"unseen": {"accuracy": 0.25}})},
    )  # fmt: skip
    assert demo.headline(other).result == (
        "next patch MSE 0.500, mean patch 0.750; unseen scripts 25 % right"
    )


def test_tables_and_page(found):
    losses, languages, speed = demo.tables(found)
    assert [r[0] for r in losses.rows] == [r[0] for r in languages.rows] == ["PixelGPT", "TextGPT"]
    assert speed.rows[0][2] == f"{found.speed.ratio:.1f}"
    assert all(len(r) == len(t.columns) for t in (losses, languages, speed) for r in t.rows)
    page = Page("t")
    demo.add_demo_section(found, page)
    text = page.render()
    assert text.count("<img") == 3 and speed.rows[0][3] in text


def test_speed_up_is_of_equal_results(found):
    assert found.speed.ratio > 0 and found.apart < 1e-4
    made = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 16, 80), generator=made, dtype=torch.uint8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    pred = torch.randn(2, 5, 768, generator=made)
    torch.testing.assert_close(
        demo.plain_patch_mse(pred, image, mask, 16, 1e-6),
        demo.ops.patch_mse(pred, image, mask, 16, True, 1e-6)[0],
    )
