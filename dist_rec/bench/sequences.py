"""Training rows a second of UniSRec's pretraining: ours against the usual way, on the same rows with the same losses.

A row is one supervised position: a sequence of n events has n - 1. Ours reads a sequence once, supervises every
position in that pass and adapts each distinct text once; the usual way (`usual_sequences`) makes every prefix a row of
its own, padded, and adapts every occurrence. Both start from the same weights and take whole steps: forward, both
losses, backward, AdamW; one process, the same threads. Neither reads data while the clock runs: what its data loader
would hand over is ready.

They take turns, each turn on a batch of its own, ours STEPS times before and after; a ratio is the median of the turns'
ratios, a rate the median of the rates. `processor_ratio` is of the seconds that processors spent on either, which other
jobs on the machine disturb less.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ..config import load_config
from ..config.unisrec import UniSRecConfig
from ..data.batch import Batch
from ..errors import UserError
from ..layers.reduction import Reduction
from ..models.unisrec import UniSRec
from ..schema import Schema
from ..strict import from_dict
from .usual_sequences import Draws, UsualUniSRec, expand, take_weights

# As many items and domains as UniSRec was pretrained on.
NUM_ITEMS, NUM_DOMAINS = 446_975, 5
TEXT_WIDTH = 384
# Events of a user to train on: at least 3 (5-core, less two held out), 8.3 in the mean as in those domains, and more
# unequal than a geometric distribution of that mean, as in Amazon's reviews.
LEAST_EVENTS, MOST_EVENTS = 3, 51
LOG_MEAN, LOG_DEVIATION = 1.2, 1.1
# Of Zipf's law, by which items are drawn.
EXPONENT = 0.8
STEPS = 3
# Rows of the usual way's first step, which is not timed.
FEW = 16

SCHEMA: Schema = from_dict(
    Schema,
    {
        "name": "sequences",
        "domains": {"names": [f"domain{n}" for n in range(NUM_DOMAINS)]},
        "features": {
            "history": {"role": "history", "kind": "ids", "shares": "item", "max_length": MOST_EVENTS - 1},
            "history_text": {"role": "history", "kind": "texts", "max_length": MOST_EVENTS - 1},
            "item": {
                "role": "item",
                "kind": "id",
                "aspect": "id",
                "vocabulary": {"kind": "integer", "size": NUM_ITEMS},
            },
            "item_text": {"role": "item", "kind": "text"},
        },
        "labels": {"next": {}},
    },
    "sequences",
)


def invent(users: int, seed: int) -> Batch:
    """A batch of as many users' sequences, with the frozen vectors of their texts, as the stream would give it."""
    draw = np.random.default_rng(seed)
    events = LEAST_EVENTS + np.floor(draw.lognormal(LOG_MEAN, LOG_DEVIATION, users)).astype(np.int64)
    events = np.minimum(events, MOST_EVENTS)
    popularity = np.cumsum(np.arange(1, NUM_ITEMS + 1) ** -EXPONENT)
    items = np.searchsorted(popularity / popularity[-1], draw.random(int(events.sum())))
    distinct, text = np.unique(items, return_inverse=True)
    last = np.zeros(len(items), bool)
    last[np.cumsum(events) - 1] = True
    items, text, lengths = torch.from_numpy(items), torch.from_numpy(text), torch.from_numpy(events - 1)
    vectors = draw.standard_normal((len(distinct), 2 * TEXT_WIDTH), np.float32) / TEXT_WIDTH**0.5
    vectors[:, TEXT_WIDTH:] = 0.9 * vectors[:, :TEXT_WIDTH] + 0.1 * vectors[:, TEXT_WIDTH:]
    ones, unknown = torch.ones(users, dtype=torch.int64), torch.full((users,), -1)
    return Batch(
        ids=KeyedJaggedTensor([], torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0, dtype=torch.int64)),
        event_places={},
        dense={},
        text_index={"history_text": text[~last], "item_text": text[last]},
        text_lengths={"history_text": lengths, "item_text": ones},
        text_tokens=torch.zeros(len(distinct), 0, dtype=torch.int64),
        text_mask=torch.zeros(len(distinct), 0, dtype=torch.bool),
        text_vectors=torch.from_numpy(vectors),
        labels={"next": torch.ones(users)},
        label_valid={"next": torch.ones(users, dtype=torch.bool)},
        domain=torch.from_numpy(draw.integers(0, NUM_DOMAINS, users)),
        valid=torch.ones(users, dtype=torch.bool),
        row=torch.arange(users),
        user=unknown,
        query=unknown,
        identity={"history": items[~last], "item": items[last]},
        identity_lengths={"history": lengths, "item": ones},
    )


class Case:
    """A model and its optimizer."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model.to(device).train(), device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def seconds(self, *given: Any, steps: int = 1) -> np.ndarray:
        """Of so many whole steps on what the model is given: by the clock, and of this process's processors."""
        start = self._now()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(*given)["loss"].backward()
            self.optimizer.step()
        return self._now() - start

    def _now(self) -> np.ndarray:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter(), time.process_time()])


