"""The page in a real browser, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stabilitykit.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
)
FLAGS += " --disable-sync --disable-quic --host-resolver-rules=MAP\u00a0*\u00a0~NOTFOUND --enable-logging=stderr"
FLAGS += " --virtual-time-budget=3000 --dump-dom"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("name", ["diverging", "hostile", "empty"])
def test_a_browser_draws_the_figures_without_a_word_on_the_console(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = write_report(request.getfixturevalue(name), tmp_path / "report.html")
    flags = [flag.replace("\u00a0", " ") for flag in FLAGS.split(" ")]

    done = subprocess.run(
        [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert (len(re.findall("<canvas", done.stdout)) > 5) == (name != "empty")
    assert 'data-theme="' in done.stdout
