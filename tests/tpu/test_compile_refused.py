"""What `jaxllm compile` refuses, before it compiles anything, and what libtpu in other hands changes: nothing."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.cli import main

LIBTPU = Path(sys.prefix, "libtpu")

CONFIG = str(Path(__file__).parent.parent.parent / "configs" / "MiMo-V2.6-Pro")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--on", "v6e:3x3"], r"slice 'v6e:3x3': unknown; nearest is 'v6e:"),
    (["--on", "gpu:8x32GB"], "--on rtx5090:8: only TPU slices can be compiled for without the chip"),
    (["--on", "v6e:8x8", "--mesh", "expert=7"], "the mesh has 7 devices, but the slice has 64: all must take part"),
    (["--on", "v6e:16x16", "--mesh", "expert=256"], "n_routed_experts = 384 cannot be split over mesh axis expert ="),
    (["--on", "v6e:2x2", "--mesh", "expert=64"], "needs 64 devices, but there are 4"),
    (["--on", "v6e:8x8", "--batch", "-1"], "batch = -1: expected a positive whole number"),
    (["--on", "v6e:8x8", "--tokens", "0", "--step", "verify"], "tokens = 0: expected a positive whole number"),
    (["--on", "v6e:8x8", "--context", "2000000"], "context = 2000000 is more than the model's 1048576"),
    (["--on", "v6e:8x8", "--resident-experts", "4"], "--resident-experts goes with --mesh"),
    (["--on", "v6e:8x8", "--mesh", "expert=8,tensor=8", "--resident-experts", "7"],
     "resident_experts = 7: a device has 6 experts of each layer (of 384, in 64 parts over the mesh)"),
    (["--on", "v6e:8x8", "--mesh", "data=64", "--batch", "8"], "batch = 8 cannot be split over mesh axis data = 64"),
])
def test_refused(libtpu, capsys, arguments, message):
    assert main(["compile", CONFIG, *arguments]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_too_little_memory(libtpu, capsys):
    """A mesh that is asked for is compiled for, whatever the plan says; what the compiler finds is one line."""
    nano = str(Path(CONFIG).parent / "mimo-nano")
    assert main(["compile", nano, "--on", "v6e:2x2", "--mesh", "expert=4", "--batch", "65536", "--context",
                 "4096"]) == 2
    assert "exceeds available HBM (31.25G)" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_while_another_process_holds_libtpu(libtpu):
    """libtpu lets one process in, by a lock file; compiling needs no device, and goes on."""
    def python(*arguments):
        return subprocess.Popen([sys.executable, *arguments], env=env, stdin=-1, stdout=-1, stderr=-1, text=True)
    env = {name: value for name, value in os.environ.items() if name != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    env |= {"PYTHONPATH": str(LIBTPU), "TPU_SKIP_MDS_QUERY": "1"}
    hold = ("import sys; from jax.experimental import topologies as t; "
            "print(len(t.get_topology_desc('v6e:2x2', platform='tpu').devices), flush=True); sys.stdin.read()")
    with python("-c", hold) as holder:
        assert holder.stdout.readline() == "4\n"
        with python("-c", hold) as another, python("-m", "jaxllm", "compile", CONFIG, "--on", "v6e:8x8", "--mesh",
                                                   "expert=7") as ours:
            assert "libtpu_lockfile" in another.communicate()[1] and another.returncode
            assert "the mesh has 7 devices, but the slice has 64" in ours.communicate()[1] and ours.returncode == 2


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["compile", CONFIG, "--on", "v6e:8x8"]) == 2
    assert "XLA's TPU compiler is needed, which is in libtpu" in (error := capsys.readouterr().err)
    assert "pip install 'jaxllm[tpu]'" in error
