"""One rank of the check of exchanges: precisions on the wire and deduplication, over every sharding type.

    torchrun --standalone --nproc-per-node 3 tests/exchange_worker.py DATA row_wise,table_wise

A layout is a sharding type, and perhaps others for single tables: `grid_shard+item_id=row_wise`. Rank 0 prints one JSON
object a layout, with what `bench exchange` measures.
"""

from __future__ import annotations

import json
import sys

from hybrids import end

from dist_rec.bench.exchange import compare
from dist_rec.config import Config
from dist_rec.strict import from_dict
from dist_rec.training.prepare import prepare
from dist_rec.training.process import choose_device, process_group, quieten

WAYS = [("fp32", False), ("fp32", True), ("bf16", True), ("fp16", False)]
STEPS = 2


def main():
    data, layouts = sys.argv[1:]
    base = {
        "data": {"train": data, "valid": data, "batch_size": 24, "streams": 3, "shuffle_window": 64},
        "tables": {"dim": 24, "init_std": 0.3, "optimizer": "adagrad"},
        "model": {"width": 16, "history": {"feedforward": 16}},
    }
    quieten()
    config = from_dict(Config, base, "exchange")
    with process_group(config, choose_device(config)) as process:
        for layout in layouts.split(","):
            base["tables"]["sharding"], *single = layout.split("+")
            base["tables"]["overrides"] = {t: {"sharding": s} for t, s in (part.split("=") for part in single)}
            cases = compare(prepare(from_dict(Config, base, "exchange")), process, STEPS, WAYS)
            if process.is_main:
                print(json.dumps({"layout": layout, "cases": cases}), flush=True)
    end()


if __name__ == "__main__":
    main()
