"""The site of the documentation: every page in its menu, no dead link, and a strict build where mkdocs is installed.

Pages that are written by a command, and messages they quote, are held to their source.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import performance_page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def menu(entries: object) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in menu(part)]  # type: ignore[union-attr]


def test_every_page_is_in_the_menu() -> None:
    said = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(menu(said["nav"])) == PAGES, "add the page to nav in mkdocs.yml"
    assert said["theme"]["font"] is False
    assert "extra_javascript" not in said  # the site needs nothing from the network


@pytest.mark.parametrize("page", [f"docs/{page}" for page in PAGES] + ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        if not link.startswith(("http:", "https:", "#")):
            assert ((ROOT / page).parent / link.partition("#")[0]).exists(), f"{page}: {link}"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings_handlers") is None,
    reason="needs mkdocs: pip install 'dre_fast[docs]'",
)
def test_strict_build(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    method = (tmp_path / "site" / "method" / "index.html").read_text(encoding="utf-8")
    assert "<math" in method
    assert "arithmatex" not in method
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "residual_encode" in api
    assert ":meth:" not in api
    assert "<p>====" not in api
    raw = tmp_path / "site" / "files" / "benchmarks" / "results" / "cpu-2-cores" / "bank.json"
    assert raw.read_bytes() == (ROOT / "benchmarks" / "results" / "cpu-2-cores" / "bank.json").read_bytes()


def test_performance_page_is_up_to_date() -> None:
    committed = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert committed == performance_page.page(), (
        "python -m benchmarks.performance_page --write docs/performance.md"
    )
    links = [link for link in LINK.findall(committed) if link.endswith(".json")]
    assert links
    assert all((DOCS / link).is_file() for link in links)  # never a figure without its raw file


def benchmark(implementation: str, seconds: float, **info: object) -> dict[str, object]:
    return {
        "group": "a|b",
        "stats": {"median": seconds},
        "extra_info": {"implementation": implementation, **info},
    }


def test_performance_page_shows_the_quickest_peer_and_where_we_are_slower(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "a-machine"
    folder.mkdir(parents=True)
    result = {
        "benchmarks": [
            benchmark("dre_fast", 0.004, ours=True),
            benchmark("slow", 0.009),
            benchmark("quick", 0.002),
            benchmark("op, part", 0.001),
        ]
    }
    (folder / "encode.json").write_text(json.dumps(result))
    (folder / "notes.json").write_text('{"seconds": 3}')
    text = performance_page.page(tmp_path / "results", tmp_path / "docs")
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if "a\\|b" in line
    ]
    assert rows == [["a\\|b", "4", "quick", "2", "0.50"]]
    assert "(../results/a-machine/encode.json)" in text
    assert "notes" not in text


def templates() -> list[str]:
    """Every text of the package's source; what is filled in is a NUL."""
    found = []
    for path in (ROOT / "dre_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_stand_in_the_source() -> None:
    quoted = re.findall(r"^> (.+)$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) > 15
    source = templates()
    for message in quoted:
        pattern = re.compile("[^\\n]*".join(map(re.escape, message.split("…"))))
        assert any(pattern.match(text) for text in source), (
            f"docs/faq.md quotes what no source says: {message}"
        )
