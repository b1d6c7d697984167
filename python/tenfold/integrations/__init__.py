"""Adapters to host frameworks: lazy imports, version-gated, nothing patched globally."""


def register_attention() -> None:
    """Registers ``attn_implementation="tenfold"`` (alias ``"dha"``) with transformers.

    Raises ModuleNotFoundError if transformers is not installed.
    """
    from tenfold.integrations import attention

    attention.register()
