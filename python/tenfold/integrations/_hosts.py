# SPDX-License-Identifier: Apache-2.0
"""What the adapters of host frameworks share: the gate on their versions, and replacements that can be undone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any, Self

_PATCHED = "_tenfold_patched_"  # begin of the attribute that holds a model's handle


def check_version(host: str, tested: tuple[str, ...], allow_untested: bool = False) -> str:
    """The installed version of ``host``.

    Raises:
        ModuleNotFoundError: not installed. ImportError: a version that the adapter was not tested with.
    """
    said = f"tenfold.integrations.{host} is tested with {host} {', '.join(tested)}"
    install = f"`pip install {host}=={tested[-1]}`"
    try:
        found = importlib.metadata.version(host)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{said}, which is not installed. Install it with {install}.", name=host
        ) from None
    if found not in tested and not allow_untested:
        raise ImportError(
            f"{said}; found {found}, whose estimator may differ. Install a tested one with {install}, or "
            "compare the results yourself and pass allow_untested=True.",
            name=host,
        )
    return found


def check_signature(host: str, function: Callable, expected: tuple[str, ...]) -> None:
    """ImportError unless ``function`` takes the arguments that its replacement takes."""
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise ImportError(
            f"{host}'s {function.__qualname__} takes ({', '.join(found)}); this adapter replaces one "
            f"that takes ({', '.join(expected)})",
            name=host,
        )


def after_import(module: str, act: Callable[[], object]) -> None:
    """Calls ``act`` once, as soon as ``module`` has been imported; an error in it is one of that import."""
    if module in sys.modules:
        act()
        return

    class Finder(MetaPathFinder):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name != module:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            if spec is None or spec.loader is None:
                return spec
            execute = spec.loader.exec_module

            def exec_module(made: Any) -> None:
                execute(made)
                act()

            spec.loader.exec_module = exec_module  # type: ignore[assignment,method-assign]
            return spec

    sys.meta_path.insert(0, Finder())


class Replacement:
    """A function put in the place of a host's own; ``remove()``, or leaving ``with``, puts that one back.

    Attributes:
        original: what was there.
    """

    def __init__(self, function: Callable, original: Callable, places: list[tuple[Any, str]]):
        """``places``: (module, class or dictionary, name), all holding ``original``."""
        if getattr(original, "_tenfold_macro", False):
            raise RuntimeError("macro actions are installed already; remove() those first")
        for owner, name in places:
            if _get(owner, name) is not original:
                raise RuntimeError(f"{name} has been replaced by other code; undo that first")
        function._tenfold_macro = True  # type: ignore[attr-defined]
        self.original, self._function, self._places = original, function, places
        for owner, name in places:
            _put(owner, name, function)

    def remove(self) -> None:
        """Puts the original back; a second call does nothing.

        Raises:
            RuntimeError: somebody else has replaced the function since; nothing is changed.
        """
        for owner, name in self._places:
            if _get(owner, name) is not self._function:
                raise RuntimeError(f"{name} was replaced again since; undo that first")
        for owner, name in self._places:
            _put(owner, name, self.original)
        self._places = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class Patched:
    """What ``patch`` has done to one model, which knows this handle; ``remove()``, or leaving ``with``, undoes it."""

    def __init__(self, model: Any, part: str, undo: Callable[[], object]):
        """``part``: ``"attention"``, ``"experts"``; a model can have a handle of each."""
        self._model, self._part, self._undo = model, part, undo
        model.__dict__[_PATCHED + part] = self

    def remove(self) -> None:
        """Puts back what was there; a second call does nothing."""
        if self._model.__dict__.get(_PATCHED + self._part) is self:
            self._undo()
            del self._model.__dict__[_PATCHED + self._part]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def is_patched(model: Any, part: str) -> bool:
    """Whether a handle of ``part`` is in force."""
    return _PATCHED + part in getattr(model, "__dict__", {})


def refuse_patched(model: Any, part: str) -> None:
    """RuntimeError if ``part`` of the model is patched."""
    if is_patched(model, part):
        raise RuntimeError(
            f"{part} of this {type(model).__name__} is patched already; unpatch(model) first"
        )


def undo_patch(model: Any, part: str) -> None:
    """Undoes what :class:`Patched` stands for; RuntimeError if it is not patched."""
    handle = getattr(model, "__dict__", {}).get(_PATCHED + part)
    if handle is None:
        raise RuntimeError(f"{part} of this {type(model).__name__} is not patched")
    handle.remove()


def _get(owner: Any, name: str) -> Any:
    return owner[name] if isinstance(owner, dict) else inspect.getattr_static(owner, name)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)
