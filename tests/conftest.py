"""Fixtures and policies come from the package's own test kit."""

import pytest
import torch

pytest_plugins = ["tenfold.testing.plugin"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
