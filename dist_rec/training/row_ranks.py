"""`ranks-<split>.parquet` of a run folder: every row's place, so that another run can be compared row by row.

Columns `row`, `domain`, `user`, `rank` (null where a row has none); the file's metadata say what was evaluated. Read
instead of evaluating a second model, whose data may lie in other shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.index import CATALOGUE
from ..errors import UserError
from ..files import write_bytes
from ..strict import from_dict, strict, to_dict
from .catalogue import catalogue_contents
from .evaluators import Evaluator
from .passes import fingerprint
from .prepared import Prepared
from .ranking import RowRanks
from .resume import Change

_KEY = b"dist_rec"
# Config keys on which no row's place depends.
IDLE = (
    "run.*",
    "train.*",
    "checkpoint.*",
    "evaluate.batch_size",
    "evaluate.at",
    "evaluate.ndcg_at",
    "data.batch_size",
    "data.read_ahead",
    "data.retries",
    "data.retry_seconds",
    "data.timeout_seconds",
)
# Of a catalogue's fingerprint: enough to tell two apart, and to be read in a message.
FINGERPRINT_DIGITS = 12


@strict
class Evaluated:
    """What places are of.

    Attributes:
        split, step: of the run.
        data: fingerprint of the split: with the same one, row numbers mean the same rows.
        domains: names, in the order of the schema.
        at: cuts of the run's recall and NDCG.
        protocol: see `RankingEvaluator`.
        overrides: of config keys that places depend on, those that were not the run's own, and their values.
    """

    split: str
    step: int
    data: str
    domains: list[str]
    at: list[int]
    protocol: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)


def path_of(run: Path, split: str) -> Path:
    return run / f"ranks-{split}.parquet"


def keep_ranks(
    evaluator: Evaluator, prepared: Prepared, split: str, step: int, run: Path, asked: Sequence[Change] = ()
) -> None:
    """Write the places that `evaluator` has of a whole split into the run folder, if it has places. Collective.

    Args:
        asked: in what the config is not the run's own.
    """
    ranks = evaluator.per_row()
    if ranks is not None:
        what = Evaluated(
            split=split,
            step=step,
            data=fingerprint(prepared.indexes[split]),
            domains=ranks.domains,
            at=list(evaluator.at),
            protocol=_catalogue(prepared) | evaluator.protocol,
            overrides={change.key: change.now for change in asked if not change.among(IDLE)},
        )
        write_ranks(path_of(run, split), ranks, what)


def _catalogue(prepared: Prepared) -> dict[str, Any]:
    """What tells the items among which rows have places from others."""
    known = catalogue_contents(prepared) or fingerprint(prepared.indexes[CATALOGUE])
    return {"candidates": prepared.num_items, "catalogue": known[:FINGERPRINT_DIGITS]}


def write_ranks(path: Path, ranks: RowRanks, what: Evaluated) -> None:
    domain = pa.DictionaryArray.from_arrays(pa.array(ranks.domain), pa.array(ranks.domains))
    rank = pa.array(ranks.rank, from_pandas=True)
    table = pa.table({"row": ranks.row, "domain": domain, "user": ranks.user, "rank": rank})
    table = table.replace_schema_metadata({_KEY: json.dumps(to_dict(what))})
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd")
    write_bytes(path, out.getvalue().to_pybytes())


def read_ranks(run: Path, split: str) -> tuple[RowRanks, Evaluated]:
    """The places that a run keeps of a split.

    Raises:
        UserError: it keeps none, or the file is none of ours.
    """
    path = path_of(run, split)
    if not run.is_dir():
        raise UserError(f"{run}: there is no such run folder.")
    if not path.is_file():
        raise UserError(
            f"{run} keeps no places of its {split} rows ({path.name}): `dist-rec evaluate {run} --split {split}` "
            "writes them, if its model ranks a catalogue (a foundation's does not)."
        )
    try:
        table = pq.read_table(path)
        what = from_dict(Evaluated, json.loads((table.schema.metadata or {})[_KEY]), str(path))
        row, user = (table[name].to_numpy() for name in ("row", "user"))
        rank = table["rank"].to_numpy()
        names = table["domain"].to_pylist()
        number = {name: n for n, name in enumerate(what.domains)}
        domain = [number[name] for name in names]
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({error}): write it again with `dist-rec evaluate {run} --split {split}`."
        ) from None
    return RowRanks(what.domains, row, np.array(domain, np.int32), user, rank), what
