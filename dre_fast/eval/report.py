"""One self-contained HTML page about a run: numbers, figures, tables, configuration."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dre_fast.data.files import write_text_atomic

_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}

_LONG = 60  # letters of a cell that is broken into lines

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1f2733; --muted: #5f6875;
  --line: #e1e5ea; --accent: #0a6cb5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181e; --card: #1d232b; --ink: #e7ebf0; --muted: #9aa5b3; --line: #313944;
    --accent: #6db7f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1.4rem 0 0; font-size: .92rem; }
a { color: var(--accent); }
.text { max-width: 50rem; overflow-wrap: anywhere; }
.lead { color: var(--muted); max-width: 46rem; margin: 0 0 1.6rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 0; }
.numbers div, figure, .scroll, pre { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.numbers div { padding: .7rem .9rem; }
.numbers dt { color: var(--muted); font-size: .8rem; overflow-wrap: anywhere; }
.numbers dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.numbers dd.text { font-size: .95rem; font-weight: 500; }
figure { margin: 0 0 1.2rem; overflow: hidden; }
figure div { overflow-x: auto; }
figure img { display: block; max-width: 100%; min-width: 40rem; height: auto; margin: 0 auto; }
figure div { background: #ffffff; }
figcaption { padding: .6rem .9rem; color: var(--muted); font-size: .88rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; margin: 0 0 1.2rem; }
table { border-collapse: collapse; min-width: 20rem; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 20rem; }
pre { padding: 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
summary { cursor: pointer; color: var(--accent); }
"""


@dataclass(frozen=True)
class Figure:
    """An image file (.png, .jpg, .svg) and what it shows."""

    path: str | os.PathLike[str]
    caption: str


@dataclass(frozen=True)
class Table:
    """A table; empty columns are left out, and columns of numbers are set to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """A part of a page under a headline of its own: figures, tables and paragraphs, in this order."""

    title: str
    parts: Sequence[Figure | Table | str]


def build_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str = "",
    summary: Mapping[str, Any] | None = None,
    figures: Sequence[Figure] = (),
    tables: Sequence[Table] = (),
    sections: Sequence[Section] = (),
    config: str | None = None,
) -> Path:
    """Writes one HTML file that holds everything it shows: it can be mailed, and opens without a network.

    Args:
        path: file to write.
        title, lead: headline, and what the page is about in a sentence or two.
        summary: name -> value, shown as a row of cards; floats with three digits, None as "undefined".
        figures: embedded in this order.
        tables: shown after the figures.
        sections: shown after the tables, with links to them at the top.
        config: text shown folded at the end, such as the YAML of the run.

    Returns:
        The path.

    Raises:
        ValueError: a figure of another format, or a table row of another length than its header.
        FileNotFoundError: a figure that does not exist.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if lead:
        parts.append(f'<p class="lead">{html.escape(lead)}</p>')
    if summary:
        parts.append('<dl class="numbers">' + "".join(_card(k, v) for k, v in summary.items()) + "</dl>")
    if sections:
        links = [f'<a href="#s{i}">{html.escape(each.title)}</a>' for i, each in enumerate(sections)]
        parts.append("<nav>" + " ".join(links) + "</nav>")
    if figures:
        parts.append("<h2>Figures</h2>")
        parts += [_figure(figure) for figure in figures]
    for table in tables:
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts.append(_table(table))
    for i, section in enumerate(sections):
        parts.append(f'<h2 id="s{i}">{html.escape(section.title)}</h2>')
        parts += [_part(part) for part in section.parts]
    if config is not None:
        parts.append(
            "<h2>Configuration</h2><details><summary>show</summary>"
            f"<pre>{html.escape(config)}</pre></details>"
        )
    write_text_atomic(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n",
    )
    return Path(path)


def _part(part: Figure | Table | str) -> str:
    if isinstance(part, Figure):
        return _figure(part)
    if isinstance(part, Table):
        return f"<h3>{html.escape(part.title)}</h3>{_table(part)}"
    return f'<p class="text">{html.escape(part)}</p>'


def _card(name: str, value: object) -> str:
    shown = _show(value)
    kind = "" if isinstance(value, (int, float)) or value is None else ' class="text"'
    label = name.replace("_", " ").replace(" auc", " AUC")
    return f"<div><dt>{html.escape(label)}</dt><dd{kind}>{html.escape(shown)}</dd></div>"


def _show(value: object) -> str:
    if value is None:
        return "undefined"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    return str(value)


def _figure(figure: Figure) -> str:
    file = Path(figure.path)
    media = _MEDIA.get(file.suffix.lower())
    if media is None:
        raise ValueError(f"{file}: figures must be one of {', '.join(_MEDIA)}, not {file.suffix!r}")
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    caption = html.escape(figure.caption)
    return (
        f'<figure><div><img src="data:{media};base64,{data}" alt="{caption}" loading="lazy"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    for number, row in enumerate(table.rows, 1):
        if len(row) != len(table.header):
            raise ValueError(
                f"table {table.title!r}, row {number}: {len(row)} cells under a header of {len(table.header)}"
            )
    kept = [i for i in range(len(table.header)) if any(_cell(row[i]) for row in table.rows) or not table.rows]
    right = {i for i in kept if all(_is_number(row[i]) or not _cell(row[i]) for row in table.rows)}
    head = "".join(f"<th{_kind(i in right)}>{html.escape(str(table.header[i]))}</th>" for i in kept)
    body = "".join("<tr>" + "".join(_data(row[i], i in right) for i in kept) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _data(value: object, right: bool) -> str:
    return f"<td{_kind(right, len(_cell(value)) > _LONG)}>{html.escape(_cell(value))}</td>"


def _kind(right: bool, long: bool = False) -> str:
    return ' class="number"' if right else ' class="long"' if long else ""


def _cell(value: object) -> str:
    return "" if value is None else _show(value)


def _is_number(value: object) -> bool:
    if isinstance(value, (int, float)):
        return True
    try:
        float(str(value))
    except ValueError:
        return False
    return True
