import json

from stabilitykit.read import Run
from stabilitykit.report import json_text, text


def test_plain_text_holds_no_control_characters(any_run: Run) -> None:
    page = text.render(any_run)

    assert all(character == "\n" or character.isprintable() for character in page)
    page.encode("utf-8")


def test_the_post_mortem_answers_what_where_why_and_what_to_do(diverging: Run) -> None:
    page = text.render(diverging)

    assert diverging.diagnosis is not None
    assert page.startswith(f"S{diverging.diagnosis.verdict[1:]}\n")
    parts = ("Cause", "Remedies", "Source", "How sure", "From the origin to loss", "The steps before", "Files")
    positions = [page.index(f"\n{part}") for part in parts]
    assert positions == sorted(positions)


def test_a_terminal_gets_colours_and_its_own_width_and_no_escape_of_a_layer(hostile: Run) -> None:
    page = text.render_for_terminal(hostile, 60)

    assert "\x1b[1;31m" in page
    assert "\x1b]0;" not in page
    assert "\x07" not in page


def test_names_are_not_taken_for_markup(hostile: Run) -> None:
    assert "[bold]markup[/bold]" in text.render(hostile)


def test_the_machine_form_is_strict_json_with_the_whole_diagnosis(diverging: Run) -> None:
    body = json.loads(json_text.render(diverging), parse_constant=lambda word: (_ for _ in ()).throw(ValueError(word)))

    assert body["level"] == "fault"
    assert body["diagnoses"][0]["origin"]["line"] == 88
    assert body["tensors"]["output"]["nonfinite"][0] == {"name": "block.1.attn", "first_step": 239}
    assert body["tensors"]["output"]["grown"][0]["name"] == "block.1.attn"


def test_the_machine_form_of_any_run_is_json(any_run: Run) -> None:
    assert json.loads(json_text.render(any_run))["last_step"] == any_run.last_step
