# SPDX-License-Identifier: Apache-2.0
"""Fixtures and policies come from the package's own test kit."""

import gc
import sys

import pytest
import torch

pytest_plugins = ["tenfold.testing.plugin"]

# What is imported and collected stays: searching it for garbage would take longer than many a test, of which those
# that train have accelerate search after every run. So does what tests import on the way.
gc.disable()
_modules = 0


def _freeze() -> None:
    global _modules
    _modules = len(sys.modules)
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    _freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    if len(sys.modules) > _modules + 30:
        _freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    # torch.manual_seed formats its caller's stack for a GPU to come: a millisecond, ten thousand times.
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)
