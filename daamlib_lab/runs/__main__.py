"""The command line, see `daamlib_lab.runs.run`."""

import sys

from .run import main

sys.exit(main())
