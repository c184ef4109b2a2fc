"""A run's own evaluation scores of every row of a split: JSON, by row number, {task: logit}."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dist_rec.config import load_config
from dist_rec.training.evaluate import trained
from dist_rec.training.setup import build_stream


def main(run: Path, split: str, out: Path) -> None:
    found = {}
    with trained(load_config(run / "config.yaml"), run, split) as loaded:
        for batch, output in loaded.predict(build_stream(loaded.prepared, split, 0, 1).batches(epoch=0)):
            for at in batch.valid.nonzero()[:, 0].tolist():
                found[int(batch.row[at])] = {task: float(of[at]) for task, of in output["logits"].items()}
    out.write_text(json.dumps([found[row] for row in range(len(found))]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
