# SPDX-License-Identifier: Apache-2.0
"""``python -m bench [FAMILY ...]``: as ``tenfold bench``, from a checkout."""

from __future__ import annotations

import argparse
import sys

from . import run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--quick", action="store_true", help="few samples, no torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--select", default="", help="only cases whose name contains this")
    parser.add_argument("--out", default="tenfold-report/bench")
    parser.add_argument("--json", action="store_true")
    try:
        return run(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
