"""One rank of the tests of frozen tables.

    torchrun --standalone --nproc-per-node 2 tests/frozen_worker.py DATA FOLDER JOB ..

A job is `KIND:NAME:tables' optimizer/sharding[+table=key:value ..]/frozen tables, by commas`.

* `still` trains: frozen tables keep every bit, in weights and in ids, have no optimizer state, take no part in
  backward, and send nothing back; the others move, and equal those of the unsharded model.
* `save` trains 3 steps, saves, and writes tables and the losses of 3 more; `load` takes it up, frozen or not, and says
  what `load_tables` said.
* `some` fills the tables that a checkpoint has and leaves the others.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_worker import whole
from hybrids import do_jobs, make_hybrid
from parity_worker import Reference
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection

from dist_rec.bench.exchange import counting
from dist_rec.config import Config
from dist_rec.embeddings.ids import ID
from dist_rec.embeddings.managed import id_counts, managed_ids
from dist_rec.embeddings.tables import table_specs
from dist_rec.errors import UserError
from dist_rec.plan.measure import _bytes_of_ranks
from dist_rec.strict import from_dict
from dist_rec.training import checkpoint
from dist_rec.training.prepare import prepare

FACTORS = [1.0, 0.5, 0.25, 0.25, 0.25, 0.25]


def config_of(data, layout):
    optimizer, kinds, _ = layout.split("/")
    sharding, *single = kinds.split("+")
    overrides = {}
    for one in single:
        table, setting = one.split("=")
        key, value = setting.split("~")
        overrides.setdefault(table, {})[key] = int(value) if value.isdigit() else value
    return from_dict(
        Config,
        {
            "data": {"train": data, "batch_size": 48, "streams": 12, "shuffle_window": 64},
            "tables": {
                "dim": 16,
                "init_std": 0.3,
                "sharding": sharding,
                "optimizer": optimizer,
                "learning_rate": 2.0 if optimizer == "sgd" else 0.05,
                "overrides": overrides,
                "managed": {"interval": 2},
            },
            "model": {"width": 16, "embedding_l2": 0.01, "history": {"dropout": 0.0, "feedforward": 16}},
            "dense": {"optimizer": "sgd", "learning_rate": 0.1},
        },
        layout,
    )


def prepared_of(data, layout, frozen=None):
    prepared = prepare(config_of(data, layout))
    frozen = set(filter(None, layout.split("/")[2].split(","))) if frozen is None else frozen
    specs = table_specs(prepared.schema, prepared.config.tables, prepared.features, frozen)
    return replace(prepared, specs=specs), frozen


def tables_of(hybrid):
    return {n.removeprefix("tables."): t for n, t in whole(hybrid).items() if n.startswith("tables.")}


def ids_of(hybrid, table):
    """What this rank keeps of a managed table's ids."""
    ids = managed_ids(hybrid.sharded)[table]
    kept = ids.by_row() | {f"pending {kind}": numbers for kind, numbers in ids.pending().items()}
    return {kind: numbers.clone() for kind, numbers in kept.items()} | {"clock": torch.tensor(ids.clock)}


def nodes(*outputs):
    """Names of everything that backward from these would run."""
    waiting, seen = [o.grad_fn for o in outputs if o.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions if after is not None]
    return {node.name() for node in seen}


def train(stream, hybrid, first, steps):
    batches, losses = stream.batches(0, first, first + steps), []
    for _ in range(steps):
        losses.append(float(hybrid.train_step(batches)["losses"]["loss"].detach()))
    return losses


def backward_of(hybrid, batch):
    """Which features' vectors have a gradient; what backward from all of them runs, and sends to other ranks."""
    hybrid.pipeline.detach()
    with counting() as sent:
        hybrid.sharded.train()
        vectors = hybrid.tables.vectors(hybrid.sharded(batch), batch)
        forward = sent.vectors
        trained = [v for v in vectors.values() if v.requires_grad]
        run = nodes(*trained)
        if trained:
            # Nothing steps: no gradient has any size.
            sum((v * 0.0).sum() for v in trained).backward()
            hybrid.sharded.replicated.step()
        bytes_ = torch.tensor([forward, sent.vectors - forward])
        dist.all_reduce(bytes_)
        return {name for name, v in vectors.items() if v.requires_grad}, run, *bytes_.tolist()


