"""The post-mortem as terminal text: verdict, cause, remedies, chain, run-up, events; coloured on a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stabilitykit.analyse.buffer import buffer_health
from stabilitykit.analyse.findings import Findings, analyse
from stabilitykit.analyse.wording import count, listed, number, plural, printable, sentence
from stabilitykit.report.run_facts import notices, results
from stabilitykit.report.words import PROOF_WORDS, source_of

if TYPE_CHECKING:
    from stabilitykit.read import Run
    from stabilitykit.schema import ChainLink, Diagnosis, TensorSummary

WIDTH = 100  # columns where there is no terminal to ask
MAX_LINKS = 24
MAX_RUN_UP = 12
MAX_EVENTS = 20
_LITERAL: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}  # names are text, never markup
_STYLES = {"fault": "bold red", "ended": "bold yellow", "fine": "bold green", "empty": "bold"}
_SEVERITY_STYLES = {"error": "red", "warning": "yellow"}


def render(run: Run) -> str:
    """The post-mortem as plain text, 100 columns wide, without escape sequences."""
    return _printed(run, Console(file=io.StringIO(), width=WIDTH, color_system=None, **_LITERAL))


def render_for_terminal(run: Run, width: int) -> str:
    """The same, coloured (unless NO_COLOR is set) and `width` columns wide."""
    return _printed(run, Console(file=io.StringIO(), width=width, force_terminal=True, **_LITERAL))


def _printed(run: Run, console: Console) -> str:
    with console.capture() as captured:
        console.print(_page(run, analyse(run)))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _page(run: Run, findings: Findings) -> Group:
    parts: list[RenderableType] = [Text(sentence(printable(findings.headline, 1_000)), style=_STYLES[findings.level])]
    parts.append(Text(findings.ending))
    parts += [Text(note) for note in findings.notes]
    parts += _section("What is missing", [Text(f"- {printable(notice, 600)}") for notice in notices(run, findings)])
    if findings.diagnoses:
        parts += _diagnosis(findings.diagnoses[0])
    later = [Text(f"- {printable(diagnosis.verdict, 1_000)}") for diagnosis in findings.diagnoses[1:]]
    parts += _section("Later faults", later)
    parts += _section("Events", _events(findings))
    parts += _section("Replay buffer", _buffer(run))
    parts += _section("Guards", [Text(f"{printable(guard.name)}: {_times(guard.acted)}") for guard in findings.guards])
    told = [Text(f"{printable(result.name)}: {result.text}") for result in results(run) if not result.rows]
    parts += _section("Results", told)
    parts += _section("Files", [Text(line) for line in _files(run)])
    return Group(*parts)


def _section(title: str, body: Sequence[RenderableType]) -> list[RenderableType]:
    if not body:
        return []
    return [Text(), Text(title, style="bold"), *(Padding(part, (0, 0, 0, 2)) for part in body)]


def _diagnosis(diagnosis: Diagnosis) -> list[RenderableType]:
    origin = diagnosis.origin
    cause = diagnosis.cause or "No rule explains this fault; the evidence below is all that is known."
    remedies = [f"{place}. {printable(remedy, 600)}" for place, remedy in enumerate(diagnosis.remedies, 1)]
    where = [Text(source_of(printable(origin.file), origin.line), style="dim"), Text(printable(origin.code, 400))]
    samples = ", ".join(map(str, origin.samples[:20])) + (" ..." if len(origin.samples) > 20 else "")
    return [
        *_section("Cause", [Text(printable(cause, 1_000))]),
        *_section("Remedies", [Text(remedy) for remedy in remedies]),
        *_section("Source", where if origin.file or origin.code else []),
        *_section("What the operation was given", [_given(summary) for summary in diagnosis.inputs[:12]]),
        *_section(sentence(printable(diagnosis.samples_are)), [Text(samples)] if samples else []),
        *_section("How sure this is", [Text(PROOF_WORDS.get(origin.proof, printable(origin.proof)))]),
        *_section(f"From the origin to {printable(diagnosis.noticed) or 'the symptom'}", _chain(diagnosis.chain)),
        *_section("The steps before", [_run_up(diagnosis)] if diagnosis.run_up else []),
    ]


def _given(summary: TensorSummary) -> Text:
    return Text(printable(summary.describe(), 400))


def _chain(links: Sequence[ChainLink]) -> list[RenderableType]:
    if len(links) <= MAX_LINKS:
        return [_link(place, link) for place, link in enumerate(links, 1)]
    half = MAX_LINKS // 2
    first = [_link(place, link) for place, link in enumerate(links[:half], 1)]
    last = [_link(place, link) for place, link in enumerate(links[-half:], len(links) - half + 1)]
    return [*first, Text(f"   ... {plural(len(links) - 2 * half, 'operation')} left out ...", style="dim"), *last]


def _link(place: int, link: ChainLink) -> Text:
    module = f" in {printable(link.module)}" if link.module else ""
    source = source_of(printable(link.file), link.line)
    text = Text(f"{place:>2} {link.phase} {printable(link.op)}{module}" + (f"  {source}" if source else ""))
    text.append(f"\n   {printable(link.output.describe(), 300)}", style="dim")
    return text


def _run_up(diagnosis: Diagnosis) -> Table:
    sized = any(step.absmax_tensor for step in diagnosis.run_up)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "loss", "gradient norm", "parameter norm", *(["max |value|"] if sized else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    if sized:
        table.add_column("in", overflow="fold")
    for step in diagnosis.run_up[-MAX_RUN_UP:]:
        cells = [count(step.step), number(step.loss), number(step.grad_norm), number(step.parameter_norm)]
        largest = [number(step.absmax if step.absmax_tensor else None), printable(step.absmax_tensor)] if sized else []
        style = "red" if step.step == diagnosis.origin.step else ""
        table.add_row(*map(Text, (*cells, *largest)), style=style)
    return table


def _events(findings: Findings) -> list[RenderableType]:
    if not findings.events:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("times", "steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("kind", "first message"):
        table.add_column(heading, overflow="fold")
    for event in findings.events[:MAX_EVENTS]:
        steps = count(event.first_step)
        steps += f" .. {count(event.last_step)}" if event.last_step != event.first_step else ""
        kind = Text(printable(event.kind), style=_SEVERITY_STYLES.get(event.severity, ""))
        about = f"{listed([printable(subject, 60) for subject in event.subjects])}: " if event.subjects else ""
        table.add_row(count(event.num), steps, kind, Text(about + printable(event.example, 300)))
    left = len(findings.events) - MAX_EVENTS
    return [table, *([Text(f"{plural(left, 'further kind')} left out")] if left > 0 else [])]


def _buffer(run: Run) -> list[RenderableType]:
    measures = buffer_health(run.buffer())
    return [
        Text(f"{measure.name}: {number(measure.worst)} at step {count(measure.worst_step)}; {measure.how}", style="red")
        for measure in measures
        if measure.alarm
    ]


def _times(acted: int) -> str:
    return plural(acted, "time") if acted else "never"


def _files(run: Run) -> list[str]:
    names = [file.name for file in sorted(run.path.glob("diagnosis*.json"))]
    names += [name for name in ("report.html", "report.png", "crash") if (run.path / name).exists()]
    return [printable(str(run.path), 400), *(f"  {name}" for name in names)]
