"""One of the processes of test_distributed.py: joins the job, loads and generates, and writes down what it saw.

    python distributed_worker.py '{"coordinator": "127.0.0.1:1234", "process": 0, "num_processes": 2, "limit": SECONDS,
                                   "out": FILE, "loads": [[FOLDER, MESH, WHAT], ...]}'

WHAT names the texts that are written once the model is loaded: a key of TEXTS.
"""
import json
import sys
from collections import Counter
from pathlib import Path

import jax

import jaxllm
import jaxllm.generate.load
from jaxllm.checkpoint import open_source

PROMPTS = ["上海是", "The menu", "Der Drucker"]      # three: no multiple of the data axis
NUM_TOKENS = 24                                      # one block of 16 tokens, and part of a second one


class CountingSource:
    """A source of parameters that counts the bytes read of each, in `read_bytes`."""

    def __init__(self, folder):
        self.source = open_source(folder)
        self.folder, self.params, self.describe = self.source.folder, self.source.params, self.source.describe
        self.read_bytes = Counter()

    def read(self, path, index):
        values = self.source.read(path, index)
        self.read_bytes[path] += values.nbytes
        return values


def write(model, **settings):
    """[tokens, text, finish_reason] of each prompt."""
    found = model.generate(PROMPTS, max_new_tokens=NUM_TOKENS, **settings)
    return [[out.tokens, out.text, out.finish_reason] for out in found]


def write_drawn(model):
    return write(model, temperature=[0.8, 1.0, 0.0], top_p=0.95, top_k=50, seed=[7, 8, 9])


def write_all(model):
    """Greedy, up to a stop string that is the middle of the second text, and drawn with stated seeds."""
    greedy = write(model)
    text = greedy[1][1]
    stop = text[len(text) // 2:][:4]
    return {"greedy": greedy, "stop": stop, "stopped": write(model, stop=stop), "drawn": write_drawn(model)}


TEXTS = {
    "nothing": lambda model: {},
    "greedy": lambda model: {"greedy": write(model)},
    "drawn": lambda model: {"drawn": write_drawn(model), "unseeded": write(model, temperature=1.0, top_p=0.95)},
    "all": write_all,
}


def load_counted(folder, mesh):
    """The model, and the bytes that this process read of each parameter."""
    source = CountingSource(folder)
    jaxllm.generate.load.open_source = lambda *_: source
    return jaxllm.load(folder, mesh=mesh, dtype="float32"), dict(source.read_bytes)


def run(folder, mesh, what):
    model, read_bytes = load_counted(folder, mesh)
    return {"read_bytes": read_bytes} | TEXTS[what](model)


def refusal_of_a_mesh_without_all_devices():
    try:
        jaxllm.make_mesh("data=2")
    except ValueError as error:
        return str(error)


def main(job):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # the test has a time limit of its own; a process on a busy machine is not to be taken for dead before
    jax.distributed.initialize(job["coordinator"], job["num_processes"], job["process"],
                               initialization_timeout=job["limit"], heartbeat_timeout_seconds=job["limit"])
    found = {"num_devices": len(jax.devices()), "num_local_devices": len(jax.local_devices()),
             "refusal": refusal_of_a_mesh_without_all_devices(), "loads": [run(*load) for load in job["loads"]]}
    Path(job["out"]).write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
