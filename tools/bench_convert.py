"""Peak memory and time of converting and loading a 2 GB checkpoint, as a table; about a minute and 5 GB of disk.

    python tools/bench_convert.py [--folder DIR]

Each step runs in a process of its own, whose peak resident memory (VmHWM, interpreter and imports included) is read at
its end. Loading onto CPU devices keeps the model in that same memory, so the column "above the model" is what counts.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

CONFIG = {
    "model_type": "mimo_v2_flash", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
    "vocab_size": 98304, "max_position_embeddings": 4096, "layernorm_epsilon": 1e-5, "hidden_act": "silu",
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "rope_theta": 5e6,
    "moe_layer_freq": [0, 1, 1, 1], "n_routed_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1024,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
BLOCK = 2**24      # elements written at once


def write_hub(folder: Path) -> int:
    """A random bfloat16 checkpoint of CONFIG in one file, never more than a block in memory. Returns its bytes."""
    from jaxllm.checkpoint.names import Table
    from jaxllm.config import Config
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header, position = {}, 0
    for name, shape in Table(Config.from_hub(folder)).shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(BLOCK, np.float32).astype(ml_dtypes.bfloat16).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, position, len(noise)):
            file.write(noise[:position - start])
    return position


STEPS = {
    "imports alone": "import jaxllm.checkpoint, jax; jax.devices()",
    "convert": "from jaxllm.checkpoint import convert; convert('hub', 'out', progress=False)",
    "load hub, 1 device": "LOAD('hub', 1)", "load converted, 1 device": "LOAD('out', 1)",
    "load hub, 8 devices": "LOAD('hub', 8)", "load converted, 8 devices": "LOAD('out', 8)",
}
PRELUDE = '''
def LOAD(folder, tensor):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxllm.checkpoint import load_arrays, open_source
    mesh, source = jax.make_mesh((1, 1, tensor), ("data", "expert", "tensor")), open_source(folder)
    def spec(path):      # what a tensor-parallel model does: heads, vocabulary and hidden dims are cut, kv heads too
        return PartitionSpec(*["tensor" if letter in "NWFI" else None for letter in path.rsplit("_", 1)[-1]])
    arrays = load_arrays(source, {path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(path)))
                                  for path, (shape, dtype) in source.params.items()})
    jax.block_until_ready(arrays)
'''
REPORT = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"


def measure(code: str, folder: Path) -> tuple[float, float]:
    """(seconds, peak MB) of a fresh interpreter that runs `code` in `folder`."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                        "PYTHONPATH": str(Path(__file__).parent.parent)}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PRELUDE + code + REPORT], cwd=folder, env=env, check=True,
                          stdout=subprocess.PIPE, text=True)
    return time.monotonic() - start, int(done.stdout.split()[-1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as temporary:
        folder = Path(temporary)
        (folder / "hub").mkdir()
        nbytes = write_hub(folder / "hub")
        print(f"checkpoint of {nbytes / 1e9:.2f} GB\n{'':28}{'seconds':>9}{'peak MB':>9}{'above the model':>17}")
        for name, code in STEPS.items():
            seconds, peak = measure(code, folder)
            above = f"{peak - nbytes / 1e6:17.0f}" if name.startswith("load") else ""
            print(f"{name:28}{seconds:9.1f}{peak:9.0f}{above}", flush=True)


if __name__ == "__main__":
    main()
