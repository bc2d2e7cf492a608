"""Real steps, compiled ahead of time for real slices by libtpu: what they hold, what they move, and what they must not.

Of the released shapes the first four layers: full attention and dense, then sliding and experts, at their full size.
"""
import json
from pathlib import Path

import pytest

from jaxllm.cli import main
from jaxllm.config import Config
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.program import compile_step, default_mesh, devices_of
from jaxllm.tpu.report import LARGE, report_of

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SOME = 14 * 2**20                        # bytes: one stack of experts has 36 MiB or more here, one of a cache's 64


def report(name: str, on: str, **changes):
    found, on = Config.from_hub(CONFIGS / name), slice_of(on)
    config = Config.from_dict(first_layers(CONFIGS / name, 4), name)
    mesh = default_mesh(found, on.num_devices)
    return report_of(compile_step(config, devices_of(on), mesh, **changes), name, on, large=SOME)


def first_layers(folder: Path, num: int) -> dict:
    stated = json.loads((folder / "config.json").read_text())
    return stated | {"num_hidden_layers": num} | {key: stated[key][:num] for key in
                                                  ("hybrid_layer_pattern", "moe_layer_freq")}


@pytest.mark.parametrize(("name", "on", "counts"), [
    ("MiMo-V2.6-Pro", "v6e:8x8", {"all-reduce": 16, "reduce-scatter": 4, "all-gather": 8}),
    ("MiMo-V2-Flash", "tpu7x:2x4x2", {"all-reduce": 12, "reduce-scatter": 12, "all-gather": 8}),
])
def test_decode(libtpu, name, on, counts):
    """Arguments are what is held, to the 3% that tiles pad. Nothing large is made: no copy of a cache or of experts.
    HBM moves at most 1.4 times the least, the bound that is asked of a whole model. Each layer sums q, k and v over
    parts of D (k and v at once, or each), gathers rows for the output projection, sums over heads, gathers D, and sums
    what experts or the dense hidden dim give; three sum the router's scores; the embedding's rows are summed once."""
    found = report(name, on, step="decode", batch=64, context=32768)
    assert found.memory["arguments"] == pytest.approx(sum(found.held.values()), rel=0.03)
    assert found.memory["temporaries"] <= LARGE and not found.large, found.large
    assert found.memory["peak"] <= 1.1 * found.memory["arguments"] + found.memory["temporaries"]      # and its code
    assert found.ratio <= 1.4
    assert {x.kind: x.count for x in found.collectives} == counts


def test_the_command(libtpu, capsys, tmp_path):
    """In words, as JSON and as a picture, of the embedded model."""
    files = tmp_path / "nano.json", tmp_path / "nano.png"
    assert main(["compile", str(CONFIGS / "mimo-nano"), "--on", "v6e:2x2", "--batch", "8", "--context", "512",
                 "--json", str(files[0]), "--png", str(files[1])]) == 0
    found = json.loads(files[0].read_text())
    assert found["mesh"] == {"data": 1, "expert": 1, "tensor": 4} and found["fits"] and found["memory"]["peak"] > 2**22
    assert f"{found['ratio']:.2f} of the least" in capsys.readouterr().out
    assert files[1].read_bytes().startswith(b"\x89PNG")
