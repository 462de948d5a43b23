"""The command line of the page."""

import sys

from classroom.progress.server import main

if __name__ == "__main__":
    sys.exit(main())
