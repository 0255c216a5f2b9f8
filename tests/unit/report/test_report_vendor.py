import hashlib
from pathlib import Path

import stabilitykit.report.html

VENDOR = Path(stabilitykit.report.html.__file__).parent / "vendor"


def test_vendored_files_are_those_whose_sums_were_committed() -> None:
    lines = (VENDOR / "SHA256SUMS").read_text().splitlines()
    expected = {name: digest for digest, name in (line.split() for line in lines)}

    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in VENDOR.glob("uPlot*")}

    assert found == expected
    assert len(found) == 3
