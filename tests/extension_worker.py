"""One rank of the tests of divided vocabularies.

    torchrun --standalone --nproc-per-node 2 tests/extension_worker.py DATA EXTENDED FOLDER JOB ..

DATA and EXTENDED have the same rows; in EXTENDED, vocabularies are inherited. A job is
`KIND:NAME:tables' optimizer/sharding[+table=sharding ..]`.

* `parity`: a run on EXTENDED is one on DATA whose tables begin with the same rows, unsharded and undivided: vectors
  of every feature, losses of 8 steps, and every row after them.
* `save` trains 3 steps, saves, and writes tables and the losses of 3 more; `load` takes it up under any plan.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from checkpoint_worker import train, whole
from hybrids import do_jobs, make_hybrid
from parity_worker import Reference, copy
from safetensors.torch import load_file, save_file

from dist_rec.config import Config
from dist_rec.data.vocabulary import undivided
from dist_rec.embeddings.tables import initial_rows
from dist_rec.strict import from_dict
from dist_rec.training import checkpoint
from dist_rec.training.prepare import prepare
from dist_rec.training.setup import build_training_stream

STEPS = 8


def config_of(data, layout):
    optimizer, kinds = layout.split("/")
    sharding, *single = kinds.split("+")
    overrides = {name: {"sharding": kind} for name, kind in (one.split("=") for one in single)}
    overrides.setdefault("tags", {})["dim"] = 8
    return from_dict(
        Config,
        {
            "data": {"train": data, "batch_size": 40, "streams": 8, "shuffle_window": 64},
            "tables": {
                "dim": 24,
                "init_std": 0.3,
                "sharding": sharding,
                "optimizer": optimizer,
                "learning_rate": 2.0 if optimizer == "sgd" else 0.05,
                "overrides": overrides,
            },
            "model": {"width": 16, "embedding_l2": 0.01, "history": {"dropout": 0.0, "feedforward": 16}},
            "dense": {"optimizer": "sgd", "learning_rate": 0.1},
        },
        layout,
    )


def joined(tables):
    """Whole vocabularies, from their parts in order."""
    parts = {}
    for name in sorted(tables):
        parts.setdefault(undivided(name), []).append(tables[name])
    return {name: torch.cat(several) for name, several in parts.items()}


def tables_of(hybrid):
    return {n.removeprefix("tables."): t for n, t in whole(hybrid).items() if n.startswith("tables.")}


def parity(data, extended, layout, process, folder, name):
    config = config_of(extended, layout)
    prepared, undivided_ = prepare(config), prepare(config_of(data, layout.split("/")[0] + "/table_wise"))
    stream, hybrid, plan = make_hybrid(prepared, process)
    faults = [] if {"item_id@1", "item_id@2", "tags@1", "user_id@1"} <= plan.keys() else [f"tables {sorted(plan)}"]
    reference = Reference(undivided_, process.device)
    start = joined({s.name: initial_rows(s, config.tables, config.run.seed, 0, s.rows) for s in prepared.specs})
    with torch.no_grad():
        for table, weight in reference.weights().items():
            weight.copy_(start[table])
    mine = build_training_stream(undivided_, process.rank, process.world_size)
    for step in range(3):
        batch, other = stream.batch(0, step), mine.batch(0, step)
        found = hybrid.tables.vectors(hybrid.sharded(batch), batch)
        wanted = reference.tables.vectors(reference.tables(other), other)
        faults += [f"features {sorted(found)}"] if found.keys() != wanted.keys() else []
        for feature, vectors in wanted.items():
            if found[feature].shape != vectors.shape or (found[feature] - vectors).abs().max() > 1e-6:
                faults.append(f"vectors of {feature}")
    losses, expected = [], []
    batches = stream.batches(0, 0, STEPS)
    for step in range(STEPS):
        expected.append({name: float(loss) for name, loss in reference.step(0, step).items()})
        losses.append({name: float(loss) for name, loss in hybrid.train_step(batches)["losses"].items()})
    apart = max(abs(one[name] - other[name]) for one, other in zip(losses, expected, strict=True) for name in other)
    faults += [f"losses {losses}, not {expected}"] if apart > 1e-5 else []
    found, before = joined({n: t for n, t in tables_of(hybrid).items() if "." not in n}), start
    for table, weight in copy(reference.weights()).items():
        if (found[table] - weight).abs().max() > 1e-4:
            faults.append(f"table {table} is {float((found[table] - weight).abs().max())} apart")
        faults += [f"table {table} stood still"] if torch.equal(weight, before[table]) else []
    return faults


def save(data, extended, layout, process, folder, name):
    config = config_of(extended, layout)
    stream, hybrid, plan = make_hybrid(prepare(config), process)
    train(stream, hybrid, 0, 3)
    writer = checkpoint.Writer(folder / name, config.checkpoint)
    writer.save(3, hybrid.sharded, hybrid.engine, state={}, config={}, plan=plan)
    tables, losses = tables_of(hybrid), train(stream, hybrid, 3, 3)
    writer.wait()
    if process.is_main:
        save_file({n: t.contiguous() for n, t in tables.items()}, folder / f"{name}.tables")
        (folder / f"{name}.losses").write_text(json.dumps(losses))
    return []


def load(data, extended, layout, process, folder, name):
    stream, hybrid, _ = make_hybrid(prepare(config_of(extended, layout)), process)
    train(stream, hybrid, 5, 1)
    saved = checkpoint.last_good(folder / name)
    faults = checkpoint.load_tables(saved, hybrid.sharded)
    checkpoint.load_dense_into_engine(saved, hybrid.engine)
    found, wanted = tables_of(hybrid), load_file(folder / f"{name}.tables")
    faults += [n for n in found.keys() | wanted.keys() if not torch.equal(found[n], wanted[n])]
    losses, again = json.loads((folder / f"{name}.losses").read_text()), train(stream, hybrid, 3, 3)
    if max(abs(a - b) for a, b in zip(losses, again, strict=True)) > 1e-4:
        faults.append(f"losses {losses} became {again}")
    return faults


JOBS = {"parity": parity, "save": save, "load": load}


def main():
    data, extended, folder, *jobs = sys.argv[1:]

    def do(job, process):
        kind, name, layout = job.split(":")
        return JOBS[kind](data, extended, layout, process, Path(folder), name)

    do_jobs(jobs, config_of(data, jobs[0].split(":")[2]), do)


if __name__ == "__main__":
    main()
