"""Two processes of four devices each, over jax.distributed on loopback, against one process of eight.

Each test looks at one side of the same two runs, which distributed_worker.py makes. Texts are compared exactly: sums in
another order move logits by 1e-5, and the closest of the greedy choices is decided by 3.8e-3.
"""
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_worker import NUM_TOKENS, write_all
from hub_maker import tiny_config, write_hub

import jaxllm
from jaxllm.checkpoint import open_source

NANO = Path(__file__).parent.parent / "configs" / "mimo-nano"      # lends its tokenizer
WORKER = Path(__file__).parent / "distributed_worker.py"
LIMIT = 480      # seconds; about 30 on two idle cores
FOUR_DEVICES = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"     # the last of a flag counts
MESH = "data=2,expert=2,tensor=2"
WHAT = {(MESH, "hub"): "all", (MESH, "converted"): "greedy", ("expert=2,tensor=4", "hub"): "drawn"}
LOADS = [(kind, mesh, WHAT.get((mesh, kind), "nothing"))
         for mesh in (MESH, "expert=2,tensor=4", "expert=8", "tensor=8") for kind in ("hub", "converted")]

# What the two processes share between them, by the end of a parameter's name; of the rest each reads all. The first has
# the first four devices in the order data, expert, tensor: half of each matrix, and on 1x1x8 half of the heads.
MATRICES = ("gate_EDI", "up_EDI", "down_EID", "embed_WD", "head_DW", "gate_DF", "up_DF", "down_FD", "q_DNH", "k_DKH",
            "v_DKV", "o_NVD", "router_DE")
SHARED = {MESH: MATRICES, "expert=2,tensor=4": MATRICES, "expert=8": MATRICES, "tensor=8": (*MATRICES, "sink_N")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with every kind of layer that mimo-nano's tokenizer fits, in both formats."""
    hub = tmp_path_factory.mktemp("model") / "hub"
    write_hub(hub, tiny_config(vocab_size=8192, num_hidden_layers=3, hybrid_layer_pattern=[0, 1, 0],
                               moe_layer_freq=[0, 1, 1]))
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(NANO / file, hub)
    return {"hub": hub, "converted": jaxllm.convert(hub, hub.parent / "converted", progress=False).folder}


@pytest.fixture(scope="module")
def one_process(folders):
    return write_all(jaxllm.load(folders["hub"], mesh=MESH, dtype="float32"))


@pytest.fixture(scope="module")
def processes(folders, tmp_path_factory):
    """What each of the two processes wrote down."""
    folder = tmp_path_factory.mktemp("processes")
    outs, logs = ([folder / f"{process}.{kind}" for process in range(2)] for kind in ("json", "log"))
    job = {"coordinator": f"127.0.0.1:{free_port()}", "num_processes": 2, "limit": LIMIT,
           "loads": [(str(folders[kind]), mesh, what) for kind, mesh, what in LOADS]}
    children = []
    try:
        for process in range(2):
            children.append(start(job | {"process": process, "out": str(outs[process])}, logs[process]))
        failure = wait(children)
    finally:
        for child in children:
            child.kill()      # SIGTERM would not do: jax.distributed catches it
            child.wait()
    if failure:
        pytest.fail("\n".join([failure, *(f"--- {log.name}:\n{log.read_text()[-6000:]}" for log in logs)]))
    return [json.loads(out.read_text()) for out in outs]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(job, log):
    environment = os.environ | {"XLA_FLAGS": FOUR_DEVICES, "JAX_PLATFORMS": "cpu", "JAXLLM_COMPILE_CACHE": "off"}
    with log.open("w") as output:
        return subprocess.Popen([sys.executable, "-W", "error", str(WORKER), json.dumps(job)], env=environment,
                                stdout=output, stderr=subprocess.STDOUT)


def wait(children):
    """None once all have ended well, else what went wrong: at the first failure, since the peer would wait for ever."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if any(codes) or None not in codes:
            return f"exit codes {codes}" if any(codes) else None
        time.sleep(0.2)
    return f"not done after {LIMIT} s"


def test_each_process_sees_all_devices_and_owns_four(processes):
    assert [(found["num_devices"], found["num_local_devices"]) for found in processes] == [(8, 4), (8, 4)]


@pytest.mark.parametrize("what", ["greedy", "stopped", "drawn"])
def test_both_write_what_one_process_writes(processes, one_process, what):
    for found in processes:
        assert found["loads"][0][what] == one_process[what]


def test_what_was_compared_is_worth_it(one_process):
    """Full lengths, a text that stops at a string in its second half, draws that differ from the likeliest tokens."""
    greedy, stopped, drawn = (one_process[what] for what in ("greedy", "stopped", "drawn"))
    assert all(len(tokens) == NUM_TOKENS and reason == "length" for tokens, _, reason in greedy)
    tokens, text, reason = stopped[1]
    assert reason == "stop" and len(tokens) < NUM_TOKENS and text == greedy[1][1].split(one_process["stop"])[0] != ""
    assert [row[0] == other[0] for row, other in zip(drawn, greedy, strict=True)] == [False, False, True]


def test_the_converted_copy_writes_the_same(processes, one_process):
    for found in processes:
        assert found["loads"][LOADS.index(("converted", MESH, "greedy"))]["greedy"] == one_process["greedy"]


def test_experts_and_heads_split_between_processes(processes, one_process):
    """On 1x2x4 the first process has half of the experts: their sums go from process to process in every layer.

    All rows lie on both processes, so both must draw alike, also with a seed that nobody stated.
    """
    first, second = (found["loads"][LOADS.index(("hub", "expert=2,tensor=4", "drawn"))] for found in processes)
    assert first["drawn"] == second["drawn"] == one_process["drawn"]
    assert first["unseeded"] == second["unseeded"]


@pytest.mark.parametrize("load", LOADS, ids="-".join)
def test_each_process_reads_its_own_slices(processes, folders, load):
    kind, mesh, _ = load
    params = open_source(folders[kind]).params
    whole = {path: math.prod(shape) * dtype.itemsize for path, (shape, dtype) in params.items()}
    own = {path: nbytes // 2 if path.endswith(SHARED[mesh]) else nbytes for path, nbytes in whole.items()}
    for found in processes:
        assert found["loads"][LOADS.index(load)]["read_bytes"] == own
    assert sum(own.values()) < 0.501 * sum(whole.values())      # all but norms


def test_a_mesh_that_leaves_devices_out_is_refused(processes):
    expected = "the mesh has 2 devices, but this job's 2 processes have 8: every process must take part"
    for found in processes:
        assert expected in found["refusal"]
