"""Every error a user can meet.

    MTTError                          exit code 70 unless a subclass says otherwise
    ├── UsageError                2   arguments that contradict each other or the checkpoint
    │   └── LayoutError           2   a parallel layout that cannot be
    ├── SourceError               3   the checkpoint cannot be used
    │   ├── NotACheckpointError       no known format
    │   ├── IncompleteError           files, ranks or tensors are missing
    │   ├── CorruptError              bytes that contradict their own metadata
    │   ├── InconsistentError         ranks that should agree and do not
    │   ├── UnsafePickleError         a pickle that asks for more than data
    │   ├── UnsupportedError          understood, but not something we can represent
    │   └── MappingError              a tensor unmatched, matched twice or left over
    ├── TargetError               4   the output place is full, locked, not empty, not writable
    └── HubError                  5   network or Hub

Errors carry the values they are about: `found`, `expected` and `fix` are printed below the
message by the command line and stand in `--json` output as they are.
"""

from __future__ import annotations


class MTTError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 70
    code = "error"

    def __init__(
        self,
        message: str,
        *,
        found: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.found = found
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.message]
        for label in ("found", "expected", "fix"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"  {label + ':':<9} {value}")
        return "\n".join(lines)


class UsageError(MTTError):
    """The request contradicts itself or the checkpoint."""

    exit_code = 2
    code = "usage"


class LayoutError(UsageError):
    """A parallel layout the model cannot have."""

    code = "layout"


class SourceError(MTTError):
    """The source cannot be used."""

    exit_code = 3
    code = "source"


class NotACheckpointError(SourceError):
    """No known checkpoint format at this path."""

    code = "not_a_checkpoint"


class IncompleteError(SourceError):
    """Files, ranks or tensors are missing."""

    code = "incomplete"


class CorruptError(SourceError):
    """Bytes contradict their own metadata: truncated, overwritten or not what they claim."""

    code = "corrupt"


class InconsistentError(SourceError):
    """Ranks that must agree do not."""

    code = "inconsistent"


class UnsafePickleError(SourceError):
    """A pickle names something that is not data; nothing of it was run."""

    code = "unsafe_pickle"


class UnsupportedError(SourceError):
    """Understood, but the result would not compute the same function."""

    code = "unsupported"


class MappingError(SourceError):
    """A tensor without a rule, with two, or left over."""

    code = "mapping"


class TargetError(MTTError):
    """The output cannot be written."""

    exit_code = 4
    code = "target"


class HubError(MTTError):
    """Network or Hub failure."""

    exit_code = 5
    code = "hub"
