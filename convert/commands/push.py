"""`mtt push`: a folder to a branch on the Hub."""

from __future__ import annotations

import argparse
import time

from ..uploading import push
from .console import print_json, print_table, progress_bar, say, size


def run(args: argparse.Namespace) -> int:
    """Upload, and say where it is."""
    start = time.monotonic()
    with progress_bar("uploading") as progress:
        result = push(
            args.folder,
            args.repo_id,
            revision=args.revision,
            private=args.private,
            create_pr=args.create_pr,
            overwrite=args.overwrite,
            resume=args.resume,
            progress=progress,
        )
    if args.json:
        body = {
            "source": args.folder,
            "output": result.url,
            "bytes": result.num_bytes,
            "files": result.num_files,
            "uploaded": result.num_uploaded,
        }
        print_json("push", "unchanged" if result.unchanged else "ok", start, body)
        return 0
    say(result.url)
    seconds = time.monotonic() - start
    sent = f"{size(result.num_uploaded)} in {seconds:.1f} s" if result.num_uploaded else ""
    if result.unchanged:
        sent = "nothing: it holds just this already"
    print_table((("files", f"{result.num_files}, {size(result.num_bytes)}"), ("sent", sent)))
    return 0
