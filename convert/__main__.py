"""The `mtt` command as a process: `python -m mtt_convert` is the same."""

from __future__ import annotations

import gc
import sys
from typing import NoReturn

_INTERRUPTED = 130
# A checkpoint's metadata has no cycles; Python's 700 has it look for them again and again.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000


def run() -> NoReturn:
    """Run the command and leave."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        from .cli import main

        status = main()
    except KeyboardInterrupt:  # before there was anything to say about it
        sys.exit(_INTERRUPTED)
    gc.freeze()  # or the interpreter goes through everything that is left, twice, to free it
    sys.exit(status)


if __name__ == "__main__":
    run()
