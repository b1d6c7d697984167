# SPDX-License-Identifier: Apache-2.0
"""The sandbox's inside: ``python -I -S jail SPEC STATUS RESULT`` (file descriptors), started by ``sandbox``."""

import sys

import jail_keeper

if __name__ == "__main__":
    jail_keeper.main(*(int(word) for word in sys.argv[1:4]))
