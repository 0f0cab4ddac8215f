"""A hook of the documentation's generator: LaTeX between dollars becomes MathML.

Browsers draw MathML by themselves, so the site needs no script; the repository's web page draws the
same dollars. Code blocks and code spans are left alone.
"""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"(^```.*?^```[^\n]*$|^~~~.*?^~~~[^\n]*$|`+[^`\n]+`+)", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^\$\$\s*(.+?)\s*\$\$$", re.DOTALL | re.MULTILINE)
_WIDE = ' style="overflow-x:auto;margin:1em 0"'  # narrow screens scroll the formula, not the page
_INLINE = re.compile(r"(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?![\w$])")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page, before it is rendered."""
    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _to_mathml(part) for index, part in enumerate(parts))


def _to_mathml(text: str) -> str:
    from latex2mathml.converter import convert

    text = _BLOCK.sub(
        lambda found: f"<div{_WIDE}>{convert(found[1].strip(), display='block')}</div>", text
    )
    # In a span, because Markdown takes a line that begins with <math> for a block.
    return _INLINE.sub(lambda found: f"<span>{convert(found[1])}</span>", text)
