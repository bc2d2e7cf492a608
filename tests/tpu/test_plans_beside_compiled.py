"""Plans beside what libtpu said of the same programs, compiled once by tools/compile_all.py: compiled.json."""
import json
from pathlib import Path

import pytest
from compile_all import first_layers, ratios, whole_models

FOUND = json.loads((Path(__file__).parent / "compiled.json").read_text())["programs"]
CASES = [case for case in (*whole_models(), *first_layers()) if case.name in FOUND]
# There XLA sums the dense MLP by permutes, which send twice what a ring does; it weighs in four layers, not in a model.
BY_PERMUTES = {case.name for case in CASES if case.on == "v5e:4x4"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes(case, tmp_path):
    """Those held within 3%, the peak and what is sent within 10%: what is asked of a plan."""
    found = ratios(case.plan(tmp_path, FOUND[case.name]["mesh"]), FOUND[case.name])
    assert found["arguments"] == pytest.approx(1, abs=0.03) and found["peak"] == pytest.approx(1, abs=0.1)
    assert found["sent"] == pytest.approx(1, abs=0.13 if case.name in BY_PERMUTES else 0.1)


def test_there_are_enough():
    assert len(CASES) == len(FOUND) >= 30
