"""An `embed` that was killed: the next one takes over what it wrote, and ends with the store of one that was not."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_ranks
from titles import TITLES, write_data_set

from dist_rec.errors import UserError
from dist_rec.text import embed as embed_module
from dist_rec.text import parts as parts_module
from dist_rec.text.embed import embed
from dist_rec.text.encoder import TextEncoder
from dist_rec.text.parts import PartWriter
from dist_rec.text.store import VectorStore

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"{title} part {i}" for i in range(30) for title in TITLES]
# Texts a batch: small batches, so that there are many to be killed between.
OPTIONS = {"store_dtype": "float32", "batch_tokens": 48}
JOB = """
import json, os, signal, sys
from dist_rec.text import embed as module
from dist_rec.text.encoder import TextEncoder
from dist_rec.text.parts import PartWriter

data, model, out, batches = *sys.argv[1:4], int(sys.argv[4])
plain, forward, counts = PartWriter.write, TextEncoder.forward, {"batches": 0, "texts": 0}

def write(self, *given):
    plain(self, *given)
    counts["batches"] += 1
    if counts["batches"] == batches:
        os.kill(os.getpid(), signal.SIGKILL)

def count(self, tokens, mask):
    counts["texts"] += len(tokens)
    return forward(self, tokens, mask)

PartWriter.write, TextEncoder.forward = write, count
result = module.embed([data], model, out, store_dtype="float32", batch_tokens=48, timeout_minutes=1)
# A file each: lines that two ranks print may be mixed.
with open(f"{out}.rank{os.environ['RANK']}", "w") as file:
    json.dump({**vars(result), "encoded": counts["texts"]}, file)
"""


class Killed(BaseException):
    """Stands for a signal: no handler of errors catches it."""


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many texts each call of the encoder had."""
    counts, forward = [], TextEncoder.forward

    def count(self, tokens, mask):
        counts.append(len(tokens))
        return forward(self, tokens, mask)

    monkeypatch.setattr(TextEncoder, "forward", count)
    return counts


def killed_after(monkeypatch, batches: int, *arguments, **options) -> None:
    plain, done = PartWriter.write, []

    def write(self, *given):
        plain(self, *given)
        done.append(1)
        if len(done) == batches:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "write", write)
        with pytest.raises(Killed):
            embed(*arguments, **options)


def vectors_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    store = VectorStore.open(folder)
    store.verify()
    return store.keys, store.lookup(np.array(store.keys))


