import sys
from pathlib import Path

import pytest

LIBTPU = Path(sys.prefix, "libtpu")      # apart, so that no other test loads it


@pytest.fixture(scope="module")
def libtpu():
    if not LIBTPU.is_dir():
        pytest.skip("needs XLA's TPU compiler: make .venv/libtpu installs it")
    sys.path.insert(0, str(LIBTPU))
    yield
    sys.path.remove(str(LIBTPU))
