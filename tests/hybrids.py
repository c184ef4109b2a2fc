"""The parts of a training run as the workers of the tests put them together."""

from __future__ import annotations

from dist_rec.embeddings.description import describe_plan
from dist_rec.training.hybrid import Hybrid
from dist_rec.training.setup import build_engine, build_tables, build_training_stream


def make_hybrid(prepared, process, planned=None):
    """A fresh hybrid with its stream and plan; with the described plan, if given."""
    stream = build_training_stream(prepared, process.rank, process.world_size)
    tables, sharded, plan = build_tables(prepared, process, planned)
    engine = build_engine(prepared, process, stream.batch_rows)
    return stream, Hybrid(tables, sharded, engine, process.device, lambda step: 1.0), describe_plan(plan)
