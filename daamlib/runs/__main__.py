"""The command line, see `daamlib.runs.run`."""

import sys

from .run import main

sys.exit(main())
