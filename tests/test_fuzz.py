"""Whatever a shard, a block, an index or a config holds, it is read rightly or refused in words.

`pytest tests/test_fuzz.py --fuzz 100000 --fuzz-seed 7` reads more damaged inputs of each kind than the default
5,000, and others. A failure names the input; `python tests/fuzz_worker.py <kind> --seed S --first N --count 1` reads
it again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import run_command

WORKER = Path(__file__).with_name("fuzz_worker.py")


@pytest.mark.parametrize("kind", ["blocks", "tars", "indexes", "configs"])
@pytest.mark.timeout(3600)
def test_damaged_input_is_read_rightly_or_refused_in_words(kind, request):
    count, seed = request.config.getoption("--fuzz"), request.config.getoption("--fuzz-seed")
    command = [sys.executable, str(WORKER), kind, "--seed", str(seed), "--count", str(count)]
    done = run_command(command, seconds=60 + count / 20)
    *numbers, last = done.stdout.splitlines() or [""]
    if done.returncode:
        pytest.fail(
            f"input {last} of {kind}, seed {seed}, ended the reader with {done.returncode}: {done.stderr[-3000:]}\n"
            f"Again: python tests/fuzz_worker.py {kind} --seed {seed} --first {last} --count 1"
        )
    found = json.loads(last)
    assert found["read"] + found["refused"] == count == len(numbers)
    # Damage that is always noticed, or never, tests nothing.
    assert found["read"] > count / 50 and found["refused"] > count / 50, found
