"""Random weights in the layout of a released MiMo-V2 checkpoint, at any size, at the speed of the disk.

    python tools/make_release.py CONFIG OUT --kind fp8|mxfp4|bfloat16 [--layers N] [--experts E] [--mtp 0..3]
        [--qkv released|plain] [--towers] [--ep R] [--shards N | --shard-gb X] [--seed S] [--plan]

CONFIG is a config.json or a folder that holds one. Names, dtypes, shapes and scale shapes are those of the releases:
split q, k and v with scales stacked by kv head on full layers (V2-Flash), or qkv_proj fused by training rank; FP8 for
attention inputs, dense MLPs and MTP; experts FP8 or MXFP4; the rest bfloat16 or float32 (`release_layout.py`).

Values are not quantised from floats but taken from pools of plausible codes, at a place that depends on the seed and
the tensor's name alone: 12 GB cost as much as copying them, and memory stays small at every size. A weight has standard
deviation 1 / sqrt(its inputs), so that activations keep their size; scales differ by up to 8 between neighbouring
blocks, so that a block read at the wrong place shows.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from release_layout import ITEMSIZE, KINDS, Tensor, Unit, count_elements, cut_config, release

POOL = 1048573                  # elements; prime, so that a tensor longer than its pool has no row twice
FP8_STD, FP8_MAX = 112, 448     # of codes: the largest of 16,384 normal values is about 4 standard deviations
FP4_STD = 2.5                   # of codes: the largest of 32 is about 2 standard deviations, the largest code 6
FP4_LEVELS = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], np.float32)
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
          "merges.txt", "special_tokens_map.json", "chat_template.jinja")
MTP_FILE = "model_mtp.safetensors"


class Pools:
    """Ready values by kind, spread and dtype; each pool is made when first asked for and is at most 4 MB."""

    def __init__(self, seed: int):
        self.seed = seed
        rng = np.random.default_rng(seed)
        self._normal = rng.standard_normal(POOL, np.float32)
        self._octaves = rng.uniform(-1.5, 1.5, POOL).astype(np.float32)
        self._made: dict[tuple[Any, ...], memoryview] = {}

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """The tensor's bytes, in pieces of a pool that is read round and round."""
        key = (tensor.values, tensor.dtype, tensor.std, tensor.mean)
        if key not in self._made:
            self._made[key] = memoryview(getattr(self, tensor.values)(tensor).view(np.uint8))
        pool, left = self._made[key], tensor.nbytes
        digest = hashlib.blake2b(f"{self.seed} {tensor.name}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest) % POOL * ITEMSIZE[tensor.dtype]
        while left:
            piece = pool[start:start + left]
            yield piece
            left, start = left - len(piece), 0

    def normal(self, tensor: Tensor) -> np.ndarray:
        values = np.float32(tensor.mean) + np.float32(tensor.std) * self._normal
        return values.astype(ml_dtypes.bfloat16) if tensor.dtype == "BF16" else values

    def fp8_codes(self, tensor: Tensor) -> np.ndarray:
        return np.clip(FP8_STD * self._normal, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)

    def fp8_scales(self, tensor: Tensor) -> np.ndarray:
        """Factors of 8 between the smallest and the largest; with the codes, weights of the tensor's std."""
        factors = np.exp2(self._octaves)
        return factors * np.float32(tensor.std / FP8_STD / np.sqrt(np.mean(factors**2)))

    def fp4_codes(self, tensor: Tensor) -> np.ndarray:
        """Two codes a byte, of the pool and of itself read backwards."""
        middles = (FP4_LEVELS[1:] + FP4_LEVELS[:-1]) / 2
        codes = np.searchsorted(middles, np.abs(FP4_STD * self._normal)).astype(np.uint8)
        codes |= np.signbit(self._normal).astype(np.uint8) << 3
        return codes | codes[::-1] << 4

    def fp4_scales(self, tensor: Tensor) -> np.ndarray:
        """Powers of two, so the tensor's std is met within a factor of sqrt(2)."""
        steps = np.round(self._octaves * (3.99 / 3) - 0.5)      # -2, -1, 0, 1 equally often
        middle = round(math.log2(tensor.std / FP4_STD / np.sqrt(np.mean(np.exp2(steps)**2))))
        return (127 + middle + steps).astype(np.uint8)


# ---- files -------------------------------------------------------------------------------------------------------

def place(units: list[Unit], ep: int, shards: int | None, shard_gb: float) -> dict[str, list[Tensor]]:
    """File name -> tensors. Experts are spread over `ep` groups, each with the same number of files; MTP is apart."""
    groups: list[list[Unit]] = [[] for _ in range(ep)]
    for unit in units:
        number, count = unit.expert
        if count % ep and count > 1:
            raise ValueError(f"ep={ep}: does not divide the {count} experts")
        if not unit.is_mtp:
            groups[number * ep // count].append(unit)
    if shards is None:
        largest = max(sum(unit.nbytes for unit in group) for group in groups)
        shards = ep * max(1, math.ceil(largest / (shard_gb * 1e9)))
    if shards % ep or shards // ep > min(map(len, groups)):
        raise ValueError(f"shards={shards}: expected a multiple of ep={ep}, up to "
                         f"{ep * min(map(len, groups))} (each file holds something)")
    files = {shard_name(g, s, ep, shards): tensors for g, group in enumerate(groups)
             for s, tensors in enumerate(cut(group, shards // ep))}
    mtp = [tensor for unit in units if unit.is_mtp for tensor in unit.tensors]
    return files | ({MTP_FILE: mtp} if mtp else {})


def shard_name(group: int, shard: int, ep: int, shards: int) -> str:
    if ep > 1:
        return f"model_pp0_ep{group}_shard{shard}.safetensors"
    return "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def cut(units: list[Unit], count: int) -> list[list[Tensor]]:
    """`count` runs of about equal bytes, none empty."""
    total, done, runs = sum(unit.nbytes for unit in units), 0, [[] for _ in range(count)]
    run = 0
    for i, unit in enumerate(units):
        if runs[run] and (done >= total * (run + 1) / count or len(units) - i == count - 1 - run):
            run += 1
        runs[run] += unit.tensors
        done += unit.nbytes
    return runs


def write_file(path: Path, tensors: list[Tensor], pools: Pools) -> None:
    """A safetensors file: header length, JSON header, data in the order of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.writelines(pools.pieces(tensor))


def write_release(config: dict[str, Any], out: str | os.PathLike[str], kind: str, *, layers: int | None = None,
                  experts: int | None = None, mtp: int = 0, qkv: str = "released", towers: bool = False, ep: int = 1,
                  shards: int | None = None, shard_gb: float = 4.5, seed: int = 0) -> int:
    """Write config.json, index and weights of `kind` into the folder `out`, made if absent; returns the tensors' bytes.

    `layers`, `experts`: so many of the config's. `mtp`: MTP blocks, in a file of their own. `qkv`: "released", or
    "plain" for a re-export whose qkv_proj is [Q; K; V], and whose k_proj and v_proj, where they are split, have scales
    of their own. `ep`: expert groups, which get files of their own. `shards`: files besides MTP's; by default as many
    as keep them under `shard_gb`. Errors: ValueError for what no release can be; FileExistsError, nothing overwritten.
    """
    if kind not in KINDS or qkv not in ("released", "plain"):
        raise ValueError(f"kind={kind!r}, qkv={qkv!r}: expected one of {KINDS} and 'released' or 'plain'")
    config = cut_config(config, kind, layers, experts, mtp)
    files = place(list(release(config, kind, mtp, qkv, towers)), ep, shards, shard_gb)
    out, pools = Path(out), Pools(seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        write_file(out / name, tensors, pools)
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    metadata: dict[str, Any] = {"total_size": total}
    if config.get("attention_projection_layout") == "fused_qkv" and qkv == "released":    # MODEL.md 4.5
        metadata |= {"save_format": kind, "tp_size": config["num_key_value_heads"]}
    names = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    write_json(out / "model.safetensors.index.json", {"metadata": metadata, "weight_map": names})
    write_json(out / "config.json", config)
    return total


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- command line ------------------------------------------------------------------------------------------------

def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config.json, or a folder that holds one")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--layers", type=int, help="the first so many; default: all")
    parser.add_argument("--experts", type=int, help="default: all")
    parser.add_argument("--mtp", type=int, default=3, choices=range(4), help="MTP blocks; default 3, as released")
    parser.add_argument("--qkv", choices=("released", "plain"), default="released")
    parser.add_argument("--towers", action="store_true", help="vision and audio too")
    parser.add_argument("--ep", type=int, default=1, help="expert groups with files of their own; V2.5 has 8")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shards", type=int, help="files besides MTP's")
    size.add_argument("--shard-gb", type=float, default=4.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", action="store_true", help="say what would be written, and write nothing")
    return parser.parse_args()


def main() -> None:
    args = parse()
    file = args.config / "config.json" if args.config.is_dir() else args.config
    hub = json.loads(file.read_text())
    if args.plan:
        cut_hub = cut_config(hub, args.kind, args.layers, args.experts, args.mtp)
        for key, value in count_elements(release(cut_hub, args.kind, args.mtp, args.qkv, args.towers)).items():
            print(f"{key:8}{value:20,}")
        return
    begin = time.perf_counter()
    total = write_release(hub, args.out, args.kind, layers=args.layers, experts=args.experts, mtp=args.mtp,
                          qkv=args.qkv, towers=args.towers, ep=args.ep, shards=args.shards, shard_gb=args.shard_gb,
                          seed=args.seed)
    for name in COPIED:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, args.out / name)
    seconds = time.perf_counter() - begin
    print(f"{args.out}: {total / 1e9:.2f} GB in {seconds:.1f} s, {total / 1e9 / seconds:.2f} GB/s")


if __name__ == "__main__":
    main()
