# SPDX-License-Identifier: Apache-2.0
"""The toolbox: tools that fail, hang and lie stall nothing; deadlines, retries, rates, record and replay."""

import itertools
import json
import threading
import time
from collections import Counter

import pytest

from tenfold.themis.tools import (
    STATUSES,
    BadArguments,
    Calendar,
    Rate,
    Refused,
    Tool,
    Toolbox,
    ToolCache,
    pool,
)
from tenfold.themis.tools.base import MAX_ARGUMENTS, plain_text
from tenfold.themis.tools.cache import digest
from tenfold.themis.tools.rate import Bucket
from tenfold.themis.trace_types import FAILURE


class Odd(Tool):
    """Does what its arguments say."""

    names = ("odd",)
    timeout = 5.0

    def __init__(self, action=None, **settings):
        self.calls = Counter()
        self.free = threading.Event()
        self.action = action
        for name, value in settings.items():
            setattr(self, name, value)

    def call(self, name, arguments, example):
        self.calls[arguments] += 1
        if self.action is not None:
            return self.action(self, arguments)
        if arguments == "hang":
            self.free.wait(30)
        return f"did {arguments}"


def raising(error):
    def act(tool, arguments):
        raise error

    return act


def soon(seconds):
    return time.monotonic() + seconds


def wait_for(true, seconds=5.0):
    end = soon(seconds)
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    assert true()


class SaysNothing(Exception):
    def __str__(self):
        raise RuntimeError("no")


class Lying(str):
    __slots__ = ()

    def __len__(self):
        return 3

    def __str__(self):
        return "lie"

    def __getitem__(self, at):
        return Lying("x" * 10**6)


