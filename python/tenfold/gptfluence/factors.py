# SPDX-License-Identifier: Apache-2.0
"""From features to the factors of the recurrence: what one training example does to one test example (section 3.1).

    A[p, i, q] = < f_p(h_i), g_p(h'_q) >        planes p: 0..n-1 multiplicative (lag 1..n), n additive

f and g are towers, linear or MLPs, one per plane; with ``towers="shared"`` g is f. With ``interaction="concat"`` a
network
over [h_i ; h'_q] has one head per plane. The M + Q rows are projected once, never per (run, step, test) tuple.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.gptfluence.config import CONCAT_WIDTH, SimulatorConfig


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """As torch's Linear starts."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Tower(nn.Module):
    """A projection per plane: features [N, D] -> [planes, N, E].

    ``"linear"``: one matrix each, without bias. ``"mlp"``: Linear(D, D)-ReLU-Linear(D, E), with biases.
    ``start``: the last layer's scale at the beginning; 0 makes the projections 0.
    """

    def __init__(
        self, planes: int, inside: int, outside: int, kind: str, start: float = 1.0
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind == "mlp":
            self.first = _uniform(planes, inside, inside, fan_in=inside)
            self.first_bias = _uniform(planes, 1, inside, fan_in=inside)
            self.last_bias = _uniform(planes, 1, outside, fan_in=inside)
        self.last = _uniform(planes, inside, outside, fan_in=inside)
        with torch.no_grad():
            self.last.mul_(start)
            if kind == "mlp":
                self.last_bias.mul_(start)

    def forward(self, features: Tensor) -> Tensor:
        """[planes, N, E]."""
        rows = features.expand(len(self.last), *features.shape)
        if self.kind == "linear":
            return torch.bmm(rows, self.last)
        hidden = torch.relu(torch.baddbmm(self.first_bias, rows, self.first))
        return torch.baddbmm(self.last_bias, hidden, self.last)


class ProductFactors(nn.Module):
    """Factors as inner products of projections.

    Args:
        config: order, towers, projection, width, residual. train_width, test_width: of the features.
    """

    def __init__(self, config: SimulatorConfig, train_width: int, test_width: int) -> None:
        super().__init__()
        planes, outside = config.order + 1, config.width or train_width
        self.shared = config.towers == "shared"
        self.train_tower = Tower(planes, train_width, outside, config.projection)
        if not self.shared:
            # A residual recurrence starts as "nothing changes": all factors 0, as the tests' projections are.
            start = 0.0 if config.residual else 1.0
            self.test_tower = Tower(planes, test_width, outside, config.projection, start)

    def project(self, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
        """H [n + 1, M, E], G [n + 1, Q, E]."""
        return self.train_tower(train), (self.train_tower if self.shared else self.test_tower)(test)

    def forward(self, train: Tensor, test: Tensor) -> Tensor:
        """Factors [n + 1, M, Q] of features [M, D] and [Q, D]."""
        H, G = self.project(train, test)
        return torch.bmm(H, G.mT)


class ConcatFactors(nn.Module):
    """Factors by a network over both features: 2D -> 2D -> 100 (``"mlp"``) or 2D -> 100, then a head per plane.

    The first layer is split into the parts of its two inputs, so that it runs over M + Q rows; what follows runs
    over M Q pairs.
    """

    def __init__(self, config: SimulatorConfig, train_width: int, test_width: int) -> None:
        super().__init__()
        both = train_width + test_width
        hidden = both if config.projection == "mlp" else CONCAT_WIDTH
        self.of_train = _uniform(hidden, train_width, fan_in=both)
        self.of_test = _uniform(hidden, test_width, fan_in=both)
        self.bias = _uniform(hidden, fan_in=both)
        self.middle = nn.Linear(both, CONCAT_WIDTH) if config.projection == "mlp" else None
        self.heads = nn.Linear(CONCAT_WIDTH, config.order + 1)
        if config.residual:
            nn.init.zeros_(self.heads.weight)
            nn.init.zeros_(self.heads.bias)

    def forward(self, train: Tensor, test: Tensor) -> Tensor:
        """Factors [n + 1, M, Q] of features [M, D] and [Q, D]."""
        left = F.linear(train, self.of_train, self.bias)
        right = F.linear(test, self.of_test)
        hidden = torch.relu(left[:, None] + right)  # [M, Q, hidden]
        if self.middle is not None:
            hidden = torch.relu(self.middle(hidden))
        return self.heads(hidden).permute(2, 0, 1).contiguous()


def make_factors(
    config: SimulatorConfig, train_width: int, test_width: int
) -> ProductFactors | ConcatFactors:
    """The network that the settings ask for, with random weights of their seed."""
    kind = ProductFactors if config.interaction == "product" else ConcatFactors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return kind(config, train_width, test_width)
