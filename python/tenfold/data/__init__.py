# SPDX-License-Identifier: Apache-2.0
"""Real input that needs no network: a pretrained model and long documents.

``python -m tenfold.data prepare`` does the one-time set-up; ``make demo`` and ``make test``
call it. Importing this package, and its functions after the set-up, never download anything.
"""

from __future__ import annotations

from tenfold.data.cache import cache_dir
from tenfold.data.documents import KINDS, PORTABLE_KINDS, Document, long_documents
from tenfold.data.models import DEFAULT_MODEL, MissingData, load_model, smollm2

__all__ = [
    "DEFAULT_MODEL",
    "KINDS",
    "PORTABLE_KINDS",
    "Document",
    "MissingData",
    "cache_dir",
    "load_model",
    "long_documents",
    "smollm2",
]
