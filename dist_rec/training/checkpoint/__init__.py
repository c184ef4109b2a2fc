"""Checkpoints: everything a run needs to go on, on any plan, ZeRO stage and world size. No pickle anywhere.

    checkpoints/step-00000100/  tables/rank-00000.safetensors   this rank's table shards and their optimizer state
                                dense/rank-00000.safetensors    this rank's ranges of the dense parameters, likewise
                                checkpoint.json                 what lies where, position, config, plan, checksums
    checkpoints/latest          name of the newest folder; its checkpoint.json names the best, if a run may stop early

Every rank writes what it holds, and reads the slices that it needs of what others wrote:

* `boxes`, `manifest`, `tensor_file`, `reader`: the format, without ranks;
* `tables`, `dense`: what a rank holds of tables and engine, and how to fill it again;
* `writer`, `publish`: saving while training goes on; `folder`: which checkpoints there are, and which is good;
* `export`: whole tensors in one file.
"""

from .dense import load_dense, load_dense_into_engine
from .folder import LATEST, best_first, checkpoints, find, last_good, name_of, read_state
from .manifest import FORMAT, STATE_NAME, environment
from .reader import Saved, read_manifest, verify
from .tables import load_tables
from .writer import Writer

__all__ = [
    "FORMAT",
    "LATEST",
    "STATE_NAME",
    "Saved",
    "Writer",
    "best_first",
    "checkpoints",
    "environment",
    "find",
    "last_good",
    "load_dense",
    "load_dense_into_engine",
    "load_tables",
    "name_of",
    "read_manifest",
    "read_state",
    "verify",
]
