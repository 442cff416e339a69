"""What no converter is faster than: files read, hashed and written by threads that do nothing else.

python benchmarks/bare.py CHECKPOINT OUT THREADS
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import xxhash

WINDOW_BYTES = 1 << 20


def main(checkpoint: Path, out: Path, num_threads: int) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    files.sort(key=lambda path: path.stat().st_size)
    for path in files:
        (out / path.relative_to(checkpoint)).parent.mkdir(parents=True, exist_ok=True)

    def copy() -> None:
        window = memoryview(bytearray(WINDOW_BYTES))
        while True:
            try:
                path = files.pop()
            except IndexError:
                return
            with (
                open(path, "rb", 0) as source,
                open(out / path.relative_to(checkpoint), "wb", 0) as file,
            ):
                hasher = xxhash.xxh3_128()
                position = 0
                while count := os.preadv(source.fileno(), [window], position):
                    hasher.update(window[:count])
                    os.pwrite(file.fileno(), window[:count], position)
                    position += count

    threads = [threading.Thread(target=copy) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
