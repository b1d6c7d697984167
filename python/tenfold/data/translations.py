"""Short texts in English and another language, from the catalogues inside the wheel ``django``."""

from __future__ import annotations

import gettext
import importlib.util
from pathlib import Path

from tenfold.data.models import MissingData

CATALOGUES = "django==5.2.19"


def _root() -> Path:
    spec = importlib.util.find_spec("django")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder)
    raise MissingData(
        f"translations come from the wheel {CATALOGUES}, which is not installed. Run "
        f"`pip install --no-deps {CATALOGUES}`"
    )


def languages() -> list[str]:
    """Codes of the languages that have catalogues (``de``, ``fr``, ...)."""
    return sorted(
        {p.parent.parent.name for p in _root().glob("**/locale/*/LC_MESSAGES/*.mo")} - {"en"}
    )


def translations(language: str, min_chars: int = 8) -> list[tuple[str, str]]:
    """(English, translation) pairs, sorted by the English text.

    Raises MissingData without the wheel, ValueError for a language without catalogues.
    """
    found = {}
    for path in sorted(_root().glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for source, target in catalogue.items():
            if isinstance(source, str) and len(source) >= min_chars and target and source != target:
                found[source] = target
    if not found:
        raise ValueError(f"no catalogues for {language!r}; there are: {', '.join(languages())}")
    return sorted(found.items())
