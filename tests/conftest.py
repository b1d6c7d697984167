"""Fixtures and policies come from the package's own test kit."""

import gc

import pytest
import torch

pytest_plugins = ["tenfold.testing.plugin"]


def pytest_collection_finish() -> None:
    """What has been imported stays: accelerate collects garbage after every run, and need not search it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
