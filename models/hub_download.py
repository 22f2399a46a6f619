"""One file from a hub over plain HTTP: what is there is not fetched again, and nothing is kept whose hash is wrong.

huggingface_hub (1.0 and later) writes to a temporary file of its own for each process and drops it when that ends, so
that a download that was killed begins anew. This one writes to `blobs/ETAG.incomplete`, under huggingface_hub's own
lock, and goes on from its end (RFC 9110, section 14: range requests).
"""
from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from edge_runtime.errors import ChecksumError, DiskSpaceError, HubError
from edge_runtime.models.hub_names import RemoteFile

RESERVE = 64 << 20  # bytes that stay free on the disk: a full one takes other programs down
RETRIES = 5  # in a row without a byte
PAUSE = 0.5  # seconds before the first of them; each further one waits twice as long
READ = 1 << 20
OVERLOADED = (408, 425, 429, 500, 502, 503, 504)

Progress = Callable[[int, int], Any]


class _Broken(Exception):
    """A connection ended early, or the server is overloaded: worth another attempt."""


class Download:
    """A file on its way to `blob`. name: what errors call it."""

    def __init__(self, name: object, file: RemoteFile, blob: Path, progress: Progress | None = None):
        self.name, self.file, self.blob = name, file, blob
        self.partial = blob.with_name(blob.name + ".incomplete")
        self.progress = progress or (lambda done, total: None)

    def run(self, url: str, headers: dict[str, str], waiting: Callable[[], Any] = lambda: None) -> int:
        """Fetch what is missing, check it, move it into place; returns the bytes fetched. `waiting` is called where
        another process is at the same file. Raises HubError, ChecksumError, DiskSpaceError."""
        lock = self.blob.parent.parent.parent / ".locks" / self.blob.parent.parent.name / f"{self.file.etag}.lock"
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with _locked(lock, waiting):
                return 0 if self.blob.exists() else self._fetch(url, headers)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space() from error
            raise HubError(self.name, f"{error.filename or self.partial}: {error.strerror or error}",
                           "Make the folder writable, or set HF_HUB_CACHE to another one.") from error

    def _fetch(self, url: str, headers: dict[str, str]) -> int:
        if self.partial.exists() and self.partial.stat().st_size > self.file.nbytes:
            self.partial.unlink()
        with open(self.partial, "ab", buffering=0) as target:
            began = target.seek(0, os.SEEK_END)
            self._check_space(began)
            hasher = self._hasher(began)
            fetched = self._stream(url, headers, target, hasher)
            os.fsync(target.fileno())
        expected = self.file.sha256 or self.file.blob_id
        if hasher.hexdigest() != expected:
            self.partial.unlink()
            kind = "sha256" if self.file.sha256 else "git hash"
            raise ChecksumError(self.name, kind, expected or "", hasher.hexdigest())
        os.replace(self.partial, self.blob)
        return fetched

    def _hasher(self, done: int) -> Any:
        """A hash of the first `done` bytes."""
        hasher = empty_hash(self.file)
        if done:
            with open(self.partial, "rb") as file:
                _feed(hasher, file)
        return hasher

    def _stream(self, url: str, headers: dict[str, str], target: BinaryIO, hasher: Any) -> int:
        """Append to `target` until the file is whole, over as many connections as it takes."""
        fetched, idle = 0, 0
        while target.tell() < self.file.nbytes:
            before = target.tell()
            self.progress(before, self.file.nbytes)
            try:
                for data in self._body(url, headers, before):
                    if target.tell() + len(data) > self.file.nbytes:
                        raise self._too_long(target)
                    view = memoryview(data)
                    while view:  # without a buffer of Python's a write may be partial
                        view = view[target.write(view):]
                    hasher.update(data)
                    fetched += len(data)
                    self.progress(target.tell(), self.file.nbytes)
                if target.tell() < self.file.nbytes:
                    raise _Broken("the connection ended early")
            except _Broken as error:
                idle = idle + 1 if target.tell() == before else 0
                if idle > RETRIES:
                    raise HubError(self.name, f"the download broke off at {target.tell()} of {self.file.nbytes} bytes: "
                                              f"{error}", "Pull it again: it goes on from there.") from error
                time.sleep(PAUSE * 2 ** idle)
        self.progress(self.file.nbytes, self.file.nbytes)
        return fetched

    def _body(self, url: str, headers: dict[str, str], offset: int) -> Iterator[bytes]:
        """The file's bytes from `offset` on. A server that knows no ranges sends those before it too: they are passed
        over."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        asked = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
        with _network(self.name), get_session().stream("GET", url, headers=asked, follow_redirects=True,
                                                       timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if response.status_code in OVERLOADED:
                raise _Broken(f"the server answered {response.status_code}")
            if response.status_code == 416:
                raise HubError(self.name, f"the server has no byte {offset} of {self.file.path}",
                               "Remove the model and pull it again.")
            hf_raise_for_status(response)
            skip = offset if response.status_code == 200 else 0
            given = response.headers.get("Content-Range", f"bytes {offset}-")
            if response.status_code == 206 and not given.startswith(f"bytes {offset}-"):
                raise HubError(self.name, f"the server was asked for bytes from {offset} on and sent {given}")
            for data in response.iter_raw():
                passed = min(skip, len(data))
                skip -= passed
                if len(data) > passed:
                    yield data[passed:]

    def _check_space(self, done: int) -> None:
        free = shutil.disk_usage(self.partial.parent).free
        if self.file.nbytes - done + RESERVE > free:
            if not done:
                self.partial.unlink(missing_ok=True)
            raise DiskSpaceError(self.name, self.partial.parent, self.file.nbytes - done + RESERVE, free)

    def _no_space(self) -> DiskSpaceError:
        done = self.partial.stat().st_size if self.partial.exists() else 0
        return DiskSpaceError(self.name, self.partial.parent, self.file.nbytes - done,
                              shutil.disk_usage(self.partial.parent).free)

    def _too_long(self, target: BinaryIO) -> ChecksumError:
        self.partial.unlink()
        return ChecksumError(self.name, "size", f"{self.file.nbytes} bytes", "more")


def empty_hash(file: RemoteFile) -> Any:
    """The hash that names a file's content: sha256 for LFS, else git's of a blob."""
    return hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)


def content_matches(path: Path, file: RemoteFile) -> bool:
    """Whether a file on this machine is what the hub describes: size, then hash."""
    if path.stat().st_size != file.nbytes:
        return False
    hasher = empty_hash(file)
    with open(path, "rb") as content:
        _feed(hasher, content)
    return bool(hasher.hexdigest() == (file.sha256 or file.blob_id))


def _feed(hasher: Any, file: BinaryIO) -> None:
    while data := file.read(READ):
        hasher.update(data)


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], Any]) -> Iterator[None]:
    """The lock of a blob, which the system takes back from a process that dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _network(name: object) -> Iterator[None]:
    """Errors of the connection as `_Broken`, answers of the hub as HubError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        refused(name, error)
    except errors.OfflineModeIsEnabled as error:
        refused(name, error)
    except errors.HTTPError as error:
        raise _Broken(str(error) or type(error).__name__) from error


def refused(name: object, error: Exception) -> NoReturn:
    """Raise what the hub's answer means to the caller."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise HubError(name, "the repository asks its users to accept its terms",
                       "Accept them on its page, and set HF_TOKEN to a token of yours.") from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise HubError(name, "the repository has no such revision",
                       "Give a branch, a tag or a whole commit.") from error
    if isinstance(error, errors.EntryNotFoundError):
        raise HubError(name, "the repository has no such file") from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise HubError(name, "the hub shows no such repository",
                       "Check its name; a private one needs a token that may read it: set HF_TOKEN.") from error
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        mend = "Check the token in HF_TOKEN." if status in (401, 403) else "Try again later." if status >= 500 else ""
        raise HubError(name, f"the hub answered {status}", mend) from error
    if isinstance(error, errors.OfflineModeIsEnabled):
        raise HubError(name, "the hub is not asked while HF_HUB_OFFLINE is set", "Unset it to download.") from error
    raise HubError(name, f"the hub cannot be reached: {error}",
                   "Check the connection (and HF_ENDPOINT, where it is set); --offline uses what is here.") from error
