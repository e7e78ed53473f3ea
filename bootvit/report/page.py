"""A page made of blocks, as Markdown and as one self-contained HTML file whose tables can be sorted."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; one that says what matters most `stands_out`."""

    text: str
    stands_out: bool = False


class Sized(NamedTuple):
    """A cell whose order is not that of the number it begins with, such as a duration."""

    text: str
    order: float


Cell = str | Sized


@dataclass(frozen=True)
class Grid:
    """A table: columns of numbers are aligned right, texts wrap. `foot` is a last row that is not sorted."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page."""

    path: Path
    caption: str


class Thumbnail(NamedTuple):
    """A small picture beside the page, with a few words."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Thumbnails in a row that wraps."""

    title: str
    pictures: Sequence[Thumbnail]


Block = Heading | Text | Grid | Picture | Gallery
MISSING = "–"
NUMBER = re.compile(rf"[-+]?\d[\d.,]*(%| s| min| h)?( ± [\d.]+)?( \(n=\d+\))?( \[[\d.]+\])?|{MISSING}")

STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 70rem; }
body { margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin-bottom: .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; overflow-wrap: anywhere; }
p.main { font-size: 1.05rem; padding: .7rem 1rem; background: #eef4fb; border-left: 4px solid #0072b2; }
p.main { max-width: none; }
.box { overflow-x: auto; max-width: 100%; background: linear-gradient(90deg, #fff 30%, #fff0) 0 0 / 2rem 100% local,
  linear-gradient(270deg, #fff 30%, #fff0) 100% 0 / 2rem 100% local,
  linear-gradient(90deg, #1c243026, #1c243000) 0 0 / .8rem 100%,
  linear-gradient(270deg, #1c243026, #1c243000) 100% 0 / .8rem 100%; background-repeat: no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e3e7ee; vertical-align: baseline; }
th { border-bottom: 2px solid #9aa5b5; vertical-align: bottom; padding: 0; }
tfoot td { border-top: 2px solid #9aa5b5; font-weight: 600; }
th button { all: unset; cursor: pointer; padding: .3rem .7rem; font-weight: 600; display: block; }
th button:focus-visible { outline: 2px solid #0072b2; } th button:hover { color: #0072b2; }
th[aria-sort] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.text { text-align: left; max-width: 24rem; } td.text { overflow-wrap: break-word; min-width: 4.8rem; }
td.text:first-child { min-width: 7rem; }
.number { text-align: right; white-space: nowrap; } th.number { white-space: normal; min-width: 4.2rem; }
tbody tr:hover { background: #5b667514; }
figure { margin: 1rem 0; } figcaption { color: #5b6675; font-size: .9rem; max-width: 46rem; }
.box img { display: block; max-width: 100%; height: auto; }
.thumbs { display: flex; flex-wrap: wrap; gap: .8rem; } .thumbs figure { width: 7.2rem; margin: 0; }
.thumbs img { width: 6rem; height: 6rem; object-fit: contain; image-rendering: pixelated; background: #f0f2f5; }
.thumbs figcaption { font-size: .78rem; line-height: 1.3; overflow-wrap: anywhere; }
@media (max-width: 640px) { body { margin: 1rem auto; padding: 0 .8rem; } .box img { max-width: none; width: 640px; } }
@media print { .box { overflow: visible; } }
"""

SORT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = row => row.cells[column].dataset.order ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const missing = (a === "\\u2013") - (b === "\\u2013");
      if (missing) return missing;
      const x = parseFloat(a), y = parseFloat(b);
      return (up ? 1 : -1) * (isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(text(a), text(b)));
    table.tBodies[0].append(...rows);
  }));
}
"""


def write_page(title: str, blocks: Sequence[Block], out: Path) -> list[Path]:
    """Write report.md and report.html into `out`, and return both."""
    files = {"report.md": to_markdown(title, blocks, out), "report.html": to_html(title, blocks)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def text_of(cell: Cell) -> str:
    """What a cell shows."""
    return cell if isinstance(cell, str) else cell.text


def numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column is of numbers, each with its unit, spread and count, or missing."""
    return all(NUMBER.fullmatch(text_of(cell)) for cell in cells)


def _columns(grid: Grid) -> list[str]:
    """`number` or `text` for each column."""
    return ["number" if numeric(cells) else "text" for cells in zip(*grid.rows, strict=True)] or ["text"] * len(
        grid.header
    )


# ------------------------------------------------------------------------------------------------- Markdown


def to_markdown(title: str, blocks: Sequence[Block], folder: Path = Path()) -> str:
    """GitHub's Markdown; pictures are links to the files beside it, in `folder`."""
    return "\n\n".join([f"# {_md(title)}", *(_markdown(block, folder) for block in blocks)]) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"## {_md(text)}"
        case Text(text, stands_out):
            return f"**{_md(text)}**" if stands_out else _md(text)
        case Picture(path, caption):
            return f"![{_md(caption)}]({_link(path, folder)})\n\n{_md(caption)}"
        case Gallery(title, pictures):
            shown = [f"![]({_link(picture.path, folder)}) {_md(picture.caption)}" for picture in pictures]
            return "\n".join([f"**{_md(title)}**", "", *(f"- {line}" for line in shown)])
        case Grid(header, rows, foot):
            rule = ["---:" if kind == "number" else "---" for kind in _columns(block)]
            lines = [[_md(text_of(cell)) for cell in row] for row in (header, *rows, *([foot] if foot else []))]
            return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _link(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _md(text: str) -> str:
    """Escape what Markdown would read as markup; names of runs and reasons of failures may hold anything."""
    for sign in ("\\", "|", "*", "_", "<", "[", "]", "`"):
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------------- HTML


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One file with its style, its pictures and the few lines that sort its tables inside."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n<script>{SORT}</script></body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Text(text, stands_out):
            kind = ' class="main"' if stands_out else ""
            return f"<p{kind}>{escape(text)}</p>"
        case Picture(path, caption):
            image = f'<div class="box">{_embedded(path, caption)}</div>'
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case Gallery(title, pictures):
            shown = [
                f"<figure>{_embedded(each.path, each.caption)}<figcaption>{escape(each.caption)}</figcaption></figure>"
                for each in pictures
            ]
            return f'<p>{escape(title)}</p><div class="thumbs">{"".join(shown)}</div>'
        case Grid():
            return _table(block)


def _table(grid: Grid) -> str:
    kinds = _columns(grid)
    head = "".join(
        f'<th class="{kind}" scope="col"><button type="button">{escape(name)}</button></th>'
        for name, kind in zip(grid.header, kinds, strict=True)
    )
    body = "".join(_row(row, kinds) for row in grid.rows)
    foot = f"<tfoot>{_row(grid.foot, kinds)}</tfoot>" if grid.foot else ""
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div>'


def _row(row: Sequence[Cell], kinds: Sequence[str]) -> str:
    cells = [f"<td{_about(cell, kind)}>{escape(text_of(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)]
    return f"<tr>{''.join(cells)}</tr>"


def _about(cell: Cell, kind: str) -> str:
    order = "" if isinstance(cell, str) else f' data-order="{cell.order}"'
    return f' class="{kind}"{order}'


def _embedded(path: Path, caption: str) -> str:
    data = path.read_bytes()
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f'<img alt="{escape(caption)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
