"""Weights in another form: each tensor against numpy, from every kind of source, through convert and export."""
import json
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hub_files import edit_tensors, whole
from hub_maker import tiny_config, write_hub
from packed_files import edit_packed, read_by_hand, write_packed
from release_cases import FUSED, small_config
from release_reader import read_tensors

from jaxllm.checkpoint import CheckpointError, convert, open_source
from jaxllm.checkpoint import repack as repack_module
from jaxllm.checkpoint.decoded import Decoded
from jaxllm.checkpoint.export import export
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.repack import Kept
from jaxllm.checkpoint.requantise import CLASSES, requantised
from jaxllm.codec import packed_dim, unpack
from jaxllm.encode import feedback, pack

FITTING = dict(intermediate_size=192)      # what groups of 32 divide
SPLIT, JOINED = small_config(**FITTING), small_config(**FITTING, **FUSED)
LINEAR = {"join_CD", *(letters for names in CLASSES.values() for letters in names)}
ROUNDS = {"fp8": 2**-4, "mxfp4": 1 / 5, "int4": 1 / 13}      # of a block's largest value, at most; 5 may become 4


def values(source, path):
    """float32 values of a parameter, packed or not."""
    return Decoded(source, np.dtype(np.float32)).read(path, whole(source.params.get(path, source.params.get(
        f"{path}.codes"))[0]))


def packed_paths(source):
    return {leaf.removesuffix(".codes") for leaf in source.params if leaf.endswith(".codes")}


def classes_of(paths):
    return {name for path in paths for name, letters in CLASSES.items() if path.endswith(letters)}


def fp8_by_hand(w: np.ndarray) -> np.ndarray:
    """A matrix [out, in] through fp8 in one grid of blocks."""
    out = np.empty_like(w)
    for i in range(0, len(w), 128):
        for j in range(0, w.shape[1], 128):
            block = w[i:i + 128, j:j + 128]
            scale = np.abs(block).max() / np.float32(448)
            out[i:i + 128, j:j + 128] = (block / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return out


def group_by_hand(w: np.ndarray, kind: str) -> np.ndarray:
    return unpack(*pack(np.ascontiguousarray(w.T), kind, 32), 0).T


def expected(plain: dict[str, np.ndarray], kind: str, ranks: int | None) -> dict[str, np.ndarray]:
    """Every matrix but the embedding, routers and those of MTP blocks, packed and decoded, in hub order."""
    found = dict(plain)
    for name, w in plain.items():
        if w.ndim == 2 and not name.endswith((".gate.weight", "embed_tokens.weight")) and ".mtp." not in name:
            found[name] = fp8_by_hand(w) if kind == "fp8" else group_by_hand(w, kind)
    for name in plain if kind == "fp8" and ranks else ():
        if name.endswith("q_proj.weight") and ".mtp." not in name:      # blocks straddle K and V in each rank's chunk
            names = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            parts = [np.split(plain[name], ranks) for name in names]
            cuts = np.cumsum([len(part[0]) for part in parts])[:-1]
            chunks = [np.split(fp8_by_hand(np.concatenate(chunk)), cuts) for chunk in zip(*parts, strict=True)]
            found |= dict(zip(names, map(np.concatenate, zip(*chunks, strict=True)), strict=True))
    return found


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int4"])
def test_all_matrices_through_convert_and_export(tmp_path, is_fused, kind):
    """What an independent reader finds in the exported folder is what numpy makes of the original's matrices."""
    config, ranks = (JOINED, 4) if is_fused else (SPLIT, None)
    num_mtp = 0 if is_fused else 1
    write_hub(tmp_path / "hub", config, dtype="bfloat16", fused=is_fused, mtp=num_mtp)
    write_hub(tmp_path / "split", SPLIT, dtype="bfloat16", mtp=num_mtp)      # the same model
    convert(tmp_path / "hub", tmp_path / "out", weights=kind, classes=["all"], progress=False)
    export(tmp_path / "out", tmp_path / "back", progress=False)
    wanted = expected({name: w.astype(np.float32) for name, w in read_tensors(tmp_path / "split").items()}, kind, ranks)
    found = read_by_hand(tmp_path / "back", f"ranks={ranks}" if ranks else "grid")
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        assert np.array_equal(found[name], w), name
    assert HubSource(tmp_path / "back").params == open_source(tmp_path / "out").params


def source_of(tmp_path, kind="bfloat16"):
    """A fused source with an MTP block, plain or packed as released."""
    if kind == "bfloat16":
        write_hub(tmp_path, JOINED, dtype="bfloat16", fused=True, mtp=1)
    else:
        write_packed(tmp_path, JOINED, kind, "ranks=4", mtp=1)
    return HubSource(tmp_path)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "mxfp4"])
