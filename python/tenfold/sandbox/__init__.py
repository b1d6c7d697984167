# SPDX-License-Identifier: Apache-2.0
"""Untrusted Python programs in processes of their own: limits, no network, no files, no way to this process.

:class:`Sandbox` runs one program (``host``; ``jail`` is what runs inside), :func:`run_program` runs one on tests.
"""

from tenfold.sandbox.host import MECHANISMS, PURPOSES, Limits, Run, Sandbox, SandboxError
from tenfold.sandbox.programs import (
    AssertTest,
    CallTest,
    ProgramResult,
    StdioTest,
    extract_code,
    parse_tests,
    run_program,
)

__all__ = [
    "MECHANISMS",
    "PURPOSES",
    "AssertTest",
    "CallTest",
    "Limits",
    "ProgramResult",
    "Run",
    "Sandbox",
    "SandboxError",
    "StdioTest",
    "extract_code",
    "parse_tests",
    "run_program",
]
