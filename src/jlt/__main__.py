"""`python -m jlt`, and so `torchrun ... -m jlt`."""

import sys

import jlt

if __name__ == "__main__":
    # `python -m` looks for modules in the current folder first, be it a data set; jlt itself may have come from there.
    if not sys.flags.safe_path and sys.path[0] != (jlt.__file__ or "").rpartition("/jlt/")[0]:
        del sys.path[0]
    from jlt.cli.main import main

    sys.exit(main())
