import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import FAULT_STEP, HOSTILE, LAYERS, write_run

from stabilitykit.analyse.findings import analyse
from stabilitykit.read import Run, open_run
from stabilitykit.report import html
from stabilitykit.report.figure_data import CODE_INF, CODE_NAN, LEVELS, page_data

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: elements, attributes, visible text, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.contents.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        shown = "".join(data for tag, data in self.contents if tag not in ("script", "style"))
        return re.sub(r"\s+", " ", shown)

    def all(self, tag: str) -> list[str]:
        return [data for name, data in self.contents if name == tag]


def numbers_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.DOTALL)
    assert match
    body: dict[str, Any] = json.loads(match[1])
    return body


def codes_of(body: dict[str, Any], grid: dict[str, Any], rows: int) -> np.ndarray:
    """The decoder of map.js, in numpy."""
    raw = zlib.decompress(base64.b64decode(body["numbers"]))
    planes = np.frombuffer(raw, np.uint8, grid["data"]["n"], grid["data"]["at"]).reshape(2, rows, grid["num"])
    deltas = planes[0].astype(np.uint16) + (planes[1].astype(np.uint16) << 8)
    return np.cumsum(deltas, axis=1, dtype=np.uint16)


def test_every_run_gives_a_whole_page(any_run: Run) -> None:
    page = Page(html.render(any_run))

    assert page.open == []
    assert [tag for tag, _ in page.elements].count("h1") == 1
    assert len({attributes["id"] for _, attributes in page.elements if "id" in attributes}) == sum(
        "id" in attributes for _, attributes in page.elements
    )


def test_a_page_asks_nothing_of_the_network(any_run: Run) -> None:
    page = Page(html.render(any_run))

    sources = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(value and value.startswith(("#", "data:")) for value in sources)


def test_the_policy_allows_exactly_our_scripts_and_style(any_run: Run) -> None:
    text = html.render(any_run)
    page = Page(text)

    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    inline = re.findall(r"<script>(.*?)</script>", text, re.DOTALL) + re.findall(
        r"<style>(.*?)</style>", text, re.DOTALL
    )
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in inline}
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert set(re.findall(r"'sha256-[^']+'", policy)) == hashes
    assert len(inline) == 3


def test_hostile_names_stay_text(hostile: Run) -> None:
    text = html.render(hostile)
    page = Page(text)

    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert HOSTILE[0] in page.text
    text.encode("utf-8")


def test_a_name_of_ten_thousand_characters_is_cut(hostile: Run) -> None:
    assert max(map(len, re.findall(r"a{50,}", html.render(hostile)))) < 1_000


def test_the_verdict_comes_first_and_the_evidence_is_there(diverging: Run) -> None:
    page = Page(html.render(diverging))

    assert diverging.diagnosis is not None
    verdict = diverging.diagnosis.verdict.replace("`", "")
    assert page.text.index(verdict[1:]) < page.text.index("Cause")
    for evidence in ("subtract the row maximum", "model.py:88", "91.4", "bit for bit", "nll_loss", "3, 17", "Later"):
        assert (evidence in page.text) == (evidence != "Later")
    assert page.text.index("Cause") < page.text.index("From the origin to loss") < page.text.index("The steps before")


def test_a_healthy_run_opens_with_its_step_count_and_headroom(healthy: Run) -> None:
    page = Page(html.render(healthy))

    assert "".join(page.all("h1")).strip() == "No non-finite value in 150 steps"
    assert "bits below its dtype's maximum" in page.text
    assert "Cause" not in page.text


def test_results_and_guards_are_shown(healthy: Run) -> None:
    text = Page(html.render(healthy)).text

    assert "39.42" in text
    assert "88.1" in text
    assert "gradient_clipping1 time" in text  # neighbouring cells
    assert "precisionnever" in text


def test_panels_without_data_are_left_out(healthy: Run, empty: Run) -> None:
    titles = [panel["title"] for panel in numbers_of(html.render(healthy))["panels"]]

    assert titles == ["Loss", "Gradient norm", "Learning rate", "Update ratio", "accuracy"]
    assert "<figure" not in html.render(empty)


def test_the_map_says_which_layer_went_bad_and_when(diverging: Run) -> None:
    body = numbers_of(html.render(diverging))

    outputs = next(entry for entry in body["maps"] if entry["role"] == "output")
    codes = codes_of(body, outputs["overview"], len(LAYERS))
    assert outputs["names"] == list(LAYERS)
    assert outputs["origin"] == 3
    assert codes[3, FAULT_STEP] == CODE_INF
    assert (codes[4:, FAULT_STEP] == CODE_NAN).all()
    assert (codes[:, :FAULT_STEP] <= LEVELS).all()
    assert body["fault"]["step"] == FAULT_STEP
    assert body["stopped"] is True


def test_decoded_codes_give_back_the_magnitudes(diverging: Run) -> None:
    body = numbers_of(html.render(diverging))

    outputs = next(entry for entry in body["maps"] if entry["role"] == "output")
    codes = codes_of(body, outputs["overview"], len(LAYERS))[:, :FAULT_STEP].astype(float)
    sizes = 10 ** (outputs["low"] + codes / LEVELS * (outputs["high"] - outputs["low"]))
    steps = np.arange(FAULT_STEP)
    assert sizes[0] == pytest.approx(2 + 0.1 * np.sin(steps), rel=1e-3)


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    layers = tuple(f"layer.{number}" for number in range(600))
    run = open_run(write_run(tmp_path / "wide", num_steps=6, layers=layers))

    body = page_data(run, analyse(run), (), budget=20_000)

    outputs = body["maps"][0]
    assert len(body["numbers"]) <= 20_000
    assert len(outputs["names"]) < 600
    assert outputs["omitted"].startswith(f"{len(outputs['names'])} of 600 tensors")
    assert {outputs["names"][0], outputs["names"][-1]} == {"layer.0", "layer.599"}


def test_a_killed_run_says_so_without_a_fault(killed: Run) -> None:
    text = Page(html.render(killed)).text

    assert "No non-finite value in 30 steps; the process was killed after step 29" in text
    assert "Every step that was acknowledged before the kill is in this report" in text
