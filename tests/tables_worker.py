"""One rank of the check that every table trains: sharding types, precisions and optimizers, against one process.

    torchrun --standalone --nproc-per-node 2 tests/tables_worker.py DATA

In every round one pooled table has one sharding type in fp32, another the next type in fp16, and a table that a
history reads a third one; with every optimizer the rounds see all types. After 3 steps of falling learning rates, with
predictions before and between them:

* every table has moved, in every row that was looked up and in no other;
* all of them equal the unsharded ones. But not where row-wise Adagrad has cut columns, which is another algorithm.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from hybrids import end, make_hybrid
from parity_worker import Reference, copy, whole

from dist_rec.config import Config
from dist_rec.embeddings.sharders import SHARDING_TYPES
from dist_rec.embeddings.tables import DATA_PARALLEL, SEQUENCE_SHARDING_TYPES
from dist_rec.strict import from_dict
from dist_rec.training.prepare import prepare
from dist_rec.training.process import choose_device, process_group, quieten

FACTORS = [1.0, 0.5, 0.25]
RATES = {"sgd": 5.0, "adagrad": 0.02, "rowwise_adagrad": 0.02}
CUTS_OF_ROWS = ("column_wise", "table_column_wise", "grid_shard")
# By precision and by whether the optimizer divides by gradients, of which some are nearly zero. A table that no
# optimizer steps is off by what it should have moved, 1e-2.
TOLERANCE = {("fp32", False): 1e-6, ("fp32", True): 1e-4, ("fp16", False): 2e-3, ("fp16", True): 2e-3}


def rounds(optimizer):
    """Sharding type and precision of the tables user_id, tags and item_id."""
    groups = [SHARDING_TYPES]
    if optimizer == "rowwise_adagrad":
        groups = [[kind for kind in SHARDING_TYPES if kind not in CUTS_OF_ROWS], CUTS_OF_ROWS]
    for kinds in groups:
        halves = [kind for kind in kinds if kind != DATA_PARALLEL]
        sequences = [kind for kind in kinds if kind in SEQUENCE_SHARDING_TYPES]
        combinations = [(kind, precision) for precision in ("fp32", "fp16") for kind in sequences]
        for i, kind in enumerate(kinds):
            yield {
                "user_id": (kind, "fp32"),
                "tags": (halves[(i + 1) % len(halves)], "fp16"),
                "item_id": combinations[i % len(combinations)],
            }


def config_of(data, layout, optimizer):
    overrides = {name: {"sharding": kind, "precision": precision} for name, (kind, precision) in layout.items()}
    overrides["tags"]["dim"] = 8
    return from_dict(
        Config,
        {
            "data": {"train": data, "batch_size": 40, "streams": 8, "shuffle_window": 64},
            "tables": {
                "dim": 24,
                "init_std": 0.3,
                "optimizer": optimizer,
                "learning_rate": RATES[optimizer],
                "overrides": overrides,
            },
            "model": {"width": 16, "history": {"dropout": 0.0, "feedforward": 16}},
            "dense": {"optimizer": "sgd", "learning_rate": 0.1},
        },
        "tables",
    )


def check(prepared, process, layout, optimizer):
    stream, hybrid, _ = make_hybrid(prepared, process)
    reference = Reference(prepared, process.device)
    hybrid.optimizer.factor = FACTORS.__getitem__
    rates = [(group, group["lr"]) for optimizer in reference.optimizers for group in optimizer.param_groups]
    start = copy(reference.weights())
    batches, seen = stream.batches(0, 0, len(FACTORS)), {name: set() for name in layout}
    for step in range(len(FACTORS)):
        for spec in prepared.specs:
            for feature in spec.features:
                seen[spec.name] |= set(reference.stream.batch(0, step).ids[feature].values().tolist())
        for group, rate in rates:
            group["lr"] = rate * FACTORS[step]
        list(hybrid.predict(stream.batches(0, step, step + 1)))
        reference.step(0, step)
        hybrid.train_step(batches)
    found, wanted, faults = whole(hybrid), copy(reference.weights()), []
    another = optimizer == "rowwise_adagrad" and any(kind in CUTS_OF_ROWS for kind, _ in layout.values())
    for name, (_, precision) in layout.items():
        moved = (found[name] != start[name]).any(dim=1).nonzero()[:, 0].tolist()
        if set(moved) != seen[name]:
            faults.append(f"{name}: rows {sorted(seen[name] ^ set(moved))} moved, or did not")
        difference = float((found[name] - wanted[name]).abs().max())
        if difference > TOLERANCE[precision, optimizer != "sgd"] and not another:
            faults.append(f"{name}: off by {difference:.1e}")
    return faults


def main():
    (data,) = sys.argv[1:]
    quieten()
    failed = False
    first = config_of(data, next(rounds("sgd")), "sgd")
    device = choose_device(first)
    with process_group(first, device) as process:
        for optimizer in RATES:
            for layout in rounds(optimizer):
                found = check(prepare(config_of(data, layout, optimizer)), process, layout, optimizer)
                everyone = [None] * process.world_size
                dist.all_gather_object(everyone, found)
                found = sorted({fault for some in everyone for fault in some})
                failed |= bool(found)
                if process.is_main:
                    words = "; ".join(f"{name} {kind} {precision}" for name, (kind, precision) in layout.items())
                    print("FAIL" if found else "ok", optimizer, words, *found, flush=True)
    end(failed)


if __name__ == "__main__":
    main()
