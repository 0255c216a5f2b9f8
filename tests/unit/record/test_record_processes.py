import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stabilitykit.record.compact import compact
from stabilitykit.record.folder import list_segments, segment_path
from stabilitykit.record.scan import read_segment

FORK = """
import os, sys, time, numpy as np
from pathlib import Path
from stabilitykit.record import Recorder
from stabilitykit.schema import ROWS, Event
row = np.zeros(1, ROWS["steps"])
recorder = Recorder(Path(sys.argv[1]), sync_seconds=0)
assert recorder.write(0, steps=row)
"""


def run_python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("stabilitykit.record", ("torch", "pyarrow", "pandas")), ("stabilitykit.record.compact", ("torch", "pandas"))],
)
def test_importing_it_loads_nothing_heavy(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {forbidden} if name in sys.modules])"

    assert run_python(code).stdout == "[]\n"


def test_compacting_does_not_load_pandas_either(tmp_path: Path) -> None:
    assert run_python(FORK + "recorder.close()", tmp_path).returncode == 0
    code = (
        "import sys; from stabilitykit.record.compact import main; main(sys.argv[1:]); print('pandas' in sys.modules)"
    )

    assert run_python(code, tmp_path).stdout == "False\n"
    assert (tmp_path / "steps/rank=0/part-000000.parquet").exists()


def test_a_forked_child_never_writes_and_its_parent_goes_on(tmp_path: Path) -> None:
    child = """
if os.fork() == 0:
    event = Event(kind="x", message="", severity="error")
    recorder.tensor_id("child")
    print([recorder.write(1, steps=row, events=[event]), recorder.lost_frames, recorder.close()])
    sys.exit()
os.wait()
assert recorder.write(2, steps=row)
recorder.close()
"""

    result = run_python(FORK + child, tmp_path)

    assert result.stderr == ""
    assert result.stdout == "[False, 0, None]\n"
    log = read_segment(segment_path(tmp_path, 0, 0))
    assert log.tables["steps"].step.tolist() == [0, 2]
    assert log.sealed
    assert log.events == []
    assert not (tmp_path / "tensors.json").exists() or "child" not in (tmp_path / "tensors.json").read_text()


def test_a_child_that_outlives_its_killed_parent_does_not_keep_the_segment(tmp_path: Path) -> None:
    code = """
child = os.fork()
if child == 0:
    os.close(1)
    os.close(2)
    time.sleep(60)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""
    result = run_python(FORK + code, tmp_path)
    try:
        assert result.returncode == -signal.SIGKILL

        assert len(compact(tmp_path, include_open=True)) == 1
    finally:
        os.kill(int(result.stdout), signal.SIGKILL)


def test_a_file_size_limit_costs_the_rows_beyond_it_and_no_more(tmp_path: Path) -> None:
    """The kernel itself makes the short write."""
    code = """
import resource, warnings
warnings.simplefilter("ignore")
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
rows = np.zeros(50, ROWS["tensors"])
said = [recorder.write(step, steps=row, tensors=rows) for step in range(1, 11)]
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
said += [recorder.write(step, steps=row, tensors=rows) for step in range(11, 14)]
print([0] + [step for step, acknowledged in enumerate(said, 1) if acknowledged])
recorder.close()
"""

    result = run_python(FORK + code, tmp_path)

    log = read_segment(segment_path(tmp_path, 0, 0))
    assert result.stdout == f"{log.tables['steps'].step.tolist()}\n"
    assert {0, 1, 11, 12, 13} < set(log.tables["steps"].step.tolist()) < set(range(14))
    assert [entry.event.kind for entry in log.events] == ["lost_rows"]
    assert list_segments(tmp_path) == [(0, 0)]
