"""A page made of blocks, as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table: the first column is text, the others are aligned right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page."""

    path: Path
    caption: str


Block = Heading | Text | Grid | Picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 62rem; }
body { margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin-bottom: .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #e3e7ee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #9aa5b5; font-weight: 600; }
tbody tr:hover { background: #f5f7fa; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #5b6675; font-size: .9rem; }
"""


def write_page(title: str, blocks: Sequence[Block], out: Path) -> list[Path]:
    """Write report.md and report.html into `out`, and return both."""
    files = {"report.md": to_markdown(title, blocks), "report.html": to_html(title, blocks)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """GitHub's Markdown; pictures are links to the files beside it."""
    return "\n\n".join([f"# {_md(title)}", *(_markdown(block) for block in blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_md(text)}"
        case Text(text):
            return _md(text)
        case Picture(path, caption):
            return f"![{_md(caption)}]({path.name})\n\n{_md(caption)}"
        case Grid(header, rows):
            rule = ["---", *["---:"] * (len(header) - 1)]
            lines = [[_md(cell) for cell in row] for row in (header, *rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _md(text: str) -> str:
    """Escape what Markdown would read as markup; names of runs and reasons of failures may hold anything."""
    for sign in ("\\", "|", "*", "_", "<", "[", "]", "`"):
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One file with its style and its pictures inside."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case Grid(header, rows):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
