# SPDX-License-Identifier: Apache-2.0
"""What the scripts that run as gloo ranks share."""

import os
import signal

import torch
import torch.distributed as dist

# Environments of ranks that share the work by DDP, and of ranks that shard the model.
MODES = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
_steps = []  # of sharded models


def _watch_shards():
    """Every step of a sharded model is seen to be one: weights and gradients are this rank's part."""
    from tenfold.training.sharding import Sharded

    finish = Sharded.finish_backward

    def watched(self):
        finish(self)
        held = [p for p in self.module.parameters() if p.ndim]
        assert all(hasattr(p, "to_local") for p in held)
        assert all(p.grad is None or hasattr(p.grad, "to_local") for p in held)
        mine, whole = sum(p.to_local().numel() for p in held), sum(p.numel() for p in held)
        assert 0 < mine < 0.75 * whole and len(self.units) > 1, (mine, whole)
        _steps.append(mine)

    Sharded.finish_backward = watched


if "ACCELERATE_USE_FSDP" in os.environ and "RANK" in os.environ:
    _watch_shards()


def killed_after(step=None, stage=None):
    """A callback that kills the last rank, or the only process, after ``step`` (of ``stage``); None: nobody."""

    def callback(progress):
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        here = stage in (None, progress.stage) and step is not None and progress.step == int(step)
        if here and last:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    return callback


def agree(model):
    """All ranks hold the same model."""
    total = torch.stack([p.detach().double().sum() for p in model.parameters()])
    other = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(other, total)
    assert all(torch.equal(total, o) for o in other)


def leave():
    assert bool(_steps) == ("ACCELERATE_USE_FSDP" in os.environ)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
