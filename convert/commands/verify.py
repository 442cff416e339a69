"""`mtt verify`: is the folder still what was written, and does it compute what it should."""

from __future__ import annotations

import argparse
import time

from ..cli import EXIT_DIFFERENT
from ..comparing import verify
from .console import (
    print_json,
    print_warnings,
    progress_bar,
    quiet_transformers,
    say,
    size,
)


def run(args: argparse.Namespace) -> int:
    """Check hashes, and logits if asked; 0 if all is well, 1 if not."""
    start = time.monotonic()
    with progress_bar("verifying") as progress:
        result = verify(args.folder, progress=progress)
    problems = list(result.problems)
    difference = None
    if args.logits and not problems:
        from ..logits import compare_logits

        quiet_transformers()
        difference = compare_logits(args.folder, args.logits)
        if not difference <= args.tolerance:
            problems.append(
                f"logits differ by up to {difference:.3g}, more than {args.tolerance:g}"
            )
    if args.json:
        body = {
            "source": args.folder,
            "tensors": result.num_tensors,
            "bytes": result.num_bytes,
            "problems": problems,
            "warnings": list(result.warnings),
            "logits_difference": difference,
        }
        print_json("verify", "different" if problems else "ok", start, body)
        return EXIT_DIFFERENT if problems else 0
    print_warnings(result.warnings)
    for problem in problems:
        say(problem)
    if difference is not None:
        print(f"logits: largest difference {difference:.3g}")
    whole = "as written" if result.hashed else "of the sizes that were written"
    verdict = f"{len(problems)} problems" if problems else whole
    print(f"{result.num_tensors} tensors, {size(result.num_bytes)}: {verdict}")
    return EXIT_DIFFERENT if problems else 0
