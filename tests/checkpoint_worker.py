"""One rank of the checkpoint tests: saves and loads models in many layouts, and compares them bit by bit.

    torchrun --standalone --nproc-per-node 2 tests/checkpoint_worker.py DATA FOLDER JOB ..

A job is `KIND:NAME:LAYOUT[:TEXT MODEL[:WRITE]]`, a layout `sharding/tables' optimizer/ZeRO stage/precision/dense
optimizer`, where `row_wise@fp16` is a sharding of fp16 tables. `save` trains 3 steps (none if NAME is `untrained`),
saves, and writes all tensors whole, as the engines' own means assemble them, and the losses of 3 more steps. `load`
fills a model that has trained something else and compares: everything to the bit, except row-wise momenta that had to
be averaged, weights that had to be rounded, and the losses of other layouts.
`overflow` is for a load that is refused, `faults`, `hang` and `again` are for saves that fail.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import threading
from copy import deepcopy
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hybrids import do_jobs, make_hybrid
from safetensors.torch import load_file, save_file
from whole import full_optimizer_state, full_parameters

from dist_rec.config import Config
from dist_rec.embeddings.sharding import local_parts, table_weights
from dist_rec.errors import UserError
from dist_rec.strict import from_dict
from dist_rec.training import checkpoint
from dist_rec.training.checkpoint import writer as writing
from dist_rec.training.prepare import prepare

GATE = threading.Event()
SEQUENCE_TYPES = ("row_wise", "table_wise", "column_wise")


def config_of(data, layout, text_model="", write="background"):
    sharding, tables, stage, precision, dense = layout.split("/")
    sharding, _, half = sharding.partition("@")
    overrides = {} if sharding in SEQUENCE_TYPES else {"item_id": {"sharding": "column_wise"}}
    return from_dict(
        Config,
        {
            "data": {"train": data, "batch_size": 48, "streams": 12, "shuffle_window": 64},
            "tables": {
                "dim": 24,
                "sharding": sharding,
                "precision": half or "fp32",
                "optimizer": tables,
                "init_std": 0.3,
                "overrides": overrides,
            },
            "model": {"width": 16, "history": {"dropout": 0.0, "feedforward": 16}},
            "text": text_of(text_model),
            "dense": {"zero_stage": int(stage), "precision": precision, "optimizer": dense},
            "checkpoint": {"chunk_bytes": 1000, "write": write},
        },
        layout,
    )


def text_of(text_model):
    """`MODEL`, or `MODE+N@MODEL`: of mode full or lora, with N layers frozen."""
    how, _, model = text_model.rpartition("@")
    mode, _, layers = how.partition("+")
    extra = {"freeze_layers": int(layers), "checkpointing": True, "batch_tokens": 60} if how else {}
    return {"mode": mode or "full", "model": model} | extra if model else {}


def train(stream, hybrid, first, steps):
    batches, losses = stream.batches(0, first, first + steps), []
    for _ in range(steps):
        losses.append(float(hybrid.train_step(batches)["losses"]["loss"].detach()))
    return losses


def whole(hybrid):
    """Everything that a checkpoint must bring back, whole on every rank, without the checkpoint's own code.

    A row-wise momentum is spread over the columns that its shard has.
    """
    found = {f"dense.{name}": value for name, value in full_parameters(hybrid.engine).items()}
    found |= {f"dense.{name}": value for name, value in full_optimizer_state(hybrid.engine).items()}
    pieces = []
    fused, replicated = hybrid.sharded.fused_optimizer, hybrid.sharded.replicated
    # One rank speaks for the tables that all hold.
    for name, parameter in replicated.parameters.items() if dist.get_rank() == 0 else ():
        stepped = replicated.optimizer.state if replicated.optimizer else {}
        state = stepped.get(parameter, {}).get("sum")
        values = {name: parameter} | ({} if state is None else {f"{name}.momentum1": state})
        pieces += [(n, parameter.size(), ((0, 0), tuple(parameter.size())), value) for n, value in values.items()]
    for name, weight in table_weights(hybrid.sharded).items():
        if name not in replicated.parameters:
            pieces += [(name, weight.size(), (offset, size), local) for offset, size, local in local_parts(weight)]
    for parameter in fused.params.values():
        for name, state in fused.state[parameter].items():
            for (offset, size, _), (_, _, local) in zip(local_parts(parameter), local_parts(state), strict=True):
                value = local if local.ndim == 2 else local[:, None]
                pieces.append((name, parameter.size(), (offset, size), value))
    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, {name: list(size) for name, size, _, _ in pieces})
    for name, size in sorted({n: tuple(s) for some in names for n, s in some.items()}.items()):
        out = torch.zeros(size)
        for other, _, ((row, column), (rows, columns)), value in pieces:
            if other == name:
                out[row : row + rows, column : column + columns] = value.detach()
        dist.all_reduce(out)
        found[f"tables.{name}"] = out
    return found


def compare(saved, plan, wanted, found, said, precision):
    """Names of what differs. A row-wise momentum must be the mean over the columns of the shard it lies in now."""
    faults = sorted(wanted.keys() ^ found.keys())
    others = sorted(t for t, info in saved.manifest.tables.items() if info.kinds["weight"].dtype != precision)
    faults += [f"{t}: in silence" for t in others if not any(f"table {t}: weights were saved as" in w for w in said)]
    for name in wanted.keys() & found.keys():
        table = name.split(".")[1]
        if name.endswith(".momentum1") and saved.manifest.tables[table].kinds["momentum1"].per_row:
            whole_table = {"offset": [0, 0], "size": list(wanted[name].shape)}
            if averaged(wanted[name], found[name], plan[table]["shards"] or [whole_table], faults):
                faults += [f"{name}: in silence"] if not any(table in w and "mean" in w for w in said) else []
        else:
            rounded = name == f"tables.{table}" and precision == "F16"
            if not torch.equal(wanted[name].half().float() if rounded else wanted[name], found[name]):
                faults.append(name)
    return faults


def averaged(wanted, found, shards, faults):
    """Whether a row-wise momentum had to be averaged; where it had not, it must be the same to the bit."""
    any_averaged = False
    for shard in shards:
        (row, column), (rows, columns) = shard["offset"], shard["size"]
        old, new = (t[row : row + rows, column : column + columns] for t in (wanted, found))
        one_source = bool((old == old[:, :1]).all())
        any_averaged |= not one_source
        if not (torch.equal(old, new) if one_source else torch.allclose(old.mean(1, keepdim=True), new, rtol=1e-5)):
            faults.append(f"row-wise momentum of {shard}")
    return any_averaged


def ranks_and_stage(config, process):
    """What the last bit of a loss depends on: another stage sums a language model's gradients in another order."""
    return [process.world_size, config.dense.zero_stage if config.text.trains else 0]


