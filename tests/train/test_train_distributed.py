"""A run of two processes with four devices each, over jax.distributed on loopback, against one process of eight.

Each process reads half of the rows, and has half of the FSDP shards.
"""
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_distributed import FOUR_DEVICES, LIMIT, free_port, wait
from test_loop import losses, settings

from jaxllm.train.loop import train
from jaxllm.train.run import Run

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys
import jax
coordinator, process, limit, resume, begun = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, 2, int(process), initialization_timeout=int(limit),
                           heartbeat_timeout_seconds=int(limit))
from jaxllm.train.loop import train
from jaxllm.train.run import Run
train(Run.from_dict(json.loads(begun), "test"), resume=bool(int(resume)), progress=False)
jax.distributed.shutdown()
"""


def in_two_processes(run: Run, folder: Path, resume: bool = False) -> None:
    address, children = f"127.0.0.1:{free_port()}", []
    logs = [folder / f"{process}.log" for process in range(2)]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAXLLM_COMPILE_CACHE": "off",
           "XLA_FLAGS": FOUR_DEVICES}
    try:
        for process, log in enumerate(logs):
            with log.open("a") as output:
                children.append(subprocess.Popen([sys.executable, "-c", WORKER, address, str(process), str(LIMIT),
                                                  str(int(resume)), run.to_json()], env=env, stdout=output,
                                                 stderr=subprocess.STDOUT))
        failure = wait(children)
    finally:
        for child in children:
            child.kill()      # SIGTERM would not do: jax.distributed catches it
            child.wait()
    if failure:
        pytest.fail("\n".join([failure, *(log.read_text()[-6000:] for log in logs)]))


def test_two_processes_have_the_numbers_of_one(tmp_path):
    """Loss and gradient's norm within 1e-5 over three steps; then one process goes on from the checkpoint of two."""
    (tmp_path / "logs").mkdir()
    run = settings(tmp_path / "two", mesh="data=2,expert=2,tensor=2", steps=3, warmup=0, decay=0, save_every=2,
                   learning_rate=1e-3)
    in_two_processes(run, tmp_path / "logs")
    train(dataclasses.replace(run, output=str(tmp_path / "one"), steps=4), progress=False)
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert two.keys() == {1, 2, 3}
    for step, found in two.items():
        assert all(abs(a - b) <= 1e-5 * max(1, abs(b)) for a, b in zip(found, one[step], strict=True)), step
    train(dataclasses.replace(run, steps=4), resume=True, progress=False)
    assert abs(losses(tmp_path / "two")[4][0] - one[4][0]) <= 1e-5
    assert json.loads((tmp_path / "two/checkpoints/3/manifest.json").read_text())["step"] == 3
