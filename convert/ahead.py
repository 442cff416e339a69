"""An iterator that runs ahead of its consumer, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class _End:
    """What the thread puts last: an error, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The items, of which up to `depth` are made before they are asked for.

    Whoever makes them needs room for `depth + 1`: an item is in use until the next is asked for.
    Closing the iterator ends the thread after the item it is at.

    Raises:
        BaseException: what the items raise, in their place.
    """
    made: SimpleQueue[T | _End] = SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = False

    def make() -> None:
        error = None
        try:
            for item in items:
                made.put(item)
                room.acquire()
                if stopped:
                    break
        except BaseException as raised:
            error = raised
        made.put(_End(error))

    thread = threading.Thread(target=make, name="mtt-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
            room.release()
        if item.error is not None:
            raise item.error
    finally:
        stopped = True
        room.release()
        thread.join()
