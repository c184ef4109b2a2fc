"""One rank of the tests of managed tables.

    torchrun --standalone --nproc-per-node 3 tests/managed_worker.py DATA FOLDER JOB ..

A job is `KIND:NAME:tables' optimizer/ZeRO stage/policy/precision`.

* `parity`: where every id finds a row at once, the run is that of plain tables, unsharded, whose rows begin alike.
* `save` trains under pressure to the middle of an interval, evaluates, saves, and writes what every id has, as the
  engine holds it, and what the next steps give; `load` takes it up on any ranks and compares, then trains on ids that
  nobody has seen.
* `faults` changes a checkpoint's numbers and expects words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hybrids import do_jobs, make_hybrid
from safetensors.torch import load_file, save_file
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.config import Config
from dist_rec.embeddings.ids import COUNT, FREE, ID, LAST_SEEN, first_vectors
from dist_rec.embeddings.managed import id_counts, managed_ids
from dist_rec.embeddings.sharding import OPTIMIZERS, optimizer_arguments
from dist_rec.embeddings.tables import EmbeddingTables
from dist_rec.errors import UserError
from dist_rec.layers.reduction import Reduction
from dist_rec.schema import RAW_IDS
from dist_rec.scoring.hashes import mix
from dist_rec.strict import from_dict
from dist_rec.training import checkpoint
from dist_rec.training.checkpoint import managed as managed_checkpoint
from dist_rec.training.checkpoint.tables import local_shards
from dist_rec.training.engine import parameter_groups
from dist_rec.training.prepare import prepare
from dist_rec.training.setup import build_model, build_training_stream

# Rows for every id on every rank; and for a few. No number divides evenly among 2 or 3 ranks.
ROOMY = {"user_id": (8, 151), "item_id": (24, 121), "tags": (16, 41)}
TIGHT = {"user_id": (8, 17), "item_id": (24, 11), "tags": (16, 8)}
# Of their ids, more than rows.
CROWDED = ("user_id", "item_id")
INTERVAL = 3
SAVED_AT = 10
AFTER = 5


def config_of(data, layout, tables, interval):
    optimizer, stage, policy, precision = layout.split("/")
    overrides = {name: {"dim": dim} | ({"managed": rows} if rows else {}) for name, (dim, rows) in tables.items()}
    return from_dict(
        Config,
        {
            "data": {"train": data, "batch_size": 48, "streams": 12, "shuffle_window": 64},
            "tables": {
                "optimizer": optimizer,
                "init_std": 0.3,
                "learning_rate": 0.05,
                "precision": precision,
                "overrides": overrides,
                "managed": {"policy": policy, "interval": interval},
            },
            "model": {"width": 16, "history": {"dropout": 0.0, "feedforward": 16}},
            "dense": {"zero_stage": int(stage)},
        },
        layout,
    )


def batches(stream, first, count):
    """Batches first .. first + count of a run over many epochs."""
    for step in range(first, first + count):
        yield stream.batch(step // stream.steps, step % stream.steps)


def train(hybrid, some):
    some, losses = iter(some), []
    while (output := hybrid.train_step(some)) is not None:
        losses.append(float(output["losses"]["loss"].detach()))
    return losses


def by_value(hybrid):
    """What every id has, from all ranks, as the engine holds it: per table, ids ascending, their vectors, states and
    numbers; what waits; and the shared rows by rank."""
    ids, mine = managed_ids(hybrid.sharded), {}
    for shard in local_shards(hybrid.sharded):
        one = ids[shard.table]
        rows = one.by_row()
        tensors = shard.tensors | {kind: rows[kind] for kind in rows}
        taken = rows[ID] != FREE
        mine |= {f"{shard.table}.{kind}": tensor[taken].detach().clone() for kind, tensor in tensors.items()}
        mine |= {f"{shard.table}.shared.{kind}": t[-1:].detach().clone() for kind, t in shard.tensors.items()}
        mine |= {f"{shard.table}.pending.{kind}": tensor for kind, tensor in one.pending().items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {name: torch.cat([some[name] for some in everyone]) for name in mine}
    for table in ids:
        for prefix in (f"{table}.", f"{table}.pending."):
            order = found[f"{prefix}{ID}"].argsort()
            names = [n for n in found if n.startswith(prefix) and "." not in n.removeprefix(prefix)]
            found |= {name: found[name][order] for name in names}
    return found


def parity(config, process, folder, name, layout, data):
    """Losses of 12 steps and every vector against plain modules on the whole batch."""
    prepared = prepare(config)
    stream, hybrid, _ = make_hybrid(prepared, process)
    plain = config_of(data, layout, {table: (dim, None) for table, (dim, _) in ROOMY.items()}, 1)
    unmanaged = prepare(plain)
    tables = EmbeddingTables(unmanaged.specs, unmanaged.schema, plain.tables, process.device)
    rows = {spec.name: spec.rows for spec in unmanaged.specs}
    weights = {path.split(".")[-2]: weight for path, weight in tables.named_parameters()}
    with torch.no_grad():
        for table, weight in weights.items():
            start = first_vectors(mix(np.arange(rows[table])), weight.shape[1], 0.3, config.run.seed, table)
            weight.copy_(torch.from_numpy(start))
    model = build_model(unmanaged, Reduction())
    optimizers = [
        OPTIMIZERS[config.tables.optimizer](tables.parameters(), **optimizer_arguments(config.tables)),
        torch.optim.AdamW(parameter_groups(model, config.dense, config.text), lr=config.dense.learning_rate),
    ]
    whole = build_training_stream(unmanaged, 0, 1)
    wanted = []
    for batch in batches(whole, 0, 12):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = model(tables.vectors(tables(batch), batch), batch)
        output["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        wanted.append(float(output["losses"]["loss"].detach()))
    found = train(hybrid, batches(stream, 0, 12))
    faults = [f"losses {found}, not {wanted}"] if np.abs(np.subtract(found, wanted)).max() > 1e-5 else []
    state = by_value(hybrid)
    counts = id_counts(hybrid.sharded, process.device)
    for table, weight in weights.items():
        row = {int(id_): i for i, id_ in enumerate(mix(np.arange(rows[table])))}
        expected = weight.detach()[[row[int(id_)] for id_ in state[f"{table}.{ID}"]]]
        apart = float((state[f"{table}.weight"] - expected).abs().max())
        if apart > 1e-3 or len(expected) < rows[table] // 2:
            faults.append(f"{table}: {len(expected)} of {rows[table]} ids, {apart} apart")
        if not state[f"{table}.weight"].abs().sum(1).all():
            faults.append(f"{table}: a vector is zero")
        if counts[table].collisions or counts[table].evicted or counts[table].occupied != counts[table].admitted:
            faults.append(f"{table}: {counts[table]}")
    return faults


def save(config, process, folder, name, layout, data):
    stream, hybrid, plan = make_hybrid(prepare(config), process)
    train(hybrid, batches(stream, 0, SAVED_AT))
    before, counted = by_value(hybrid), id_counts(hybrid.sharded, process.device)
    list(hybrid.predict(batches(stream, SAVED_AT, 2)))
    state = by_value(hybrid)
    faults = [f"evaluation changed {n}" for n in differing(before, state)]
    if id_counts(hybrid.sharded, process.device) != counted:
        faults.append("evaluation was counted")
    evaluated = id_counts(hybrid.sharded, process.device, evaluated=True)
    if not all(evaluated[table].lookups > evaluated[table].collisions > 0 for table in CROWDED):
        faults.append(f"evaluation counted {evaluated}")
    crowded = all(counted[table].lookups > counted[table].collisions > 0 for table in CROWDED)
    # Under lfu nobody leaves who came as often as the new ones.
    if not crowded or not (counted["user_id"].evicted or config.tables.managed.policy == "lfu"):
        faults.append(f"no pressure: {counted}")
    if not all(len(state[f"{table}.pending.{ID}"]) for table in TIGHT):
        faults.append("nothing waits")
    writer = checkpoint.Writer(folder / name, config.checkpoint)
    writer.save(SAVED_AT, hybrid.sharded, hybrid.engine, state={}, config={}, plan=plan)
    losses = train(hybrid, batches(stream, SAVED_AT, AFTER))
    writer.wait()
    after = by_value(hybrid)
    if process.is_main:
        save_file({n: t.contiguous() for n, t in state.items()}, folder / f"{name}.state")
        save_file({n: t.contiguous() for n, t in after.items()}, folder / f"{name}.after")
        (folder / f"{name}.losses").write_text(json.dumps([process.world_size, losses]))
    dist.barrier()
    return faults


def differing(wanted, found):
    return [n for n in wanted.keys() | found.keys() if n not in found or not torch.equal(wanted[n], found[n])]


def load(config, process, folder, name, layout, data):
    stream, hybrid, _ = make_hybrid(prepare(config), process)
    train(hybrid, batches(stream, 20, 2))
    saved = checkpoint.last_good(folder / name)
    said = checkpoint.load_tables(saved, hybrid.sharded)
    checkpoint.load_dense_into_engine(saved, hybrid.engine)
    wanted, found = load_file(folder / f"{name}.state"), by_value(hybrid)
    world, losses = json.loads((folder / f"{name}.losses").read_text())
    faults = []
    if world == process.world_size:
        faults += [f"{n} differs" for n in differing(wanted, found)] + said
        again = train(hybrid, batches(stream, SAVED_AT, AFTER))
        faults += [f"losses {losses} became {again}"] if losses != again else []
        faults += [f"then {n} differs" for n in differing(load_file(folder / f"{name}.after"), by_value(hybrid))]
    else:
        for table in TIGHT:
            faults += moved(table, wanted, found, said, config.tables, process.world_size)
    if config.tables.managed.policy != "lfu":
        faults += unseen(hybrid, stream, process)
    return faults + restarted(hybrid, config)


def moved(table, wanted, found, said, config, ranks):
    """Ids keep all they had; those that lost their rows are the coldest of ranks that have too few."""
    faults = [n for n in differing(wanted, found) if n.startswith(f"{table}.pending")]
    before, now = wanted[f"{table}.{ID}"], found[f"{table}.{ID}"]
    place = torch.searchsorted(before, now)
    kinds = [n for n in wanted if n.startswith(f"{table}.") and n.count(".") == 1]
    faults += [name for name in kinds if not torch.equal(wanted[name][place], found[name])]
    share = -(-TIGHT[table][1] // ranks)
    capacity = [min(share, TIGHT[table][1] - rank * share) - 1 for rank in range(ranks)]
    owner = (before // -(-RAW_IDS // ranks)).numpy()
    count, last = (wanted.get(f"{table}.{kind}") for kind in ("count", "last_seen"))
    worth = {"lfu": lambda: count, "lru": lambda: last, "distance_lfu": lambda: count / (SAVED_AT - last + 1)}
    worth, kept, dropped = worth[config.managed.policy]().numpy(), np.isin(before, now), 0
    for rank in range(ranks):
        here = owner == rank
        dropped += max(here.sum() - capacity[rank], 0)
        if (kept & here).sum() != min(here.sum(), capacity[rank]):
            faults.append(f"{table}: rank {rank} keeps {(kept & here).sum()} of {here.sum()}, not {capacity[rank]}")
        if (~kept & here).any() and worth[~kept & here].max() > worth[kept & here].min():
            faults.append(f"{table}: rank {rank} dropped warmer ids than it kept")
    words = [line for line in said if line.startswith(f"table {table}: {dropped} of {len(before)} ids lost their rows")]
    if bool(words) != bool(dropped):
        faults.append(f"{table}: {dropped} ids dropped, said {said}")
    # Where one range lies in another, ids without a row read the same vector as before.
    shared, old = found[f"{table}.shared.weight"], wanted[f"{table}.shared.weight"]
    if ranks % len(old) == 0 and not torch.equal(shared, old.repeat_interleave(ranks // len(old), 0)):
        faults.append(f"{table}: shared rows are others")
    if len(old) % ranks == 0 and not torch.allclose(shared, old.view(ranks, -1, shared.shape[1]).mean(1), atol=1e-3):
        faults.append(f"{table}: shared rows are no means")
    return faults


def unseen(hybrid, stream, process):
    """Ids that nobody has seen find rows on every rank, and lose the cold ones theirs."""

    def shifted(batch):
        ids = batch.ids
        values = (ids.values() + 12345) % RAW_IDS
        batch.ids = KeyedJaggedTensor(keys=ids.keys(), values=values, lengths=ids.lengths(), stride=ids.stride())
        return batch

    before, counted = by_value(hybrid), id_counts(hybrid.sharded, process.device)
    losses = train(hybrid, map(shifted, batches(stream, 30, 2 * INTERVAL)))
    after, faults = by_value(hybrid), []
    for table, counts in id_counts(hybrid.sharded, process.device).items():
        new = np.setdiff1d(after[f"{table}.{ID}"], before[f"{table}.{ID}"])
        owners = len(np.unique(new // -(-RAW_IDS // process.world_size)))
        if not len(new) or counts.admitted - counted[table].admitted < len(new):
            faults.append(f"{table}: no unseen id found a row")
        if table == "user_id" and owners < process.world_size:
            faults.append(f"{table}: unseen ids found rows on {owners} ranks only")
    return faults if np.isfinite(losses).all() else [*faults, f"losses {losses}"]


def restarted(hybrid, config):
    """A row that gets another id has its first vector and no momenta, whatever it had; the others stay."""
    faults = []
    for module in hybrid.sharded.modules():
        for table in getattr(module, "_table_to_tbe_and_index", {}):
            (shard,) = (shard for shard in local_shards(hybrid.sharded) if shard.table == table)
            ids, rows = managed_ids(hybrid.sharded)[table].by_row()[ID], torch.tensor([0])
            before = {kind: tensor.detach().clone() for kind, tensor in shard.tensors.items()}
            module._evict({table: rows})
            start = torch.from_numpy(first_vectors(ids[rows].numpy(), shard.box.size[1], 0.3, config.run.seed, table))
            wanted = {kind: torch.zeros_like(tensor[:1]) for kind, tensor in before.items()}
            wanted["weight"] = start.to(before["weight"].dtype)
            faults += [f"{table}: {kind} is not restarted" for kind in differing(wanted, part_of(shard, 0, 1))]
            others = {kind: tensor[1:] for kind, tensor in before.items()}
            faults += [f"{table}: other rows' {kind}" for kind in differing(others, part_of(shard, 1, None))]
            if table in CROWDED and not all(tensor[:1].any() for tensor in before.values()):
                faults.append(f"{table}: nothing to restart")
    return faults


def part_of(shard, start, stop):
    return {kind: tensor[start:stop].detach() for kind, tensor in shard.tensors.items()}


def faults(config, process, folder, name, layout, data):
    """Numbers that cannot be are told, on all ranks, whatever the checksums say."""
    _, hybrid, _ = make_hybrid(prepare(config), process)
    saved, true, wrong = checkpoint.last_good(folder / name), managed_checkpoint.whole_numbers, []

    def expect(words, change, changed_kind=ID):
        def changed(saved, table, info, kind, box):
            numbers = true(saved, table, info, kind, box)
            if kind == changed_kind and table == "user_id" and len(numbers):
                change(numbers)
            return numbers

        with mock.patch.object(managed_checkpoint, "whole_numbers", changed):
            try:
                checkpoint.load_tables(saved, hybrid.sharded)
                wrong.append(f"nothing said of {words}")
            except UserError as error:
                wrong.extend([] if words in str(error) else [str(error)])

    expect("ids of other ranks", lambda numbers: numbers[:1].fill_(-5))
    expect("ids of other ranks", lambda numbers: numbers[:1].fill_(RAW_IDS - 1 if numbers[0] < RAW_IDS // 2 else 1))
    expect("an id in the shared row", lambda numbers: numbers[-1:].copy_(numbers[:1]))
    expect("an id twice", lambda numbers: numbers[1:2].copy_(numbers[:1]))
    for kind, words in ((COUNT, "an id that never came"), (LAST_SEEN, "an id that came at no step")):
        if kind in managed_ids(hybrid.sharded)["user_id"].kinds:
            expect(words, lambda numbers: numbers[:1].fill_(-1), kind)
            if kind == LAST_SEEN:
                expect(words, lambda numbers: numbers[:1].fill_(10**12), kind)
    other = "lru" if config.tables.managed.policy != "lru" else "lfu"
    another = config_of(data, layout.replace(config.tables.managed.policy, other), TIGHT, INTERVAL)
    _, hybrid, _ = make_hybrid(prepare(another), process)
    with pytest.raises(UserError, match=r"'user_id' keeps .* of a row, .*tables.managed.policy want"):
        checkpoint.load_tables(saved, hybrid.sharded)
    return wrong


JOBS = {"parity": parity, "save": save, "load": load, "faults": faults}


def main():
    data, folder, *jobs = sys.argv[1:]

    def do(job, process):
        kind, name, layout = job.split(":")
        tables, interval = (ROOMY, 1) if kind == "parity" else (TIGHT, INTERVAL)
        config = config_of(data, layout, tables, interval)
        return JOBS[kind](config, process, Path(folder), name, layout, data)

    do_jobs(jobs, config_of(data, jobs[0].split(":")[2], TIGHT, INTERVAL), do)


if __name__ == "__main__":
    main()
