"""A converted folder is whole or not at all: what is in the way, what fails, what is killed, what is left."""
import fcntl
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_files import assert_same, edit_tensors, run

from jaxllm.checkpoint import CheckpointError, convert, open_source
from jaxllm.checkpoint.atomic import MARKER, work_folder
from jaxllm.checkpoint.hubsource import HubSource


def test_empty_folders_are_filled(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(hub, tmp_path / "empty", progress=False)
    (tmp_path / "behind").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    convert(hub, tmp_path / "link", progress=False)
    assert_same(hub, tmp_path / "empty")
    assert_same(hub, tmp_path / "behind")


def test_nothing_that_exists_is_touched(hub, out, tmp_path):
    def listing():
        return sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    for name in ("mine.txt", "config.json"):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.mkdir(parents=True)
        (out / name).write_text("mine")
        before = listing()
        with pytest.raises(CheckpointError, match=f"already holds something .*{name}.*nothing was changed"):
            convert(hub, out, progress=False)
        assert listing() == before
    with pytest.raises(CheckpointError, match="already holds something"):
        convert(hub, hub, progress=False)
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        convert(hub, hub / "config.json", progress=False)


def test_a_second_conversion_is_refused(hub, out):
    convert(hub, out, progress=False)
    with pytest.raises(CheckpointError, match="already holds something"):
        convert(hub, out, progress=False)
    assert_same(hub, out)


def test_a_folder_of_the_users_in_the_place_of_the_temporary_one(hub, out):
    work_folder(out).mkdir(parents=True)
    (work_folder(out) / "mine.txt").write_text("mine")
    for mark in (False, True):
        if mark:
            (work_folder(out) / MARKER).write_text("")
        with pytest.raises(CheckpointError, match="holds what jaxllm did not put there .*mine.txt"):
            convert(hub, out, progress=False)
        assert (work_folder(out) / "mine.txt").read_text() == "mine"


def test_a_checkpoint_that_is_not_whole_writes_nothing(hub, out):
    edit_tensors(hub, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="missing 1: model.norm.weight"):
        convert(hub, out, progress=False)
    assert not out.parent.exists()


def test_an_error_in_the_middle_leaves_nothing(hub, out, monkeypatch):
    def fail(self, path, index):
        raise CheckpointError("read failed")
    monkeypatch.setattr(HubSource, "read", fail)
    with pytest.raises(CheckpointError, match="read failed"):
        convert(hub, out, progress=False)
    assert os.listdir(out.parent) == []


def test_two_conversions_at_once(hub, out):
    """The second stops while the first holds its lock, and does not disturb it."""
    work = work_folder(out)
    work.mkdir(parents=True)
    with open(work / MARKER, "w") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is being filled by another process"):
            convert(hub, out, progress=False)
        assert os.listdir(work) == [MARKER]
    convert(hub, out, progress=False)
    assert_same(hub, out)


def test_a_disk_too_small_is_known_before(hub, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="needs .* bytes, but .* has 1000 free; nothing was written"):
        convert(hub, out, progress=False)
    assert not out.parent.exists()


def test_a_place_that_cannot_be_written(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    with pytest.raises(CheckpointError, match="/sys/jaxllm/out cannot be written: .*choose another place"):
        convert(hub, "/sys/jaxllm/out", progress=False)      # read-only even for root


def test_a_disk_that_fills_up(hub, out):
    """A limit on file size stands in for a full disk: the same failed write, without a disk of one's own."""
    done = run("""
import resource, sys
from jaxllm.checkpoint import CheckpointError, convert
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    convert(sys.argv[1], sys.argv[2], progress=False)
except CheckpointError as error:
    print(error)
""", hub, out)
    assert f"{out} cannot be written" in done.stdout and "File too large" in done.stdout, done.stderr
    assert "free space or choose another place" in done.stdout
    assert os.listdir(out.parent) == []


KILLED = """
import os, signal, sys
from jaxllm.checkpoint import atomic, convert, store
from jaxllm.checkpoint.hubsource import HubSource
def die_at(owner, name, call):
    count, real = 0, getattr(owner, name)
    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)
hub, out, *points = sys.argv[1:]
for point in points:
    owner, name, call = point.split(":")
    child = os.fork()      # before any JAX backend or thread pool starts
    if child == 0:
        die_at({"os": os, "atomic": atomic, "convert": sys.modules["jaxllm.checkpoint.convert"], "store": store,
                "HubSource": HubSource}[owner], name, int(call))
        convert(hub, f"{out}-{name}-{call}", progress=False)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
POINTS = {      # where a conversion is killed: what it leaves
    "convert:save_params:1": "work", "HubSource:read:1": "work", "HubSource:read:15": "work",
    "atomic:_flush:1": "work", "atomic:_sync:30": "work", "os:rename:2": "work", "os:unlink:1": "out",
}


def test_a_killed_conversion_is_never_taken_for_whole(hub, out):
    """kill -9 when the small files are copied, in the first and a middle block, before and in the flush to disk, before
    the last rename (Orbax's own is the first), before the mark is removed; then once more, to the end."""
    out.parent.mkdir()
    done = run(KILLED, hub, out, *POINTS)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(POINTS), done.stderr
    for point, left in POINTS.items():
        _, name, call = point.split(":")
        target = Path(f"{out}-{name}-{call}")
        assert target.exists() == (left == "out") and work_folder(target).exists() == (left == "work"), point
        for folder in (target, work_folder(target)):
            with pytest.raises(CheckpointError, match="again" if folder.exists() or left == "work" else "no model"):
                open_source(folder)
        convert(hub, target, progress=False)
        assert_same(hub, target)
        assert not work_folder(target).exists() and not (target / MARKER).exists()


def test_the_errors_of_an_interrupted_conversion_say_what_to_do(out):
    work_folder(out).mkdir(parents=True)
    (work_folder(out) / MARKER).write_text("")
    with pytest.raises(CheckpointError, match=f"interrupted, and is in {work_folder(out)}; .*run jaxllm convert again"):
        open_source(out)
    with pytest.raises(CheckpointError, match=f"is a conversion that is not finished: .* again into {out}$"):
        open_source(work_folder(out))
