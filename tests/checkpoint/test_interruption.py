"""A converted folder is whole or says that it is not: what is in the way, what fails, what is killed, what is gone on
with."""
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_files import assert_same, edit_json, edit_tensors, finished, interrupt, listing, run, tree
from hub_maker import tiny_config, write_hub

from jaxllm.checkpoint import CheckpointError, convert, open_source
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.incomplete import LOCK, MARKER, PLAN
from jaxllm.checkpoint.journal import JOURNAL
from jaxllm.checkpoint.manifest import MANIFEST


def test_empty_folders_are_filled(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(hub, tmp_path / "empty", progress=False)
    (tmp_path / "behind").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    convert(hub, tmp_path / "link", progress=False)
    assert_same(hub, tmp_path / "empty")
    assert_same(hub, tmp_path / "behind")


@pytest.mark.parametrize("resume", [False, True])
def test_nothing_that_exists_is_touched(hub, out, tmp_path, resume):
    for name in ("mine.txt", "config.json", "params/mine.txt"):
        shutil.rmtree(out.parent, ignore_errors=True)
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        before = listing(tmp_path)
        with pytest.raises(CheckpointError, match="already holds something .*(mine|config|params).*was changed"):
            convert(hub, out, resume=resume, progress=False)
        assert listing(tmp_path) == before
    with pytest.raises(CheckpointError, match="already holds something"):
        convert(hub, hub, resume=resume, progress=False)
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        convert(hub, hub / "config.json", resume=resume, progress=False)


def test_a_second_conversion_is_refused(hub, out):
    convert(hub, out, progress=False)
    with pytest.raises(CheckpointError, match="already holds something"):
        convert(hub, out, progress=False)
    assert_same(hub, out)


def test_a_checkpoint_that_is_not_whole_writes_nothing(hub, out):
    edit_tensors(hub, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="missing 1: model.norm.weight"):
        convert(hub, out, progress=False)
    assert not out.parent.exists()


def test_a_disk_too_small_is_known_before(hub, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="needs .* bytes, but .* has 1000 free; nothing was written"):
        convert(hub, out, progress=False)
    assert not out.parent.exists()


def test_a_place_that_cannot_be_written(hub, monkeypatch):
    with pytest.raises(CheckpointError, match="/sys/jaxllm/out cannot be written: .*choose another place"):
        convert(hub, "/sys/jaxllm/out", progress=False)      # read-only even for root


def test_what_is_finished_is_not_made_again(hub, out, tmp_path, monkeypatch):
    """Nor read: of a finished chunk, the source is not asked again."""
    interrupt(hub, out, monkeypatch)
    before, done = listing(out), finished(out)
    chunks = {path for path in done if re.match(r"\d", path.name)}
    assert len(chunks) == 9 and chunks < done
    with pytest.raises(CheckpointError, match="is a conversion .*that is not finished: .* again with --resume"):
        open_source(out)
    with pytest.raises(CheckpointError, match="was interrupted: run again with --resume, or delete it"):
        convert(hub, out, progress=False)
    assert listing(out) == before
    reads = []
    monkeypatch.setattr(HubSource, "read", lambda self, path, index, real=HubSource.read: (
        reads.append(path), real(self, path, index))[1])
    convert(hub, out, resume=True, progress=False)
    after = listing(out)
    assert all(after[path] == before[path] for path in done)
    num_chunks = len(list(out.glob("params/*/[0-9]*")))
    assert len(reads) == num_chunks - len(chunks)
    convert(hub, tmp_path / "at once", progress=False)
    assert tree(out) == tree(tmp_path / "at once")
    assert_same(hub, out)


def test_a_finished_file_that_was_damaged_is_made_again(hub, out, tmp_path, monkeypatch):
    interrupt(hub, out, monkeypatch)
    first, second, third, *_ = sorted(path for path in finished(out) if path.parent.name.startswith("layers"))
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    second.unlink()
    third.write_bytes(b"")
    convert(hub, out, resume=True, progress=False)
    convert(hub, tmp_path / "at once", progress=False)
    assert tree(out) == tree(tmp_path / "at once")


def test_a_whole_folder_is_repaired(hub, out, monkeypatch):
    """With --resume a whole folder is checked, and what is damaged is made again; nothing else is written."""
    convert(hub, out, progress=False)
    whole, before = tree(out), listing(out)
    (out / "config.json").write_text("{}")
    (out / "params/head_DW/0.0").unlink()
    convert(hub, out, resume=True, progress=False)
    after = listing(out)
    assert tree(out) == whole
    changed = {path.name for path in after if path.is_file() and after[path] != before[path]}
    assert changed == {"config.json", "0.0", MANIFEST}


def test_resume_where_nothing_is(hub, out):
    """A kill may have come before anything was written, or before there was a plan."""
    convert(hub, out, resume=True, progress=False)
    shutil.rmtree(out)
    (out / MARKER).mkdir(parents=True)
    (out / LOCK).touch()
    with pytest.raises(CheckpointError, match="not finished"):
        open_source(out)
    convert(hub, out, resume=True, progress=False)
    assert_same(hub, out)


def test_an_error_before_the_plan_leaves_the_mark_of_an_earlier_run_or_none(hub, out, monkeypatch):
    interrupt(hub, out, monkeypatch)
    before = tree(out)
    with pytest.raises(ValueError, match="no such file"):
        convert(hub / "absent", out, resume=True, progress=False)
    assert tree(out) == before
    shutil.rmtree(out)
    convert(hub, out, progress=False)
    before = tree(out)
    with pytest.raises(ValueError, match="no such file"):
        convert(hub / "absent", out, resume=True, progress=False)
    assert tree(out) == before


def change_tensor(hub):
    edit_tensors(hub, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 7))


