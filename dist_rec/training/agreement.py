"""What the ranks agree on after every step without waiting for each other: to stop, to save.

Any rank may be told to stop, and only rank 0 looks at the clock; yet all must act after the same
step. A small sum travels over a process group of its own while the step computes.
"""

from __future__ import annotations

import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config import CheckpointConfig


class Agreement:
    """Collective: made, begun and ended by all ranks together.

    Args:
        config: when to save.
        timeout: of the process group.
    """

    def __init__(self, config: CheckpointConfig, timeout: timedelta) -> None:
        self.config = config
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.is_main = dist.get_rank() == 0
        self.asked_to_stop = False
        self.saved = time.monotonic()
        self.previous = signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, *_) -> None:
        self.asked_to_stop = True

    def begin(self, lost_rows: int) -> None:
        """Send this rank's wishes on their way, and how many rows the blocks have that it could not read."""
        minutes = self.config.every_minutes
        due = self.is_main and minutes > 0 and time.monotonic() - self.saved >= 60 * minutes
        self.wishes = torch.tensor([int(self.asked_to_stop), int(due), lost_rows])
        self.work = dist.all_reduce(self.wishes, group=self.group, async_op=True)

    def end(self, step: int) -> None:
        """Learn all ranks' wishes: `stop`, `save` and `lost_rows` hold after `step` steps."""
        self.work.wait()
        stop, due, self.lost_rows = self.wishes.tolist()
        every = self.config.every_steps
        self.stop = stop > 0
        self.save = due > 0 or self.stop or (every > 0 and step % every == 0)
        if self.save:
            self.saved = time.monotonic()

    def close(self) -> None:
        """Let SIGTERM end the process again."""
        signal.signal(signal.SIGTERM, self.previous)

    def leave(self) -> None:
        """Give up the process group, when nothing has failed: its threads would outlive this object."""
        dist.destroy_process_group(self.group)
