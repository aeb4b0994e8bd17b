"""A page: self-contained, escaped, the same for the same input, and in a cloud's hands without images."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import results

from flep_fl.reporting.image_view import ImageView, Stage, png
from flep_fl.reporting.inversion_view import InversionView
from flep_fl.reporting.page.blocks import Page, Section, Table, Text
from flep_fl.reporting.page.render import render, write_page
from flep_fl.reporting.run_page import cloud_page, run_page

SETTINGS = {"cloud": {"trust": "untrusted"}, "noise": {"std": 25.0}, "seed": 0}
HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&"


class Elements(HTMLParser):
    """Collects elements with their attributes, and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def an_image(seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)


def a_view() -> ImageView:
    stages = [Stage(name, "caption", png(an_image(i))) for i, name in enumerate(("captured", "on the wire"))]
    return ImageView(stages, stages, [[1] * 256, [2] * 256], "an image", None)


def an_inversion() -> InversionView:
    return InversionView(
        [Stage("cloud=open", "caption", png(an_image(7)))], "what was attacked", {"open": 0.9}
    )


def whole_page() -> str:
    return render(run_page(results(), SETTINGS, images=a_view(), inversion=an_inversion()))


def test_a_page_asks_for_nothing_outside_itself() -> None:
    found = Elements(whole_page())
    for tag, attributes in found.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"<{tag} {name}={value}>"
    style = (Path(__file__).parents[3] / "flep_fl/reporting/page/templates/page.css").read_text()
    assert "url(" not in style
    assert "@import" not in style
    assert len(found.named("img")) == 5


def test_the_policy_forbids_whatever_is_not_in_the_page() -> None:
    policy = next(
        m["content"]
        for m in Elements(whole_page()).named("meta")
        if m.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy)


def test_hostile_names_stay_text() -> None:
    hostile = results(sites=(HOSTILE, "b", "c"))
    hostile["rounds"][0]["failed"] = [{"site": HOSTILE, "reason": HOSTILE}]
    hostile["versions"][HOSTILE] = HOSTILE
    hostile["cloud"] = HOSTILE
    page = render(run_page(hostile, {HOSTILE: {HOSTILE: HOSTILE}}, title=HOSTILE))
    found = Elements(page)
    assert len(found.named("script")) == 1
    assert found.named("img") == []
    assert not [a for _, attributes in found.elements for a in attributes if a.startswith("on")]
    assert "alert(1)" in "".join(found.text), "the name itself is shown"


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    # A carriage return becomes a line feed, and NUL a replacement mark: HTML itself says so.
    page = render(
        Page("t", "", [], [Section("s", "t", [Text(f"<{text}>"), Table("t", ["a"], [[f"<{text}>"]])])])
    )
    shown = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(Elements(page.replace("\r\n", "\n").replace("\r", "\n")).text).count(f"<{shown}>") == 2


def test_equal_runs_give_equal_pages() -> None:
    assert whole_page() == whole_page()


def test_a_page_is_private(tmp_path: Path) -> None:
    path = write_page(tmp_path / "report.html", run_page(results(), SETTINGS))
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_clouds_page_has_only_what_the_cloud_knows() -> None:
    handed = results() | {
        "restore": {"psnr_db": 31.4159, "noisy_psnr_db": 20.2718},
        "images": a_view().to_json(),
        "inversion": an_inversion().to_json(),
        "examples": {"a": 987654},
    }
    handed["final"]["secret_figure"] = 123.456
    shared = {"cloud": {"trust": "untrusted"}, "federation": {"rounds": 3}}
    page = render(cloud_page(handed, shared))
    assert Elements(page).named("img") == []
    for secret in (
        "31.4",
        "20.2718",
        "20.3",
        "987654",
        "987,654",
        "123.456",
        "PSNR",
        "life of one image",
        "out of one update",
        "data:image",
    ):
        assert secret not in page, secret
    # The same figures do appear where they belong: the search above can find them.
    whole = render(run_page(handed, SETTINGS, images=a_view(), inversion=an_inversion()))
    there = ("31.4 dB", "20.3 dB", "life of one image", "out of one update", "data:image")
    assert all(shown in whole for shown in there)


@pytest.mark.parametrize("mode", ["untrusted", "trusted", "mixed", "open"])
def test_every_trust_mode_has_its_words(mode: str) -> None:
    text = "".join(Elements(render(run_page(results(cloud=mode), SETTINGS))).text)
    assert f"cloud={mode}" in text
    assert ("no: it holds a context without any key" in text) == (mode == "untrusted")


def test_a_run_without_a_round_still_has_a_page() -> None:
    page = render(run_page(results(rounds=0), SETTINGS))
    assert "No round took place" in page


def test_a_failed_round_is_shown() -> None:
    failed = results()
    failed["rounds"][1] |= {"accuracy": None, "loss": None, "error": "QuorumError: 1 of 3", "replied": ["a"]}
    failed["rounds"][1]["failed"] = [{"site": "b", "reason": "timeout"}, {"site": "c", "reason": "lost"}]
    failed["closing_failures"] = [{"site": "a", "reason": "lost"}]
    text = "".join(Elements(render(run_page(failed, SETTINGS))).text)
    for shown in ("QuorumError: 1 of 3", "timeout", "2 of 3", "2 contributions failed", "end of run"):
        assert shown in text


def test_pictures_survive_the_file() -> None:
    view = a_view()
    assert ImageView.from_json(json.loads(json.dumps(view.to_json()))).to_json() == view.to_json()
