# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs.yml: pages link as they must on GitHub, and the site has what lies outside docs/.

A relative link that leaves docs/ (README.md, CONTRIBUTING.md, an example, a picture of bench/results)
becomes one into ``repository/``, a mirror of the linked files. Markdown among them become pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
MIRROR = "repository"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\brel=\"?stylesheet\b[^>]*//"
)


def _origin(uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    return uri.removeprefix(f"{MIRROR}/") if uri.startswith(f"{MIRROR}/") else f"docs/{uri}"


def _place(path: str) -> str:
    """Where on the site a file of the repository is."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{MIRROR}/{path}"


def _targets(text: str, origin: str) -> list[str]:
    """Files of the repository outside of docs/ that a page links to."""
    prose = _CODE.sub("", text)
    found = (posixpath.normpath(posixpath.join(posixpath.dirname(origin), link)) for link, _ in _LINK.findall(prose)
             if "://" not in link)  # fmt: skip
    return [
        path for path in found if not path.startswith(("docs/", "..")) and (ROOT / path).is_file()
    ]


def on_files(files: Any, config: Any) -> Any:
    """Adds the mirrored files."""
    wanted, seen = list(PAGES), set()
    for file in files.documentation_pages():
        wanted += _targets(file.content_string, _origin(file.src_uri))
    while wanted:
        path = wanted.pop()
        if path not in seen:
            seen.add(path)
            files.append(File.generated(config, f"{MIRROR}/{path}", abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                wanted += _targets((ROOT / path).read_text(encoding="utf-8"), path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the site's places, outside of code."""
    uri = page.file.src_uri
    origin = _origin(uri)

    def moved(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
        inside = origin.startswith("docs/") and path.startswith("docs/")
        if "://" in link or inside:
            return link + anchor
        return posixpath.relpath(_place(path), posixpath.dirname(uri) or ".") + anchor

    parts = _CODE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(moved, part) for i, part in enumerate(parts))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuses a page that would load something from elsewhere."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another place: {found[0]}")
    return output
