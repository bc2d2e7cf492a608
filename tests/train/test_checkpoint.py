"""Checkpoints of a run: what comes back, on which mesh, which are kept; kill -9, damage and a full disk."""
import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.axes import make_mesh
from jaxllm.checkpoint import CheckpointError
from jaxllm.train.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
IDENTITY = {"architecture": {"hidden_size": 64, "vocab_size": 96}, "tokenizer": {"tokenizer.json": "abc"}}
MESHES = ("data=1", "data=2,expert=2,tensor=2")
NUMBERS = 256      # times as many: 256 KB, which do not get smaller by compression


def state_on(mesh: str, step: int = 0) -> dict:
    sharding = NamedSharding(make_mesh(mesh), PartitionSpec("tensor", "data"))
    values = np.random.default_rng(step).standard_normal((NUMBERS, NUMBERS), np.float32)
    return {"step": jnp.int32(step), "trained": {"layers.0.w_DF": jax.device_put(values, sharding)},
            "opt_state": (jax.device_put(values.astype(jnp.bfloat16), sharding),)}


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def fill(folder: Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(folder, keep, IDENTITY) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_on("data=1", step), {"place": step})


def restore(folder: Path, identity=IDENTITY, wanted=None):
    """(what was restored, what was said on the way)."""
    said: list[str] = []
    with Checkpoints(folder, 3, identity) as checkpoints:
        return checkpoints.restore_latest(abstract(wanted or state_on("data=1")), said.append), said


@pytest.mark.parametrize("there", MESHES)
@pytest.mark.parametrize("here", MESHES)
def test_the_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, there, here):
    """Also where the saved arrays are given to the next step at once: nothing of what is written is the device's."""
    state = state_on(there, 7)
    expected = jax.tree.map(np.array, state)
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    with Checkpoints(tmp_path, 3, IDENTITY) as checkpoints:
        checkpoints.save(7, state, {"place": [1, "a"]})
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
    targets = abstract(state_on(here))
    with Checkpoints(tmp_path, 3, IDENTITY) as checkpoints:
        found = checkpoints.restore_latest(targets, pytest.fail)
    assert (found.step, found.data) == (7, {"place": [1, "a"]})
    for got, want, target in zip(*map(jax.tree.leaves, (found.state, expected, targets)), strict=True):
        assert got.dtype == want.dtype and got.sharding == target.sharding
        np.testing.assert_array_equal(got, want)


def test_as_many_as_wanted_are_kept(tmp_path):
    assert restore(tmp_path) == (None, [])
    fill(tmp_path, 8, 9, 10, 11, keep=2)
    with Checkpoints(tmp_path, 2, IDENTITY) as checkpoints:
        assert checkpoints.steps == [10, 11]      # by number, not by name
    manifest = json.loads((tmp_path / "11/manifest.json").read_text())
    assert (manifest["step"], manifest["arrays"]["trained/layers.0.w_DF"]) == (11, "float32[256, 256]")
    assert {name for name in manifest["files"]} >= {"_METADATA", "manifest.ocdbt"}


