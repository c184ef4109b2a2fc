"""One rank of the parity check: the hybrid against one unsharded process, in many layouts.

    torchrun --standalone --nproc-per-node 3 tests/parity_worker.py DATA row_wise,table_wise 1,3 [section.key=value ..]

DATA is a data set for a small foundation model, or configs of whichever models, a.yaml,b.yaml. A layout is a sharding
type, and perhaps others for single tables: `row_wise+tags=table_wise`.

Each rank trains its part with sharded tables and a ZeRO engine, and, beside it, the whole global
batch with plain modules. For every layout and stage:

* SGD: the first step's gradients of all parameters, and all parameters after 3 steps, to 1e-6.
* Adagrad (row-wise where rows are whole) and AdamW: the losses of 20 steps, to 1e-5, with the plan
  as a checkpoint gives it back.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from hybrids import end, make_hybrid
from sequence_batches import draws_of_rows
from whole import full_parameters

from dist_rec.config import Config, apply_overrides
from dist_rec.embeddings.sharding import OPTIMIZERS, local_parts, optimizer_arguments, table_weights
from dist_rec.embeddings.tables import EmbeddingTables, initial_rows
from dist_rec.layers.reduction import Reduction
from dist_rec.models.unisrec import UniSRec
from dist_rec.strict import from_dict
from dist_rec.training import setup
from dist_rec.training.engine import parameter_groups
from dist_rec.training.prepare import prepare
from dist_rec.training.process import choose_device, process_group
from dist_rec.training.setup import build_model, build_training_stream

RATE = 0.5
CUTS_OF_ROWS = {"column_wise", "table_column_wise", "grid_shard"}


class Reference:
    """Plain modules on the whole global batch: what every layout must equal."""

    def __init__(self, prepared, device):
        config = prepared.config
        self.device = device
        self.stream = build_training_stream(prepared, 0, 1)
        self.halves = [spec.name for spec in prepared.specs if spec.precision == "fp16"]
        specs = {spec.name: replace(spec, precision="fp32") for spec in prepared.specs}
        self.tables = EmbeddingTables(list(specs.values()), prepared.given[0], config.tables, device)
        with torch.no_grad():
            for name, weight in self.weights().items():
                weight.copy_(initial_rows(specs[name], config.tables, config.run.seed, 0, specs[name].rows))
        self.round()
        self.model = build_model(prepared, Reduction()).to(device)
        dense = torch.optim.SGD if config.dense.optimizer == "sgd" else torch.optim.AdamW
        self.optimizers = [
            dense(parameter_groups(self.model, config.dense, config.text), lr=config.dense.learning_rate)
        ]
        if specs:
            of_tables = OPTIMIZERS[config.tables.optimizer]
            self.optimizers.append(of_tables(self.tables.parameters(), **optimizer_arguments(config.tables)))

    def weights(self):
        return {name.split(".")[-2]: p for name, p in self.tables.named_parameters()}

    def parameters(self):
        return {**self.weights(), **dict(self.model.named_parameters())}

    def step(self, epoch, step):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        batch = self.stream.batch(epoch, step).to(self.device)
        output = self.model(self.tables.vectors(self.tables(batch), batch), batch)
        output["loss"].backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.round()
        return output["losses"]

    def round(self):
        """What fp16 tables lose. They are fp32 modules here: torch's optimizers keep states in the weights' type."""
        with torch.no_grad():
            for name in self.halves:
                self.weights()[name].copy_(self.weights()[name].half())


def whole(hybrid):
    """Every parameter of the hybrid, whole, by name; buffers, such as a language model's positions, do not train."""
    trained = {name for name, _ in hybrid.engine.module.named_parameters()}
    found = {name: value for name, value in full_parameters(hybrid.engine).items() if name in trained}
    for name, weight in sorted(table_weights(hybrid.sharded).items()):
        out = torch.zeros(weight.size(), device=hybrid.device)
        for (row, column), (rows, columns), local in local_parts(weight):
            out[row : row + rows, column : column + columns] = local.detach()
        if name in hybrid.sharded.replicated.parameters:
            assert_equal_on_all_ranks(name, out)
        else:
            dist.all_reduce(out)
        found[name] = out.cpu()
    return found


def assert_equal_on_all_ranks(name, value):
    most, least = value.clone(), value.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    assert torch.equal(most, least), f"ranks differ in {name}"


def largest_difference(found, wanted):
    worst = max(wanted, key=lambda name: (found[name] - wanted[name]).abs().max())
    return float((found[worst] - wanted[worst]).abs().max()), worst


