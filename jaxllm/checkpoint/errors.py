"""The error of everything that reads or writes checkpoints, and how it lists names."""
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; names the file or tensor, what was found and what to do."""


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The count and the first `limit` of `names`, for an error: '7: a, b, c, d, e, ...'."""
    names = list(names)
    return f"{len(names)}: {', '.join(names[:limit])}{', ...' if len(names) > limit else ''}"
