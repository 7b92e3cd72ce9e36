"""``python -m elle_fast``: the command line, as ``elle-fast`` is."""

import sys

from elle_fast.recipes.cli import main

sys.exit(main())