def largest(step: Path) -> Path:
    return max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "is damaged: other bytes than written": lambda step: flip(largest(step)),
    "has 10 bytes, expected": lambda step: largest(step).write_bytes(b"0" * 10),
    "_METADATA is missing": lambda step: (step / "_METADATA").unlink(),
    "manifest.json cannot be read": lambda step: (step / "manifest.json").unlink(),
    "manifest.json is damaged": lambda step: (step / "manifest.json").write_text(
        (step / "manifest.json").read_text().replace('"place": 2', '"place": 3')),
    "not valid JSON|manifest.json": lambda step: (step / "manifest.json").write_bytes(b"\xff{"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_step_is_set_aside_for_the_one_before(tmp_path, message):
    fill(tmp_path, 1, 2)
    DAMAGES[message](tmp_path / "2")
    found, said = restore(tmp_path)
    assert (found.step, found.data) == (1, {"place": 1})
    np.testing.assert_array_equal(found.state["trained"]["layers.0.w_DF"],
                                  state_on("data=1", 1)["trained"]["layers.0.w_DF"])
    assert len(said) == 1 and said[0].endswith("; set aside as 2.damaged; going on from step 1")
    assert any(part in said[0] for part in message.split("|"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged"]
    fill(tmp_path, 2)
    assert restore(tmp_path)[0].step == 2


def test_no_step_is_whole(tmp_path):
    fill(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip(largest(tmp_path / step))
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole: .*/2/.* is damaged.*; .*/1/.* is damaged"):
        restore(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_what_orbax_notes_beside_the_manifest_does_not_matter(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "1/_CHECKPOINT_METADATA").write_text("{")
    assert restore(tmp_path)[0].step == 1


def test_another_model_or_tokenizer_is_refused_by_what_differs(tmp_path):
    fill(tmp_path, 1)
    wider = {"hidden_size": 128, "vocab_size": 96, "head_dim": 8}
    with pytest.raises(CheckpointError, match="/1 is of another architecture: 2: head_dim is None there and 8 here, "
                                              "hidden_size is 64 there and 128 here"):
        restore(tmp_path, IDENTITY | {"architecture": wider})
    with pytest.raises(CheckpointError, match="/1 is of another tokenizer: 1: tokenizer.json is 'abc' there and 'd'"):
        restore(tmp_path, IDENTITY | {"tokenizer": {"tokenizer.json": "d"}})
    other = state_on("data=1")
    other["opt_state"] = (other["opt_state"][0], jnp.int32(0))
    with pytest.raises(CheckpointError, match=r"/1 holds other arrays .*: 1: opt_state/1 is None there and 'int32"):
        restore(tmp_path, wanted=other)


@pytest.fixture
def file_limit():
    """A limit on file size stands in for a full disk: the same failed write, without a disk of one's own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Of several writes that fail at once, Orbax hears one and has closed its event loop when the others come.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [100, 1000, 100_000])
def test_a_disk_that_fills_up(tmp_path, file_limit, size):
    """At the first file, at small ones, at the arrays; the step before is kept, and nothing else."""
    fill(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 2 could not be written into .* \(.*(File too "
                                              r"large|EFBIG|OUT_OF_RANGE).*\); the last whole one is step 1: free sp"):
        with Checkpoints(tmp_path, 1, IDENTITY) as checkpoints:
            file_limit(size)
            checkpoints.save(2, state_on("data=1", 2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    file_limit(resource.RLIM_INFINITY)
    assert restore(tmp_path)[0].step == 1


def test_a_disk_that_fills_up_at_the_manifest(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("jaxllm.train.checkpoint.Files.write", full)
    with pytest.raises(CheckpointError, match="step 1 could not be written .*No space left.*there is none before it"):
        fill(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_the_first_of_two_errors_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_seal", lambda self: 1 / 0)
    with pytest.raises(KeyError, match="of the loop"):
        with Checkpoints(tmp_path, 1, IDENTITY) as checkpoints:
            checkpoints.save(1, state_on("data=1", 1), {})
            raise KeyError("of the loop")


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
folder, *points = sys.argv[1:]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def die_halfway(path, *args, **kwargs):
    next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
    die()
for point in points:
    child = os.fork()      # before any JAX backend or thread pool starts
    if child == 0:
        import test_checkpoint
        from jaxllm.train import checkpoint
        test_checkpoint.fill(Path(folder, point), 1, 2)
        owner, name = {"seal": (checkpoint.Checkpoints, "_seal"), "manifest": (checkpoint.Files, "write"),
                       "rename": (os, "rename"), "remove": (shutil, "rmtree")}[point]
        setattr(owner, name, die_halfway if point == "remove" else die)
        test_checkpoint.fill(Path(folder, point), 3, keep=2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_kill_9_around_the_rename(tmp_path):
    """When all arrays are written; at the manifest; at the rename; while the oldest step is removed, which is after."""
    points = {"seal": 2, "manifest": 2, "rename": 2, "remove": 3}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *points], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/train'}"})
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(points), done.stderr
    for point, step in points.items():
        left = {path.name for path in (tmp_path / point).iterdir()}
        assert left == ({"1", "2", "3"} if step == 3 else {"1", "2", "3.orbax-checkpoint-tmp"}), point
        found, said = restore(tmp_path / point)
        assert (found.step, said) == (step, []), point
        fill(tmp_path / point, 4, keep=2)
        assert {path.name for path in (tmp_path / point).iterdir()} == {str(step), "4"}
    shutil.rmtree(tmp_path)
