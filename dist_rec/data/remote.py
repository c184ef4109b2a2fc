"""Byte ranges of the files below a folder or URL: retried, with a hard time limit, in bounded memory.

Knows file systems and nothing of what the bytes mean. Local files are read directly; HTTP and
other asynchronous file systems on fsspec's event loop; any other one in a thread that is left
behind when its time is up, since nothing else ends a read that hangs.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from ..errors import UserError

T = TypeVar("T")

LONGEST_WAIT = 60.0
POLL_SECONDS = 0.1
CHUNK = 1 << 18
HTTP = ("http://", "https://")
RETRIED_STATUS = (408, 425, 429)
# Not trouble of a file system but of a program, ours or fsspec's: never retried, never hidden.
BUGS = (TypeError, AttributeError, NameError, NotImplementedError, AssertionError, MemoryError)


@dataclass(frozen=True)
class Retry:
    """What is done about trouble.

    Attributes:
        retries: attempts after the first.
        wait_seconds: before the first retry; the wait doubles each time, up to LONGEST_WAIT.
        timeout_seconds: hard limit of one attempt, from connecting to its last byte.
    """

    retries: int = 5
    wait_seconds: float = 0.5
    timeout_seconds: float = 60.0

    def wait(self, attempt: int) -> float:
        """Seconds to wait after attempt 0, 1, ..., which failed."""
        return min(self.wait_seconds * 2.0**attempt, LONGEST_WAIT)


DEFAULT_RETRY = Retry()


class Unreadable(Exception):
    """A range could not be read. `missing`: there is no such file; `short`: the file ends before the range does."""

    def __init__(self, cause: str, attempts: int = 1, *, missing: bool = False, short: bool = False) -> None:
        super().__init__(cause + (f" ({attempts} attempts)" if attempts > 1 else ""))
        self.missing, self.short = missing, short


class Cancelled(Exception):
    """The reading was called off: `Files.cancelled` is set."""


class _Refused(Exception):
    """No retry would help."""


class _Short(_Refused):
    """The file ends before the range does."""


class Files:
    """Reads files of one folder or URL.

    Args:
        root: local folder or fsspec URL.
        retry: what to do about trouble.

    Attributes:
        cancelled: an event that calls off every read and wait as soon as it is set; replace it by
            one's own.

    Raises:
        UserError: no such protocol, or what it needs is not installed.
    """

    def __init__(self, root: str, retry: Retry) -> None:
        self.retry = retry
        self.cancelled = threading.Event()
        self.http = root.startswith(HTTP)
        try:
            # One body is one range: never expanded, and with no other time limit than ours.
            options = {"client_kwargs": {"auto_decompress": False, "timeout": _no_timeout()}} if self.http else {}
            self.fs, self.base = fsspec.core.url_to_fs(root, **options)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"cannot read {root}: {error}.") from None
        self.local = isinstance(self.fs, LocalFileSystem)

    def read(self, name: str, start: int, stop: int, accept: Callable[[bytes], T] = bytes) -> T:
        """Bytes start .. stop of a file, all of them, as `accept` returns them.

        Args:
            accept: raises UserError if these are not the right bytes. Bytes that came from
                elsewhere are then fetched once more, for the damage may be the transfer's.

        Raises:
            Unreadable: after the last attempt, or at once where another cannot help.
            UserError: `accept`'s.
            Cancelled: called off.
        """
        return self._retried(name, start, stop, True, accept)

    def read_whole(self, name: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes.

        Raises:
            Unreadable: as `read`, or the file is longer.
        """
        data = self._retried(name, 0, limit + 1, False, bytes)
        if len(data) > limit:
            raise Unreadable(_too_long(limit + 1))
        return data

    def size(self, name: str) -> int:
        """Length of a file in bytes.

        Raises:
            Unreadable, Cancelled: as `read`.
        """
        return self._attempts(lambda cancelled: self._size(self._path(name), cancelled))

    def _path(self, name: str) -> str:
        return f"{self.base.rstrip('/')}/{name}"

    def _retried(self, name: str, start: int, stop: int, exact: bool, accept: Callable[[bytes], T]) -> T:
        first_refusal: UserError | None = None
        while True:
            data = self._attempts(lambda cancelled: self._fetch(self._path(name), start, stop, exact, cancelled))
            try:
                return accept(data)
            except UserError as error:
                if self.local:
                    raise
                if first_refusal is not None:
                    raise UserError(f"{error} It came twice like that.") from None
                first_refusal = error

    def _attempts(self, attempt: Callable[[threading.Event], T]) -> T:
        # The event of those who began this read, whoever begins another meanwhile.
        cancelled = self.cancelled
        for number in range(self.retry.retries + 1):
            if cancelled.is_set():
                raise Cancelled
            try:
                return attempt(cancelled)
            except (Cancelled, *BUGS):
                raise
            except _Refused as error:
                raise Unreadable(str(error), number + 1, short=isinstance(error, _Short)) from None
            except FileNotFoundError:
                raise Unreadable("no such file", number + 1, missing=True) from None
            except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
                raise Unreadable(error.strerror or str(error), number + 1) from None
            except Exception as error:  # what a file system raises is its own affair, HTTP's are no OSErrors
                cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                if isinstance(error, TimeoutError):
                    cause = str(error) or "timed out"
            if number < self.retry.retries and cancelled.wait(self.retry.wait(number)):
                raise Cancelled
        raise Unreadable(cause, self.retry.retries + 1)

    def _fetch(self, path: str, start: int, stop: int, exact: bool, cancelled: threading.Event) -> bytes:
        """One attempt; with `exact` all bytes, else as many as there are up to `stop`."""
        if self.local:
            return _read_local(path, start, stop, exact)
        if self.http:
            data = self._on_loop(_read_http(self.fs, path, start, stop, exact), cancelled)
        elif isinstance(self.fs, AsyncFileSystem):
            data = self._on_loop(self.fs._cat_file(path, start=start, end=stop), cancelled)
        else:
            data = self._in_thread(lambda: self.fs.cat_file(path, start=start, end=stop), cancelled)
        if len(data) > stop - start or exact and len(data) < stop - start:
            raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
        return data

    def _size(self, path: str, cancelled: threading.Event) -> int:
        if self.local:
            return os.stat(path).st_size
        if self.http:
            return self._on_loop(_http_size(self.fs, path), cancelled)
        if isinstance(self.fs, AsyncFileSystem):
            return self._on_loop(self.fs._info(path), cancelled)["size"]
        return self._in_thread(lambda: self.fs.info(path), cancelled)["size"]

    def _on_loop(self, work: Coroutine, cancelled: threading.Event) -> Any:
        return self._result(asyncio.run_coroutine_threadsafe(work, self.fs.loop), cancelled)

    def _in_thread(self, work: Callable[[], Any], cancelled: threading.Event) -> Any:
        future: Future = Future()
        future.set_running_or_notify_cancel()  # so that it cannot be cancelled: the thread goes on
        threading.Thread(target=_settle, args=(future, work), name="read", daemon=True).start()
        return self._result(future, cancelled)

    def _result(self, future: Future, cancelled: threading.Event) -> Any:
        """What `future` gives within the time limit; else it is cancelled, or left to itself."""
        limit = self.retry.timeout_seconds
        deadline = time.monotonic() + limit
        while not wait([future], min(POLL_SECONDS, max(deadline - time.monotonic(), 0.0))).done:
            if cancelled.is_set():
                future.cancel()
                raise Cancelled
            if time.monotonic() >= deadline:
                future.cancel()
                raise TimeoutError(f"not done within {limit:g} s")
        return future.result()


