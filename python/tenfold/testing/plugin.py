# SPDX-License-Identifier: Apache-2.0
"""The pytest part: a device fixture, and a policy under which no skip goes unnoticed.

``pytest_plugins = ["tenfold.testing.plugin"]`` in the top conftest. Skips must match a line of the file
named by the ini option ``allowed_skips`` (``test id pattern : reason pattern``), else the run fails.
Without a CUDA device the tests of ``device`` on it are left out, and the summary says how many.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares the ini option."""
    parser.addini("allowed_skips", "file of allowed skips", default="tests/allowed_skips.txt")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks and the policy."""
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.pluginmanager.register(_SkipPolicy(config), "tenfold-skip-policy")


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda])],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """``cpu``, and ``cuda`` where there is one."""
    return torch.device(request.param)


# For a test that only makes sense on CUDA; it takes ``device`` like all others.
cuda_only = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=[pytest.mark.cuda])], indirect=True
)


def _on_cuda(item: pytest.Item) -> bool:
    """Whether this is a test of ``device`` on CUDA; the mark alone may be on a test without it."""
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("device") == "cuda"


class _SkipPolicy:
    def __init__(self, config: pytest.Config) -> None:
        path = Path(config.rootpath) / config.getini("allowed_skips")
        lines = path.read_text().splitlines() if path.is_file() else []
        rules = [line.split(" : ", 1) for line in lines if line.strip() and line[0] != "#"]
        self.rules = [(a.strip(), b.strip()) for a, b in rules]
        self.refused: list[str] = []
        self.without_device = 0
        # In a process of pytest-xdist: how it tells the first one, which never collects.
        self.told: dict[str, object] | None = getattr(config, "workeroutput", None)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leaves out what needs a CUDA device where there is none: thousands, not worth a skip each.

        Last, so that only what ``-m`` and ``-k`` have chosen is counted. Where tests are only collected (as to see
        what a machine with a GPU would run), all stay.
        """
        if torch.cuda.is_available() or config.option.collectonly:
            return
        needs = [item for item in items if _on_cuda(item)]
        if needs:
            self.without_device = len(needs)
            config.hook.pytest_deselected(items=needs)
            items[:] = [item for item in items if not _on_cuda(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes every skip of a test without a rule."""
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes every skip of a whole module without a rule: its tests are never run or reported."""
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        for test, why in self.rules:
            if fnmatch.fnmatchcase(report.nodeid, test) and fnmatch.fnmatchcase(reason, why):
                return
        self.refused.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        """Takes over what a process of pytest-xdist refused; several refuse the same modules.

        All of them collect everything, hence the largest count, not the sum.
        """
        told = getattr(node, "workeroutput", {})
        lines = told.get("skips_refused", [])
        self.refused += [line for line in lines if line not in self.refused]
        self.without_device = max(self.without_device, told.get("without_device", 0))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fails the run if a skip was not allowed."""
        if self.told is not None:
            self.told["skips_refused"] = self.refused
            self.told["without_device"] = self.without_device
        elif self.refused and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Says which skips were not allowed, and how many tests need a device that is not there."""
        if self.without_device:
            terminalreporter.write_line(
                f"no CUDA device; tests that need one, not run: {self.without_device}",
                yellow=True,
            )
        for line in self.refused:
            terminalreporter.write_line(f"SKIP NOT ALLOWED {line}", red=True)
