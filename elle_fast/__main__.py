"""``python -m elle_fast``: the command line, as ``elle-fast`` is; torchrun takes it as ``-m elle_fast``."""

import sys

from elle_fast.recipes.cli import main

sys.exit(main())
