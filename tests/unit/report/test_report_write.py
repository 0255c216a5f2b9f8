import subprocess
import sys
from pathlib import Path

import pytest

from stabilitykit.errors import UsageError
from stabilitykit.read import Run
from stabilitykit.report import FORMATS, write_report


def test_a_report_is_written_whole_into_folders_that_are_made(killed: Run, tmp_path: Path) -> None:
    path = write_report(killed, tmp_path / "new" / "folder" / "r.html")

    assert path.read_text().startswith("<!DOCTYPE html>")
    assert list(path.parent.iterdir()) == [path]


def test_an_unknown_format_is_refused_with_the_known_ones(killed: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"got format='pdf', expected one of html, png, text, json"):
        write_report(killed, tmp_path / "r.pdf", "pdf")  # type: ignore[arg-type]

    assert list(tmp_path.iterdir()) == []


def test_rendering_every_format_never_imports_torch(killed: Run, tmp_path: Path) -> None:
    code = (
        "import sys; from stabilitykit.read import open_run; from stabilitykit.report import FORMATS, write_report\n"
        "run = open_run(sys.argv[1])\n"
        "for format in FORMATS: write_report(run, sys.argv[2] + '/' + format, format)\n"
        "assert not {name for name in sys.modules if name.split('.')[0] in ('torch', 'torchvision')}"
    )

    subprocess.run(
        [sys.executable, "-c", code, str(killed.path), str(tmp_path)], check=True, cwd=Path(__file__).parents[3]
    )

    assert {file.name for file in tmp_path.iterdir()} == set(FORMATS)
