"""`python -m batchnorm`: the same as the command `batchnorm`."""

import sys

from .tools.command import main

if __name__ == "__main__":
    sys.exit(main())