def copy(parameters):
    return {name: p.detach().cpu().clone() for name, p in parameters.items()}


def check_sgd(prepared, process, layout):
    stream, hybrid, _ = make_hybrid(prepared, process)
    reference = Reference(prepared, process.device)
    start = copy(reference.parameters())
    batches = stream.batches(0, 0, 3)
    for step in range(3):
        reference.step(0, step)
        hybrid.train_step(batches)
        if step == 0:
            wanted = {n: p.grad.detach().cpu().clone() for n, p in reference.parameters().items() if p.requires_grad}
            found = {name: (start[name] - p) / RATE for name, p in whole(hybrid).items()}
            report(layout, "first-step gradient", *largest_difference(found, wanted), 1e-6)
    report(layout, "SGD parameters", *largest_difference(whole(hybrid), copy(reference.parameters())), 1e-6)


def check_adaptive(prepared, process, layout):
    _, _, plan = make_hybrid(prepared, process)
    with mock.patch.object(setup, "plan_here", side_effect=AssertionError("planned anew")):
        stream, hybrid, again = make_hybrid(prepared, process, json.loads(json.dumps(plan)))
    assert again == plan
    reference = Reference(prepared, process.device)
    done, worst = 0, 0.0
    for epoch in range(20):
        batches = stream.batches(epoch, 0, min(stream.steps, 20 - done))
        for step in range(min(stream.steps, 20 - done)):
            wanted, found = reference.step(epoch, step), hybrid.train_step(batches)["losses"]
            worst = max(worst, *(abs(float(found[name]) - float(wanted[name])) for name in wanted))
            done += 1
    assert done == 20
    report(layout, "losses of 20 steps", worst, "", 1e-5)


FAULTS = []


def report(layout, what, difference, where, limit):
    good = difference <= limit
    if dist.get_rank() == 0:
        print(f"{'ok  ' if good else 'FAIL'} {layout:60s} {what:22s} {difference:.2e} {where}", flush=True)
    if not good:
        FAULTS.append((layout, what))


def main():
    data, layouts, stages, *overrides = sys.argv[1:]
    bases = [base_of(one) for one in data.split(",")]
    for base in bases:
        apply_overrides(base, dict(o.split("=", 1) for o in overrides))
    device = choose_device(from_dict(Config, bases[0], "parity"))
    # What copies of sequences lack is drawn by each rank.
    as_rows_say = mock.patch.object(UniSRec, "_draws", lambda _, batch, sequences: draws_of_rows(batch, sequences))
    with process_group(from_dict(Config, bases[0], "parity"), device) as process, as_rows_say:
        for base in bases:
            check(base, layouts.split(","), [int(stage) for stage in stages.split(",")], process)
    end(bool(FAULTS))


def base_of(data):
    if data.endswith(".yaml"):
        return yaml.safe_load(Path(data).read_text())
    return {
        "data": {"train": data, "batch_size": 40, "streams": 8, "shuffle_window": 64},
        "tables": {"dim": 24, "init_std": 0.3},
        "model": {"width": 16, "history": {"dropout": 0.0, "feedforward": 16}, "regulariser": {"kind": "js"}},
    }


def check(base, layouts, stages, process):
    given = base["tables"].get("overrides", {})
    of_config = f" {base['run']['name']}" if "run" in base else ""
    for layout in layouts:
        sharding, *single = layout.split("+")
        single = dict(part.split("=") for part in single)
        base["tables"]["sharding"] = sharding
        wanted = {table: {"sharding": other} for table, other in single.items()}
        base["tables"]["overrides"] = {t: given.get(t, {}) | wanted.get(t, {}) for t in given | wanted}
        rows_whole = CUTS_OF_ROWS.isdisjoint([sharding, *single.values()])
        for stage in stages:
            name = f"{process.world_size} ranks{of_config} {layout} ZeRO-{stage}"
            sgd = {"optimizer": "sgd", "learning_rate": RATE}
            base["dense"] = {"zero_stage": stage, **sgd}
            base["tables"] |= sgd
            base.setdefault("text", {})["learning_rate"] = RATE
            check_sgd(prepare(from_dict(Config, base, "parity")), process, name)
            base["dense"] |= {"optimizer": "adamw", "learning_rate": 1e-3}
            base["text"]["learning_rate"] = 1e-3
            base["tables"] |= {
                "optimizer": "rowwise_adagrad" if rows_whole else "adagrad",
                "learning_rate": 0.02,
            }
            check_adaptive(prepare(from_dict(Config, base, "parity")), process, name)


if __name__ == "__main__":
    main()
