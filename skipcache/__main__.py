"""``python -m skipcache``: the same as the ``skipcache`` command."""

import sys

from skipcache.cli import main

if __name__ == "__main__":
    sys.exit(main())
