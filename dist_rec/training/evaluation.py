"""Evaluating a split, and evaluation.json of the run folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import nn

from ..data.stream import Stream
from ..embeddings.managed import id_counts, managed_ids
from ..files import write_text
from .evaluators import Evaluator
from .prepared import Prepared
from .process import choose_device

FILE_NAME = "evaluation.json"
# Of what is told of managed ids, which evaluation only reads.
EVALUATED = ("occupancy", "collisions")


def evaluate(prepared: Prepared, evaluator: Evaluator, stream: Stream, predict, sharded: nn.Module) -> dict[str, Any]:
    """Run `predict` over a stream and compute every metric, and how fast it went. Collective.

    Args:
        evaluator: takes what the model says of each batch, and still has it afterwards (`per_row`).
        predict: iterator of batches -> iterator of (batch, output), the output as the evaluator reads it.
        sharded: the tables that `predict` reads; of those with managed ids, `managed` of the result says how full
            they are, and what share of the ids read a shared row.
    """
    for ids in managed_ids(sharded).values():
        ids.forget_evaluation()
    started = time.monotonic()
    for batch, output in predict(stream.batches(epoch=0)):
        evaluator.add_batch(batch, output)
    metrics = evaluator.compute()
    seconds = time.monotonic() - started
    rates = {"evaluate_seconds": round(seconds, 2), "evaluate_rows_per_s": round(stream.reader.index.rows / seconds, 1)}
    counted = id_counts(sharded, choose_device(prepared.config), evaluated=True)
    managed = {table: {k: v for k, v in c.shares().items() if k in EVALUATED} for table, c in counted.items()}
    return {"rates": rates, **metrics, **({"managed": managed} if managed else {})}


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What evaluation.json of a run holds; None where there is none that can be read."""
    try:
        held = json.loads((folder / FILE_NAME).read_text())
        return held if isinstance(held, dict) and {"split", "step", "rates"} <= held.keys() else None
    except (OSError, ValueError):
        return None


def write_evaluation(folder: Path, entry: dict[str, Any], of_training: bool = False) -> None:
    """evaluation.json of the run folder: split, step, rates, overall, domains.

    Of a run whose model nothing can be measured of, split is None, overall and domains are empty, and `not_evaluated`
    says why. `overrides` has what of the run's config it was measured under other values of, by key.

    What training ends with always stands there. Evaluated again, the split it holds is replaced and
    the rates of training stay; another split goes to evaluation-<split>.json beside it.
    """
    path, held = folder / FILE_NAME, None if of_training else read_evaluation(folder)
    if held is not None and held["split"] == entry["split"]:
        entry = {**entry, "rates": {**held["rates"], **entry["rates"]}}
    elif held is not None:
        path = folder / f"evaluation-{entry['split']}.json"
    write_text(path, json.dumps(entry, indent=1))
