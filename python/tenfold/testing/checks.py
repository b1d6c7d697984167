# SPDX-License-Identifier: Apache-2.0
"""The standing checks of an op: opcheck, compile, determinism, ISAs, errors, untouched inputs."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tenfold
from tenfold.testing import processes
from tenfold.training.threads import threads


@contextlib.contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels of one instruction set."""
    before = tenfold.cpu_capability()
    tenfold.set_cpu_capability(name)
    try:
        yield
    finally:
        tenfold.set_cpu_capability(before)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh uninitialised tensors are NaN (or the largest integer): unwritten outputs show."""
    settings = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory)
    # torch.use_deterministic_algorithms tells the compiler too: importing that takes a process seconds.
    torch._C._set_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def _clone(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _equal(a: Any, b: Any) -> bool:
    """Same shapes, dtypes and values; NaN equals NaN and nothing else."""
    one, other = _tensors(a), _tensors(b)
    return len(one) == len(other) and all(map(_same, one, other))


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return bool(((x == y) | ((x != x) & (y != y))).all())


def check_opcheck(op: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
    """``torch.library.opcheck``: schema, fake and autograd registrations agree."""
    torch.library.opcheck(op, tuple(_clone(args)), _clone(kwargs or {}))


def check_compiles(
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    backend: str = "aot_eager",
    dynamic: bool | None = True,
) -> None:
    """``torch.compile(fullgraph=True)`` gives exactly the eager result."""
    torch._dynamo.reset()
    want = call(*_clone(args), **_clone(kwargs or {}))
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    got = compiled(*_clone(args), **_clone(kwargs or {}))
    if not _equal(want, got):
        raise AssertionError(f"compiled ({backend}) result differs from the eager one")


def check_deterministic(
    call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> None:
    """Equal bits from run to run and for 1, 2 and 3 threads, in poisoned memory."""
    results = []
    for count in (1, 2, 3, 2):
        with threads(count), poisoned_memory():
            results.append(call(*_clone(args), **_clone(kwargs or {})))
    for count, other in zip((2, 3, 2), results[1:]):
        if not _equal(results[0], other):
            raise AssertionError(f"result with {count} threads differs from that with 1")


def check_isas_agree(
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> None:
    """All instruction sets of this CPU: integers equal, floats close."""
    results = {}
    for name in tenfold.cpu_capabilities():
        with forced_isa(name):
            results[name] = _tensors(call(*_clone(args), **_clone(kwargs or {})))
    first, *others = results
    for name in others:
        for a, b in zip(results[first], results[name], strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(b, a, rtol=rtol, atol=atol, equal_nan=True,
                                           msg=lambda m, n=name: f"{n} vs {first}: {m}")  # fmt: skip
            elif not torch.equal(a, b):
                raise AssertionError(f"integers differ between {first} and {name}")


def check_inputs_unmodified(
    call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> None:
    """A functional op leaves its inputs alone and returns fresh memory."""
    before = _clone((args, kwargs or {}))
    out = call(*args, **(kwargs or {}))
    if not _equal(before, (args, kwargs or {})):
        raise AssertionError("an input was modified")
    mine = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {})) if t.numel()}
    if any(t.untyped_storage().data_ptr() in mine for t in _tensors(out) if t.numel()):
        raise AssertionError("an output shares memory with an input")


def check_strides_equal_fake(
    op: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> None:
    """Shapes, dtypes, strides and device types of the fake equal those of the kernel."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = _tensors(op(*_clone(args), **_clone(kwargs or {})))
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = pytree.tree_map(
            lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, (args, kwargs or {})
        )
        fake = _tensors(op(*fake_args, **fake_kwargs))
    for r, f in zip(real, fake, strict=True):
        facts = [(x.shape, x.dtype, x.stride(), x.device.type) for x in (r, f)]
        if facts[0] != facts[1]:
            raise AssertionError(
                "kernel gives {} {} {} {}, fake {} {} {} {}".format(*facts[0], *facts[1])
            )


