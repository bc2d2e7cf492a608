"""Shards of a source at hand when they are needed, and not longer."""
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from jaxllm.checkpoint.plan import Piece
from jaxllm.checkpoint.shards import Shards

AT_HAND = 2      # shards: the one that is read and the next; also the disk that a source on the hub needs


class Feed:
    """Acquires the shards that `pieces` need, in their order and ahead of them, and releases each after its last piece.

    All of it happens in one thread beside the caller's, one after the other.
    """

    def __init__(self, shards: Shards, pieces: Iterable[Piece]):
        self._shards = shards
        self._left = Counter(name for piece in pieces for name in sorted(piece.shards))
        self._waiting = list(self._left)      # not yet acquired, in the order in which they are needed
        self._held: dict[str, Future[None]] = {}
        self._released: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._shards.stop()
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._raise_from_releases()

    def has_room(self, piece: Piece) -> bool:
        """Whether the shards of `piece` can be at hand beside those that earlier pieces still need."""
        return len(self._held.keys() | piece.shards) <= AT_HAND

    def need(self, piece: Piece) -> None:
        """Return when the shards of `piece` are at hand."""
        for name in sorted(piece.shards - self._held.keys()):
            self._acquire(name)
        while self._waiting and len(self._held) < AT_HAND:
            self._acquire(self._waiting[0])
        for name in piece.shards:
            self._held[name].result()

    def is_last(self, piece: Piece) -> bool:
        """Whether a shard is released once `piece` is done."""
        return any(self._left[name] == 1 for name in piece.shards)

    def done(self, piece: Piece) -> None:
        """`piece` has been read."""
        self._raise_from_releases()
        for name in piece.shards:
            self._left[name] -= 1
            if not self._left[name]:
                del self._held[name]
                self._released.append(self._thread.submit(self._shards.release, name))

    def _acquire(self, name: str) -> None:
        self._waiting.remove(name)
        self._held[name] = self._thread.submit(self._shards.acquire, name)

    def _raise_from_releases(self) -> None:
        while self._released and self._released[0].done():
            self._released.pop(0).result()