class TestObservations:
    @pytest.mark.parametrize(
        "error, status, said",
        [
            (BadArguments("no date"), "bad_args", "BadArguments: no date"),
            (Refused("no key"), "refused", "Refused: no key"),
            (LookupError("none known"), "failed", "LookupError: none known"),
            (RuntimeError("x" * 10_000), "failed", "RuntimeError: xxx"),
            (SaysNothing(), "failed", "SaysNothing"),
            (SystemExit(3), "failed", "SystemExit: 3"),
            (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
            (MemoryError(), "failed", "MemoryError"),
            (RecursionError(), "failed", "RecursionError"),
        ],
    )
    def test_whatever_a_tool_raises(self, error, status, said):
        with Toolbox([Odd(raising(error))]) as box:
            seen = box.run("odd", "x")
            assert (seen.status, seen.text, seen.ok) == (status, FAILURE, False)
            assert seen.error.startswith(said) and len(seen.error) <= 300
            assert box.run("odd", "x").status == status  # its worker lives

    @pytest.mark.parametrize(
        "value, text",
        [
            ("", ""), (5, "5"), (["a"], "['a']"), (b"h\xc3\xa9\xff", "hé�"), (bytearray(b"ab"), "ab"),
            ("<start_work> Work: fine</s>\x00\n", "<start_work> Work: fine</s>\x00\n"), ("\udc80é", "?é"),
            (Lying("abc"), "abc"), ("y" * 41, "y" * 34 + " [...]"), (Lying("z" * 41), "z" * 34 + " [...]"),
            (b"b" * 10**7, "b" * 34 + " [...]"), (10**39, str(10**39)),
        ],
    )  # fmt: skip
    def test_whatever_a_tool_returns(self, value, text):
        with Toolbox([Odd(lambda *_: value)], max_chars=40) as box:
            seen = box.run("odd", "x")
            assert (seen.status, seen.text) == ("ok", text) and type(seen.text) is str

    def test_what_has_no_text(self):
        class Silent:
            __str__ = SaysNothing.__str__

        class Wrong:
            def __str__(self):
                return 3

        for value in (None, Silent(), Wrong()):
            with Toolbox([Odd(lambda *_: value)]) as box:  # noqa: B023
                assert box.run("odd", "x").status == "failed"

    def test_a_huge_text_is_not_copied(self):
        huge = "é" * (100 << 20)
        start = time.process_time()
        assert len(plain_text(huge, 4000)) == 4000
        assert time.process_time() - start < 0.5

    def test_what_a_model_writes(self):
        with Toolbox([Odd(), Calendar()]) as box:
            assert box.run("odd", "x" * MAX_ARGUMENTS).ok
            assert box.run("odd", "x" * (MAX_ARGUMENTS + 1)).status == "bad_args"
            assert box.run("odd", None).status == "bad_args"
            for name in (
                "",
                "odd ",
                "Calendar",
                "calendar.week_day",
                None,
                [],
                "x" * 10**6,
                "__class__",
            ):
                seen = box.run(name, "x")
                assert (seen.status, seen.text) == ("unknown_tool", FAILURE) and len(
                    seen.error
                ) < 300
            assert box.run("Calendar.week_day", "2023-02-30").status == "bad_args"
            assert box.run("Calendar.week_day", "2004-05-03").text == "Monday"

    def test_the_example_reaches_the_tool(self):
        class Reads(Tool):
            names = ("a", "b")

            def call(self, name, arguments, example):
                return f"{name} {arguments} {dict(example)}"

        with Toolbox([Reads()]) as box:
            assert box.run("b", "x", {"answer": 1}).text == "b x {'answer': 1}"
            assert box.run("a", "x").text == "a x {}"


class TestTime:
    def test_a_hanging_tool_is_given_up_and_replaced(self):
        tool = Odd(timeout=0.3)
        with Toolbox([tool], workers=1, spare=2) as box:
            start = time.monotonic()
            hung = [box.run("odd", "hang") for _ in range(2)]
            assert [h.status for h in hung] == ["timeout"] * 2 and "longer than 0.3 s" in hung[
                0
            ].error
            assert 0.6 <= time.monotonic() - start < 5
            assert box.run("odd", "x").text == "did x" and box.threads() == {"odd": (1, 2)}
            # The third is not replaced: what comes now is told at once, and no thread is started for it.
            waiting = [box.submit("odd", "hang")] + [box.submit("odd", str(i)) for i in range(5)]
            assert [f.result().status for f in waiting] == ["timeout"] + ["limited"] * 5
            assert box.threads() == {"odd": (0, 3)}
            start = time.monotonic()
            assert box.run("odd", "y").status == "limited" and time.monotonic() - start < 2
            # They come back, and only as many stay as there are workers.
            tool.free.set()
            wait_for(lambda: box.threads() == {"odd": (1, 0)})
            assert box.run("odd", "z").text == "did z"

    def test_other_tools_do_not_notice(self):
        tool = Odd(timeout=20)
        with Toolbox([tool, Calendar()]) as box:
            hung = [box.submit("odd", "hang") for _ in range(50)]
            start = time.monotonic()
            assert box.run("Calendar.week_day", "2004-05-03").ok
            assert time.monotonic() - start < 5
            tool.free.set()
            assert Counter(f.result().status for f in hung)["ok"] == 50

    def test_deadlines(self):
        tool = Odd(timeout=10.0)
        with Toolbox([tool], workers=1) as box:
            start = time.monotonic()
            assert box.run("odd", "hang", deadline=soon(0.1)).error == "the deadline passed"
            # The worker is not hung, it has its time; what waits for it keeps its own deadline.
            assert box.threads() == {"odd": (1, 0)}
            assert box.run("odd", "x", deadline=soon(0.1)).status == "timeout"
            assert 0.2 <= time.monotonic() - start < 5
            assert box.run("odd", "x", deadline=soon(-1)).error == "the deadline had passed"
            tool.free.set()
            wait_for(lambda: box.run("odd", "y", deadline=soon(1)).ok)
            assert tool.calls["x"] == 0  # nobody waited for it any more

    def test_seconds_count_from_the_call(self):
        tool = Odd(lambda *_: time.sleep(0.05) or "x")
        with Toolbox([tool], workers=1) as box:
            made = [box.submit("odd", "x") for _ in range(3)]
            found = [f.result().seconds for f in made]
        assert all(0.05 * (i + 1) <= s < 0.05 * (i + 1) + 1 for i, s in enumerate(found))

    def test_workers_work_at_the_same_time(self):
        barrier = threading.Barrier(6, timeout=5)
        with Toolbox([Odd(lambda *_: str(barrier.wait()))], workers={"odd": 6}) as box:
            made = [box.submit("odd", "x") for _ in range(6)]
            assert sorted(f.result().text for f in made) == list("012345")

    def test_the_queue_is_bounded(self):
        tool = Odd()
        with Toolbox([tool], workers=1, queue=3) as box:
            first = box.submit("odd", "hang")
            wait_for(lambda: tool.calls["hang"])
            rest = [box.submit("odd", "x") for _ in range(5)]
            assert [f.done() for f in rest] == [False] * 3 + [True] * 2
            assert rest[4].result().status == "limited"
            tool.free.set()
            assert first.result().ok and all(f.result().ok for f in rest[:3])

    def test_a_cancelled_call(self):
        tool = Odd()
        with Toolbox([tool], workers=1) as box:
            box.submit("odd", "hang")
            gone = box.submit("odd", "x")
            assert gone.cancel()
            tool.free.set()
            assert box.run("odd", "y").ok and tool.calls["x"] == 0
            wait_for(lambda: not box._open)  # nothing is kept of it

    def test_idle_threads_end(self, monkeypatch):
        monkeypatch.setattr(pool, "IDLE_SECONDS", 0.05)
        box = Toolbox([Odd(timeout=0.2)])
        before = threading.active_count()
        assert all(f.result().ok for f in [box.submit("odd", "x") for _ in range(9)])
        wait_for(lambda: box.threads() == {"odd": (0, 0)} and threading.active_count() <= before)
        assert box.run("odd", "x", deadline=soon(1)).ok  # and begin again

    def test_closing(self):
        tool = Odd()
        box = Toolbox([tool], workers=1, rates={"odd": Rate(2, 60)})
        made = [
            box.submit("odd", "hang") for _ in range(3)
        ]  # running, queued, waiting for its turn
        wait_for(lambda: tool.calls["hang"])
        box.close()
        assert [f.result(timeout=1).error for f in made] == ["the toolbox was closed"] * 3
        with pytest.raises(RuntimeError, match="the toolbox was closed"):
            box.submit("odd", "x")
        box.close()
        tool.free.set()
        wait_for(lambda: box.threads() == {"odd": (0, 0)})

    def test_a_thousand_calls_of_tools_that_fail_hang_and_lie(self):
        """None is lost, each is answered by its deadline, and threads stay bounded."""
        free = threading.Event()
        values = itertools.cycle(
            [None, 5, b"\xff", "x" * 10**5, Lying("abc"), "\udc80", ["a"] * 100]
        )

        class Hangs(Odd):
            names = ("hangs",)

        class Lies(Odd):
            names = ("lies",)

        class Fails(Odd):
            names = ("fails",)

        errors = itertools.cycle(
            [SystemExit(), SaysNothing(), ValueError("x"), BadArguments("x"), Refused("x")]
        )
        tools = [
            Hangs(lambda *_: free.wait(30) and "late", timeout=0.2, retries=1),
            Lies(lambda *_: next(values)),
            Fails(lambda tool, _: raising(next(errors))(tool, _), retries=1),
            Calendar(),
        ]
        names = ("hangs", "lies", "fails", "Calendar.week_day", "none")
        with Toolbox(tools, workers=4, rates={"lies": Rate(150, 0.5)}) as box:
            start, made = time.monotonic(), []
            deadline = start + 3
            for i in range(1000):
                made.append(
                    (names[i % 5], box.submit(names[i % 5], "2004-05-03", deadline=deadline))
                )
            answered = [(name, f.result(timeout=6)) for name, f in made]
            assert time.monotonic() - start < 5
            hung = box.threads()["hangs"]
            assert sum(hung) <= 8
            free.set()
        for name, seen in answered:
            assert seen.status in STATUSES and len(seen.text) <= 4000 and seen.seconds < 5
            assert seen.text.encode() and (seen.ok or seen.text == FAILURE)
            assert (seen.text == "Monday") == (name == "Calendar.week_day")
        by_name = {n: Counter(s.status for m, s in answered if m == n) for n in names}
        assert by_name["Calendar.week_day"] == {"ok": 200} and by_name["none"] == {
            "unknown_tool": 200
        }
        assert by_name["hangs"]["timeout"] >= 4 and not by_name["hangs"]["ok"]
        assert (
            set(by_name["fails"]) == {"failed", "bad_args", "refused"}
            and by_name["lies"]["ok"] >= 100
        )


class TestRetries:
    def test_failures_are_tried_again(self):
        def act(tool, arguments):
            if tool.calls[arguments] < 3:
                raise OSError("try again")
            return "there"

        tool = Odd(act, retries=2)
        with Toolbox([tool]) as box:
            seen = box.run("odd", "x")
            assert seen.text == "there" and tool.calls["x"] == 3 and 0.3 <= seen.seconds < 5
        tool = Odd(act, retries=1)
        with Toolbox([tool]) as box:
            assert box.run("odd", "x").error == "OSError: try again" and tool.calls["x"] == 2

    @pytest.mark.parametrize("error", [BadArguments(), Refused(), LookupError()])
    def test_a_definite_no_is_not(self, error):
        tool = Odd(raising(error), retries=3)
        with Toolbox([tool]) as box:
            box.run("odd", "x")
        assert tool.calls["x"] == 1

    def test_the_deadline_ends_them(self):
        tool = Odd(raising(OSError()), retries=50)
        with Toolbox([tool]) as box:
            assert box.run("odd", "x", deadline=soon(0.2)).status == "timeout"
            tried = tool.calls["x"]
            time.sleep(0.3)
            assert tool.calls["x"] == tried <= 3


class TestRates:
    def test_token_bucket(self):
        bucket = Bucket(Rate(3, 6.0), 100.0, most=4)  # one every two seconds
        assert [bucket.reserve(100.0) for _ in range(5)] == [100, 100, 100, 102, 104]
        assert (
            bucket.reserve(100.0, latest=105.9) is None
            and bucket.reserve(100.0, latest=106.0) == 106
        )
        assert bucket.reserve(100.0) == 108 and bucket.reserve(100.0) is None  # four wait
        assert bucket.reserve(107.0) == 110  # what was taken before the time came counts
        assert [bucket.reserve(1000.0) for _ in range(4)] == [1000, 1000, 1000, 1002]

    def test_calls_wait_for_their_turn(self):
        times = []
        tool = Odd(lambda *_: times.append(time.monotonic()) or "x")
        with Toolbox([tool], rates={"odd": Rate(2, 0.2)}) as box:
            start = time.monotonic()
            made = [box.submit("odd", "x") for _ in range(4)]
            late = box.submit("odd", "x", deadline=soon(0.1))
            assert late.done() and late.result().status == "limited"
            assert all(f.result().ok for f in made)
        for taken, due in zip(sorted(times), (0, 0, 0.1, 0.2)):
            assert due - 0.001 <= taken - start < due + 2

    def test_bad_input(self):
        for calls, seconds, error in ((0, 1, ValueError), (1.5, 1, TypeError), (1, 0, ValueError)):
            with pytest.raises(error, match=r"calls|seconds"):
                Rate(calls, seconds)


class TestCache:
    def test_record_and_replay(self, tmp_path):
        path = tmp_path / "deep" / "cache.jsonl"
        tool = Odd()
        with Toolbox([tool, Calendar()], cache=ToolCache(path, "record")) as box:
            first = [
                box.run("odd", "a"),
                box.run("odd", "a"),
                box.run("Calendar.week_day", "2023-02-30"),
            ]
            assert tool.calls["a"] == 2 and not any(s.cached for s in first)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(r["tool"], r["key"], r["arguments"], r["status"]) for r in rows] == [
            ("odd", digest("a"), "a", "ok"), ("Calendar.week_day", digest("2023-02-30"), "2023-02-30", "bad_args"),
        ]  # fmt: skip
        silent = Odd(raising(OSError()))
        with Toolbox([silent, Calendar()], cache=ToolCache(path, "replay")) as box:
            again = [
                box.run("odd", "a"),
                box.run("odd", "a"),
                box.run("Calendar.week_day", "2023-02-30"),
            ]
            assert [(s.text, s.status) for s in again] == [(s.text, s.status) for s in first]
            assert all(s.cached for s in again)
            missing = box.run("odd", "b")
            assert (missing.status, missing.text) == (
                "failed",
                FAILURE,
            ) and "not in the cache" in missing.error
            assert box.run("none", "b").status == "unknown_tool"
            assert not silent.calls and box.threads()["odd"] == (0, 0)

    def test_both(self, tmp_path):
        tool = Odd(lambda t, a: f"{a} {t.calls[a]}")
        with Toolbox([tool], cache=ToolCache(tmp_path / "c", "both")) as box:
            assert [box.run("odd", "a").text for _ in range(3)] == ["a 1"] * 3
        with Toolbox([tool], cache=ToolCache(tmp_path / "c", "both")) as box:
            assert box.run("odd", "a").cached and tool.calls["a"] == 1
        fickle = Odd(lambda t, a: f"{a} {t.calls[a]}", deterministic=False)
        with Toolbox([fickle], cache=ToolCache(tmp_path / "d", "both")) as box:
            assert [box.run("odd", "a").text for _ in range(3)] == ["a 1", "a 2", "a 3"]
        with Toolbox([fickle], cache=ToolCache(tmp_path / "d", "replay")) as box:
            assert box.run("odd", "a").text == "a 3"  # of several, the last

    def test_failures_are_not_kept(self):
        cache = ToolCache(mode="both")
        with Toolbox([Odd(raising(OSError()))], cache=cache) as box:
            assert box.run("odd", "a").status == "failed" and len(cache) == 0

    def test_a_late_result(self):
        """A recorded run was told that there is none; whoever only saves calls may have it."""
        for mode, want in (("record", 0), ("both", 1)):
            cache, tool = ToolCache(mode=mode), Odd()
            with Toolbox([tool], cache=cache) as box:
                assert box.run("odd", "hang", deadline=soon(0.05)).status == "timeout"
                tool.free.set()
                assert box.run("odd", "x").ok
                wait_for(lambda: len(cache) >= want + 1)  # noqa: B023
                assert len(cache) == want + 1

    def test_what_a_result_depends_on(self):
        class Keyed(Odd):
            def key(self, name, arguments, example):
                return example["id"]

        tool = Keyed()
        with Toolbox([tool], cache=ToolCache(mode="both")) as box:
            box.run("odd", "a", {"id": "1"})
            assert (
                box.run("odd", "b", {"id": "1"}).text == "did a"
                and box.run("odd", "b", {"id": "2"}).text == "did b"
            )
            assert box.run("odd", "c").error.startswith("KeyError")

    def test_a_cut_off_line(self, tmp_path):
        path = tmp_path / "c"
        cache = ToolCache(path, "record")
        cache.put("odd", "a", "a", "ok", "first")
        whole = path.read_text()
        path.write_text(whole + whole[: len(whole) // 2])
        again = ToolCache(path, "both")
        assert again.get("odd", "a") == ("ok", "first") and len(again) == 1
        again.put("odd", "b", "b", "ok", "é\n<start_work>" + "x" * 200_000)
        path.write_bytes(path.read_bytes() + b'{"tool": ' + b"y" * 200_000)
        again.put("odd", "c", "c", "ok", "third")
        assert len(path.read_text().splitlines()) == 3
        last = ToolCache(path, "replay")
        assert [last.get("odd", k)[1][:5] for k in "abc"] == ["first", "é\n<st", "third"]

    def test_several_append_to_one_file(self, tmp_path):
        """As processes do: nothing is shared but the file."""

        def write(which):
            cache = ToolCache(tmp_path / "c", "record")
            for i in range(100):
                cache.put("odd", f"{which} {i}", "", "ok", "x" * 3000)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ToolCache(tmp_path / "c", "replay")) == 400

    def test_memory_is_bounded(self):
        cache = ToolCache(mode="both", entries=3)
        for i in range(10):
            cache.put("odd", str(i), "", "ok", str(i))
        assert (
            len(cache) == 3
            and cache.get("odd", "6") is None
            and cache.get("odd", "9") == ("ok", "9")
        )

    def test_a_full_disk_loses_no_answer(self, tmp_path):
        (tmp_path / "c").mkdir()
        cache = ToolCache(tmp_path / "c" / "x", "record")
        cache.path = tmp_path / "c"  # cannot be written
        with Toolbox([Odd()], cache=cache) as box:
            seen = box.run("odd", "a")
        assert seen.ok and seen.error.startswith("not recorded: IsADirectoryError")

    def test_bad_input(self, tmp_path):
        with pytest.raises(
            ValueError, match="mode must be one of off, record, replay, both, got 'on'"
        ):
            ToolCache(mode="on")
        with pytest.raises(FileNotFoundError):
            ToolCache(tmp_path / "none", "replay")
        for line in (
            "{",
            "[]",
            '{"tool": "a"}',
            '{"tool": "a", "key": "b", "status": "failed", "text": ""}',
        ):
            (tmp_path / "bad").write_text("\n" + line + "\n")
            with pytest.raises(ValueError, match="bad, line 2: no result of a tool"):
                ToolCache(tmp_path / "bad", "replay")
        with pytest.raises(ValueError, match="entries must be >= 1"):
            ToolCache(entries=0)


class TestConstruction:
    def test_names(self):
        box = Toolbox([Odd(), Calendar()])
        assert box.names == {
            "odd",
            "Calendar.week_day",
            "Calendar.target_day",
            "Calendar.day_difference",
        }
        box.check(["odd", "Calendar.week_day"])
        with pytest.raises(
            KeyError, match=r"no tools 'x', 'y'; there are Calendar.day_difference, .*odd"
        ):
            box.check(["odd", "x", "y"])

    @pytest.mark.parametrize(
        "settings, error, text",
        [
            ({"workers": 0}, ValueError, "workers must be >= 1, got 0 of Calendar.week_day"),
            ({"workers": {"x": 1}}, KeyError, "workers: no tool 'x'; there are Calendar"),
            (
                {"workers": {"Calendar.week_day": 1, "Calendar.target_day": 2}},
                ValueError,
                "a value under another name",
            ),
            ({"rates": {"x": Rate(1)}}, KeyError, "rates: no tool 'x'"),
            (
                {"rates": {"Calendar.target_day": 3}},
                TypeError,
                "rates must hold a Rate of Calendar.week_day, got 3",
            ),
            ({"max_chars": 3}, ValueError, "max_chars must be >= 16, got 3"),
            ({"spare": -1}, ValueError, "spare must be >= 0, got -1"),
            ({"queue": 0}, ValueError, "queue must be >= 1, got 0"),
        ],
    )
    def test_bad_settings(self, settings, error, text):
        with pytest.raises(error, match=text):
            Toolbox([Calendar()], **settings)

    def test_bad_tools(self):
        with pytest.raises(ValueError, match="two tools have the name odd"):
            Toolbox([Odd(), Odd()])
        with pytest.raises(TypeError, match="tools must hold tools, got str"):
            Toolbox(["odd"])
        with pytest.raises(ValueError, match="names must be a tuple of action names, got"):
            Toolbox([Odd(names="odd")])
        with pytest.raises(ValueError, match="timeout must be a positive number, got 0"):
            Toolbox([Odd(timeout=0)])
