"""The order in which a folder is written: one expert a file, shards one after the other, few at hand."""
import re
from pathlib import Path

import pytest
from hub_files import SMALL
from hub_maker import tiny_config, write_hub
from packed_files import write_packed

from jaxllm.checkpoint import CheckpointError, convert, open_source
from jaxllm.checkpoint.blocks import chunk_shape
from jaxllm.checkpoint.feed import Feed
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.plan import Piece, array_pieces
from jaxllm.checkpoint.shards import LocalShards
from jaxllm.checkpoint.source import Tally


def planned(folder):
    source = HubSource(folder)
    return source, array_pieces(source, source.hub.tensors, {path: Tally() for path in source.params})


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int4"])
def test_an_expert_is_a_file_that_needs_no_other_expert(tmp_path, kind):
    write_packed(tmp_path, tiny_config(**SMALL), kind, weight_block_size=[16, 16])
    source, pieces = planned(tmp_path)
    for path in ("layers.1.moe.gate_EDI", "layers.1.moe.down_EID"):
        for part in ("codes", "scale"):
            files = [piece.name for piece in pieces if piece.name.startswith(f"params/{path}.{part}/")]
            assert files == [f"params/{path}.{part}/{expert}.0.0" for expert in range(8)]
    shape, dtype = source.params["layers.1.moe.gate_EDI.codes"]
    assert {piece.size for piece in pieces if "gate_EDI.codes" in piece.name} == {
        shape[1] * shape[2] * dtype.itemsize}
    assert chunk_shape("x.gate_EDI.codes", (384, 3072, 2048), 1) == (1, 3072, 2048)
    assert chunk_shape("x.gate_EDI.scale", (384, 192, 2048), 1) == (1, 192, 2048)
    assert chunk_shape("x.down_EID", (2, 4096, 8192), 4) == (1, 1024, 8192)      # 128 MiB are four files
    assert chunk_shape("x.bias_E", (384,), 4) == (384,)      # no stack


def test_shards_follow_one_another(tmp_path):
    """Whatever tensors lie in which shard: each shard is needed from its first piece to its last, and no more than
    two between."""
    write_hub(tmp_path, tiny_config(), shards=7, mtp=1)
    source, pieces = planned(tmp_path)
    assert sum(piece.size for piece in pieces) == sum(info.nbytes for info in source.hub.tensors.values())
    last = {name: n for n, piece in enumerate(pieces) for name in piece.shards}
    first = {name: n for n, piece in reversed(list(enumerate(pieces))) for name in piece.shards}
    assert len(first) == 7
    for n in range(len(pieces)):
        assert len([name for name in first if first[name] <= n <= last[name]]) <= 2
    experts = [piece for piece in pieces if re.search("_E(DI|ID)", piece.name)]
    assert all(len(piece.shards) == 1 for piece in experts) and len({*map(str, (p.shards for p in experts))}) > 3


class Log:
    """Shards that note what is asked of them."""
    identity, folder = {}, Path()

    def __init__(self):
        self.events, self.held, self.most = [], set(), 0

    def hashes(self):
        return {}

    def acquire(self, name):
        self.held.add(name)
        self.most = max(self.most, len(self.held))
        self.events.append(f"+{name}")

    def release(self, name):
        self.held.remove(name)
        self.events.append(f"-{name}")

    def stop(self):
        self.events.append("stop")


def pieces_of(*shards: str) -> list[Piece]:
    return [Piece(f"{n}", 1, frozenset(names), bytes) for n, names in enumerate(shards)]


def test_the_next_shard_is_fetched_ahead_and_a_consumed_one_dropped():
    log, pieces = Log(), pieces_of("", "a", "a", "ab", "b", "c", "", "c", "d")
    with Feed(log, pieces) as feed:
        for piece in pieces:
            assert feed.has_room(piece)
            feed.need(piece)
            assert piece.shards <= log.held
            feed.done(piece)
    assert log.events == ["+a", "+b", "-a", "+c", "-b", "+d", "-c", "-d"] and log.most == 2


def test_there_is_no_room_for_a_third_while_two_are_read():
    log, (first, second, third) = Log(), pieces_of("a", "b", "c")
    with Feed(log, [first, second, third]) as feed:
        feed.need(first)
        feed.need(second)
        assert not feed.has_room(third)
        feed.done(first)
        assert feed.has_room(third)
        feed.need(third)
        feed.done(second)
        feed.done(third)
    assert log.events == ["+a", "+b", "-a", "+c", "-b", "-c"]


@pytest.mark.parametrize("when", ["acquire", "release"])
def test_what_a_shard_raises_is_raised(when, monkeypatch):
    log, pieces = Log(), pieces_of("a", "b")

    def fail(name):
        raise CheckpointError(f"{name} is bad")
    monkeypatch.setattr(log, when, fail)
    with pytest.raises(CheckpointError, match="a is bad"), Feed(log, pieces) as feed:
        for piece in pieces:
            feed.need(piece)
            feed.done(piece)
    assert "stop" in log.events


@pytest.mark.parametrize("threads", [1, 8])
def test_a_conversion_holds_two_shards_at_most(tmp_path, out, monkeypatch, threads):
    """Also while many pieces are in the making."""
    write_hub(tmp_path / "hub", tiny_config(), shards=20, mtp=1)
    held, most, gone = set(), [0], set()

    def acquire(self, name):
        assert name not in held | gone
        held.add(name)
        most.append(len(held))

    def release(self, name):
        held.remove(name)
        gone.add(name)
    monkeypatch.setattr(LocalShards, "acquire", acquire)
    monkeypatch.setattr(LocalShards, "release", release)
    monkeypatch.setattr(LocalShards, "hashes", lambda self: {})
    monkeypatch.setattr("jaxllm.checkpoint.writer.THREADS", threads)
    convert(tmp_path / "hub", out, progress=False)
    assert (max(most), len(gone), held) == (2, 20, set())
    assert open_source(out).params == HubSource(tmp_path / "hub").params
