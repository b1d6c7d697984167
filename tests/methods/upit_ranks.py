"""One of several gloo ranks: python upit_ranks.py FOLDER. The run is stopped after two steps and started again."""

import os
import sys

import torch
import upit_mixtures as tiny

from tenfold.upit import PostTrainingConfig
from tenfold.upit.post_train import post_train


def settings(**changes):
    return PostTrainingConfig(**({"steps": 4, "batch_size": 4, "learning_rate": 2e-3, "aux_coef": 0.3,
                                  "checkpoint_every": 1} | changes))  # fmt: skip


def data():
    """Rows whose ranks have different numbers of tokens, for the loss and for the balance."""
    rows = {"input_ids": tiny.rows(16), "attention_mask": torch.ones(16, 12, dtype=torch.int64)}
    for i in range(16):
        rows["attention_mask"][i, 12 - i // 2 :] = 0
    return rows


def train(folder, callback=None):
    return post_train(tiny.mixtral(), data(), config=settings(), out=os.path.join(folder, "out"), callback=callback,
                      eval_rows=tiny.rows(4, seed=5))  # fmt: skip


def main(folder):
    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    try:
        train(folder, stop)
    except KeyboardInterrupt:
        print("stopped")
    made = train(folder)
    total = torch.stack([p.double().sum() for p in made.model.parameters()])
    other = [torch.empty_like(total) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(other, total)
    assert all(torch.equal(total, o) for o in other)
    if torch.distributed.get_rank() == 0:
        torch.save(
            {"model": made.model.state_dict(), "result": made.to_json()},
            os.path.join(folder, "made.pt"),
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
