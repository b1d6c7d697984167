# SPDX-License-Identifier: Apache-2.0
"""Random rollouts and the plain formulas that MA-RLHF's tests compare with."""

import torch

from tenfold.ma_rlhf import MARLHFConfig, make_segmenter, prepare

NAN = float("nan")


def rollout(rows=5, width=13, seed=0, lengths=None, dtype=torch.float32, scale=1.0):
    """Inputs of ``prepare``, with NaN wherever they must not be read."""
    made = torch.Generator().manual_seed(seed)
    if lengths is None:
        lengths = torch.randint(2, width + 1, (rows,), generator=made)
    mask = torch.arange(width) < torch.as_tensor(lengths)[:, None]
    draw = [scale * torch.randn(rows, width, generator=made, dtype=torch.float64) for _ in range(3)]
    old, ref, value = (torch.where(mask, x, NAN).to(dtype) for x in draw)
    score = torch.randn(rows, generator=made, dtype=torch.float64).to(dtype)
    return {"mask": mask, "logp_old": old, "logp_ref": ref, "value_old": value, "score": score}


def moved(exp, seed=1, size=0.3):
    """New log-probabilities or values beside the old ones, NaN where masked."""
    made = torch.Generator().manual_seed(seed)
    step = size * torch.randn(exp.mask.shape, generator=made, dtype=torch.float64)
    return torch.where(exp.mask, exp.logp_old.double() + step, NAN).to(exp.logp_old.dtype)


def experience(data=None, segmenter=None, config=None, **settings):
    """(config, experience) of a rollout; ``settings`` are the config's."""
    config = config or MARLHFConfig(**({"score_clip": 100.0, "min_response": 1} | settings))
    return config, prepare(config, segmenter or make_segmenter(config), **(data or rollout()))


def token_gae(value, reward, lam, gamma, last=0.0):
    """GAE of one row, token by token, as every PPO trainer has it."""
    adv, carry = [], 0.0
    for t in reversed(range(len(value))):
        later = value[t + 1] if t + 1 < len(value) else last
        carry = reward[t] + gamma * later - value[t] + gamma * lam * carry
        adv.append(carry)
    return torch.stack(adv[::-1]) if adv else torch.zeros(0, dtype=value.dtype)


def token_rewards(data, row, beta):
    """-beta k1 of the valid tokens of a row in float64, the score at the last one."""
    on = data["mask"][row]
    made = -beta * (data["logp_old"][row, on].double() - data["logp_ref"][row, on].double())
    if len(made):
        made[-1] += data["score"][row].double()
    return made


def row_of(data, index):
    """The rollout of some rows."""
    return {k: v[index] for k, v in data.items()}


def wider(data, columns):
    """The rollout with more columns of padding, full of NaN."""
    made = {}
    for k, v in data.items():
        fill = False if k == "mask" else NAN
        made[k] = v if v.dim() == 1 else torch.nn.functional.pad(v, (0, columns), value=fill)
    return made


def assert_same(one, other, **kwargs):
    """Two experiences agree in all tensors."""
    for name in (
        "mask",
        "seg",
        "nseg",
        "adv",
        "ret",
        "adv_m",
        "ret_m",
        "kl_row",
        "logp_old",
        "score",
    ):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), **kwargs, msg=lambda m, n=name: f"{n}: {m}"
        )
