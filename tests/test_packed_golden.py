"""Packed weights of released layouts, as llama.cpp, transformers and sglang-jax read them: tests/golden/packed.

Both readings are held against them bit for bit: the independent one of the tests, and jaxllm's. How the files came to
be, and where the others are wrong, is in golden/README.md.
"""
import hashlib
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from make_release import write_release
from release_cases import CASES
from release_reader import decode_fp8, decode_mxfp4, read_release, read_tensors

from jaxllm.checkpoint import open_source
from jaxllm.codec import packed_dim, unpack

GOLDEN = Path(__file__).parent / "golden" / "packed"
READABLE = sorted(file.stem for file in GOLDEN.glob("*.npz") if file.stem != "codes")

# Full layers 0 and 2 of a split release: the scales of k_proj and v_proj are those of each head's stacked rows.
STACKED = {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 2) for part in "kv"}
# The sources that read such scales as if k_proj and v_proj were on their own, and what they get wrong by it.
WRONG = {(case, source, name) for case in ("v2_flash", "v2_flash_wide", "split_mxfp4")
         for source in ("llama.cpp", "transformers") for name in STACKED}

# our path -> hub name
NAMES = [(r"(layers|mtp)\.(\d+)\.attention\.([qkv])_\w+", r"\1.\2.self_attn.\3_proj.weight"),
         (r"(layers|mtp)\.(\d+)\.mlp\.(gate|up|down)_\w+", r"\1.\2.mlp.\3_proj.weight"),
         (r"(layers)\.(\d+)\.moe\.(gate|up|down)_\w+", r"\1.\2.mlp.experts.{}.\3_proj.weight")]


def entries(case):
    """(source, hub name, digest, sample) of each matrix that a source read."""
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        return list(zip(*(arrays[key].tolist() for key in ("source", "name", "sha256")), arrays["samples"],
                        strict=True))


@pytest.fixture(scope="module", params=READABLE)
def release(request, tmp_path_factory):
    """(case, folder), checked to hold the weights that the sources read."""
    folder = tmp_path_factory.mktemp(request.param)
    config, options = CASES[request.param]
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        write_release(config, folder, seed=int(arrays["seed"]), **options)
        whole = hashlib.sha256()
        for name, value in sorted(read_tensors(folder).items()):
            whole.update(name.encode() + value.tobytes())
        assert whole.hexdigest() == str(arrays["weights_sha256"]), "make_release.py no longer makes these weights"
    return request.param, folder


def independent(folder, case):
    return read_release(folder, "grid" if case == "v2_flash_grid" else None)


def ours(folder, case):
    """What jaxllm decodes, by hub name and in hub orientation."""
    source, found = open_source(folder), {}
    def leaf(path):
        return source.read(path, tuple(slice(0, size) for size in source.params[path][0]))
    for path in (path.removesuffix(".codes") for path in source.params if path.endswith(".codes")):
        values = unpack(leaf(f"{path}.codes"), leaf(f"{path}.scale"), packed_dim(path))
        pattern, name = next(pair for pair in NAMES if re.fullmatch(pair[0], path))
        name = "model." + re.sub(pattern, name, path).replace("mtp.", "mtp.layers.")
        for e, matrix in enumerate(values) if "{}" in name else [(None, values)]:
            found[name.format(e)] = matrix.reshape(matrix.shape[0], -1).T
    return found


def digest(values):
    """Of the float32 bytes; minus zero counts as zero, since one decoder of MXFP4 has no sign for it."""
    return hashlib.sha256((np.ascontiguousarray(values, "<f4") + np.float32(0)).tobytes()).hexdigest()


@pytest.mark.parametrize("read", [independent, ours])
def test_every_matrix_has_the_values_that_others_read(release, read):
    case, folder = release
    values = read(folder, case)
    for source, name, expected, sample in entries(case):
        mine = values[name]
        if source == "sglang-jax":              # rounds what it decodes
            mine = mine.astype(ml_dtypes.bfloat16).astype(np.float32)
        if (case, source, name) in WRONG:
            assert digest(mine) != expected, f"{source} reads {name} as we do: remake the golden file, change WRONG"
        else:
            assert digest(mine) == expected, (source, name, mine.reshape(-1)[::mine.size // 16 + 1], sample)


@pytest.mark.parametrize("case", READABLE)
def test_samples_belong_to_the_digests(case, tmp_path):
    """They say what was expected where a digest differs, so they must be of the same reading."""
    config, options = CASES[case]
    write_release(config, tmp_path, seed=1, **options)
    values = independent(tmp_path, case)
    for source, name, _, sample in entries(case):
        mine = values[name].reshape(-1)[::values[name].size // 16 + 1]
        tolerance = 2**-8 if source == "sglang-jax" else 0                # half a bfloat16 step is 2^-9
        if (case, source, name) not in WRONG:
            np.testing.assert_allclose(sample[:len(mine)], mine, rtol=tolerance)


def test_every_layout_is_read_by_another():
    """The cases without a source: see UNREAD of make_packed_golden.py and golden/README.md."""
    assert set(CASES) - set(READABLE) == {"v25_plain", "one_kv_head", "one_kv_head_split", "bfloat16"}
    sources = {(case, source) for case in READABLE for source, *_ in entries(case)}
    assert {("v2_flash_wide", "sglang-jax"), ("v2_flash_wide", "transformers"), ("v26_pro", "llama.cpp"),
            ("v26_pro", "transformers"), ("v25", "llama.cpp"), ("v25_pro", "llama.cpp")} <= sources
    assert {name for source, name, *_ in entries("v2_flash_wide") if source == "sglang-jax"} >= STACKED


def test_every_code_means_what_torch_says():
    """All 256 bytes of each kind; NaN where torch has NaN: 0x7f and 0xff of e4m3, 255 of e8m0."""
    every = np.arange(256, dtype=np.uint8)
    with np.load(GOLDEN / "codes.npz") as arrays:
        fp8, fp4, e8m0 = arrays["fp8"], arrays["fp4"], arrays["e8m0"]
    one = np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(decode_fp8(every[:, None].view(ml_dtypes.float8_e4m3fn), one, every * 0)[:, 0], fp8)
    np.testing.assert_array_equal(unpack(every.view(ml_dtypes.float8_e4m3fn), one[0], 0), fp8)
    assert set(np.flatnonzero(np.isnan(fp8)).tolist()) == {0x7f, 0xff} and np.isnan(e8m0).nonzero()[0].tolist() == [255]
    # Rows of one byte, scaled by 2^0; then 255 rows of the code 1, with every scale that is a number.
    at_one = np.full((256, 1), 127, np.uint8)
    ones, scales = np.full((255, 16), 0x22, np.uint8), every[:255, None]
    for decode in (decode_mxfp4, lambda codes, scale: unpack(codes, scale, 1)):
        np.testing.assert_array_equal(decode(every[:, None], at_one), fp4)
        np.testing.assert_array_equal(decode(ones, scales), np.repeat(e8m0[:255, None], 32, 1))
