"""A look at a pickle stream before it is followed.

The standard unpickler believes two kinds of numbers: memo indices, for which it makes room at
once, and extension codes, which lead to whatever this process has registered. `check` walks the
opcodes, which is cheap because their arguments are only skipped, and refuses both.
(Opcodes: CPython's pickletools.py.)
"""

from __future__ import annotations

from ..errors import CorruptError, UnsafePickleError

_FIXED = {
    **dict.fromkeys(b"K\x80qh\x82\x94", 1),
    **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"Jrj\x84", 4),
    **dict.fromkeys(b"G\x95", 8),
}
_FIXED[0x94] = 0  # MEMOIZE
_LENGTH_BYTES = {
    **dict.fromkeys(b"UC\x8c\x8a", 1),
    **dict.fromkeys(b"TBX\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
_LINES = {**dict.fromkeys(b"IFLSVPpg", 1), **dict.fromkeys(b"ci", 2)}
_EXTENSIONS = b"\x82\x83\x84"
_PUT, _LONG_BINPUT, _STOP = ord("p"), ord("r"), ord(".")


def check(data: bytes, path: str, start: int = 0) -> int:
    """Refuse a stream that would make the unpickler use more than the stream itself warrants.

    Args:
        data: what the stream stands in.
        path: the file it came from, for messages.
        start: where it begins in `data`.

    Returns:
        The position behind the stream.

    Raises:
        UnsafePickleError: it uses extension codes.
        EndlessError: it has no end.
        CorruptError: it has memo indices beyond its own length.
    """
    position, size = start, len(data)
    while position < size:
        opcode = data[position]
        position += 1
        if opcode == _STOP:
            return position
        if opcode in _EXTENSIONS:
            raise UnsafePickleError(
                f"{path} was refused: its pickle uses extension codes; nothing of it was run",
                found=f"opcode {opcode:#04x}",
                expected="tensors, numbers, text and containers",
            )
        if opcode == _LONG_BINPUT:
            _check_index(int.from_bytes(data[position : position + 4], "little"), size, path)
        if opcode in _FIXED:
            position += _FIXED[opcode]
        elif opcode in _LENGTH_BYTES:
            width = _LENGTH_BYTES[opcode]
            length = int.from_bytes(data[position : position + width], "little")
            position += width + length
        elif opcode in _LINES:
            for _ in range(_LINES[opcode]):
                start, end = position, data.find(b"\n", position)
                if end < 0:
                    raise _endless(path)
                position = end + 1
            if opcode == _PUT:
                text = data[start:end]
                _check_index(int(text) if text.isdigit() and len(text) < 12 else -1, size, path)
    raise _endless(path)


def _check_index(index: int, size: int, path: str) -> None:
    if not 0 <= index <= size:
        raise CorruptError(
            f"{path}: its pickle cannot be read",
            found=f"memo index {index} in {size} bytes",
            expected="no more values than bytes",
            fix="copy the file again from where it was written",
        )


class EndlessError(CorruptError):
    """A pickle stream without an end, as far as it was read."""


def _endless(path: str) -> EndlessError:
    return EndlessError(
        f"{path}: its pickle cannot be read",
        found="a stream without an end",
        expected="a complete pickle",
        fix="copy the file again from where it was written",
    )
