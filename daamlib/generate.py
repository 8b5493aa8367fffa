"""``python -m daamlib.generate``: datasets of any size from the command line, see `daamlib.datasets.cli`."""

import sys

from .datasets.cli import main

if __name__ == "__main__":
    sys.exit(main())
