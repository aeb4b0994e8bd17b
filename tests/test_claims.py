"""Every test that a page names as the proof of a claim is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.compile(r"`(?:tests/)?([\w/]+\.py)?(?:::(\w+))?`")


def named_tests(page: str) -> list[tuple[str, str]]:
    """Return (file, test) for every test that a page names; a test alone belongs to the file before it."""
    found, last = [], ""
    for file, test in NAMED.findall((ROOT / page).read_text()):
        if file and not Path(file).name.startswith("test_"):
            continue  # a module of ours
        last = file or last
        if last:
            found.append((last, test))
    return found


@pytest.mark.parametrize("page", ["docs/threat-model.md", "SECURITY.md"])
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    named = named_tests(page)
    assert len(named) >= 5, "the search must find what the page names"
    for file, test in named:
        paths = [ROOT / "tests" / file] if "/" in file else list((ROOT / "tests").rglob(file))
        assert paths, f"{page} names {file}"
        assert paths[0].exists(), f"{page} names {file}"
        assert not test or f"def {test}(" in paths[0].read_text(), f"{page} names {file}::{test}"
