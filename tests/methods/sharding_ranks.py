# SPDX-License-Identifier: Apache-2.0
"""One of two gloo ranks: what FSDP2's shards of the training loop must do, whatever the method."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave
from torch import nn
from torch.utils.checkpoint import checkpoint

from tenfold.training import sharding
from tenfold.training.loop import load_checkpoint, make_accelerator, save_checkpoint
from tenfold.training.sharding import Sharded
from tenfold.training.store import WorkFolder


class Block(nn.Module):
    """Its gate is read by the loss, beside the block's own output."""

    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x):
        self.said = self.gate(x)
        return x + torch.tanh(self.inner(x)) * self.said.mean(-1, keepdim=True)


class Net(nn.Module):
    """Odd sizes, a scalar, a tied head that the loss reads, weights that do not train."""

    recompute = False

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.layers[0].inner.weight.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def loss_of(model, ids):
    x = model(ids)
    bare = model if isinstance(model, Net) else model.module
    logits = F.linear(x * bare.gain, bare.head.weight)
    said = torch.cat([layer.said for layer in bare.layers])
    return (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + said.square().mean()
    )


def optimizer_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trained if p.ndim], [p for p in trained if not p.ndim]]
    return torch.optim.AdamW([{"params": g} for g in groups], lr=1e-2, eps=1e-4, fused=True)


IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(3))


def train(model, optimizer, steps, bare=None):
    """Steps on all rows, or on this rank's of a sharded model."""
    rank = dist.get_rank()
    ids = IDS if bare is None else IDS[2 * rank : 2 * rank + 2]
    for _ in range(steps):
        loss = sharding.computed(model, loss_of, ids)
        loss.backward()
        for layer in (bare or model).layers:
            layer.said = None  # a graph cannot be copied
        if bare is not None:
            model.finish_backward()
            assert torch.is_tensor(bare.gain) and not hasattr(bare.gain, "to_local")
        norm = nn.utils.clip_grad_norm_([p for p in optimizer.param_groups[0]["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return float(sharding.gathered(norm))


def close(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4, msg=name)


def hooks(model):
    names = (*sharding._FORWARD_HOOKS, *sharding._STATE_HOOKS)
    return [len(getattr(m, n)) for m in model.modules() for n in names]


def main(folder):
    settings = SimpleNamespace(mixed_precision="no")
    accelerator = make_accelerator(settings, torch.device("cpu"))
    mesh = sharding.mesh_of(accelerator)
    alone, model = Net(), Net(seed=dist.get_rank())  # what rank 0 has counts
    plain, parameters = hooks(model), [id(p) for p in model.parameters()]
    names = list(model.state_dict())
    sharded = Sharded(model, mesh, apart=[layer.gate for layer in model.layers])
    assert len(sharded.units) == 3 + 3 + 1 and list(model.state_dict()) == names
    assert model.head.weight is model.embed.weight and hasattr(model.head.weight, "to_local")
    single, optimizer = optimizer_of(alone), optimizer_of(model)
    want, got = train(alone, single, 3), train(sharded, optimizer, 3, model)
    assert got == pytest.approx(want, rel=1e-4)

    with sharded.whole() as inside:
        assert inside is model and type(model.layers[0]) is Block and hooks(model) == plain
        assert [id(p) for p in model.parameters()] == parameters
        assert model.head.weight is model.embed.weight
        close(model, alone)
        # Ranks may do as they like, and copy.
        copied = copy.deepcopy(model)
        for _ in range(1 + dist.get_rank()):
            assert torch.equal(model(IDS), copied(IDS))
        model.load_state_dict(copied.state_dict())
        for each in (model, alone):  # what is changed stays changed
            with torch.no_grad():
                each.layers[1].inner.weight.mul_(0.5)
                each.embed.weight.add_(0.1)
    assert type(model.layers[0]) is not Block and hasattr(model.embed.weight, "to_local")
    train(alone, single, 2), train(sharded, optimizer, 2, model)

    # Other weights train: a block that had none, and one that had.
    for each in (model, alone):
        each.layers[0].requires_grad_(True)
        each.layers[2].requires_grad_(False)
    sharded.changed()
    train(alone, optimizer_of(alone), 2), train(sharded, optimizer := optimizer_of(model), 2, model)

    work = WorkFolder(folder, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    save_checkpoint(accelerator, work, "a", 2, [], sharded, optimizer)
    train(sharded, optimizer, 2, model)
    went_on = [sharding.local(p.detach()).clone() for p in model.parameters()]
    fresh = optimizer_of(model)
    assert load_checkpoint(accelerator, work, "a", sharded, fresh) == (2, [])
    train(sharded, fresh, 2, model)
    for p, kept in zip(model.parameters(), went_on, strict=True):
        assert torch.equal(sharding.local(p), kept)
    load_checkpoint(accelerator, work, "a", sharded, fresh)
    state = [s["exp_avg"] for s in fresh.state.values()]
    assert (
        state and sum(hasattr(s, "to_local") for s in state) == len(state) - 1
    )  # but the scalar's
    with pytest.raises(ValueError, match="was written with FSDP2, and this run is without"):
        load_checkpoint(accelerator, work, "a", alone, fresh)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (Path(folder) / "a-2" / "shards-2.pt").touch()
    accelerator.wait_for_everyone()
    with pytest.raises(ValueError, match="a checkpoint of 3 sharded ranks, and there are 2"):
        load_checkpoint(accelerator, work, "a", sharded, fresh)

    sharded.undo()
    assert type(model.layers[0]) is Block and hooks(model) == plain
    assert [id(p) for p in model.parameters()] == parameters
    assert not [n for m in model.modules() for n in vars(m) if "fsdp" in n or "composable" in n]
    close(model, alone)
    model.load_state_dict(model.state_dict())
    alone.recompute = model.recompute = True
    again = Sharded(model, mesh, apart=[layer.gate for layer in model.layers])
    train(alone, optimizer_of(alone), 2), train(again, optimizer_of(model), 2, model)
    again.undo()
    close(model, alone)
    again = Sharded(model, mesh, "bf16", apart=[layer.gate for layer in model.layers])
    again(lambda bare: bare(IDS).float().sum()).backward()
    assert model.layers[0].inner.weight.grad is not None
    again.undo()
    assert "forward" not in vars(model) and type(model.layers[0]) is Block
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
