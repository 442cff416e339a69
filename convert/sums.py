"""What is computed of a tensor's bytes on their way: a hash, and a checksum if its file has one."""

from __future__ import annotations

from .manifest import new_hasher

try:  # ten times as fast
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32


class Sums:
    """Of one tensor, from its first byte to its last.

    Attributes:
        checksum: CRC-32 of the bytes so far; 0 where none is asked for.

    Args:
        algorithm: of the hash; see `manifest.new_hasher`.
        checksum: whether to compute one.
    """

    def __init__(self, algorithm: str, *, checksum: bool) -> None:
        self.checksum = 0
        self._hasher, self._has_checksum = new_hasher(algorithm), checksum

    def update(self, data: memoryview) -> None:
        """Take in the bytes that follow."""
        self._hasher.update(data)
        if self._has_checksum:
            self.checksum = crc32(data, self.checksum)

    @property
    def digest(self) -> str:
        """The hash of the bytes so far."""
        return self._hasher.hexdigest()
