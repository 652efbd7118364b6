"""One self-contained HTML page: text, tables and pictures that need no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 78rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; border-top: 1px solid #ccc; padding-top: 1rem; margin-top: 2rem; }
figure { margin: 1.5rem 0; } figcaption, .note { color: #444; font-size: 0.9rem; max-width: 48rem; }
img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #888; vertical-align: bottom; overflow-wrap: normal; } td { white-space: nowrap; }
.problems { border-left: 4px solid #b3261e; background: #fdf3f2; padding: 0.6rem 0.6rem 0.6rem 2rem; }
summary { cursor: pointer; word-break: break-all; }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto; font-size: 0.85rem; }
@media (max-width: 30rem) { body { padding: 0.6rem; } th, td { padding: 0.2rem 0.4rem; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: nothing but what is in the page."""


def heading(text: str) -> str:
    """Returns the heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    """Returns a paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def problems(texts: Sequence[str]) -> str:
    """Returns a list that stands out; empty for none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="problems">{items}</ul>' if texts else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table that scrolls within itself where the window is narrow."""
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return _wide(f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>")


def image(png: bytes, caption: str, *, name: str, width: int) -> str:
    """Returns a PNG, inside the page itself, with its caption; in a narrower window than `width` pixels it scrolls."""
    data = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    picture = _wide(
        f'<img alt="{escape(name)}" style="min-width: {width}px; max-width: {width * 5 // 4}px" src="{data}">'
    )
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def details(title: str, text: str) -> str:
    """Returns text that is shown when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def whole(title: str, parts: Sequence[str]) -> str:
    """Returns the page."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _wide(content: str) -> str:
    return f'<div class="wide" tabindex="0">{content}</div>'