def add_tokenizer(hub):
    (hub / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(("change", "message"), [
    (change_tensor, "model.safetensors of the source has the SHA-256 [0-9a-f]{64}, then [0-9a-f]{64}; go on with"),
    (add_tokenizer, "tokenizer.json of the source has the SHA-256 [0-9a-f]{64}, then there was none"),
    (lambda hub: edit_json(hub / "config.json", lambda config: config.update(rope_theta=1e4)),
     "config.json of the source has"),
])
@pytest.mark.parametrize("whole", [False, True])
def test_another_source_is_refused(hub, out, monkeypatch, change, message, whole):
    if whole:
        convert(hub, out, progress=False)
    else:
        interrupt(hub, out, monkeypatch)
    change(hub)
    before = tree(out)
    with pytest.raises(CheckpointError, match=f"another source or with other options: {message}"):
        convert(hub, out, resume=True, progress=False)
    assert tree(out) == before


def test_other_options_are_refused(hub, out, monkeypatch):
    interrupt(hub, out, monkeypatch)
    edit_json(out / PLAN, lambda plan: plan["options"].update(weights="int4"))
    with pytest.raises(CheckpointError, match="weights is 'keep', then 'int4'; go on with those it was begun with"):
        convert(hub, out, resume=True, progress=False)
    edit_json(out / PLAN, lambda plan: plan.update(format=0))
    with pytest.raises(CheckpointError, match="plan.json has the format 0, this jaxllm reads 1; use the version"):
        convert(hub, out, resume=True, progress=False)


def test_weights_in_another_form_are_resumed_in_that_form(hub, out):
    convert(hub, out, weights="mxfp4", progress=False)
    before = tree(out)
    (out / "params/layers.1.moe.gate_EDI.codes/3.0.0").unlink()
    convert(hub, out, weights="mxfp4", resume=True, progress=False)
    assert tree(out) == before
    for weights, changes, message in (("mxfp4", {"classes": ["dense"]}, "classes is .'dense'., then .'experts'."),
                                      ("int4", {}, "weights is 'int4', then 'mxfp4'")):
        with pytest.raises(CheckpointError, match=message):
            convert(hub, out, weights=weights, **changes, resume=True, progress=False)
    assert tree(out) == before


def test_a_journal_that_a_loss_of_power_spoilt(hub, out, monkeypatch):
    interrupt(hub, out, monkeypatch)
    for piece in out.glob(f"{JOURNAL}*"):
        piece.write_bytes(b"")
    convert(hub, out, resume=True, progress=False)
    assert_same(hub, out)


@pytest.mark.parametrize("resume", [False, True])
def test_two_conversions_at_once(hub, out, monkeypatch, resume):
    """The second is refused while the first runs, and does not disturb it."""
    refused = []

    def read(self, path, index, real=HubSource.read):
        if not refused:
            refused.append(path)
            with pytest.raises(CheckpointError, match="is being filled by another process; wait for it"):
                convert(hub, out, resume=resume, progress=False)
        return real(self, path, index)
    monkeypatch.setattr(HubSource, "read", read)
    convert(hub, out, progress=False)
    assert refused
    assert_same(hub, out)


FULL = """
import resource, sys
from jaxllm.checkpoint import CheckpointError, convert, journal
hub, out, limit = sys.argv[1:]
journal.EVERY_SECONDS = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    convert(hub, out, progress=False)
except CheckpointError as error:
    print(error)
"""


def test_a_disk_that_fills_up(hub, out, tmp_path):
    """A limit on file size stands in for a full disk: the same failed write, without a disk of one's own."""
    done = run(FULL, hub, out, 25_000)
    assert f"{out} cannot be written" in done.stdout and "File too large" in done.stdout, done.stderr
    assert "what is finished is kept: free space, and run again with --resume" in done.stdout
    before, kept = listing(out), finished(out)
    assert any(path.name == "0.0" for path in kept)
    convert(hub, out, resume=True, progress=False)
    after = listing(out)
    assert all(after[path] == before[path] for path in kept)
    convert(hub, tmp_path / "at once", progress=False)
    assert tree(out) == tree(tmp_path / "at once")


def test_a_disk_that_is_full_from_the_start(hub, out):
    done = run(FULL, hub, out, 10)
    assert f"{out} cannot be written" in done.stdout and "free space or choose another place" in done.stdout
    assert not out.parent.exists()


KILLED = """
import os, signal, sys
from jaxllm.checkpoint import convert, hubsource, incomplete, journal, manifest
from jaxllm.checkpoint.files import Files
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
owners = {"convert": sys.modules["jaxllm.checkpoint.convert"], "HubSource": hubsource.HubSource, "Files": Files,
          "Journal": journal.Journal, "incomplete": incomplete}
for point in points:
    owner, name, call = point.split(":")
    child = os.fork()      # before any JAX backend or thread pool starts
    if child == 0:
        die_at(owners[owner], name, int(call))
        convert(hub, f"{out}-{owner}-{name}-{call}", progress=False)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
POINTS = ["incomplete:_locked:1", "convert:open_shards:1", "Journal:flush:1", "Files:write:1", "convert:write_pieces:1",
          "HubSource:read:1", "HubSource:read:15", "Journal:add:30", "convert:write_manifest:1", "Files:flush:1",
          "incomplete:sync:1", "Files:delete:1", "Files:remove:1"]


def test_a_killed_conversion_is_never_taken_for_whole(hub, out, tmp_path):
    """kill -9 when the folder is marked, before the plan, in the first and a middle chunk, at the manifest, in the
    flush to disk, before the plan and the mark are removed; then once more, to the end."""
    out.parent.mkdir()
    done = run(KILLED, hub, out, *POINTS)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(POINTS), done.stderr
    convert(hub, tmp_path / "at once", progress=False)
    for point in POINTS:
        target = Path(f"{out}-{point.replace(':', '-')}")
        with pytest.raises(CheckpointError, match="is a conversion .*that is not finished: .* again with --resume"):
            open_source(target)
        with pytest.raises(CheckpointError, match="was interrupted: run again with --resume"):
            convert(hub, target, progress=False)
        convert(hub, target, resume=True, progress=False)
        assert tree(target) == tree(tmp_path / "at once"), point


AT_RANDOM = """
import os, random, signal, sys, time
from jaxllm.checkpoint import convert, journal
hub, out, seed, count = sys.argv[1:]
def start(number):
    child = os.fork()
    if child == 0:
        convert(hub, f"{out}-{number}", progress=False)
        os._exit(0)
    return child
begin = time.monotonic()
os.waitpid(start("whole"), 0)
whole, moments = time.monotonic() - begin, random.Random(int(seed))
for number in range(int(count)):
    child = start(number)
    time.sleep(moments.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_kill_9_at_random_moments(tmp_path):
    """20 of them, spread over a conversion. Whatever is left is refused, and gone on with to the same bytes; what was
    noted as finished is not written again."""
    hub, out, count = tmp_path / "hub", tmp_path / "out", 20
    write_hub(hub, tiny_config(), shards=3, mtp=1)
    assert run(AT_RANDOM, hub, out, 0, count).returncode == 0
    expected, interrupted = tree(Path(f"{out}-whole")), 0
    for number in range(count):
        target = Path(f"{out}-{number}")
        if (target / MARKER).exists():
            interrupted += 1
            with pytest.raises(CheckpointError, match="is a conversion .*that is not finished"):
                open_source(target)
        before, kept = listing(target), finished(target)
        convert(hub, target, resume=True, progress=False)
        after = listing(target)
        assert all(after[path] == before[path] for path in kept)
        assert tree(target) == expected
    assert interrupted > count / 4      # the others were killed before the first file or after the last
