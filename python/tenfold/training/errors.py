# SPDX-License-Identifier: Apache-2.0
"""The errors that a user can do something about; without torch, so that the command line loads fast."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what can be done."""
