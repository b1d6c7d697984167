# SPDX-License-Identifier: Apache-2.0
"""The report of a conversion: every plot from a real record, and the page that holds them."""

import json
import struct

import dha_models as tiny
import pytest
import torch

from tenfold.dha import report
from tenfold.dha.conversion import convert
from tenfold.dha.record import ConversionRecord


@pytest.fixture(scope="module")
def record():
    made = convert(
        tiny.make(kv_heads=4), 0.25, tiny.rows(), tiny.config(), eval_rows=tiny.rows(4, seed=9)
    )
    return made.conversion


def test_record_round_trip(record, tmp_path):
    record.write(tmp_path / "record.json")
    again = ConversionRecord.read(tmp_path / "record.json")
    assert again.to_json() == record.to_json()
    assert json.loads((tmp_path / "record.json").read_text())["ratio"] == record.ratio <= 0.25
    assert record.kv_bytes_per_token(2) == sum(record.key_heads + record.value_heads) * 8 * 2
    assert set(record.losses) == {"parent", "collapsed", "final"}


def test_copies_are_alike(record):
    """The parent's pairs of query heads have one KV head each: CKA 1, and the smallest distances."""
    for cka, distance in zip(record.cka, record.distances):
        assert cka.shape == distance.shape == (8, 8)
        pairs = [float(cka[h, h + 1]) for h in range(0, 8, 2)]
        assert pairs == pytest.approx([1] * 4, abs=1e-4)
        inside = max(float(distance[h, h + 1]) for h in range(0, 8, 2))
        assert inside < min(
            float(distance[a, b]) for a in range(8) for b in range(a) if a // 2 != b // 2
        )


def test_page_and_pictures(record, tmp_path):
    page = report.write_report([record, record], tmp_path / "r" / "index.html", "<tiny>")
    text = page.read_text()
    names = {p.name for p in page.parent.glob("*.png")}
    assert len(names) == text.count("data:image/png;base64,") and len(names) % 2 == 0
    for name in ("heads", "loss", "fusion", "redundancy", "cka-0-key", "cka-1-value", "M-1-key"):
        assert {f"1-{name}.png", f"2-{name}.png"} <= names
    for path in page.parent.glob("*.png"):
        assert min(struct.unpack(">II", path.read_bytes()[16:24])) > 100
    assert "&lt;tiny&gt;" in text and "8 of 32" in text


def test_what_is_missing_is_left_out(tmp_path):
    made = convert(tiny.make(), 0.25, None, tiny.config(method="gqa_mean", recovery_steps=0))
    page = report.write_report([made.conversion], tmp_path / "index.html")
    names = {p.name for p in tmp_path.glob("*.png")}
    assert "heads.png" in names and "fusion.png" not in names and "M-0-key.png" not in names
    assert "Distances that grouped" not in page.read_text()


def test_many_heads_are_drawn_without_numbers():
    matrix = torch.rand(32, 32)
    assert len(report.matrix_plot(matrix, "t").axes[0].texts) == 0
