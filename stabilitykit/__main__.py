"""`python -m stabilitykit`: the same as the `stabilitykit` command."""

import sys

from stabilitykit.cli.main import main

sys.exit(main())
