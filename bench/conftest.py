# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark carries the same cases: ``pytest bench/ --benchmark-json=out.json``.

Options: ``--full`` (all cases; default: the quick ones), ``--bench-device cpu|cuda``. Every case's
extra_info has the ratios, shares and ceilings that the harness found.
"""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases, not only the quick ones")
    parser.addoption("--bench-device", default="cpu", help="cpu or cuda")


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest):
    from bench.harness import Options, quick_options

    chosen = Options(device=torch.device(request.config.getoption("--bench-device")))
    return chosen if request.config.getoption("--full") else quick_options(chosen)


@pytest.fixture(scope="session")
def ceilings(options):
    from bench.ceilings import measure_ceilings
    from bench.runner import settle

    settle(options.device)
    return measure_ceilings(options.device)