def check_cuda_graph(
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None,
    fresh_args: Sequence[Any],
    fresh_kwargs: dict[str, Any] | None = None,
) -> None:
    """Captured with some inputs and replayed with others, a CUDA graph gives the eager result.

    All tensors are on one CUDA device; the fresh ones have the shapes of the first. Everything else
    in the arguments is part of the graph and must be equal.
    """
    inputs, fresh = _clone((list(args), kwargs or {})), (list(fresh_args), fresh_kwargs or {})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads modules, which a capture may not
        warm = _clone(inputs)
        call(*warm[0], **warm[1])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs[0], **inputs[1])
    for values in (fresh, _clone(inputs), fresh):
        again = _clone(values)
        want = call(*again[0], **again[1])
        for mine, new in zip(_tensors(inputs), _tensors(values), strict=True):
            mine.copy_(new)
        for t in _tensors(out):
            t.fill_(77)  # so that a replay that writes nothing shows
        graph.replay()
        torch.cuda.synchronize()
        if not _equal(want, out):
            raise AssertionError("a replayed graph differs from the eager call")


_PEAK = """
import contextlib, ctypes, torch
torch.manual_seed(0)
torch.set_num_threads(1)
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
def map_libraries():  # else the pages of their code that the call is the first to use would count as its memory
    madvise, populate_read = ctypes.CDLL(None).madvise, 22
    with open("/proc/self/maps") as lines:
        for line in lines:
            if ".so" in line and line.split()[1].startswith("r"):
                begin, end = (int(x, 16) for x in line.split()[0].split("-"))
                madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), populate_read)
{setup}
map_libraries()
with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again at what is resident now; without it only too high
before = status("VmRSS:")
{call}
print(status("VmHWM:") - before)
"""


def peak_growth(setup: str, call: str) -> int:
    """Bytes by which the resident memory of a Python process of its own peaks while ``call`` runs.

    ``setup`` makes its inputs before; both are source text. One torch thread. Linux only. (Neither
    this process nor ``ru_maxrss`` would do: both remember what earlier tests needed.)
    """
    source = _PEAK.format(setup=textwrap.dedent(setup), call=textwrap.dedent(call))
    done = processes.python("-c", source, loaded=("torch",))
    if done.returncode != 0:
        raise RuntimeError(f"the measured call failed: {done.stderr[-4000:]}")
    return int(done.stdout.split()[-1])


def check_op(
    op: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    mutates: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> None:
    """All of the above for one set of arguments. ``op`` is ``torch.ops.tenfold.f``.

    For an op that mutates its arguments, the mutated arguments count as its result.
    """

    def call(*a: Any, **k: Any) -> Any:
        out = op(*a, **k)
        return [x.clone() for x in _tensors(a)] if mutates else out

    check_opcheck(op, args, kwargs)
    # What comes after Dynamo, with dynamic shapes, opcheck has traced.
    check_compiles(call, args, kwargs, backend="eager")
    if all(t.is_cpu for t in _tensors(args)):
        check_deterministic(call, args, kwargs)
        check_isas_agree(call, args, kwargs, rtol=rtol, atol=atol)
    if not mutates:
        check_inputs_unmodified(op, args, kwargs)
        check_strides_equal_fake(op, args, kwargs)


Bad = tuple[
    Callable[..., Any], Any, tuple[Any, ...], dict[str, Any], type[Exception], Iterable[str]
]


def check_errors(face: Callable[..., Any], op: Any, args: Sequence[Any], kwargs: dict[str, Any],
                 error: type[Exception], *words: str) -> None:  # fmt: skip
    """Bad input: ``face`` raises ``error``, ``op`` RuntimeError, with one text that has all ``words``.

    Tensors among the arguments must be as they were.
    """
    before = _clone((args, kwargs))
    texts = []
    for function, kind in ((face, error), (op, RuntimeError)):
        try:
            function(*args, **kwargs)
        except Exception as raised:
            if type(raised) is not kind:
                raise AssertionError(f"{kind.__name__} expected, got {raised!r}") from raised
            texts.append(str(raised))
        else:
            raise AssertionError(f"{kind.__name__} expected, nothing was raised")
    if texts[0] != texts[1]:
        raise AssertionError(f"texts differ: {texts[0]!r} and {texts[1]!r}")
    missing = [w for w in words if w not in texts[0]]
    if missing:
        raise AssertionError(f"{missing} not in the message {texts[0]!r}")
    if not _equal(before, (args, kwargs)):
        raise AssertionError("a failed call changed its arguments")