@pytest.mark.parametrize("weights", ["fp8", "mxfp4", "int4"])
def test_experts_alone_by_default(tmp_path, kind, weights):
    """From any source: experts are packed, and near what they were; all else is bit for bit as stored."""
    source = source_of(tmp_path, kind)
    if kind == weights:
        with pytest.raises(CheckpointError, match=f"nothing to pack as {weights} in the classes experts"):
            requantised(source, weights)
        return
    made = requantised(source, weights)
    experts = {path for path in packed_paths(made) if classes_of([path]) == {"experts"}}
    assert len(experts) == 6 and packed_paths(made) - experts == packed_paths(source) - experts
    for leaf, (shape, _) in made.params.items():
        path = leaf.removesuffix(".codes").removesuffix(".scale")
        if path not in experts:
            assert made.read(leaf, whole(shape)).tobytes() == source.read(leaf, whole(shape)).tobytes(), leaf
        elif leaf.endswith(".codes"):
            before, after = values(source, path), values(made, path)
            assert np.abs(after - before).max() <= ROUNDS[weights] * np.abs(before).max(), path
    assert (made.reading, made.num_mtp, made.left_out, made.folder) == ("ranks=4", 1, {}, tmp_path)


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_plain(tmp_path, weights):
    """Codes times scales, rounded to the nearest; routers, their biases and sinks keep the float32 they are stored in.
    """
    write_packed(tmp_path, SPLIT, "mxfp4", "grid", mtp=1)
    edit_packed(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(np.float32) for name in tensors
                                                          if "sink" in name}))
    source = HubSource(tmp_path)
    made, by_hand = requantised(source, weights), read_by_hand(tmp_path, "grid")
    kept = {path for path in made.params if path.endswith(("router_DE", "bias_E", "sink_N"))}
    assert len(kept) == 2 * 2 + 2 and not packed_paths(made)
    for path, (shape, dtype) in made.params.items():
        assert dtype == (np.float32 if path in kept else np.dtype(weights)), path
        tensor, = made.tensors_of(path)[:1]
        if path.endswith("gate_DF"):
            assert np.array_equal(made.read(path, whole(shape)), by_hand[tensor].T.astype(dtype))
    hub = made.hub_config()
    assert "quantization_config" not in hub and hub["torch_dtype"] == weights and "dtype" not in hub


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int4"])
def test_slices_equal_the_whole(tmp_path, monkeypatch, kind):
    """Whatever the slices, in whatever order and by however many threads, and with units that end anywhere."""
    made = requantised(source_of(tmp_path), kind, ["all"])
    all_at_once = {leaf: made.read(leaf, whole(shape)) for leaf, (shape, _) in made.params.items()}
    monkeypatch.setattr(repack_module, "UNIT", 5000)
    made = requantised(made.source, kind, ["all"])
    rng = np.random.default_rng(0)
    work = [(leaf, tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in shape))
            for leaf, (shape, _) in made.params.items() if made.params[leaf][1].itemsize < 4 for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for (leaf, index), found in zip(work, pool.map(lambda item: made.read(*item), work), strict=True):
            assert np.array_equal(found, all_at_once[leaf][index]), (leaf, index)


def test_codes_and_scale_are_packed_once(tmp_path, monkeypatch):
    made = requantised(source_of(tmp_path), "mxfp4")
    calls = []
    monkeypatch.setattr(repack_module, "pack", lambda *args: calls.append(1) or pack(*args))
    for part in (".codes", ".scale"):
        leaf = f"layers.1.moe.gate_EDI{part}"
        for expert in range(4):
            shape = made.params[leaf][0]
            made.read(leaf, (slice(expert, expert + 1), *whole(shape[1:])))
    assert len(calls) == 4


def test_what_is_kept_is_bounded():
    kept = Kept(100)
    for key in range(5):
        kept.put(key, np.zeros(40, np.uint8))
    assert [key for key in range(5) if kept.get(key) is not None] == [3, 4] and kept.nbytes == 80
    kept.put(4, np.zeros(10, np.uint8))
    assert kept.nbytes == 50 and kept.take(3) is not None and kept.take(3) is None and kept.nbytes == 10


