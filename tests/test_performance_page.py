# SPDX-License-Identifier: Apache-2.0
"""The generated parts of docs/performance.md: floors, spreads, lost cases, pictures."""

import math
from pathlib import Path
from xml.etree import ElementTree

from bench import performance, pictures


def case(op, seconds, share, others, dtype="float32", **fields):
    """A case in which ours took ``seconds``; ``others``: by provider's name its seconds."""
    providers = {"tenfold": {"kind": "tenfold", "status": "ok", "p50_s": seconds, "share": share}}
    ratios = {}
    for name, took in others.items():
        kind = name.split(":")[0]
        providers[name] = {"kind": kind, "status": "ok", "p50_s": took}
        ratios[kind] = min(took / seconds, ratios.get(kind, math.inf))
    if ratios:
        ratios["best_other"] = min(ratios.values())
    made = {"op": op, "variant": "", "shape": {"n": 8}, "dtype": dtype, "bytes": 2_000_000, "flops": 0,
            "bound": "memory", "providers": providers, "ratios": ratios}  # fmt: skip
    return made | fields


def record(*cases, **fields):
    made = {"family": "optim", "machine": "m", "device_type": "cpu", "date": "2026-01-02", "time": "t", "cases": cases,
            "commit": "c" * 40, "ceilings": {"copy": {"value": 40.0, "unit": "GB/s"}},
            "environment": {"device": "CPU", "threads": 2, "isa": "avx2", "versions": {"torch": "2.13.0"}}}  # fmt: skip
    return made | fields


CASES = (
    case("one", 1e-3, 0.5, {"eager:a": 2e-3, "eager:b": 3e-3, "peer": 5e-4}),
    case("one", 1e-4, 0.25, {"eager:a": 9e-5, "compile": 4e-4}, "bfloat16"),
    case("two", 2e-3, 0.8, {}, bound="compute", flops=3e9, peak="fma_fp32"),
    case("two", 1e-3, 0.1, {"eager": 0.9961e-3}),  # as fast, by what two decimals show
)


def test_a_row_has_the_largest_case_and_the_spread_of_all():
    one, two = (
        performance.row_of(op, cases) for op, cases in performance.ops_of(record(*CASES)).items()
    )
    assert one == ["`one`", "n 8, float32", "2 MB: 500 µs", "1 ms", "50 %", "25 % to 50 %",
                   "1.45× (0.90×)", "4.00×", "0.50×", "2 of 2"]  # fmt: skip
    assert two[2:6] == ["3 GFLOP, 2 MB: 1.6 ms", "2 ms", "80 %", "10 % to 80 %"]
    assert two[-1] == "0 of 1"


def test_a_row_of_a_cpu_predicts_what_an_h200_needs_at_least():
    """By the peaks of its datasheet: 4.8 TB/s, 67 TFLOP/s in float32, 989 TFLOP/s in bfloat16, dense."""
    moved = case("op", 1e-3, 0.5, {}, bytes=48_000_000)
    assert performance.predicted_seconds(moved) == 10e-6
    for peak, rate in (("fma_fp32", 67e12), ("dot_bf16", 989e12)):
        product = case("op", 1e-3, 0.5, {}, flops=rate / 1e3, peak=peak, bytes=48_000_000)
        assert math.isclose(performance.predicted_seconds(product), 1e-3)
        small = case("op", 1e-3, 0.5, {}, flops=rate / 1e9, peak=peak, bytes=48_000_000)
        assert performance.predicted_seconds(small) == 10e-6
    plain, row = performance.row_of("op", [moved]), performance.row_of("op", [moved], True)
    assert row == [*plain[:3], "10 µs", *plain[3:]]
    assert performance.predicted_text(case("group_heads", 1e-3, 0.5, {})) == "on the host"
    cpu = performance.columns_of(record())
    assert cpu[3] == performance.PREDICTED and len(cpu) == len(row)
    assert performance.columns_of(record(device_type="cuda")) == performance.COLUMNS


def test_lost_cases_name_the_fastest_the_worst_first():
    assert performance.losses(record(*CASES)) == [
        "- `one` (n 8, float32): 0.50× of `peer`",
        "- `one` (n 8, bfloat16): 0.90× of `eager:a`",
    ]


def test_a_case_in_which_ours_has_no_time_is_left_out():
    broken = case("three", None, None, {})
    assert list(performance.ops_of(record(broken, *CASES))) == ["one", "two"]


def test_the_last_run_on_a_cpu_and_that_on_a_gpu():
    old, new = record(), record(date="2026-01-03")
    gpu = record(device_type="cuda", machine="h200", date="2025-01-01")
    assert performance.chosen([new, old, gpu], "optim") == [new, gpu]
    assert performance.chosen([new], "norm") == []


def test_pictures_and_blocks_of_a_checkout(tmp_path):
    (tmp_path / "csrc/optim").mkdir(parents=True)
    (tmp_path / "csrc/optim/ops.cpp").touch()
    records = [record(*CASES), record(*CASES, device_type="cuda", machine="h200")]
    made = performance.pictures(tmp_path, records)
    names = ["performance-optim.svg", "performance-optim-h200.svg"]
    assert [path.name for path in made] == names
    block = performance.blocks(tmp_path, lambda _: records)["performance-optim"](tmp_path)
    assert all(f"](images/{name})" in block for name in names)
    assert "faster in 2 of 3 cases" in block and "| `two` |" in block
    empty = performance.blocks(tmp_path, lambda _: [])["performance-optim"](tmp_path)
    assert empty == "No measurement has been committed."


def test_a_picture_has_a_dot_for_each_number_inside_its_frame():
    rows = [
        pictures.Row("a", [(1.4, 0.2, "float32"), (0.1, 80.0, "int8")]),
        pictures.Row("b", [(0.5, None, "bfloat16")]),
    ]
    text = pictures.picture("x", rows)
    assert text == pictures.picture("x", rows)
    root = ElementTree.fromstring(text)
    dots = root.findall("{*}circle")
    assert len(dots) == 3 + 5  # the legend's, and 2 of each case that has a ratio
    width, height = float(root.get("width")), float(root.get("height"))
    for dot in dots:
        assert 0 < float(dot.get("cx")) < width and 0 < float(dot.get("cy")) < height
    assert {t.text for t in root.findall("{*}text")} >= {"a", "b", "float32", "other", "1", "100"}


def test_the_committed_pictures_are_what_the_page_shows():
    root = Path(__file__).resolve().parent.parent
    shown = set((root / performance.PAGE).read_text().split("](images/")[1:])
    shown = {part.split(")")[0] for part in shown}
    assert shown == {p.name for p in (root / performance.PICTURES).glob("performance-*.svg")}