def still(data, layout, process, folder, name):
    prepared, frozen = prepared_of(data, layout)
    stream, hybrid, plan = make_hybrid(prepared, process)
    hybrid.optimizer.factor = FACTORS.__getitem__
    specs = {spec.name: spec for spec in prepared.specs}
    managed = {n for n in frozen if specs[n].managed}
    features = {f for n in specs.keys() - frozen for f in specs[n].features}
    before, ids = tables_of(hybrid), {n: ids_of(hybrid, n) for n in managed}
    with_gradient, vectors_of = [], hybrid.tables.vectors

    def vectors(looked_up, batch):
        found = vectors_of(looked_up, batch)
        with_gradient.append({name for name, v in found.items() if v.requires_grad or v.grad_fn is not None})
        return found

    hybrid.tables.vectors = vectors
    plain = not any(spec.managed or spec.precision == "fp16" for spec in prepared.specs)
    reference = Reference(prepared, process.device) if plain else None
    faults, batches = [], stream.batches(0, 0, len(FACTORS))
    for step in range(3):
        loss = float(hybrid.train_step(batches)["losses"]["loss"].detach())
        if reference:
            rates = [(group, group["lr"]) for optimizer in reference.optimizers for group in optimizer.param_groups]
            for group, rate in rates:
                group["lr"] = rate * FACTORS[step]
            wanted = float(reference.step(0, step)["loss"])
            for group, rate in rates:
                group["lr"] = rate
            faults += [f"loss {loss}, not {wanted}"] if abs(loss - wanted) > 1e-5 else []
    while hybrid.train_step(batches) is not None:
        pass
    faults += [f"gradients of {with_gradient}, not of {features}"] if with_gradient != [features] * len(FACTORS) else []
    collections = sum(1 for m in hybrid.tables.modules() if isinstance(m, ShardedEmbeddingModule))
    ahead = len(hybrid.pipeline._pipelined_modules)
    # A managed collection has the one of its vectors inside.
    inside = sum(1 for m in hybrid.tables.modules() if isinstance(m, BaseShardedManagedCollisionEmbeddingCollection))
    faults += [f"{ahead} of {collections - inside} collections run ahead"] if ahead != collections - inside else []
    list(hybrid.predict(stream.batches(0, 3, 4)))
    after = tables_of(hybrid)
    for n in specs:
        moved = not torch.equal(before[n], after[n])
        if moved == (n in frozen):
            faults.append(f"{n} {'moved' if moved else 'stood still'}")
        states = {k for k in after if k.startswith(f"{n}.")}
        if bool(states) == (n in frozen or prepared.config.tables.optimizer == "sgd"):
            faults.append(f"{n} has the states {states}")
    for n in managed:
        now = ids_of(hybrid, n)
        faults += [f"{n}: {kind} changed" for kind in now if not torch.equal(now[kind], ids[n][kind])]
        counts = id_counts(hybrid.sharded, process.device)[n]
        faults += [f"{n}: {counts}"] if counts.lookups or counts.admitted or counts.evicted else []
    for n in {s.name for s in prepared.specs if s.managed} - managed:
        faults += [] if id_counts(hybrid.sharded, process.device)[n].admitted else [f"{n} admits nobody"]
    found, run, forward, back = backward_of(hybrid, stream.batch(0, 5))
    faults += [f"gradients of {found}, not of {features}"] if found != features else []
    strange = {n for n in run if any(word in n for word in ("Lookup", "lookup", "All2All", "Reduce", "AllGather"))}
    if (frozen == specs.keys()) == bool(strange):
        faults.append(f"backward runs {strange}")
    # What goes back is what came, of the tables that train: nothing where none does.
    if process.world_size > 1:
        alone = [s.name for s in prepared.specs if plan[s.name]["sharding_type"] != "data_parallel"]
        expected = forward if not frozen & set(alone) else 0 if frozen >= set(alone) else None
        if expected is not None and back != expected or expected is None and not 0 < back < forward:
            faults.append(f"{forward} bytes of vectors came, {back} went back")
    copied = [m for m in hybrid.tables.frozen.modules() for m in getattr(m, "_lookups", [])]
    faults += ["gradient buckets of copied tables"] * any(isinstance(m, DistributedDataParallel) for m in copied)
    return faults + bytes_of(hybrid, prepared, frozen, process)


def bytes_of(hybrid, prepared, frozen, process):
    """Of weights and optimizer states there is what the planner counts."""
    from dist_rec.plan.request import row_bytes

    found = _bytes_of_ranks(hybrid.sharded)
    optimizer, ranks = prepared.config.tables.optimizer, process.world_size
    copied = hybrid.sharded.replicated.parameters
    wanted = sum(s.rows * row_bytes(s, optimizer) * (ranks if s.name in copied else 1) for s in prepared.specs)
    # Row-wise momenta of column shards, and ids, are more than that.
    return [f"{sum(found)} bytes, not {wanted}"] if sum(found) != wanted else []


