"""What the site needs beside Markdown: raw files that pages link to, formulas as MathML, docstring roles as code.

Pages are written to read on GitHub too. There a link may leave ``docs/``, to a raw result or a source file; the site
takes such a file along under ``files/``. Formulas become MathML when the site is built, so no script is fetched to show
them.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:class|meth|func|attr|mod):<code>~?([^<]+)</code>")


def outside(page: str, link: str) -> Path | None:
    """The file or folder of the repository that a link of a page means, when it lies outside docs; else None.

    Raises:
        FileNotFoundError: there is no such file.
    """
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if target.startswith("docs/"):
        return None
    if target.startswith("..") or not (ROOT / target).exists():
        raise FileNotFoundError(f"docs/{page}: the link {link} leads to no file of the repository")
    return Path(target)


def shown_as(target: Path) -> str:
    """Where the site has a file of the repository: as it is, Markdown as plain text."""
    return f"files/{target}" + (".txt" if target.suffix == ".md" else "")


def on_files(files: Any, config: Any) -> Any:
    """Take along the files outside docs that pages link to."""
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        for _, link in LINK.findall(page.content_string):
            target = outside(page.src_uri, link)
            if target is not None and (ROOT / target).is_file():
                shown = shown_as(target)
                if files.get_file_from_path(shown) is None:
                    files.append(File.generated(config, shown, content=(ROOT / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs, to where the site has their files; those to folders become their names."""
    uri = page.file.src_uri

    def local(found: re.Match[str]) -> str:
        target = outside(uri, found[2])
        if target is None:
            return found[0]
        if (ROOT / target).is_dir():
            return f"{found[1]} (`{target}`)"
        return f"[{found[1]}]({posixpath.relpath(shown_as(target), posixpath.dirname(uri) or '.')})"

    return LINK.sub(local, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, roles of docstrings as plain code."""
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return convert(html.unescape(found[3]).strip(), display=display)

    return ROLE.sub(r"<code>\1</code>", FORMULA.sub(formula, content))
