"""A `dist-rec train` that something befalls: what `tests/test_early_stopping.py` starts.

python tests/stopping_worker.py EVENT:STEP CONFIG ...

* term: it is told to stop such that it does after STEP steps;
* save: it dies when the checkpoint of STEP is about to be written;
* saved: it dies when the checkpoint of STEP has been published;
* full: the checkpoint of STEP cannot be written.
"""

from __future__ import annotations

import os
import signal
import sys

from dist_rec.cli import main
from dist_rec.training import trainer
from dist_rec.training.checkpoint import writer

EVENT, _, STEP = sys.argv.pop(1).partition(":")
STEP = int(STEP)
seed_step, save, write_tensors = trainer.seed_step, trainer.Trainer.save, writer.write_tensors


def seed_and_be_told(seed: int, step: int, rank: int) -> None:
    # Heard of when the step after this one begins.
    if EVENT == "term" and step == STEP - 2:
        os.kill(os.getpid(), signal.SIGTERM)
    seed_step(seed, step, rank)


def save_and_die(self: trainer.Trainer) -> None:
    if EVENT == "save" and self.step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self)
    if EVENT == "saved" and self.step == STEP:
        self.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)


def write_unless_full(path, *arguments):
    if EVENT == "full" and f"{STEP:08d}" in str(path):
        raise OSError("the disk is full")
    return write_tensors(path, *arguments)


trainer.seed_step = seed_and_be_told
trainer.Trainer.save = save_and_die
writer.write_tensors = write_unless_full
sys.argv[1:1] = ["train"]
main()
