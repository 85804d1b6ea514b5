"""The shell of our HTML pages, each of which holds all that it shows; styles and scripts are files in `assets/`."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
KINDS = {"image": "img-src data: blob:", "media": "media-src data:"}  # what a page may show beside text


def shell(
    title: str,
    body: str,
    *,
    style: str,
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    shows: Sequence[str] = (),
) -> str:
    """A page with `body` in its main part.

    Its policy lets it load and send nothing, and run these scripts only.

    Args:
        title: plain text.
        body: HTML.
        style: the name of a stylesheet in `assets/`.
        scripts: JavaScript, run in their order at the end of the page.
        data: values that scripts read, by the id of the element that holds each as JSON.
        shows: kinds of embedded media, of `KINDS`.
    """
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts) or "'none'"
    shown = "".join(f" {KINDS[kind]};" for kind in shows)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline';{shown} form-action 'none'; base-uri 'none'"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{asset(f'{style}.css')}</style>",
        "</head>",
        "<body>",
        f"<main>\n{body}\n</main>",
        *(
            f'<script type="application/json" id="{name}">{_json(value)}</script>'
            for name, value in (data or {}).items()
        ),
        *(f"<script>{script}</script>" for script in scripts),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return (ASSETS / name).read_text(encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table of plain texts; `classes` of its rows, if any has one."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for index, row in enumerate(rows):
        kind = f' class="{classes[index]}"' if classes and classes[index] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON in which nothing ends the element that holds it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
