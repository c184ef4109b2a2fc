"""The experiments of MVKE: every run's config is sound, and all that are compared have as many dense parameters."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from dist_rec.bench.experiment import load_experiment, planned_runs
from dist_rec.config import Config, MVKEConfig, apply_overrides
from dist_rec.layers.reduction import Reduction
from dist_rec.models.mvke import MVKE
from dist_rec.schema import load_schema
from dist_rec.strict import from_dict
from dist_rec.training.kinds import kind_of

FOLDER = ROOT / "configs" / "experiments" / "mvke"
SCHEMAS = {"ml1m_likes": "two_objectives_movielens", "hillstrom": "two_objectives_hillstrom"}
# Of the largest difference from the reference's count.
SHARE = 0.03


def dense_parameters(config: Config, schema) -> int:
    features = kind_of(config).features(schema, config)
    dims = {schema.table_of(name): config.tables.dim for name in schema.select(kinds=("id", "ids"))}
    with torch.device("meta"):
        model = MVKE(schema, config.model, dims, 0, None, features, Reduction())
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_compared_has_one_budget(path: Path):
    experiment = load_experiment(path)
    schema = load_schema(ROOT / "shards" / "recipes" / "schemas" / f"{SCHEMAS[path.stem]}.yaml")
    counts = {}
    for run in planned_runs(experiment, path):
        tree = copy.deepcopy(experiment.config)
        apply_overrides(tree, {key: json.dumps(value) for key, value in run.overrides.items()})
        config = from_dict(Config, tree, run.label)
        assert isinstance(config.model, MVKEConfig)
        counts[run.name] = dense_parameters(config, schema) * (2 if len(config.model.tasks) == 1 else 1)
    wanted = counts["official"]
    assert len(counts) > 20
    assert {name: n for name, n in counts.items() if abs(n / wanted - 1) > SHARE} == {}, wanted
