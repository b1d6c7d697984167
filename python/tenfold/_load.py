# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the native library ``_ops.so``; turns a failure into a sentence with a fix.

``TENFOLD_OPS_PATH`` names another ``_ops.so`` (a build folder's, or one carried to a GPU machine).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIN_TORCH = (2, 10)
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: IndexError, 3: TypeError}


class LoadError(ImportError):
    """``_ops.so`` is missing or cannot be loaded here; the message says why and what to do."""


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def ops_path() -> Path:
    """Path of the native library; raises :class:`LoadError` if there is none."""
    named = os.environ.get("TENFOLD_OPS_PATH")
    if named:
        if not Path(named).is_file():
            raise LoadError(
                f"TENFOLD_OPS_PATH={named} does not exist; unset it or name an _ops.so."
            )
        return Path(named).resolve()
    package = sys.modules["tenfold"]
    folders = [Path(p) for p in package.__path__]
    # An editable install keeps the binary beside the installed metadata, not beside the sources.
    folders += [Path(p) / "tenfold" for p in sys.path if p]
    for folder in folders:
        if (folder / "_ops.so").is_file():
            return folder / "_ops.so"
    raise LoadError(
        f"tenfold's native library _ops.so is not beside {folders[0]}: the package was not built. "
        "Install it with `pip install --no-build-isolation .` from the source folder "
        f"(torch >= 2.10 first; found torch {torch.__version__})."
    )


def _load(path: Path) -> ctypes.CDLL:
    if _torch_version() < MIN_TORCH:
        raise LoadError(
            f"tenfold needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found torch {torch.__version__}. "
            "Upgrade it with `pip install -U torch`."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise LoadError(
            f"tenfold could not load {path}: {error}. It was built for torch >= 2.10 on "
            f"{sys.platform}; found torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), "
            f"Python {sys.version.split()[0]}. Reinstall it with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`, or run `tenfold doctor`."
        ) from error
    return ctypes.CDLL(str(path))


class _Ctypes:
    """What ``tenfold._C`` offers, straight from ``_ops.so``: for Pythons without a built ``_C``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("version", "build_cuda", "build_torch", "build_compiler", "cpu_capability"):
            setattr(self, name, self._text(f"tenfold_{name}"))

    def _text(self, symbol: str) -> Callable[[], str]:
        function = getattr(self._library, symbol)
        function.restype = ctypes.c_char_p
        return lambda: function().decode()

    def cpu_capabilities(self) -> list[str]:
        at = self._library.tenfold_cpu_capability_at
        at.restype = ctypes.c_char_p
        names: list[str] = []
        while (name := at(len(names))) is not None:
            names.append(name.decode())
        return names

    def set_cpu_capability(self, name: str) -> bool:
        return self._library.tenfold_set_cpu_capability(name.encode()) == 0

    def last_error_kind(self) -> int:
        return self._library.tenfold_last_error_kind()


def _native(path: Path, library: ctypes.CDLL) -> Any:
    try:
        module = importlib.import_module("tenfold._C")
    except ImportError:
        return _Ctypes(library)
    module.attach(str(path))
    return module


class _Missing:
    """Stands for the native library that could not be loaded; any use raises why."""

    def __init__(self, why: LoadError) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise self._why


PATH = Path()
native: Any
error: LoadError | None = None
try:
    PATH = ops_path()
    native = _native(PATH, _load(PATH))
except LoadError as found:
    error, native = found, _Missing(found)


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls ``torch.ops.tenfold.*``, raising the Python type that the failed check names.

    Under ``torch.compile`` and ``torch.export`` the op is called as it is.
    """
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    native.last_error_kind()  # forgets an error of an earlier call that nobody asked about
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        kind = _ERRORS.get(native.last_error_kind())
        if kind is None:
            raise
        raise kind(str(error)) from None
