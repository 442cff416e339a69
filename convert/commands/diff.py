"""`mtt diff`: two checkpoints, bit by bit."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from ..cli import EXIT_DIFFERENT, source_options
from ..comparing import diff
from .console import print_json, progress_bar, say


def run(args: argparse.Namespace) -> int:
    """Compare; 0 if all tensors are equal, 1 if not."""
    start = time.monotonic()
    with progress_bar("comparing") as progress:
        result = diff(
            args.first,
            args.second,
            **source_options(args),
            replicated=args.replicated,
            progress=progress,
        )
    different = bool(result.differences)
    if args.json:
        body = {
            "source": args.first,
            "output": args.second,
            "tensors": result.num_equal,
            "differences": [asdict(item) for item in result.differences],
            "warnings": list(result.notes),
        }
        print_json("diff", "different" if different else "equal", start, body)
        return EXIT_DIFFERENT if different else 0
    for note in result.notes:
        say(f"note: {note}")
    for item in result.differences:
        say(f"{item.name}: {item.text}")
    print(f"{result.num_equal} tensors are equal, {len(result.differences)} differ")
    return EXIT_DIFFERENT if different else 0
