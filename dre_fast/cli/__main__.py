"""``python -m dre_fast.cli``: the same as ``dre-fast``."""

import sys

from dre_fast.cli import main

sys.exit(main())
