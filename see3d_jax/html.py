"""Self-contained HTML pages: no script or style from elsewhere, dark and light, phone to desktop.

All text arguments are escaped here; arguments named `*_html` are taken as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape

import numpy as np

from see3d_jax.files import write_text
from see3d_jax.media import data_uri

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:75rem}
h1{line-height:1.2}img,video{max-width:100%;height:auto;border-radius:4px}
figure{margin:1rem 0}figcaption{font-size:.9rem;opacity:.8}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}
td,th{border:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}
th{background:var(--soft)}code,pre{background:var(--soft);border-radius:4px;padding:.1rem .3rem}
pre{overflow-x:auto;padding:.6rem}details{margin:.4rem 0}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr))}
"""


def page(title: str, *body_html: str) -> str:
    """One whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>" + "\n".join(body_html) + "</body></html>\n"
    )


def write_page(path: str | os.PathLike[str], title: str, *body_html: str) -> None:
    """Writes one page atomically."""
    write_text(path, page(title, *body_html))


def section(heading: str, *body_html: str) -> str:
    """A heading and what stands below it."""
    return f"<section><h2>{escape(heading)}</h2>" + "\n".join(body_html) + "</section>"


def paragraph(text: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    """Lines to copy, in a box."""
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, body_html: str) -> str:
    """Something that is hidden until asked for."""
    return f"<details><summary>{escape(summary)}</summary>{body_html}</details>"


def scrolling(picture_html: str) -> str:
    """A picture with small print: on a narrow screen it keeps its size and scrolls sideways."""
    return (
        f'<div class="scroll" tabindex="0"><div style="min-width:52rem">{picture_html}</div></div>'
    )


def image(picture: np.ndarray | str | os.PathLike[str], caption: str) -> str:
    """An embedded picture; the caption is its alternative text too."""
    return (
        f'<figure><img src="{data_uri(picture)}" alt="{escape(caption, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def video(path: str | os.PathLike[str], caption: str) -> str:
    """An embedded mp4."""
    return (
        f'<figure><video src="{data_uri(path)}" controls loop muted playsinline '
        f'aria-label="{escape(caption, quote=True)}"></video>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of plain values, scrolling sideways on narrow screens."""
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
