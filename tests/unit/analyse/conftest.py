"""The synthetic runs of the report's tests, here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # tests are no package
