"""The files of one commit of a model repository on the hub, fetched with patience.

huggingface_hub knows the addresses, the token (HF_TOKEN, `hf auth login`), HF_ENDPOINT, HF_HUB_OFFLINE, proxies and
what the hub's refusals mean. The bytes are asked for here: its own download forgets what it has of a file when it is
killed, and shards have up to 20 GB. Plain HTTP ranges do for every file, for those that the hub keeps in Xet too.
"""
import hashlib
import json
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers

from jaxllm.checkpoint.errors import CheckpointError

BUSY = frozenset({408, 429, 500, 502, 503, 504})      # statuses that pass
TRIES = 7                # in a row and without a byte in between
FIRST_WAIT = 1.0         # seconds, doubled each time: about a minute in all
LONGEST_WAIT = 600.0     # seconds; the hub's own windows are half of that
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it: bytes, git's id of it, and its hash where it is kept by LFS or Xet, as shards are."""
    size: int
    blob: str
    sha256: str | None

    def is_whole(self, file: Path) -> bool:
        """Whether `file`, which exists, has exactly these bytes."""
        if file.stat().st_size != self.size:
            return False
        with open(file, "rb") as stream:
            if self.sha256 is not None:
                return hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256
            return hashlib.sha1(b"blob %d\0" % self.size + stream.read()).hexdigest() == self.blob


class Repo:
    """The model repository `repo_id` at what `revision` (a branch, tag or commit) is now: its `commit` and `files`.

    Setting `stopped` ends what other threads fetch. Errors: CheckpointError in one line that names repository and
    revision, for all that the hub or the line may do.
    """

    def __init__(self, repo_id: str, revision: str):
        self.repo_id, self.revision, self.api, self.stopped = repo_id, revision, HfApi(), threading.Event()
        try:
            info = self._insist("the list of files", lambda: self.api.model_info(
                repo_id, revision=revision, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT))
            self.commit, self.files = _parse(info)
        except HFValidationError as error:
            raise CheckpointError(f"{repo_id!r} is neither a folder nor a hub id: {error}") from None
        except (KeyError, TypeError, json.JSONDecodeError):
            raise CheckpointError(f"{self}: the answer is not that of a hub; see HF_ENDPOINT and proxies") from None

    def __str__(self) -> str:
        return f"{self.repo_id} at {self.revision} on {self.api.endpoint}"

    def download(self, name: str, into: Path) -> None:
        """All of the file `name`, checked. What `into` holds already is taken for its first bytes."""
        for _ in range(2):
            self.grow(into, name, self.files[name].size)
            if self.files[name].is_whole(into):
                return
            into.unlink()
        raise CheckpointError(f"{name} of {self} arrived twice with other bytes than the hub states (sha256 or git id "
                              f"{self.files[name].sha256 or self.files[name].blob}); something on the way damages it: "
                              "run again with --resume, over another line if it stays")

    def grow(self, into: Path, name: str, size: int) -> None:
        """Make `into`, which holds the first bytes of the file `name` or is absent, hold the first `size` or more."""
        while not into.exists() or into.stat().st_size < size:
            self._insist(name, lambda: self._append(into, name, size))

    def _append(self, into: Path, name: str, size: int) -> None:
        """One request for what is missing. It is no failure of a line to drop after it brought some of that."""
        url = f"{self.api.endpoint}/{self.repo_id}/resolve/{self.commit}/{quote(name)}"
        with open(into, "ab") as stream:
            start = stream.tell()
            headers = build_hf_headers() | {"Range": f"bytes={start}-{size - 1}", "Accept-Encoding": "identity"}
            try:
                with get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
                    hf_raise_for_status(response)
                    if response.status_code != 206:      # a server without ranges begins at the beginning
                        stream.seek(0)
                        stream.truncate()
                    for piece in response.iter_raw():
                        self._check_wanted(name)
                        stream.write(piece)
                        if stream.tell() >= size:
                            return
            except HTTPError:
                if stream.tell() <= start:
                    raise
            if stream.tell() <= start:
                raise HTTPError("the answer ends at once")

    def _insist(self, what: str, ask: Callable[[], T]) -> T:
        """ask(), and again after a wait while the hub is busy or the line drops."""
        attempt = 0
        while True:
            try:
                return ask()
            except OfflineModeIsEnabled:
                raise CheckpointError(f"{self} cannot be reached: HF_HUB_OFFLINE is set; unset it") from None
            except HTTPError as error:      # all that its client raises
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status is not None and status not in BUSY:
                    raise CheckpointError(self._refusal(what, error, status)) from None
                reason = f"status {status}" if status else f"{type(error).__name__}: {error}"
                wait = _wait(error, attempt)
            attempt += 1
            if attempt == TRIES or wait > LONGEST_WAIT:
                raise CheckpointError(f"{what} of {self} cannot be fetched: {reason}, {attempt} times in a row; check "
                                      f"the network, wait {wait:.0f} s or more and run again with --resume")
            logging.getLogger(__name__).warning("%s of %s: %s; again in %.0f s", what, self, reason, wait)
            self._rest(wait)
            self._check_wanted(what)

    def _rest(self, seconds: float) -> None:
        self.stopped.wait(seconds)

    def _check_wanted(self, what: str) -> None:
        if self.stopped.is_set():
            raise CheckpointError(f"{what} of {self} was not fetched to its end: the conversion has ended")

    def _refusal(self, what: str, error: Exception, status: int) -> str:
        if isinstance(error, RevisionNotFoundError):
            return f"{self}: there is no such revision; expected a branch, a tag or a commit of {self.repo_id}"
        if isinstance(error, GatedRepoError):
            return (f"{self} is gated (status {status}): accept its conditions at {self.api.endpoint}/{self.repo_id}, "
                    "then log in with `hf auth login` or a token in HF_TOKEN")
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            return (f"{self}: there is no such folder here and no such repository there, or it is private (status "
                    f"{status}); check the name, or log in with `hf auth login` or a token in HF_TOKEN")
        return f"{what} of {self} is refused with status {status}"


def _parse(info: ModelInfo) -> tuple[str, dict[str, RemoteFile]]:
    """(commit, files) out of the hub's answer. Errors: TypeError when it lacks something."""
    files = {}
    for file in info.siblings or ():
        size = file.lfs.size if file.lfs else file.size
        if size is None or file.blob_id is None:
            raise TypeError(f"no size of {file.rfilename}")
        files[file.rfilename] = RemoteFile(size, file.blob_id, file.lfs.sha256 if file.lfs else None)
    if info.sha is None:
        raise TypeError("no commit")
    return info.sha, files


def _wait(error: Exception, attempt: int) -> float:
    """Seconds before the next try: what the hub asks for, or ever longer; never the same for all who wait."""
    stated = 0
    if isinstance(error, HfHubHTTPError):
        limit = parse_ratelimit_headers(error.response.headers)
        after = error.response.headers.get("Retry-After", "")
        stated = int(after) if after.isdecimal() else limit.reset_in_seconds if limit and not limit.remaining else 0
    return max(stated, FIRST_WAIT * 2**attempt) * random.uniform(1, 1.25)
