# SPDX-License-Identifier: Apache-2.0
"""Cases of ``markov_onestep_tuples`` and ``outer_dot``: part of the family ``influence``.

Tuples: the published mini-batch of 128, forward and backward, features of 384. ``eager:bags`` sums the rows of a batch
as bags of an embedding, ``peer:gather`` gathers them. Products of gradients: of all pairs; ``eager`` multiplies
all tokens with all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider
from .gradients import compiled_and_pulled_back, pulled_back

FT: Shape = {"N": 128, "B": 4, "M": 200, "Q": 200, "E": 384, "n": 1}
IT: Shape = {"N": 128, "B": 8, "M": 1400, "Q": 1055, "E": 384, "n": 1}
DOTS: list[Shape] = [
    {"N": 16, "T": 32, "M": 32, "S": 32, "V": 4096, "D": 512},
    {"N": 4, "T": 128, "M": 8, "S": 128, "V": 16384, "D": 1024},
    {"N": 64, "T": 1, "M": 200, "S": 1, "V": 16384, "D": 1024},
]


def _tuples(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    n, planes = s["N"], s["n"] + 1
    ids = torch.randint(0, s["M"], (n, s["B"]), generator=made)
    plane = torch.arange(planes)[:, None, None]
    return Inputs(
        H=torch.randn(planes, s["M"], s["E"], generator=made).to(device, dtype),
        G=torch.randn(planes, s["Q"], s["E"], generator=made).to(device, dtype),
        ids=ids.to(device), order=ids.int().to(device),
        bags=(ids + plane * s["M"]).flatten(0, 1).to(device),  # rows of all planes of H
        tests=torch.randint(0, s["Q"], (n,), generator=made).to(device),
        hist=torch.randn(n, s["n"], generator=made).to(device),
        upstream=[torch.randn(n, generator=made).to(device)],
    )  # fmt: skip


def _predictions(batch: Tensor, i: Inputs) -> Tensor:
    factors = (batch * i.G[:, i.tests]).sum(-1)
    return torch.addcmul(factors[1], factors[0] + 1.0, i.hist[:, 0])


def by_bags(i: Inputs) -> Tensor:
    """A batch is a bag of rows of H."""
    rows = torch.nn.functional.embedding_bag(i.bags, i.H.flatten(0, 1), mode="sum")
    return _predictions(rows.unflatten(0, (2, -1)), i)


def by_gather(i: Inputs) -> Tensor:
    """The rows of all batches are gathered."""
    return _predictions(i.H[:, i.ids].sum(2), i)


def _tuple_bytes(s: Shape, size: int) -> int:
    rows = (s["n"] + 1) * s["E"] * size
    return rows * (2 * s["N"] * (s["B"] + 1) + s["M"] + s["Q"])  # dense gradients


def _tuple_case(s: Shape, variant: str) -> Case:
    def ours(i: Inputs) -> Tensor:
        return ops.markov_onestep_tuples(i.H, i.G, i.order, i.tests, i.hist, residual=True)

    def defined(i: Inputs) -> Tensor:
        wide = i.H.double(), i.G.double(), i.ids, i.tests, i.hist.double()
        return reference.markov_onestep_tuples(*wide, residual=True)

    return Case(
        op="markov_onestep_tuples", variant=variant, shape=s, dtype=torch.float32, inputs=_tuples,
        bytes=_tuple_bytes,
        providers=[
            provider("tenfold", pulled_back(ours, "H", "G")),
            provider("eager:bags", pulled_back(by_bags, "H", "G")),
            provider("peer:gather", pulled_back(by_gather, "H", "G")),
            compiled_and_pulled_back(by_gather, "H", "G"),
        ],
        reference=pulled_back(defined, "H", "G"), quick=variant == "ft",
    )  # fmt: skip


def _rows(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def randn(*size: str) -> Tensor:
        return torch.randn([s[k] for k in size], generator=made).to(device, dtype)

    return Inputs(J=randn("N", "T", "V"), X=randn("N", "T", "D"), J2=randn("M", "S", "V"),
                  X2=randn("M", "S", "D"))  # fmt: skip


def all_tokens(i: Inputs) -> Tensor:
    """Two products of all tokens with all tokens."""
    j, x, j2, x2 = (t.flatten(0, 1) for t in (i.J, i.X, i.J2, i.X2))
    products = (j @ j2.T) * (x @ x2.T)
    sizes = len(i.J), i.J.shape[1], len(i.J2), i.J2.shape[1]
    return products.view(sizes).sum((1, 3), dtype=torch.float32)


def _dot_case(s: Shape, dtype: torch.dtype) -> Case:
    half = dtype != torch.float32
    return Case(
        op="outer_dot", shape=s, dtype=dtype, inputs=_rows,
        bytes=lambda s, size: size * (s["N"] * s["T"] + s["M"] * s["S"]) * (s["V"] + s["D"]),
        flops=lambda s: 2 * s["N"] * s["T"] * s["M"] * s["S"] * (s["V"] + s["D"]),
        providers=[
            provider("tenfold", lambda i: ops.outer_dot(i.J, i.X, i.J2, i.X2)),
            provider("eager", all_tokens),
            compiled(all_tokens),
        ],
        reference=lambda i: all_tokens(Inputs(**{k: x.double() for k, x in vars(i).items()})).double(),
        tolerance=2e-2 if half else 1e-4,  # plain torch rounds the products
        peak="dot_bf16" if half else "fma_fp32", traffic="read",
        quick=s is DOTS[0],
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    yield _tuple_case(FT, "ft")
    yield _tuple_case(IT, "it")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in DOTS:
            yield _dot_case(shape, dtype)
