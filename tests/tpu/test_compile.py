"""Real steps, compiled ahead of time for real slices by libtpu: what they hold, what they move, and what they must not.

Of the released shapes the first four layers: full attention and dense, then sliding and experts, at their full size.
"""
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxllm.axes import make_mesh, spec
from jaxllm.checkpoint.stated import stated_params
from jaxllm.cli import main
from jaxllm.config import Config
from jaxllm.dispatch import exchange, sends_ragged
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.plan import plans
from jaxllm.tpu.program import compile_step, devices_of
from jaxllm.tpu.report import LARGE, report_of
from jaxllm.tpu.steps import work_of

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SOME = 14 * 2**20                        # bytes: one stack of experts has 36 MiB or more here, one of a cache's 64


def compiled(name: str, on: str, batch: int, context: int, layers: int = 4):
    """The best plan of the first layers, and the report of its program."""
    on = slice_of(on)
    config = Config.from_dict(first_layers(CONFIGS / name, layers), name)
    held = Held(name, config, stated_params(config))
    work = work_of(config, "decode", batch, context)
    best = plans(held, on, work)[0]
    program = compile_step(config, devices_of(on), best.mesh, work)
    return best, report_of(program, name, on, large=SOME)


def first_layers(folder: Path, num: int) -> dict:
    stated = json.loads((folder / "config.json").read_text())
    return stated | {"num_hidden_layers": num} | {key: stated[key][:num] for key in
                                                  ("hybrid_layer_pattern", "moe_layer_freq")}


@pytest.mark.parametrize(("name", "on", "counts"), [
    ("MiMo-V2.6-Pro", "v6e:8x8", {"all-reduce": 17, "reduce-scatter": 8, "all-gather": 8, "all-to-all": 11,
                                   "ragged-all-to-all": 6}),
    ("MiMo-V2-Flash", "tpu7x:2x4x2", {"all-reduce": 6, "reduce-scatter": 15, "all-gather": 16, "all-to-all": 11,
                                       "ragged-all-to-all": 6}),
])
def test_decode(libtpu, name, on, counts):
    """Arguments are what is held, to the 3% that tiles pad. Nothing large is made: no copy of a cache or of experts.
    HBM moves at most 1.4 times the least, the bound that is asked of a whole model. Each layer exchanges
    rows for parts of D and back, gathers those, sums q, k and v over them (some of them at once), gathers rows for the
    output projection, and sums over heads. The dense one gathers rows and sums. Three exchange rows for the router and
    sum its scores, gather what it chose, and send rows to experts and back. The embedding's rows are summed once, and
    all are gathered for the head. Sums of which a device keeps a part are scattered, or on v6e some are not."""
    planned, found = compiled(name, on, batch=64, context=32768)
    assert found.memory["arguments"] == pytest.approx(sum(found.held.values()), rel=0.03)
    assert found.memory["temporaries"] <= LARGE and not found.large, found.large
    assert found.memory["peak"] <= 1.1 * found.memory["arguments"] + found.memory["temporaries"]      # and its code
    assert found.ratio <= 1.4
    # As planned, within what is asked of plans: what is held, the peak, and what is sent.
    assert {kind: nbytes for kind, nbytes in planned.held.items() if kind != "cache"} == {
        kind: nbytes for kind, nbytes in found.held.items() if kind != "cache"}
    assert sum(planned.held.values()) == pytest.approx(found.memory["arguments"], rel=0.03)
    assert planned.peak == pytest.approx(found.memory["peak"], rel=0.1)
    assert planned.sent == pytest.approx(sum(x.nbytes for x in found.collectives), rel=0.1)
    assert {x.kind: x.count for x in found.collectives} == counts


def test_one_row_of_a_long_context(libtpu):
    """A full layer's cache of a million tokens, by slots over the eight places of `expert`: read once, never copied,
    and what is sent for it is as planned. The first layer alone, which is full and dense."""
    planned, found = compiled("MiMo-V2.5-Pro", "v6e:8x8", batch=1, context=2**20, layers=1)
    part = 2**20 // 8 * (192 + 128) * 2      # slots, K and V, bfloat16, of one kv head
    assert planned.mesh["expert"] == 8 and planned.held["cache"] == part
    assert found.memory["arguments"] == pytest.approx(sum(planned.held.values()), rel=0.03)
    assert part <= found.moved["cache"] <= 1.02 * part and not found.large, found.large
    assert planned.sent == pytest.approx(sum(x.nbytes for x in found.collectives), rel=0.1)


@pytest.mark.parametrize(("on", "kind"), [("v5e:4x4", "ragged-all-to-all"), ("v5e:4x8", "all-to-all"),
                                          ("v6e:4x8", "ragged-all-to-all")])
def test_rows_are_exchanged_by_what_the_slice_has(libtpu, on, kind):
    devices = devices_of(slice_of(on))
    num = len(devices)
    mesh, places = make_mesh({"expert": num}, devices), spec("whole_experts")
    rows, counts = (jax.ShapeDtypeStruct((num * size, *shape), dtype, sharding=NamedSharding(mesh, places))
                    for size, shape, dtype in ((8, (128,), jnp.bfloat16), (num, (), jnp.int32)))
    step = jax.shard_map(partial(exchange, most=8), mesh=mesh, in_specs=(places,) * 6, out_specs=places)
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(rows, rows, *[counts] * 4).compile().as_text()
    assert {opcode for opcode in re.findall(r" ([\w-]*all-to-all)(?:-start)?\(", text)} == {kind}
    assert sends_ragged(slice_of(on).chip.name, num) == (kind == "ragged-all-to-all")


def test_the_command(libtpu, capsys, tmp_path):
    """In words, as JSON and as a picture, of the embedded model."""
    files = tmp_path / "nano.json", tmp_path / "nano.png"
    assert main(["compile", str(CONFIGS / "mimo-nano"), "--on", "v6e:2x2", "--batch", "8", "--context", "512",
                 "--json", str(files[0]), "--png", str(files[1])]) == 0
    found = json.loads(files[0].read_text())
    assert found["mesh"] == {"data": 1, "expert": 2, "tensor": 2} and found["fits"] and found["memory"]["peak"] > 2**22
    assert f"{found['ratio']:.2f} of the least" in capsys.readouterr().out
    assert files[1].read_bytes().startswith(b"\x89PNG")
