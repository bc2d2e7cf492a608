"""Make tests/golden/packed/*.npz: what other implementations read out of packed weights in released layouts.

    python tools/make_packed_golden.py [CASE ...]      # in the environment that tests/golden/README.md describes

The cases are those of tests/release_cases.py, written by make_release.py. A file holds, for each source and each packed
matrix, the SHA-256 of its values and a few of them; the weights themselves are made again by the test.

`codes.npz`: every FP8 code, every byte of two FP4 codes and every E8M0 exponent as torch and transformers take them.

llama.cpp     its converter (conversion/mimo.py), float32 out of FP8, experts left in MXFP4 and decoded by gguf-py
transformers  Fp8Dequantize, which is given single matrices; it takes neither fused nor partial blocks
sglang-jax    WeightLoader.dequant_fused_kv, which gives bfloat16; split k and v alone, no partial blocks
"""
import ast
import hashlib
import json
import math
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from llamacpp import SOURCES, convert_to_gguf
from make_release import write_release

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "packed"
SGLANG_JAX = Path(sys.prefix) / "sglang-jax" / "weight_utils.py"
SGLANG_COMMIT = "cddbf6f1cc33cbdd453bd8f36ff7051cf46ca176"
SEED = 1
# [Q; K; V] and one rank are refused by llama.cpp's converter; in the others there is nothing to be learned from it.
UNREAD = ("v25_plain", "one_kv_head", "one_kv_head_split", "bfloat16")

sys.path.insert(0, str(ROOT / "tests"))
from release_cases import CASES  # noqa: E402  (needs the path above)
from release_reader import read_tensors  # noqa: E402

Matrices = Iterator[tuple[str, np.ndarray]]      # hub name, float32 [out, in]


# ---- llama.cpp -----------------------------------------------------------------------------------------------------

def read_llamacpp(folder: Path, config: dict[str, Any]) -> Matrices:
    with tempfile.TemporaryDirectory() as scratch:
        convert_to_gguf(folder, Path(scratch) / "model.gguf", with_mtp=True)
        import gguf
        for tensor in gguf.GGUFReader(Path(scratch) / "model.gguf").tensors:
            match = re.fullmatch(r"blk\.(\d+)\.(attn_q|attn_k|attn_v|attn_qkv|ffn_\w+?)(_exps)?\.weight", tensor.name)
            if match and match[2] in GGUF_NAMES:
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
                yield from name_llamacpp(config, int(match[1]), match[2], values)


GGUF_NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_qkv": "self_attn.qkv_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj"}


