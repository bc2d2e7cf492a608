"""From a hub folder to a converted one: `params/` by Orbax, config and tokenizer files verbatim beside it.

Streaming: never more than two blocks of one parameter in memory. Atomic: everything is written into OUT.jaxllm-incomplete
beside OUT, flushed to disk and renamed; a marker file lies in the folder from its first moment until after the rename, so
that whatever a kill leaves, in either place, says of itself that it is not whole, and the next run takes it up.
"""
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from jaxllm.checkpoint.errors import CheckpointError, listed
from jaxllm.checkpoint.source import HubSource, open_source