def bench_sequences(users: int, repeats: int, seed: int, config: Path | None = None) -> dict[str, Any]:
    """Measure both ways.

    Args:
        users: sequences of an invented batch.
        repeats: turns.
        seed: of the invented rows, the weights and the draws.
        config: of a UniSRec run, whose training batches and sizes are measured instead: its items are texts with
            frozen vectors, its loss in_batch.

    Returns:
        What `dist-rec bench sequences --json` prints.

    Raises:
        UserError: a number makes no sense, or the config is none of that kind.
    """
    if users < 2 or repeats < 1:
        raise UserError("--users must be at least 2 and --repeats at least 1.")
    torch.manual_seed(seed)
    if config is None:
        model = UniSRec(SCHEMA, UniSRecConfig(), {}, TEXT_WIDTH, None, list(SCHEMA.features), Reduction())
        batches = [invent(users, seed + turn) for turn in range(repeats)]
    else:
        model, batches = _of_config(config, repeats)
    usual = UsualUniSRec(model.config, model.text_width)
    take_weights(usual, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, theirs = Case(model, device), Case(usual, device)
    console, turns = Console(stderr=True), []
    for turn, batch in enumerate(batches):
        rows, batch = expand(model, batch), batch.to(device)
        draws = Draws(torch.rand(len(rows.length)), torch.rand(rows.items.shape))
        rows, draws = (type(held)(*(column.to(device) for column in held)) for held in (rows, draws))
        if not turn:
            # What a first step costs once (libraries, memory) is nobody's.
            ours.seconds({}, batch)
            few = [type(held)(*(column[:FEW] for column in held)) for held in (rows, draws)]
            theirs.seconds(few[0], batch.text_vectors, few[1])
        # Half of ours before and half after, since a machine's load drifts.
        mine = ours.seconds({}, batch, steps=STEPS)
        its = theirs.seconds(rows, batch.text_vectors, draws)
        mine = (mine + ours.seconds({}, batch, steps=STEPS)) / (2 * STEPS)
        found = {
            "rows_per_s": len(rows.length) / mine[0],
            "usual_rows_per_s": len(rows.length) / its[0],
            "processor_ratio": its[1] / mine[1],
            "rows": len(rows.length),
            "events": len(rows.length) + int(batch.valid.sum()),
            "sequences": int(batch.valid.sum()),
            "texts": len(batch.text_vectors),
        }
        found["ratio"] = found["rows_per_s"] / found["usual_rows_per_s"]
        console.print(
            f"turn {turn + 1}: ours {found['rows_per_s']:,.1f} rows/s, the usual way {found['usual_rows_per_s']:,.1f}"
        )
        turns.append(found)
    return _summary(turns, model, device, config)


def _of_config(path: Path, repeats: int) -> tuple[UniSRec, list[Batch]]:
    """The model of a config, and its first training batches."""
    from ..training.prepare import prepare
    from ..training.setup import build_model, build_training_stream

    config = load_config(path)
    model = config.model
    if not isinstance(model, UniSRecConfig) or (model.item, model.loss) != ("text", "in_batch"):
        raise UserError(f"{path}: the usual way is built for model.kind unisrec with item: text and loss: in_batch.")
    if config.text.mode != "frozen":
        raise UserError(f"{path}: both ways read frozen text vectors: set text.mode: frozen.")
    prepared = prepare(config)
    stream = build_training_stream(prepared, 0, 1)
    return build_model(prepared, Reduction()), [stream.batch(0, step % stream.steps) for step in range(repeats)]


def _summary(
    turns: list[dict[str, float]], model: UniSRec, device: torch.device, config: Path | None
) -> dict[str, Any]:
    def middle(name: str, digits: int = 1) -> float:
        return round(statistics.median(turn[name] for turn in turns), digits)

    sizes = model.config
    return {
        "rows_per_s": middle("rows_per_s"),
        "usual_rows_per_s": middle("usual_rows_per_s", 2),
        "ratio": middle("ratio", 2),
        "processor_ratio": middle("processor_ratio", 2),
        "ratios": [round(turn["ratio"], 2) for turn in turns],
        "unit": "supervised positions a second",
        "data": str(config) if config else "invented",
        "rows": middle("rows"),
        "sequences": middle("sequences"),
        "events_per_sequence": round(sum(t["events"] for t in turns) / sum(t["sequences"] for t in turns), 2),
        "distinct_texts_per_event": round(sum(t["texts"] for t in turns) / sum(t["events"] for t in turns), 3),
        "text_width": model.text_width,
        "width": sizes.width,
        "experts": sizes.adaptor.experts,
        "layers": sizes.encoder.layers,
        "max_length": sizes.encoder.max_length,
        "contrast_weight": sizes.contrast.weight,
        "parameters": sum(p.numel() for p in model.parameters()),
        "turns": len(turns),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The two ways as a table."""
    table = Table(title=f"training rows a second, {summary['data']}, {summary['rows']:,.0f} rows a step")
    for heading in ("ours", "usual", "ours / usual"):
        table.add_column(heading, justify="right")
    table.add_row(*(f"{summary[key]:,.1f}" for key in ("rows_per_s", "usual_rows_per_s", "ratio")))
    Console().print(table)
