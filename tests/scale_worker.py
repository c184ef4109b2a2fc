"""One rank of a case of `bench tables` whose checkpoint is read in pieces far smaller than its shards.

torchrun --standalone --nproc-per-node 2 tests/scale_worker.py CASE STEPS
"""

from __future__ import annotations

from dist_rec.bench import tables_case
from dist_rec.training.checkpoint import reader, tables

if __name__ == "__main__":
    reader.READ_BYTES = tables.READ_BYTES = 1 << 14
    tables_case.main()