def save(config, process, folder, name):
    stream, hybrid, plan = make_hybrid(prepare(config), process)
    first = 0 if name == "untrained" else 3
    train(stream, hybrid, 0, first)
    writer = checkpoint.Writer(folder / name, config.checkpoint)
    GATE.clear()
    if config.checkpoint.write == "chunks":
        GATE.set()
    writer.save(first, hybrid.sharded, hybrid.engine, state={"name": name}, config={}, plan=plan)
    # Training goes on, and only then is the copy written.
    tensors, losses = whole(hybrid), train(stream, hybrid, first, 3)
    GATE.set()
    path = writer.wait()
    assert path == folder / name / f"step-{first:08d}"
    if process.is_main:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"{name}.whole.safetensors")
        (folder / f"{name}.losses").write_text(json.dumps([ranks_and_stage(config, process), losses]))
    return []


def load(config, process, folder, name):
    stream, hybrid, plan = make_hybrid(prepare(config), process)
    train(stream, hybrid, 5, 1)
    saved = checkpoint.last_good(folder / name)
    assert saved.manifest.state == {"name": name}
    said = checkpoint.load_tables(saved, hybrid.sharded)
    checkpoint.load_dense_into_engine(saved, hybrid.engine)
    precision = "F16" if config.tables.precision == "fp16" else "F32"
    faults = compare(saved, plan, load_file(folder / f"{name}.whole.safetensors"), whole(hybrid), said, precision)
    held, losses = json.loads((folder / f"{name}.losses").read_text())
    again = train(stream, hybrid, saved.step, 3)
    same = held == ranks_and_stage(config, process) and plan == saved.manifest.plan and not said
    # In bf16 and fp16 another layout rounds other sums; averaged momenta step differently.
    rough = config.dense.precision == "bf16" or precision == "F16" or said
    close = 0.0 if same else 0.05 if rough else 1e-4
    if max(abs(a - b) for a, b in zip(losses, again, strict=True)) > close:
        faults.append(f"losses {losses} became {again}")
    return faults


