"""Blocks fetched ahead of use: a few threads, a budget of bytes, results in whatever order they are taken.

One request after the other leaves a fast but distant server idle. Knows numbers and bytes, not
what a block is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

THREADS = 8
BUDGET = 64 << 20


class Prefetch:
    """Fetches what is named ahead of its use.

    Args:
        fetch: bytes of a block by number; may raise, which `take` passes on.
        size: bytes that a block will take, by number.
    """

    def __init__(self, fetch: Callable[[int], bytes], size: Callable[[int], int]) -> None:
        self.fetch, self.size = fetch, size
        self.lock = threading.Lock()
        self.waiting: deque[int] = deque()
        self.started: dict[int, Future] = {}
        self.bytes = self.threads = 0

    def want(self, numbers: Iterable[int]) -> None:
        """What will be taken next, soonest first; what was wanted before and is no more is dropped."""
        wanted = dict.fromkeys(numbers)
        with self.lock:
            for number in [n for n in self.started if n not in wanted]:
                self._forget(number)
            self.waiting = deque(n for n in wanted if n not in self.started)
            self._start()

    def take(self, number: int) -> bytes | None:
        """A block that was wanted, waiting for it if it is under way; None if nobody began to fetch it."""
        with self.lock:
            future = self.started.get(number)
            if future is None:
                if number in self.waiting:
                    self.waiting.remove(number)
                return None
        try:
            return future.result()
        finally:
            with self.lock:
                if self.started.get(number) is future:
                    self._forget(number)
                self._start()

    def _forget(self, number: int) -> None:
        del self.started[number]
        self.bytes -= self.size(number)

    def _start(self) -> None:
        """Start as many as threads and budget allow; the lock is held."""
        while self.waiting and self.threads < THREADS:
            size = self.size(self.waiting[0])
            if self.started and self.bytes + size > BUDGET:
                return
            number, future = self.waiting.popleft(), Future()
            self.started[number] = future
            self.bytes += size
            self.threads += 1
            # Not a ThreadPoolExecutor: the interpreter would wait for its threads at exit.
            threading.Thread(target=self._work, args=(number, future), name="prefetch", daemon=True).start()

    def _work(self, number: int, future: Future) -> None:
        try:
            future.set_result(self.fetch(number))
        except BaseException as error:
            future.set_exception(error)
        with self.lock:
            self.threads -= 1
            self._start()