def assert_same(folder: Path, other: Path) -> None:
    for one, two in zip(vectors_of(folder), vectors_of(other), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_a_job_killed_on_two_ranks_goes_on_to_the_last_bit(tiny_model, tmp_path):
    data = write_data_set(tmp_path / "data", TEXTS)
    script = tmp_path / "job.py"
    script.write_text(JOB)

    def job(out: str, batches: int):
        return run_ranks(2, [str(script), data, tiny_model, str(tmp_path / out), str(batches)], 120)

    def told(out: str) -> list[dict]:
        return [json.loads((tmp_path / f"{out}.rank{rank}").read_text()) for rank in range(2)]

    whole = job("whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert job("killed", 12).returncode != 0
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if path.stat().st_size)
    assert "store.json" not in left and "vectors-1-0-2.bin" in left
    again = job("killed", 0)
    assert again.returncode == 0, again.stderr
    first, second = told("whole"), told("killed")
    assert sum(r["encoded"] for r in first) == len(TEXTS)
    taken = second[0]["taken_over"]
    assert taken >= 12 and {r["taken_over"] for r in second} == {taken}
    assert sum(r["encoded"] for r in second) == len(TEXTS) - taken
    assert "taken over" in again.stderr
    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert {path.suffix for path in (tmp_path / "killed").iterdir()} == {".bin", ".json"}
    assert len(VectorStore.open(tmp_path / "killed").info.parts) == 2

    # What two ranks left serves one.
    result = embed([data], tiny_model, str(tmp_path / "other"), **OPTIONS)
    assert result.taken_over == taken and result.added == len(TEXTS)
    (keys, vectors), (wanted, expected) = vectors_of(tmp_path / "other"), vectors_of(tmp_path / "whole")
    np.testing.assert_array_equal(keys, wanted)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_a_job_killed_twice_loses_nothing(tiny_model, tmp_path, monkeypatch, encoded):
    data, out = write_data_set(tmp_path / "data", TEXTS), str(tmp_path / "store")
    embed([data], tiny_model, str(tmp_path / "whole"), **OPTIONS)
    assert sum(encoded) == len(TEXTS)
    encoded.clear()
    killed_after(monkeypatch, 5, [data], tiny_model, out, **OPTIONS)
    killed_after(monkeypatch, 7, [data], tiny_model, out, **OPTIONS)
    result = embed([data], tiny_model, out, **OPTIONS)
    # The batch that a kill finds between the model and the file is computed again.
    assert sum(encoded) <= len(TEXTS) + 2 * max(encoded)
    assert result.taken_over >= 12 and result.added == len(TEXTS)
    assert_same(tmp_path / "store", tmp_path / "whole")
    encoded.clear()
    assert embed([data], tiny_model, out, **OPTIONS).added == 0 and not encoded


def test_a_job_that_was_killed_before_it_published_needs_no_model(tiny_model, tmp_path, monkeypatch):
    data, out = write_data_set(tmp_path / "data", TEXTS), str(tmp_path / "store")

    def fail(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "publish", fail)
        with pytest.raises(Killed):
            embed([data], tiny_model, out, **OPTIONS)
    monkeypatch.setattr(embed_module, "load_text_encoder", lambda *_: pytest.fail("the model is not needed"))
    result = embed([data], tiny_model, out, **OPTIONS)
    assert result.taken_over == result.added == len(TEXTS) and result.texts_per_second == 0


def test_a_job_that_extended_a_store_goes_on(tiny_model, tmp_path, monkeypatch):
    first, out = write_data_set(tmp_path / "a", TEXTS[:50]), str(tmp_path / "store")
    embed([first], tiny_model, out, **OPTIONS)
    before = vectors_of(tmp_path / "store")
    more = write_data_set(tmp_path / "b", TEXTS)
    killed_after(monkeypatch, 6, [more], tiny_model, out, **OPTIONS)
    for one, two in zip(vectors_of(tmp_path / "store"), before, strict=True):
        np.testing.assert_array_equal(one, two)
    # What extends a store is no part of one that is written anew.
    result = embed([more], tiny_model, str(out), **OPTIONS)
    assert result.taken_over > 0 and result.added == len(TEXTS) - 50


@pytest.mark.parametrize("suffix", [".bin", ".keys"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_leftovers_are_dropped(tiny_model, tmp_path, monkeypatch, capfd, suffix, ranks):
    data, out = write_data_set(tmp_path / "data", TEXTS), tmp_path / "store"
    embed([data], tiny_model, str(tmp_path / "whole"), **OPTIONS)
    killed_after(monkeypatch, 20, [data], tiny_model, str(out), **OPTIONS)
    (path,) = (path for path in out.iterdir() if path.suffix == suffix)
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 4
    path.write_bytes(payload[:-3])
    if ranks == 2:
        # As two ranks of two would see what one left: rename it, and let one rank read it.
        for one in list(out.iterdir()):
            one.rename(out / one.name.replace("-1-0-1", "-1-0-2"))
    capfd.readouterr()
    result = embed([data], tiny_model, str(out), **OPTIONS)
    assert 0 < result.taken_over < len(TEXTS) and result.added == len(TEXTS)
    if ranks == 1:
        assert "vectors of a job that did not end: damaged" in capfd.readouterr().err
        assert_same(out, tmp_path / "whole")
    (keys, vectors), (wanted, expected) = vectors_of(out), vectors_of(tmp_path / "whole")
    np.testing.assert_array_equal(keys, wanted)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


@pytest.mark.parametrize("change", ["pooling", "overwrite", "note"])
def test_leftovers_of_another_recipe_or_base_are_dropped(tiny_model, tmp_path, monkeypatch, change):
    data, out = write_data_set(tmp_path / "data", TEXTS), tmp_path / "store"
    options = dict(OPTIONS)
    if change == "overwrite":
        embed([write_data_set(tmp_path / "some", TEXTS[:9])], tiny_model, str(out), **options)
    killed_after(monkeypatch, 8, [data], tiny_model, str(out), **options)
    if change == "pooling":
        options["pooling"] = "cls"
    elif change == "overwrite":
        options["overwrite"] = True
    else:
        next(out.glob("part-*.json")).write_text("{")
    result = embed([data], tiny_model, str(out), **options)
    assert (result.taken_over, result.added) == (0, len(TEXTS))
    options.pop("overwrite", None)
    embed([data], tiny_model, str(tmp_path / "whole"), **options)
    assert_same(out, tmp_path / "whole")


def test_a_job_that_is_still_at_work_is_not_robbed(tiny_model, tmp_path, monkeypatch):
    data, out = write_data_set(tmp_path / "data", TEXTS), tmp_path / "store"
    killed_after(monkeypatch, 3, [data], tiny_model, str(out), **OPTIONS)
    with open(out / "part-1-0-1.keys", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another job is writing .*part-1-0-1.keys"):
            embed([data], tiny_model, str(out), **OPTIONS)
    for path in list(out.iterdir()):
        path.rename(out / path.name.replace("-1-0-1", "-1-1-3"))
    with open(out / "part-1-1-3.keys", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another job is writing .*part-1-1-3.keys"):
            embed([data], tiny_model, str(out), **OPTIONS)
    assert embed([data], tiny_model, str(out), **OPTIONS).taken_over > 0


def test_half_a_batch_is_computed_again(tiny_model, tmp_path, monkeypatch):
    data, out = write_data_set(tmp_path / "data", TEXTS), tmp_path / "store"
    embed([data], tiny_model, str(tmp_path / "whole"), **OPTIONS)
    killed_after(monkeypatch, 6, [data], tiny_model, str(out), **OPTIONS)
    keys = out / "part-1-0-1.keys"
    entries = np.fromfile(keys, "<i8").reshape(-1, parts_module._COLUMNS)
    torn = int(np.flatnonzero(entries[:, 2] > 0)[-1])
    keys.write_bytes(entries[: torn + 1].tobytes())
    ended = int(np.flatnonzero(entries[:torn, 2] == 0)[-1]) + 1
    assert embed([data], tiny_model, str(out), **OPTIONS).taken_over == ended
    assert_same(out, tmp_path / "whole")
