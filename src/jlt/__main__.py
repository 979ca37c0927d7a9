"""`python -m jlt`, and so `torchrun ... -m jlt`."""

import sys

from jlt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
