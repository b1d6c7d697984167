# SPDX-License-Identifier: Apache-2.0
"""One of several gloo ranks: python hft_ranks.py FOLDER continual|fsdp2|... [STAGE STEP], where the last is killed."""

import copy
import os
import sys

import hft_models as tiny
import torch
from ranks import agree, killed_after, leave

from tenfold import hft
from tenfold.hft.config import HFTConfig
from tenfold.optim import MaskedAdamW


def tasks():
    return [hft.Task(f"task {i}", tiny.rows(16, 16, 10 + i), {"input_ids": tiny.rows(8, 16, 20 + i)})
            for i in range(3)]  # fmt: skip


def continual(folder, stage=None, step=None):
    """Continual learning over accelerate: a new DDP wrapper, or the same shards, for every draw."""
    callback = killed_after(step, stage)
    config = HFTConfig.from_preset(
        "small", steps=4, batch_size=4, learning_rate=1e-2, checkpoint_every=1
    )
    if torch.distributed.is_available() and "WORLD_SIZE" in os.environ:
        config = config.with_changes(reselect="steps:3")
    model = tiny.tiny(2)
    record = hft.continual(model, tasks(), config, work_dir=folder, callback=callback)
    if torch.distributed.is_initialized():
        agree(model)
        if torch.distributed.get_rank() == 0:
            torch.save(model.state_dict(), os.path.join(folder, "model.pt"))
            record.write(os.path.join(folder, "record.json"))
        leave()


# More than one draw, layers that train first in the second one, the gradient of a penalty, both references.
KINDS = {
    "soft": {"soft_freeze": 0.5, "micro_batch_size": 1},
    "lisa": {"method": "lisa", "lisa_layers": 1, "lisa_every": 2},
    "adamw": {"method": "full", "optimizer": "adamw"},
    "dpo": {},
    "dpo-lora": {"method": "lora"},
}


def kind(name):
    """(model, record) of one of the other loops."""
    model = tiny.tiny(2)
    config = HFTConfig.from_preset("small", steps=4, batch_size=4, learning_rate=1e-2, eps=1e-4)
    config = config.with_changes(**KINDS[name])
    ids = tiny.rows(16, 16)
    if name.startswith("dpo"):
        other = tiny.rows(16, 16, 5)
        data = {
            "input_ids": ids,
            "labels": ids,
            "rejected_input_ids": other,
            "rejected_labels": other,
        }
        return model, hft.dpo(model, data, config)
    return model, hft.sft(model, ids, config)


def kinds(folder):
    for name in KINDS:
        model, record = kind(name)
        agree(model)
        losses = [m["loss"] for m in record.curves["round-0"]]
        if torch.distributed.get_rank() == 0:
            torch.save((model.state_dict(), losses), os.path.join(folder, f"{name}.pt"))
    leave()


def plain(model, optimizer, ids, steps=3):
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp2(folder):
    """FSDP2: two rounds on the sharded model against the same on one process, with and without parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    ids = tiny.rows(4)
    for strategy, kind in (("category", "fp32"), ("element", "fp32"), ("category", "int8")):
        models = []
        for sharded in (True, False):
            # int8: shards of whole blocks, for elsewhere blocks begin anew in each shard.
            model = tiny.tiny(2, width=32, ffn=128 if kind == "int8" else 136)
            if sharded:
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            optimizer = None
            for r in range(2):
                plan = hft.apply(model, strategy=strategy, round=r)
                if optimizer is None:
                    # eps: gradients that are rounding only must not become whole steps.
                    optimizer = MaskedAdamW(model.parameters(), lr=1e-2, eps=1e-5, state_dtype=kind,
                                            max_grad_norm=0.5, weight_decay=0.1)  # fmt: skip
                else:
                    optimizer.switch(plan, "hand_over")
                plain(model, optimizer, ids)
            models.append((model, optimizer))
        (model, optimizer), (alone, single) = models
        for p, q in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(p.full_tensor(), q, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            optimizer.last_grad_norm, single.last_grad_norm, rtol=1e-2, atol=1e-6
        )
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(p not in optimizer.state for p in frozen) and (frozen or strategy == "element")
        if strategy == "category" and kind == "fp32":
            held = next(iter(optimizer.state.values()))["exp_avg"]
            assert type(held).__name__ == "DTensor"
            checkpoint(model, optimizer)
    if torch.distributed.get_rank() == 0:
        open(os.path.join(folder, "done"), "w").close()
    leave()


def checkpoint(model, optimizer):
    """A round trip through torch's distributed state dicts."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    before = {id(p): s["exp_avg"].to_local().clone() for p, s in optimizer.state.items()}
    for s in optimizer.state.values():
        s["exp_avg"].to_local().zero_()
    set_optimizer_state_dict(model, optimizer, saved)
    for p, s in optimizer.state.items():
        if id(p) in before:
            assert torch.equal(s["exp_avg"].to_local(), before[id(p)])


def rewrap(folder):
    """A Plan cannot be applied to a model in DDP."""
    torch.distributed.init_process_group("gloo")
    model = tiny.tiny(2)
    hft.apply(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    try:
        hft.apply(wrapped, round=1)
    except RuntimeError as error:
        assert "wrap it again" in str(error)
        if torch.distributed.get_rank() == 0:
            open(os.path.join(folder, "done"), "w").close()
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"continual": continual, "kinds": kinds, "fsdp2": fsdp2, "rewrap": rewrap}[sys.argv[2]](
        sys.argv[1], *sys.argv[3:]
    )
