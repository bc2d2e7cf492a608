"""Writing the files of a plan: a few threads each read, transpose, hash and write one, and each is noted when finished.
"""
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256

from jaxllm.checkpoint.feed import Feed
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.journal import Journal
from jaxllm.checkpoint.manifest import Stored
from jaxllm.checkpoint.plan import Piece
from jaxllm.checkpoint.shards import Shards, at_once

THREADS = min(4, 1 + (os.cpu_count() or 1))    # files in the making; one more than cores, since some wait for the disk


def unfinished(pieces: Sequence[Piece], files: Files, journal: Journal, done: Callable[[int], object]) -> list[Piece]:
    """The pieces that no earlier run has finished, or that are not as they were then; `done` is told of all others."""
    def is_whole(piece: Piece) -> bool:
        content = files.read(piece.name)
        if content is None or stored(content) != journal.done[piece.name]:
            return False
        done(piece.size)
        return True
    known = [piece for piece in pieces if piece.name in journal.done]
    whole = {piece.name for piece, same in zip(known, at_once(is_whole, known), strict=True) if same}
    return [piece for piece in pieces if piece.name not in whole]


def write_pieces(pieces: Sequence[Piece], files: Files, shards: Shards, journal: Journal,
                 done: Callable[[int], object]) -> None:
    """Make and write all pieces, in their order or nearly so."""
    running: deque[tuple[Piece, Future[Stored]]] = deque()

    def finish() -> None:
        piece, writing = running.popleft()
        journal.add(piece.name, writing.result())
        if feed.is_last(piece):
            journal.flush()      # first: a shard of which something is still to be made would have to come again
        feed.done(piece)
        done(piece.size)

    pool = ThreadPoolExecutor(THREADS)
    try:
        with Feed(shards, pieces) as feed:
            for piece in pieces:
                while len(running) > THREADS or running and not feed.has_room(piece):
                    finish()
                feed.need(piece)
                running.append((piece, pool.submit(_make, piece, files)))
            while running:
                finish()
    finally:
        pool.shutdown(cancel_futures=True)
        with suppress(OSError):      # a disk that is full is told of by what raised; what is not noted is made again
            journal.flush()


def _make(piece: Piece, files: Files) -> Stored:
    content = piece.make()
    assert len(content) == piece.size, piece
    files.write(piece.name, content)
    return stored(content)


def stored(content: bytes) -> Stored:
    """How a file with this content is known."""
    return Stored(len(content), sha256(content).hexdigest())
