"""A small hub folder, and a place beside it to convert it to."""
import pytest
from hub_files import SMALL
from hub_maker import tiny_config, write_hub


@pytest.fixture
def hub(tmp_path):
    write_hub(tmp_path / "hub", tiny_config(**SMALL), mtp=1)
    return tmp_path / "hub"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "out"      # the folder above it is made too
