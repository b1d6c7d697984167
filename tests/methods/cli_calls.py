# SPDX-License-Identifier: Apache-2.0
"""The command line of a method, called in this process: what the tests of the four of them share."""

import re

from typer.testing import CliRunner

from tenfold.cli.main import app


def tenfold_(*arguments):
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(found.exception, SystemExit | None), found.exception
    return found.exit_code, found.stdout, found.stderr


def succeeds(*arguments):
    status, out, err = tenfold_(*arguments)
    assert status == 0, err
    return out


def fails(*arguments):
    status, out, err = tenfold_(*arguments)
    assert status == 2 and out == "" and re.fullmatch(r"tenfold: [^\n]+\n", err), err
    return err