def save(data, layout, process, folder, name):
    prepared, _ = prepared_of(data, layout)
    stream, hybrid, plan = make_hybrid(prepared, process)
    train(stream, hybrid, 0, 3)
    writer = checkpoint.Writer(folder / name, prepared.config.checkpoint)
    writer.save(3, hybrid.sharded, hybrid.engine, state={}, config={}, plan=plan)
    tables, losses = tables_of(hybrid), train(stream, hybrid, 3, 3)
    writer.wait()
    if process.is_main:
        save_file({n: t.contiguous() for n, t in tables.items()}, folder / f"{name}.tables")
        (folder / f"{name}.losses").write_text(json.dumps([process.world_size, layout, losses]))
    dist.barrier()
    return []


def load(data, layout, process, folder, name):
    prepared, frozen = prepared_of(data, layout)
    stream, hybrid, _ = make_hybrid(prepared, process)
    train(stream, hybrid, 5, 1)
    saved = checkpoint.last_good(folder / name)
    said = checkpoint.load_tables(saved, hybrid.sharded)
    checkpoint.load_dense_into_engine(saved, hybrid.engine)
    found, wanted = tables_of(hybrid), load_file(folder / f"{name}.tables")
    world, before, losses = json.loads((folder / f"{name}.losses").read_text())
    was = set(filter(None, before.split("/")[2].split(",")))
    faults = [n for n in found.keys() & wanted.keys() if not torch.equal(found[n], wanted[n])]
    for n in {k.split(".")[0] for k in found}:
        states = [k for k in found if k.startswith(f"{n}.")]
        if n in was - frozen and (not states or any(found[k].any() for k in states)):
            faults.append(f"{n}: states {states} do not begin anew")
        words = "they were frozen" if n in was - frozen else "they are frozen" if n in frozen - was else None
        told = [line for line in said if line.startswith("tables ") and n in line.partition(":")[0].split()[1:]]
        told += [line for line in said if f"{n}," in line.partition(":")[0]]
        if bool(told) != (words is not None) or words and words not in told[0]:
            faults.append(f"{n}: said {said}")
    manifest = saved.manifest.tables
    faults += [f"{n} is saved as frozen: {i.frozen}" for n, i in manifest.items() if i.frozen != (n in was)]
    again = train(stream, hybrid, 3, 3)
    if was == frozen and world == process.world_size and before == layout and again != losses:
        faults.append(f"losses {losses} became {again}")
    return faults


def some(data, layout, process, folder, name):
    """Of a checkpoint, only some tables, into a model that has others of another shape."""
    prepared, frozen = prepared_of(data, layout)
    stream, hybrid, _ = make_hybrid(prepared, process)
    before, saved = tables_of(hybrid), checkpoint.last_good(folder / name)
    wanted, faults = load_file(folder / f"{name}.tables"), []
    assert checkpoint.load_tables(saved, hybrid.sharded, with_optimizer=False, only=["item_id", "user_id"]) == []
    after = tables_of(hybrid)
    faults += [n for n in ("item_id", "user_id") if not torch.equal(after[n], wanted[n])]
    faults += ["tags"] if not torch.equal(after["tags"], before["tags"]) else []
    faults += ["ids that are not there"] if ID in saved.manifest.tables["item_id"].kinds else []
    refused = {None: "'tags' is 4 x 16, the config wants 4 x 8: set tables.overrides.tags.dim to 16"}
    refused[("nothing",)] = "table 'nothing' is not in the checkpoint"
    for only, words in refused.items():
        try:
            checkpoint.load_tables(saved, hybrid.sharded, with_optimizer=False, only=only)
            faults.append(f"nothing said of {words}")
        except UserError as error:
            faults += [] if words in str(error) else [str(error)]
    train(stream, hybrid, 0, 2)
    return faults


JOBS = {"still": still, "save": save, "load": load, "some": some}


def main():
    data, folder, *jobs = sys.argv[1:]

    def do(job, process):
        kind, name, layout = job.split(":")
        return JOBS[kind](data, layout, process, Path(folder), name)

    do_jobs(jobs, config_of(data, jobs[0].split(":")[2]), do)


if __name__ == "__main__":
    main()