def overflow(config, process, folder, name):
    """A weight that is saved in fp32 and that fp16 cannot hold."""
    halves, config = config, deepcopy(config)
    config.tables.precision = "fp32"
    _, hybrid, plan = make_hybrid(prepare(config), process)
    for _, _, local in local_parts(table_weights(hybrid.sharded)["user_id"]):
        local.fill_(1e6)
    writer = checkpoint.Writer(folder / name, config.checkpoint)
    GATE.set()
    writer.save(1, hybrid.sharded, hybrid.engine, state={}, config={}, plan=plan)
    writer.wait()
    _, hybrid, _ = make_hybrid(prepare(halves), process)
    with pytest.raises(UserError, match="table 'user_id' has weights that F16 cannot hold: keep F32"):
        checkpoint.load_tables(checkpoint.last_good(folder / name), hybrid.sharded)
    return []


def faults(config, process, folder, name):
    """Three saves fail, each after one that works."""
    stream, hybrid, plan = make_hybrid(prepare(config), process)
    folder = folder / name
    writer = checkpoint.Writer(folder, config.checkpoint)
    GATE.set()

    def begin(step):
        train(stream, hybrid, step % 5, 1)
        writer.save(step, hybrid.sharded, hybrid.engine, state={}, config={}, plan=plan)

    def works(step):
        begin(step)
        assert writer.wait() == folder / f"step-{step:08d}"

    def fails(why, good):
        with pytest.raises(UserError, match=f"the last checkpoint was not written: .*{why}.*step-{good:08d}"):
            writer.wait()
        assert checkpoint.find(folder).name == f"step-{good:08d}"
        assert [path for path in folder.iterdir() if path.name.startswith(".")] == []
        assert checkpoint.last_good(folder).step == good

    def limit(size):
        if process.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    works(1)
    limit(4096)
    begin(2)
    fails("rank 1: .*File too large", 1)
    limit(resource.RLIM_INFINITY)
    works(3)
    GATE.clear()
    begin(4)
    if process.is_main:
        shutil.rmtree(next(folder.glob(".step-*")))
    dist.barrier()
    GATE.set()
    fails("rank 0: .*", 3)
    works(5)
    # A file where the folder should be.
    away = folder.rename(folder.with_name("away")) if process.is_main else folder.with_name("away")
    if process.is_main:
        folder.write_text("")
    dist.barrier()
    begin(6)
    dist.barrier()
    if process.is_main:
        folder.unlink()
        away.rename(folder)
    dist.barrier()
    fails("rank 0: .*", 5)
    # Asked for again while the one before is still being written; and only the newest are kept.
    begin(7)
    begin(8)
    works(9)
    kept = [path.name for path in checkpoint.checkpoints(folder)]
    return [] if kept == [f"step-{step:08d}" for step in (9, 8, 7)] else kept


def hang(config, process, folder, name):
    """Save step 1; of step 2, rank 1 writes all and rank 0 nothing, for ever."""
    stream, hybrid, plan = make_hybrid(prepare(config), process)
    writer = checkpoint.Writer(folder / name, config.checkpoint)
    GATE.set()
    writer.save(1, hybrid.sharded, hybrid.engine, state={}, config={}, plan=plan)
    writer.wait()
    if process.is_main:
        GATE.clear()
    writer.save(2, hybrid.sharded, hybrid.engine, state={}, config={}, plan=plan)
    writer.wait()
    return ["it did not hang"]


def again(config, process, folder, name):
    """The next start after `hang`."""
    stream, hybrid, plan = make_hybrid(prepare(config), process)
    GATE.set()
    checkpoint.Writer(folder / name, config.checkpoint)
    return [] if checkpoint.last_good(folder / name).step == 1 else ["no checkpoint"]


JOBS = {"overflow": overflow, "save": save, "load": load, "faults": faults, "hang": hang, "again": again}
WRITE = writing.write_tensors


def write_through_gate(*arguments):
    assert GATE.wait(120)
    return WRITE(*arguments)


def main():
    data, folder, *jobs = sys.argv[1:]

    def do(job, process):
        kind, name, layout, *more = job.split(":")
        config = config_of(data, layout, *more)
        with mock.patch.object(writing, "write_tensors", write_through_gate):
            return JOBS[kind](config, process, Path(folder), name)

    do_jobs(jobs, config_of(data, jobs[0].split(":")[2]), do)


if __name__ == "__main__":
    main()
