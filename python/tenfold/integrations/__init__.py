"""Adapters to host frameworks: lazy imports, version-gated, nothing patched globally."""