def _settle(future: Future, work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _too_long(stop: int) -> str:
    return f"it is longer than {stop - 1:,} bytes"


def _no_timeout():
    import aiohttp

    return aiohttp.ClientTimeout(total=None)


def _read_local(path: str, start: int, stop: int, exact: bool) -> bytes:
    # O_NONBLOCK: opening a named pipe would wait for whoever writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("it is no regular file")
        if not exact and status.st_size >= stop:
            raise _Refused(_too_long(stop))
        if status.st_size < stop:
            if exact:
                raise _Short(f"the file ends too early, at byte {status.st_size:,} of {stop:,}")
            stop = status.st_size
        parts, at = [], start
        while at < stop:
            part = os.pread(descriptor, stop - at, at)
            if not part:
                raise OSError(f"{at - start} bytes came where {stop - start} were asked for")
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def _check_status(answer) -> None:
    status = f"the server answers {answer.status} {answer.reason or ''}".rstrip()
    if answer.status in (404, 410):
        raise FileNotFoundError
    if answer.status == 416:
        raise _Short(f"the file ends too early ({status})")
    if 400 <= answer.status < 500 and answer.status not in RETRIED_STATUS:
        raise _Refused(status)
    if answer.status not in (200, 206):
        raise OSError(status)
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Refused(f"the server sends it compressed ({answer.headers['Content-Encoding']}), unasked")


def _file_size(answer) -> int | None:
    """The file's length by the answer's Content-Range `bytes first-last/length`."""
    length = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isascii() and length.isdigit() else None


async def _read_http(fs, url: str, start: int, stop: int, exact: bool) -> bytes:
    """A range, or with `exact` False the whole file up to `stop`.

    fsspec's own reads take a body of any length into memory, and retry nothing.
    """
    session = await fs.set_session()
    headers = {"Accept-Encoding": "identity"}
    if exact:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    async with session.get(fs.encode_url(url), headers=headers) as answer:
        _check_status(answer)
        if exact:
            if answer.status != 206:
                # Taking what was asked for out of the whole would fetch a shard for each of its blocks.
                raise _Refused(
                    "the server ignores byte ranges and sends the whole file: serve the folder with one that "
                    "honours Range, or copy the data set"
                )
            length = _file_size(answer)
            if length is not None and length < stop:
                raise _Short(f"the file ends too early, at byte {length:,} of {stop:,}")
            if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise OSError(f"another range came: {answer.headers.get('Content-Range')!r}")
        promised = answer.content_length
        if not exact and promised is not None and promised >= stop:
            raise _Refused(_too_long(stop))
        parts, size = [], 0
        while size < stop - start and (part := await answer.content.read(min(CHUNK, stop - start - size))):
            parts.append(part)
            size += len(part)
        # Python's HTTP servers close the connection where a body ends, and so does a dropped one.
        if promised is not None and size < min(promised, stop - start):
            raise OSError(f"the body ended after {size} of {promised} bytes")
        return b"".join(parts)


async def _http_size(fs, url: str) -> int:
    session = await fs.set_session()
    headers = {"Accept-Encoding": "identity", "Range": "bytes=0-0"}
    async with session.get(fs.encode_url(url), headers=headers) as answer:
        _check_status(answer)
        size = _file_size(answer) if answer.status == 206 else answer.content_length
    if size is None:
        raise _Refused("the server does not say how long the file is")
    return size
