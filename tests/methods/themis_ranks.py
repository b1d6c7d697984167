"""One of several gloo ranks: python themis_ranks.py FOLDER. The run is stopped after two steps and started again."""

import os
import sys

import themis_models as tiny
import torch

from tenfold.themis.config import ThemisConfig
from tenfold.themis.training import train_themis

FORMAT = tiny.format(256)
KINDS = {
    # Ranks have texts of unlike length, and more than one micro-batch, of unlike size.
    "full": {"micro_batch_size": 2},
    "lora": {"lora_rank": 2, "lora_dropout": 0.0, "lm_reduce": "component_sum", "packed": True},
}


def train(kind, out=None, callback=None):
    changes = {"steps": 3, "batch_size": 6, "max_length": 256, "learning_rate": 1e-3, "checkpoint_every": 1,
               "eval_every": 2, "obs_dropout": 0.3, "warmup": 0.0} | KINDS[kind]  # fmt: skip
    model = tiny.reward_model(tied=kind == "lora")
    record = train_themis(model, tiny.pairs(14, context=True), FORMAT, ThemisConfig(**changes), out=out,
                          validation=tiny.pairs(5, 1), callback=callback)  # fmt: skip
    return model, record


def main(folder):
    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    for kind in KINDS:
        out = os.path.join(folder, kind)
        if kind == "full":
            try:
                train(kind, out, stop)
            except KeyboardInterrupt:
                print("stopped")
        model, _ = train(kind, out)
        total = torch.stack([p.detach().double().sum() for p in model.parameters()])
        other = [torch.empty_like(total) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(other, total)
        assert all(torch.equal(total, o) for o in other)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
