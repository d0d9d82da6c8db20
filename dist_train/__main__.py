"""`python -m dist_train` and the DeepSpeed launcher's `--module dist_train`."""

import sys

from dist_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
