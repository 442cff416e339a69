"""`python -m mtt_convert` is the `mtt` command."""

import sys

from .cli import main

sys.exit(main())
