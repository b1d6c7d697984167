# SPDX-License-Identifier: Apache-2.0
"""DhaConfig: the paper's numbers, presets, and every setting that cannot be."""

import dataclasses
import re

import pytest

from tenfold.dha.config import DhaConfig


def test_the_defaults_are_the_papers():
    c = DhaConfig()
    assert (c.search_steps, c.fusion_steps, c.recovery_steps) == (240, 1000, 50_000)
    assert (c.sequence_length, c.batch_size, c.recovery_batch_size) == (4096, 64, 256)
    assert (c.learning_rate, c.omega_lr, c.lambda_lr) == (1e-4, 1e-2, 1e-2)
    assert (c.betas, c.weight_decay, c.clip, c.warmup) == ((0.9, 0.95), 0.1, 1.0, 0.03)
    assert (c.final_lr, c.stop_mse, c.lambda_init) == (0.1, 1e-3, 1.0)
    assert (c.margin_base, c.margin_end) == (0.995, 0.8)
    assert c == DhaConfig.from_preset("paper")


def test_small_differs_only_in_size_and_rates():
    small, paper = DhaConfig.from_preset("small"), DhaConfig()
    changed = {f.name for f in dataclasses.fields(DhaConfig)
               if getattr(small, f.name) != getattr(paper, f.name)}  # fmt: skip
    assert changed == {
        "search_steps", "fusion_steps", "recovery_steps", "sequence_length", "batch_size",
        "recovery_batch_size", "learning_rate", "omega_lr", "lambda_lr", "margin_base",
        "margin_end", "collapse_mse", "checkpoint_every", "preset",
    }  # fmt: skip
    assert small.collapse_mse == 1e-2 and small.stop_mse == 1e-3  # it still aims at the paper's


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"budget": 0.0}, ValueError, r"budget must be in \(0, 1\].*got 0.0"),
        ({"budget": -0.5}, ValueError, "budget"),
        ({"budget": 1.001}, ValueError, "got 1.001"),
        ({"budget": float("nan")}, ValueError, "budget"),
        ({"method": "gqa"}, ValueError, "method must be one of dha, gqa_mean"),
        ({"search_steps": -1}, ValueError, "search_steps must be >= 0, got -1"),
        ({"fusion_steps": 1.5}, TypeError, "fusion_steps must be an integer, got 1.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer"),
        ({"sequence_length": 1}, ValueError, "sequence_length must be >= 2"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be a positive number"),
        ({"omega_lr": float("inf")}, ValueError, "omega_lr"),
        ({"lambda_lr": -1e-3}, ValueError, "lambda_lr must be a number >= 0"),
        ({"lambda_init": float("nan")}, ValueError, "lambda_init must be a number >= 0, got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"warmup": 1.2}, ValueError, r"warmup must be in \[0, 1\]"),
        ({"distill": -0.1}, ValueError, "distill"),
        ({"margin_base": 0.0}, ValueError, r"margin_base must be in \(0, 1\]"),
        ({"margin_end": 1.1}, ValueError, "margin_end"),
        ({"fusion_loss": "mean"}, ValueError, "fusion_loss must be one of per_group, summed"),
        ({"coefficients": "none"}, ValueError, "coefficients must be one of full, scalar, tied"),
        ({"grouping": "random"}, ValueError, "grouping"),
        ({"solver": "anneal"}, ValueError, "solver must be one of swap, paper_sa, contiguous"),
        ({"allocation": "best"}, ValueError, "allocation must be one of dp, greedy, uniform"),
        ({"gqa": "copy"}, ValueError, "gqa must be one of expand, group"),
        ({"init": "random"}, ValueError, "init must be one of identity, aligned"),
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision"),
        ({"sizes": ()}, ValueError, "sizes must be head counts"),
        ({"sizes": (0, 2)}, ValueError, "sizes must be head counts"),
        ({"tp_size": 0}, ValueError, "tp_size must be >= 1"),
        ({"temperature": 0}, ValueError, "temperature must be a positive number"),
    ],
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        DhaConfig(**changes)
    with pytest.raises(error, match=message):
        DhaConfig().with_changes(**changes)


def test_unknown_preset():
    with pytest.raises(
        ValueError, match=re.escape("preset must be one of paper, small, got 'big'")
    ):
        DhaConfig.from_preset("big")


def test_json_round_trip():
    c = DhaConfig.from_preset("small", sizes=(2, 4), betas=(0.8, 0.9), micro_batch_size=2)
    assert DhaConfig.from_json(c.to_json()) == c
