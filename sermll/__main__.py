"""`python -m sermll`, for places where no console script is installed, such as a Ray job's working directory."""

import sys

from sermll.cli import main

if __name__ == "__main__":
    sys.exit(main())
