# SPDX-License-Identifier: Apache-2.0
"""The emulation itself: right kernels give right results, planted faults are caught."""

import subprocess

import pytest

from build import build

IN = list(range(5, 5 + 192))


@pytest.fixture(scope="module")
def program():
    return build("self_test")


def run(program, name, seed=1):
    done = subprocess.run([program, name, str(seed)], capture_output=True, text=True, timeout=60)
    return done.returncode, [int(x) for x in done.stdout.split()], done.stderr


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_barrier(program, seed):
    code, out, _ = run(program, "barrier", seed)
    assert code == 0 and out == IN[95::-1] + IN[:95:-1]


def test_missing_barrier_is_seen(program):
    """A planted race gives wrong results, and other ones under another schedule."""
    results = [run(program, "race", seed)[1] for seed in (1, 2)]
    assert results[0] != IN[95::-1] + IN[:95:-1] and results[0] != results[1]


def test_shuffles_and_votes(program):
    code, out, _ = run(program, "warp")
    want = []
    for w in range(3):
        lanes = IN[32 * w : 32 * w + 32]
        votes = sum(x % 3 == 0 for x in lanes)
        want += [sum(lanes) + votes * 100000 + lanes[0] * 1000000] * 32
    assert code == 0 and out[:96] == want


def test_atomics(program):
    code, out, _ = run(program, "atomic")
    assert code == 0 and out[0] == sum(IN[:96])


def test_mma_fragments(program):
    """Integers stand for bf16 bits here, so the identity picks out the first 8 columns."""
    code, out, _ = run(program, "mma")
    assert code == 0 and out == [i + j for i in range(16) for j in range(8)]


def test_matrix_loads(program):
    """Lane l gets two neighbours of row l // 4, transposed: of column l // 4."""
    code, out, _ = run(program, "matrices")
    want = []
    for lane in range(32):
        for i in (0, 3):
            first = 64 * i + lane // 4 * 8 + lane % 4 * 2
            turned = 64 * i + lane % 4 * 16 + lane // 4
            want += [first | (first + 1) << 16, turned | (turned + 8) << 16]
    assert code == 0 and out[:128] == want


@pytest.mark.parametrize("seed", [1, 2])
def test_copies_are_there_after_the_wait(program, seed):
    code, out, _ = run(program, "copies", seed)
    assert code == 0 and out == IN[:96] + [0] * 96
    assert run(program, "unfinished_copies", seed)[1] != out


@pytest.mark.parametrize("name", ["divergent", "early_exit"])
def test_divergent_barriers_are_reported(program, name):
    code, _, error = run(program, name)
    assert code == 86 and "divergent barrier" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_blocks", "invalid launch: 0 blocks of 96"), ("large", "too much shared memory: 49156")],
)
def test_limits_of_the_device_are_checked(program, name, message):
    code, _, error = run(program, name)
    assert code == 86 and message in error


@pytest.mark.parametrize("name", ["shared_overrun", "global_overrun"])
def test_out_of_bounds_writes_are_reported(program, name):
    code, _, error = run(program, name)
    assert code != 0 and "heap-buffer-overflow" in error
