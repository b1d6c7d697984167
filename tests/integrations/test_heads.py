# SPDX-License-Identifier: Apache-2.0
"""Grouped maps: the cached ones, and those that must not be cached."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tenfold.integrations import heads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(heads, "_made", {})


def test_made_once():
    first = heads.grouped_map(6, 2, CPU)
    assert first.tolist() == [0, 0, 0, 1, 1, 1] and first.dtype == torch.int32
    assert heads.grouped_map(6, 2, CPU) is first
    with torch.inference_mode():
        assert not heads.grouped_map(8, 2, CPU).is_inference()


def test_fake_tensors_stay_in_their_mode():
    with FakeTensorMode():
        assert isinstance(heads.grouped_map(6, 2, CPU), FakeTensor)
    assert not heads._made
    real = heads.grouped_map(6, 2, CPU)
    assert type(real) is torch.Tensor
    with FakeTensorMode():  # nor do real ones get in
        assert isinstance(heads.grouped_map(6, 2, CPU), FakeTensor)
    assert heads.grouped_map(6, 2, CPU) is real


def test_functional_tensors_are_not_kept():
    torch.func.functionalize(lambda x: x + heads.grouped_map(6, 2, CPU))(torch.zeros(6))
    assert not heads._made


def test_nothing_of_a_cuda_graph_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert heads.grouped_map(6, 2, CPU).tolist() == [0, 0, 0, 1, 1, 1] and not heads._made


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="must divide the 6 query heads or come with maps, got 4"):
        heads.grouped_map(6, 4, CPU)
