# SPDX-License-Identifier: Apache-2.0
"""Fixtures and policies come from the package's own test kit."""

import gc

import pytest
import torch

pytest_plugins = ["tenfold.testing.plugin"]

# What is imported and collected stays: searching it for garbage would take longer than many a test, of which those
# that train have accelerate search after every run.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
