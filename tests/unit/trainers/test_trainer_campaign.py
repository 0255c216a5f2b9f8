import json
from pathlib import Path

import pandas as pd
import pytest

from stabilitykit.errors import UsageError
from trainers import ablate
from trainers.campaign import CampaignConfig, Record, draw, parse, summarise
from trainers.faults import FAULTS
from trainers.flags import GUARDS, guard_names
from trainers.trial import Outcome, Spec

ALL = tuple(GUARDS)


def outcome(index: int, *, fault: str = "bad_image", guards: tuple[str, ...] = ALL, **facts: object) -> Outcome:
    spec = Spec(index=index, seed=index, net="mnistmlp", num_tasks=2, fault=fault, step=9, guards=guards)
    return Outcome(spec=spec, **facts)


def config(**options: object) -> CampaignConfig:
    defaults = {"runs": 40, "healthy": 4, "guards": "all", "faults": tuple(FAULTS), "seed": 0, "jobs": 1, "out": Path()}
    return CampaignConfig(**(defaults | options))


def test_run_number_i_is_the_same_under_any_guards_and_any_number_of_runs() -> None:
    few, many = config(runs=5, healthy=0).specs(), config(runs=40, healthy=0, guards="none").specs()

    assert [(run.fault, run.step, run.seed, run.net) for run in few] == [
        (run.fault, run.step, run.seed, run.net) for run in many[:5]
    ]


def test_healthy_runs_are_all_different_and_strike_nowhere() -> None:
    healthy = config(runs=0, healthy=30).specs()

    assert len({run.seed for run in healthy}) == 30
    assert {run.step for run in healthy} == {-1}


def test_quick_is_the_guides_first_four() -> None:
    assert guard_names("quick") == ("lr", "precision", "freeze_bn", "buffer")
    assert guard_names("clip,lr") == ("lr", "clip")
    assert guard_names("none") == ()
    with pytest.raises(UsageError, match="got 'seatbelt'"):
        guard_names("seatbelt")


def test_the_summary_counts_faulty_runs_and_takes_false_alarms_from_healthy_ones() -> None:
    runs = [
        outcome(
            0, survived=True, class_il=70.0, twin_class_il=72.0, detected=True, origin_correct=True, cpu_seconds=1.0
        ),
        outcome(1, survived=True, class_il=60.0, twin_class_il=72.0, detected=True, cpu_seconds=1.0),
        outcome(2, cpu_seconds=1.0),
        outcome(3, fault="healthy", survived=True, alarms=1, cpu_seconds=1.0),
        outcome(4, fault="healthy", survived=True, cpu_seconds=1.0),
    ]

    assert summarise("all", runs) == {
        "guards": "all",
        "runs": 3,
        "survived": 2,
        "kept_accuracy": 1,
        "detected": 2,
        "origin_correct": 1,
        "false_alarms": 1,
        "cpu_seconds": 5.0,
    }


def test_a_record_is_read_back_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path)
    first, second = outcome(0, survived=True, acted={"clip": 3}), outcome(1, error="IndexError: 10")
    record.add(first)
    record.add(second)
    with record.path.open("a") as file:
        file.write('{"spec": {"index": 7')

    again = Record(tmp_path)
    again.add(outcome(2))

    assert list(again.outcomes.values())[:2] == [first, second]
    assert len(Record(tmp_path).outcomes) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--runs -1", "--runs: got -1, expected 0 or more"),
        ("--jobs 0", "--jobs: got 0, expected 1 or more"),
        ("--faults bad_image,typo", "--faults: got 'typo', expected all, or a list of bad_image"),
    ],
)
def test_bad_flags_are_one_line(flags: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([*flags.split(), "--out", "x"])

    assert str(caught.value).startswith(message)


def test_the_ablation_has_each_guard_alone_and_left_out_on_the_same_runs() -> None:
    sets = ablate.guard_sets()
    specs = ablate.specs(("bad_image",), 2, 0)

    assert len(sets) == 2 + 2 * len(GUARDS)
    assert sets["only clip"] == ("clip",)
    assert "clip" not in sets["without clip"]
    assert len(specs) == 2 * len(sets)
    assert len({(run.seed, run.step, run.net) for run in specs}) == 2


def test_the_ablation_is_a_table_a_figure_and_a_page(tmp_path: Path) -> None:
    outcomes = [
        outcome(index, fault=fault, guards=guards, survived=bool(guards), cpu_seconds=0.5)
        for fault in ("bad_image", "nan_weight")
        for index in range(2)
        for guards in ablate.guard_sets().values()
    ]

    ablate.write(tmp_path, outcomes, 2, "python -m trainers ablate --faults <all>")

    data = pd.read_parquet(tmp_path / "ablation.parquet")
    assert len(data) == 2 * len(ablate.guard_sets())
    assert data.loc[data["guards"] == "none", "kept_accuracy"].tolist() == [0, 0]
    assert data.loc[data["guards"] == "all", "kept_accuracy"].tolist() == [2, 2]
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "&lt;all&gt;" in (tmp_path / "ablation.html").read_text()


def test_a_healthy_draw_and_a_faulty_one_can_be_told_by_their_record() -> None:
    line = json.loads(outcome(0, survived=True).line())

    assert line["spec"]["fault"] == "bad_image"
    assert line["kept_accuracy"] is True
    assert draw(0, 0, ("healthy",), ()).fault == "healthy"
