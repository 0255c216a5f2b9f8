"""The HTML report: one file that needs no network and no server, with the verdict first."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from stabilitykit.analyse import wording
from stabilitykit.analyse.buffer import buffer_health
from stabilitykit.analyse.findings import analyse
from stabilitykit.report.curve_data import panels
from stabilitykit.report.figure_data import page_data
from stabilitykit.report.run_facts import notices, results, run_facts
from stabilitykit.report.words import PHASE_WORDS, PROOF_WORDS, source_of

if TYPE_CHECKING:
    from stabilitykit.read import Run

_HERE = Path(__file__).parent
SCRIPTS = ("map.js", "curves.js", "page.js")
MAX_LINKS = 40  # of a chain that are shown unfolded
MAX_TEXT = 1_200  # characters of any one text
MAX_CODE = 400  # characters of a source line


def render(run: Run) -> str:
    """The whole report as HTML text, under 2 MB whatever the run's length.

    The figures show at most 1,000 columns of steps with the largest value of each, and every single step near the end
    and near each finding; what is left out is said in the page.
    """
    findings = analyse(run)
    drawn = panels(findings)
    data = page_data(run, findings, drawn)
    library, ours = _read("vendor/uPlot.iife.min.js"), _own_script()
    style = _read("vendor/uPlot.min.css") + _read("templates/report.css")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            findings=findings,
            name=str(run.meta.get("name") or run.path.name),
            maps=findings.maps,
            panels=drawn,
            buffer=buffer_health(run.buffer()),
            notices=notices(run, findings),
            results=results(run),
            facts=run_facts(run, findings),
            command=_command(run.meta.get("command")),
            proof_words=PROOF_WORDS,
            phase_words=PHASE_WORDS,
            max_links=MAX_LINKS,
            data=_json(data),
            library=Markup(library),  # noqa: S704 - our own files, pinned by hash
            script=Markup(ours),  # noqa: S704
            style=Markup(style),  # noqa: S704
            policy=_policy(style, library, ours),
        )
    )


def _json(body: dict[str, Any]) -> Markup:
    """JSON that cannot end its script element, whatever a layer is called."""
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))  # ASCII, so that U+2028 is escaped as well
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704


def _policy(style: str, *scripts: str) -> str:
    allowed = " ".join(_hash(script) for script in scripts)
    return f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; base-uri 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _own_script() -> str:
    parts = "\n".join(_read(f"templates/{name}") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


@cache
def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = {name: getattr(wording, name) for name in ("count", "number", "plural", "listed", "sentence")}
    environment.filters |= words | {"prose": prose, "code": _code, "source": source_of}
    return environment


def _finalize(value: Any) -> Any:
    """Every text that a template prints passes here: what our files say is Markup, all else is untrusted."""
    return wording.printable(value, MAX_TEXT) if isinstance(value, str) and not isinstance(value, Markup) else value


def prose(text: str) -> Markup:
    """A sentence as HTML: escaped, with `code` between backticks."""
    clean = wording.printable(text, MAX_TEXT)
    pieces = clean.split("`")
    if len(pieces) % 2 == 0:  # a backtick that nothing closes
        return escape(clean)
    wrap = (escape, Markup("<code>{}</code>").format)
    return Markup("").join(wrap[place % 2](piece) for place, piece in enumerate(pieces))


def _code(text: str) -> str:
    return wording.printable(text, MAX_CODE)


def _command(command: object) -> str:
    words = command if isinstance(command, list) else []
    return shlex.join(wording.printable(str(word)) for word in words)
