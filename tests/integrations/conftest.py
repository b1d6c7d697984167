# SPDX-License-Identifier: Apache-2.0
"""The tiny models are shared with the methods' tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
