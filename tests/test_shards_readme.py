"""The walk-through of shards/README.md is run as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from dist_rec.data.extend import as_extended
from dist_rec.data.index import read_index


def walk_through() -> str:
    """The bash blocks of the three sections that make data sets, one script."""
    sections = (ROOT / "shards" / "README.md").read_text().split("\n## ")[1:4]
    titles = ["From your own tables", "Data that keeps arriving", "A new domain"]
    assert [section.partition("\n")[0] for section in sections] == titles
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", "".join(sections), re.MULTILINE | re.DOTALL))


def test_the_walk_through_trains_a_model(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", walk_through()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    overall = json.loads((tmp_path / "runs" / "run" / "evaluation.json").read_text())["overall"]
    assert overall["ctr"]["auc"] > 0.6 and overall["relevance"]["auc"] > 0.7, overall
    index = read_index(str(tmp_path / "built" / "train"))
    assert index.between(0, 1).rows == 2_000 and index.generation == 1
    assert "begin empty" not in done.stderr and "Built (0) and appended" in done.stdout
    few, kiosk = read_index(str(tmp_path / "kiosk-256")), read_index(str(tmp_path / "kiosk" / "valid"))
    assert few.rows == few.rows_of("kiosk") == 256 and few.schema == kiosk.schema
    assert few.schema.features["item"].vocabulary.inherited == [index.schema.features["item"].vocabulary.size]
    assert as_extended(index, few.schema).rows == index.rows
