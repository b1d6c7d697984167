# SPDX-License-Identifier: Apache-2.0
"""One HTML file, readable on a phone and on a desk: everything inside, nothing fetched."""

from __future__ import annotations

import base64
import html
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --paper: #fff; --tint: #f4f6f8;
  --mark: 38, 110, 190; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.card { background: var(--tint); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; line-height: 1.3; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.num, th.num { text-align: right; white-space: nowrap; }
tr.best td { font-weight: 600; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; max-width: 46rem; }
pre, .tokens { background: var(--tint); border-radius: .5rem; padding: .8rem 1rem; margin: .75rem 0;
  font: .85rem/1.6 ui-monospace, "SFMono-Regular", Menlo, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens { max-height: 30rem; overflow-y: auto; }
.tokens span { border-radius: .15rem; }
.failed { background: #fff1f0; border: 1px solid #e5b3ae; border-radius: .5rem; padding: .6rem 1rem; }
nav a { margin-right: 1rem; }
"""


@dataclass(frozen=True)
class Card:
    """A headline number: its value, what it is, and optionally a remark."""

    value: str
    label: str
    note: str = ""


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _is_number(text: str) -> bool:
    return bool(text) and text.lstrip("+-−")[:1].isdigit()


class Page:
    """Collects the parts of a page; ``write`` puts them into one file."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._subtitle = subtitle
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []

    def section(self, title: str) -> None:
        """Starts a section; sections are linked at the top when there are several."""
        anchor = f"s{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{_escape(title)}</h2>')

    def add(self, other: Page) -> None:
        """Appends another page's sections and what is in them; its title is left behind."""
        for part in other._parts:
            for anchor, title in other._sections:
                if part.startswith(f'<h2 id="{anchor}">'):
                    self.section(title)
                    break
            else:
                self._parts.append(part)

    def heading(self, title: str) -> None:
        """A heading inside a section."""
        self._parts.append(f"<h3>{_escape(title)}</h3>")

    def text(self, text: str, soft: bool = False) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p{' class=soft' if soft else ''}>{_escape(text)}</p>")

    def failure(self, text: str) -> None:
        """A box that says what failed."""
        self._parts.append(f'<p class="failed">{_escape(text)}</p>')

    def cards(self, cards: Iterable[Card]) -> None:
        """Headline numbers side by side."""
        inner = "".join(
            f'<div class="card"><b>{_escape(c.value)}</b>{_escape(c.label)}'
            + (f"<br><span>{_escape(c.note)}</span>" if c.note else "")
            + "</div>"
            for c in cards
        )
        self._parts.append(f'<div class="cards">{inner}</div>')

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[Any]], best: Iterable[int] = ()
    ) -> None:
        """A table that scrolls sideways by itself; ``best``: numbers of rows printed bold."""
        cells = [[str(value) for value in row] for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns")
        number = [
            bool(cells) and all(_is_number(row[i]) or row[i] in ("", "–") for row in cells)
            for i in range(len(columns))
        ]
        bold = set(best)

        def line(tag: str, row: Sequence[str], kind: str = "") -> str:
            inner = "".join(
                f"<{tag}{' class=num' if number[i] else ''}>{_escape(text)}</{tag}>"
                for i, text in enumerate(row)
            )
            return f"<tr{kind}>{inner}</tr>"

        body = "".join(
            line("td", row, ' class="best"' if i in bold else "") for i, row in enumerate(cells)
        )
        self._parts.append(
            f'<div class="scroll"><table><thead>{line("th", columns)}</thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def image(self, png: bytes, caption: str, width: int | None = None) -> None:
        """A PNG with its caption, which also serves as its alternative text."""
        data = base64.b64encode(png).decode()
        size = f' style="width:{width}px"' if width else ""
        self._parts.append(
            f'<figure><img{size} alt="{_escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_escape(caption)}</figcaption></figure>"
        )

    def audio(self, data: bytes, caption: str, kind: str = "audio/wav") -> None:
        """A sound with controls to play it, and its caption."""
        encoded = base64.b64encode(data).decode()
        self._parts.append(
            f'<figure><audio controls preload="none" src="data:{kind};base64,{encoded}"></audio>'
            f"<figcaption>{_escape(caption)}</figcaption></figure>"
        )

    def preformatted(self, text: str) -> None:
        """Text as it is, wrapped where lines are too long."""
        self._parts.append(f"<pre>{_escape(text)}</pre>")

    def tokens(self, tokens: Iterable[tuple[str, float]]) -> None:
        """Text piece by piece, each shaded by its share in [0, 1] (0: not at all)."""
        spans = []
        for text, share in tokens:
            if share > 0:
                shade = f"background:rgba(var(--mark),{0.12 + 0.6 * min(share, 1.0):.2f})"
                spans.append(f'<span style="{shade}">{_escape(text)}</span>')
            else:
                spans.append(_escape(text))
        self._parts.append(f'<div class="tokens">{"".join(spans)}</div>')

    def render(self) -> str:
        """The whole page as HTML text."""
        links = "".join(f'<a href="#{a}">{_escape(t)}</a>' for a, t in self._sections)
        nav = f"<nav>{links}</nav>" if len(self._sections) > 1 else ""
        lead = f'<p class="soft">{_escape(self._subtitle)}</p>' if self._subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escape(self.title)}</title><style>{_STYLE}</style></head>\n<body><main>"
            f"<h1>{_escape(self.title)}</h1>{lead}{nav}\n" + "\n".join(self._parts) + "\n"
            "</main></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Writes the page, replacing an old one only when the new one is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Text that was cut inside a character can hold half of one, which UTF-8 cannot.
        data = self.render().encode("utf-8", errors="replace")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
        return path
