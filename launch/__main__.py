"""``python -m coterie.launch``: the same as ``coterie``."""

import sys

from coterie.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
