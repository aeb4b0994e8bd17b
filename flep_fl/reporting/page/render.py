"""Turn a page into one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flep_fl.contracts.files import write_secret
from flep_fl.reporting.page.blocks import Page

_TEMPLATES = Path(__file__).parent / "templates"


def render(page: Page) -> str:
    """Return the HTML text of a page; equal pages give equal texts.

    Every text is escaped. The page's own policy (a ``Content-Security-Policy``) allows its one script, its
    one style sheet and pictures inside the page, and nothing else: what should slip through could not run,
    and nothing can be fetched.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            policy=policy,
            style=style,
            script=script,
        )
    )


def write_page(path: Path, page: Page) -> Path:
    """Write a page whole, readable by its owner alone: it may show private images."""
    write_secret(path, render(page).encode())
    return path


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    return Markup("\n" + (_TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704  # our own file


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