def name_llamacpp(config: dict[str, Any], block: int, part: str, values: np.ndarray) -> Matrices:
    """Hub names: MTP blocks come after the layers, experts are stacked, qkv is [Q; K; V]."""
    layers = config["num_hidden_layers"]
    prefix = f"model.layers.{block}" if block < layers else f"model.mtp.layers.{block - layers}"
    name = f"{prefix}.{GGUF_NAMES[part]}.weight"
    if part == "attn_qkv":
        swa = "" if block < layers and not config["hybrid_layer_pattern"][block] else "swa_"
        N, K, H, V = (config[swa + key] for key in
                      ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
        for letter, rows in zip("qkv", np.split(values, [N * H, (N + K) * H]), strict=True):
            yield name.replace("qkv", letter), rows
        assert values.shape[0] == N * H + K * (H + V)
    elif values.ndim == 3:
        for e, matrix in enumerate(values):
            yield name.replace(".mlp.", f".mlp.experts.{e}."), matrix
    else:
        yield name, values


# ---- transformers --------------------------------------------------------------------------------------------------

def read_transformers(folder: Path, config: dict[str, Any]) -> Matrices:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    dequantize, stored = Fp8Dequantize(None)._dequantize_one, read_tensors(folder)
    for name, codes in stored.items():
        if f"{name}_scale_inv" in stored and "qkv" not in name and all(size % 128 == 0 for size in codes.shape):
            weight = torch.from_numpy(codes.view(np.uint8).copy()).view(torch.float8_e4m3fn)
            scale = torch.from_numpy(stored[f"{name}_scale_inv"].copy())
        elif f"{name}_scale" in stored:
            weight = torch.from_numpy(codes.copy()).view(torch.int8)
            scale = torch.from_numpy(stored[f"{name}_scale"].copy())
        else:
            continue
        yield name, dequantize(weight, scale, torch.float32).numpy()


# ---- sglang-jax ----------------------------------------------------------------------------------------------------

def read_sglang_jax(folder: Path, config: dict[str, Any]) -> Matrices:
    """The two methods, taken out of their file: the package itself wants a TPU stack."""
    stored = {name: value for name, value in read_tensors(folder).items() if re.search("[kv]_proj", name)}
    if config["hidden_size"] % 128 or not any(name.endswith("_scale_inv") for name in stored):
        return
    loader, layers = sglang_loader(), {}
    for slides in (0, 1):                                    # it takes one pair of head sizes at a time
        buffers = {}
        for i in (i for i, kind in enumerate(config["hybrid_layer_pattern"]) if kind == slides):
            prefix = f"model.layers.{i}.self_attn"
            buffers[i] = {f"{part}_{kind}": loader.jnp.asarray(stored[f"{prefix}.{part}_proj.weight{suffix}"])
                          for part in "kv" for kind, suffix in (("weight", ""), ("scale", "_scale_inv"))}
            layers[i] = types.SimpleNamespace(self_attn=types.SimpleNamespace())
        swa = "swa_" if slides else ""
        sizes = types.SimpleNamespace(head_dim=config[f"{swa}head_dim"], v_head_dim=config[f"{swa}v_head_dim"])
        loader.dequant_fused_kv(buffers, layers, sizes)
    for i, layer in layers.items():
        for part in "kv":
            matrix = np.asarray(getattr(layer.self_attn, f"{part}_proj"))      # transposed: [in, out]
            assert matrix.dtype == ml_dtypes.bfloat16
            yield f"model.layers.{i}.self_attn.{part}_proj.weight", matrix.T.astype(np.float32)


def sglang_loader() -> Any:
    import logging

    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec
    tree = ast.parse(SGLANG_JAX.read_text())
    methods = [node for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for node in cls.body
               if getattr(node, "name", "") in ("dequant_fused_kv", "_uniform_block_dequant")]
    space: dict[str, Any] = {"jax": jax, "jnp": jnp, "P": PartitionSpec, "math": math, "logger": logging.getLogger()}
    holder = ast.ClassDef("Loader", bases=[], keywords=[], body=methods, decorator_list=[], type_params=[])
    exec(compile(ast.fix_missing_locations(ast.Module([holder], [])), str(SGLANG_JAX), "exec"), space)
    loader = space["Loader"]()
    loader.jnp, loader.mesh = jnp, jax.make_mesh((1,), ("tensor",))
    loader.create_bf16_linear = lambda weight, axes, mesh: weight
    return loader


# ---- files ---------------------------------------------------------------------------------------------------------

READERS = {"llama.cpp": read_llamacpp, "transformers": read_transformers, "sglang-jax": read_sglang_jax}


def digest(values: np.ndarray) -> str:
    """Of the float32 bytes; minus zero counts as zero, since one decoder of MXFP4 has no sign for it."""
    return hashlib.sha256((np.ascontiguousarray(values, "<f4") + np.float32(0)).tobytes()).hexdigest()


def stored_digest(folder: Path) -> str:
    """Of names and bytes of every tensor in the folder, in name order."""
    whole = hashlib.sha256()
    for name, value in sorted(read_tensors(folder).items()):
        whole.update(name.encode() + value.tobytes())
    return whole.hexdigest()


def make(case: str) -> None:
    config, options = CASES[case]
    rows: list[tuple[str, str, str, np.ndarray]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_release(config, folder, seed=SEED, **options)
        written, weights = json.loads((folder / "config.json").read_text()), stored_digest(folder)
        for source, read in READERS.items():
            rows += [(source, name, digest(values), values.reshape(-1)[::values.size // 16 + 1])
                     for name, values in sorted(read(folder, written))]
    sources, names, digests, samples = zip(*rows, strict=True)
    np.savez_compressed(
        GOLDEN / f"{case}.npz", seed=SEED, weights_sha256=weights, source=sources, name=names, sha256=digests,
        samples=np.stack([np.pad(sample, (0, 16 - len(sample)), constant_values=np.nan) for sample in samples]),
        command=f"python tools/make_packed_golden.py {case}", versions=json.dumps(versions()))
    print(f"{case}: " + ", ".join(f"{source} {sources.count(source)}" for source in dict.fromkeys(sources)))


def make_codes() -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    every = torch.arange(256, dtype=torch.uint8)
    np.savez_compressed(
        GOLDEN / "codes.npz", fp8=every.view(torch.float8_e4m3fn).float().numpy(),
        fp4=Fp8Dequantize(None)._unpack_fp4(every[:, None]).numpy(),
        e8m0=every.view(torch.float8_e8m0fnu).float().numpy(),
        command="python tools/make_packed_golden.py codes", versions=json.dumps(versions()))


def versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "transformers", "jax", "numpy", "ml_dtypes")}
    return found | {"llama.cpp": "of llama-cpp-python 0.3.36", "sglang-jax": SGLANG_COMMIT}


def main() -> None:
    if not SGLANG_JAX.is_file() or not SOURCES.is_dir():
        raise SystemExit(f"{SGLANG_JAX} or {SOURCES} is missing; tests/golden/README.md says how to get them")
    GOLDEN.mkdir(exist_ok=True)
    for case in sys.argv[1:] or ["codes", *(case for case in CASES if case not in UNREAD)]:
        make_codes() if case == "codes" else make(case)


if __name__ == "__main__":
    main()
