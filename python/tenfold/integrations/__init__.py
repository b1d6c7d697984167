# SPDX-License-Identifier: Apache-2.0
"""Adapters to host frameworks: lazy imports, version-gated, nothing patched globally."""


def register_attention() -> None:
    """Registers ``attn_implementation="tenfold"`` (alias ``"dha"``) with transformers.

    Raises ModuleNotFoundError if transformers is not installed.
    """
    from tenfold.integrations import attention

    attention.register()


def register_experts() -> None:
    """Registers ``experts_implementation="tenfold"`` with transformers.

    Raises ModuleNotFoundError if transformers is not installed, ImportError if it has another interface.
    """
    from tenfold.integrations import experts

    experts.register()
