# SPDX-License-Identifier: Apache-2.0
"""The live set-up of acceptance checks 9 and 10: a tiny GPT on four bigram tasks, many short runs, exact gradients."""

import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from tenfold.gptfluence.baselines import Constant, MeanTrajectory
from tenfold.gptfluence.config import RecordConfig
from tenfold.gptfluence.curricula import Curriculum, make_curricula
from tenfold.gptfluence.encoders import BagEncoder
from tenfold.gptfluence.evaluation import evaluate, evaluate_gradients
from tenfold.gptfluence.features import Features
from tenfold.gptfluence.gradients import GradientTracker, gradient_curve, gradient_scores
from tenfold.gptfluence.runs import Run, RunSet
from tenfold.gptfluence.simulator import Simulator

VOCABULARY, LENGTH, WIDTH, TASKS = 32, 16, 32, 4
TRAIN, VALIDATION, TEST = 24, 4, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        scores = q @ k.mT / WIDTH**0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.out(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class TinyGPT(nn.Module):
    """Without a last norm: with one, losses move three times less than in the set-up's published numbers."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight[: ids.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def losses(model, batch):
    """Mean loss of each row's 15 next tokens."""
    ids = batch["input_ids"]
    logits = model(ids)[:, :-1]
    flat = F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="none")
    return flat.view(len(ids), -1).mean(1)


class World:
    """Examples, tests, and runs of one seed.

    unseen: the runs to test on draw from other examples (numbers 96 to 191) than those to learn from.
    tracked: ``gradients`` can be asked for; without, none are taken at every step of those runs.
    """

    def __init__(
        self,
        seed,
        optimizer="sgd",
        unseen=False,
        train=96,
        tests=32,
        runs=(TRAIN, VALIDATION, TEST),
        tracked=True,
    ):
        self.seed, self.optimizer, self.unseen, self.runs = seed, optimizer, unseen, runs
        self.tracked = tracked
        made = torch.Generator().manual_seed(1000 + seed)
        tables = (3 * torch.randn(TASKS, VOCABULARY, VOCABULARY, generator=made)).softmax(-1)
        self.rows = self._rows(tables, 2 * train if unseen else train, made)
        self.tests = self._rows(tables, tests, made)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = TinyGPT()
        settings = {
            "examples": train // 2,
            "epochs": 4.0,
            "batch_size": 4,
            "concentration": 0.3,
            "seed": seed,
        }
        config = RecordConfig(runs=sum(runs), **settings)
        self.curricula = make_curricula(config, [i % TASKS for i in range(train)])
        if unseen:
            later = [Curriculum(c.run, c.order + train) for c in self.curricula[-runs[2] :]]
            self.curricula = self.curricula[: -runs[2]] + later
        self.trackers = {}

    @staticmethod
    def _rows(tables, count, made):
        ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=made)
        for i in range(count):
            for t in range(1, LENGTH):
                ids[i, t] = torch.multinomial(tables[i % TASKS, ids[i, t - 1]], 1, generator=made)
        return {"input_ids": ids}

    def rates(self, steps):
        """Linear decay."""
        top = 0.3 if self.optimizer == "sgd" else 3e-3
        return top * (1 - torch.arange(steps) / steps)

    def run(self, curriculum, gradients=False):
        """One run: measured after every step."""
        model = copy.deepcopy(self.model)
        steps = len(curriculum.order)
        made = (torch.optim.SGD(model.parameters(), lr=1.0) if self.optimizer == "sgd"
                else torch.optim.AdamW(model.parameters(), weight_decay=1e-3))  # fmt: skip
        tracker = GradientTracker(
            lambda m: gradient_scores(m, self.rows, self.tests, losses, vectorized=True),
            1 if gradients else 10_000,
        )
        values = []
        for t, rate in enumerate(self.rates(steps).tolist()):
            made.param_groups[0]["lr"] = rate
            made.zero_grad()
            losses(
                model, {"input_ids": self.rows["input_ids"][curriculum.order[t]]}
            ).mean().backward()
            made.step()
            tracker.step(model, t + 1)
            with torch.no_grad():
                values.append(losses(model, self.tests))
        self.trackers[curriculum.run] = tracker
        return Run(f"{curriculum.run}", curriculum.order, torch.arange(steps), {"loss": torch.stack(values)},
                   tuple(range(len(self.rows["input_ids"]))), tuple(range(len(self.tests["input_ids"]))),
                   {"loss": "nats"})  # fmt: skip

    @cached_property
    def sets(self):
        """(to learn from, to validate on, to test on)."""
        first = sum(self.runs) - self.runs[2]
        made = [self.run(c, gradients=self.tracked and c.run >= first) for c in self.curricula]
        return RunSet.of(made).split(self.runs[1], self.runs[2])

    @cached_property
    def features(self):
        """Bags of bigrams, 64 wide."""
        encoder = BagEncoder(64, seed=self.seed)
        return tuple(
            Features.of_texts(range(len(r["input_ids"])), r["input_ids"].tolist(), encoder)
            for r in (self.rows, self.tests)
        )

    def simulator(self, preset="default", **changes):
        """Fitted."""
        from tenfold.gptfluence.config import SimulatorConfig

        made = Simulator(
            *self.features, SimulatorConfig.from_preset(preset, seed=self.seed, **changes)
        )
        made.fit(self.sets[0], self.sets[1])
        return made

    def simulated(self, simulator):
        return evaluate(simulator.predict(self.sets[2]).values, self.sets[2])

    def baseline(self, one):
        train, held, test = self.sets
        one.fit(train, held)
        return evaluate(one.predict(test), test)

    def plain(self):
        """Constant and mean training trajectory."""
        return self.baseline(Constant()), self.baseline(MeanTrajectory())

    def gradients(self):
        """Evaluations of TracIn of every step and of Grad-Dot, raw and scaled in hindsight."""
        test = self.sets[2]
        curves = {"tracin": [], "grad-dot": []}
        for name, order, y in zip(test.names, test.order, test.y):
            scores = self.trackers[int(name)].scores
            rates = self.rates(order.shape[0])[1:]
            for method, used in (("tracin", scores), ("grad-dot", scores[max(scores)])):
                curves[method].append(gradient_curve(order[1:], y[0], rates, used, start=1))
        return {k: evaluate_gradients(torch.stack(v), test) for k, v in curves.items()}