def test_grams(tmp_path):
    """Codes are those that the feedback of the gram gives; other parameters are not touched by it."""
    source, rng = source_of(tmp_path), np.random.default_rng(0)
    x = rng.standard_normal((100, 160)).astype(np.float32)
    path = "layers.0.attention.q_DNH"
    made, plain = (requantised(source, "int4", ["attention"], grams=grams) for grams in ({path: x.T @ x}, None))
    w = values(source, path)
    codes, _ = pack(w.reshape(160, -1), "int4", 32, feedback(x.T @ x))
    for other in packed_paths(made):
        shape = made.params[f"{other}.codes"][0]
        found = made.read(f"{other}.codes", whole(shape))
        assert np.array_equal(found, plain.read(f"{other}.codes", whole(shape))) == (other != path)
        assert other != path or np.array_equal(found, codes.reshape(shape))
    wrong = requantised(source, "int4", ["attention"], grams={path: np.eye(8, dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"q_DNH .* in-dim of 160, but its gram has shape \[8, 8\]; calibrate"):
        wrong.read(f"{path}.codes", whole(wrong.params[f"{path}.codes"][0]))


def test_groups_that_span_heads(tmp_path):
    """Values of 16, so that a group of 32 along o_proj's columns is two heads."""
    write_hub(tmp_path, tiny_config(), dtype="bfloat16")
    source = HubSource(tmp_path)
    made = requantised(source, "int4", ["attention"])
    assert made.params["layers.0.attention.o_NVD.scale"][0] == (4, 1, 64)
    w = values(source, "layers.0.attention.o_NVD")
    codes, scale = (made.read(f"layers.0.attention.o_NVD.{part}", whole(w.shape)) for part in ("codes", "scale"))
    by_hand = unpack(*pack(w.reshape(128, 64), "int4", 32), 0).reshape(w.shape)
    assert np.array_equal(unpack(codes, scale, packed_dim("o_NVD")), by_hand)


@pytest.mark.parametrize(("kind", "weights", "classes", "told"), [
    ("bfloat16", "mxfp4", ["experts"], {"quant_method": "fp8", "store_dtype": "mxfp4", "mxfp4_block_size": 32}),
    ("bfloat16", "int4", ["experts", "head"], {"quant_method": "int4", "group_size": 32}),
    ("bfloat16", "mxfp4", ["attention"], {"quant_method": "fp8", "store_dtype": "mxfp4"}),
    ("mxfp4", "fp8", ["experts"], {"quant_method": "fp8"}),
    ("fp8", "int4", ["all"], {"quant_method": "int4", "group_size": 32, "weight_block_size": [128, 128]}),
])
def test_config_tells_what_is_packed(tmp_path, kind, weights, classes, told):
    """ignored_layers names the plain linear modules and no other; the rest of the config is as it was."""
    source = source_of(tmp_path, kind)
    made = requantised(source, weights, classes)
    hub = made.hub_config()
    quantization = hub.pop("quantization_config")
    assert told.items() <= quantization.items()
    before = json.loads((tmp_path / "config.json").read_text())
    before.pop("quantization_config", None)
    assert hub == before
    plain = {made.tensors_of(path)[0] for path in made.params if path.rsplit(".", 1)[-1] in LINEAR}
    assert set(quantization["ignored_layers"]) == {name.removesuffix(".weight") if ".experts." not in name else
                                                   name.split(".0.")[0] for name in plain}


def test_stated_ignored_layers_stay(tmp_path):
    """Those that name no tensor of ours mean something to other programs; those that are packed now go."""
    write_packed(tmp_path, JOINED, "fp8", "ranks=4", ignored_layers=["model.decoder.self_attn.o_proj",
                                                                     "model.layers.0.self_attn.o_proj"])
    ignored, of_all = (requantised(HubSource(tmp_path), "mxfp4", classes).hub_config()["quantization_config"][
        "ignored_layers"] for classes in (["experts"], ["all"]))
    assert ignored[0] == "model.decoder.self_attn.o_proj" and "model.layers.0.self_attn.o_proj" in ignored
    assert not any("experts" in name or "qkv" in name or "gate" in name for name in ignored)
    assert of_all == ["model.decoder.self_attn.o_proj"]


@pytest.mark.parametrize(("options", "message"), [
    ({"weights": "int8"}, "weights 'int8' are not known; expected one of bfloat16, float32, fp8, mxfp4, int4"),
    ({"weights": "mxfp4", "group": 128}, "mxfp4 in groups of 128 is not known; expected groups of 32"),
    ({"weights": "int4", "group": 64}, "int4 in groups of 64 is not known; expected groups of 32 or 128"),
    ({"weights": "int4", "classes": ["router", "head"]},
     "classes router are not known; expected some of experts, attention, dense, head, or all"),
    ({"weights": "int4", "classes": []}, "nothing to pack as int4 in the classes : no such"),
    ({"weights": "int4", "group": 128},
     "cannot be packed so: layers.1.moe.gate_EDI .* groups of 128, which do not divide its in-dims .160.; choose"),
])
def test_bad_options(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        requantised(source_of(tmp_path), **options)


@pytest.mark.parametrize(("kind", "weights", "classes"), [
    ("fp8", "mxfp4", ["attention"]), ("mxfp4", "int4", ["attention"]), ("int4", "mxfp4", ["experts"])])
def test_mixtures_that_no_config_can_tell(tmp_path, kind, weights, classes):
    with pytest.raises(CheckpointError, match="would be .* which no config.json can tell: of the 4-bit kinds"):
        requantised(source_of(tmp_path, kind), weights, classes)


def test_nan_is_refused(tmp_path):
    source_of(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["model.layers.1.mlp.experts.2.up_proj.weight"].__setitem__(
        (3, 4), np.nan))
    made = requantised(HubSource(tmp_path), "mxfp4")
    with pytest.raises(CheckpointError, match=r"up_EDI \(of .*has 1 NaN or Inf values, which mxfp4 cannot hold"):
        made.read("layers.1.moe.up_EDI.codes", whole(made.params["layers.1.moe.up_EDI.codes"][0]))
