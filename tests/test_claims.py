"""Every test that a page names as the proof of a claim is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
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


FILE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|yaml))`")
"""A file of ours in a page; without a folder it may be one of the user's own, so only ``.py`` counts then."""


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", *(f"docs/{p.name}" for p in DOCS)])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    named = {name for name in FILE.findall((ROOT / page).read_text()) if "/" in name or name.endswith(".py")}
    missing = [
        name
        for name in named
        if not any((folder / name).is_file() for folder in (ROOT, ROOT / "flep_fl", ROOT / "tests"))
        and not ("/" not in name and name.startswith("test_"))  # the tests above look for these
    ]
    assert not missing, f"{page} names {', '.join(sorted(missing))}"


def test_the_life_of_one_image_names_a_file_for_every_step() -> None:
    page = (ROOT / "docs" / "data-owner.md").read_text()
    table = page[page.index("| step |") : page.index("## Devices")]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    steps = [row.split("|")[1].strip() for row in rows]
    assert steps[0] == "enrol" and {"shutter", "store", "release", "fetch", "gradient"} <= set(steps)
    for row in rows:
        files = FILE.findall(row.split("|")[3])
        assert files, row
        assert all((ROOT / "flep_fl" / name).is_file() for name in files), row
