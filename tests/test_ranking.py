"""Ranking metrics equal plain loops, and are the same bit for bit on any number of ranks.

Run as a script, this file is one rank of the several-process tests.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_ranks

from dist_rec.errors import UserError
from dist_rec.report.table import print_evaluation
from dist_rec.schema import Schema
from dist_rec.strict import from_dict
from dist_rec.training.evaluators import RankingEvaluator
from dist_rec.training.ranking import RankingEvaluation
from dist_rec.training.row_ranks import Evaluated, path_of, read_ranks, write_ranks

DOMAINS = ["toys", "books", "void"]
AT = [1, 5, 10, 50]
ROWS = 2000
TIME_LIMIT = 120


def places(seed: int = 0) -> dict[str, np.ndarray]:
    """Places with ties (ending in .5), rows without one, masked rows, and a domain without rows."""
    draw = np.random.default_rng(seed)
    rank = np.ceil(draw.exponential(30, ROWS)) + draw.choice([0, 0.5], ROWS, p=[0.8, 0.2])
    rank[draw.random(ROWS) < 0.05] = np.nan
    return {
        "rank": rank,
        "valid": draw.random(ROWS) < 0.9,
        "domain": draw.integers(0, 2, ROWS),
        "user": draw.integers(-1, 500, ROWS),
        "row": draw.permutation(ROWS),
    }


def add(evaluation: RankingEvaluation, columns: dict[str, np.ndarray], chosen: np.ndarray, batch: int = 129) -> None:
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        evaluation.add(**{name: torch.as_tensor(column[part]) for name, column in columns.items()})


def evaluate(chosen: np.ndarray) -> RankingEvaluation:
    evaluation = RankingEvaluation(DOMAINS, AT)
    add(evaluation, places(), chosen)
    return evaluation


@pytest.fixture(scope="module")
def single() -> dict:
    return evaluate(np.arange(ROWS)).compute()


@pytest.mark.parametrize("domain", [None, 0, 1])
def test_metrics_equal_plain_loops(single, domain):
    columns = places()
    sums, rows, unranked = {}, 0, 0
    for rank, valid, of in zip(columns["rank"], columns["valid"], columns["domain"], strict=True):
        if not valid or domain not in (None, of):
            continue
        if math.isnan(rank):
            unranked += 1
            continue
        rows += 1
        one = {f"recall@{k}": 1.0 if rank <= k else 0.0 for k in AT}
        one |= {f"ndcg@{k}": 1 / math.log2(1 + rank) if rank <= k else 0.0 for k in AT}
        for name, value in (one | {"mrr": 1 / rank}).items():
            sums[name] = sums.get(name, 0.0) + value
    found = (single["overall"] if domain is None else single["domains"][DOMAINS[domain]])["next"]
    assert found == {"rows": rows, "unranked": unranked} | {
        name: pytest.approx(total / rows, rel=1e-12) for name, total in sums.items()
    }
    assert unranked > 10 and 0.1 < found["recall@10"] < 0.9


def test_a_known_case():
    evaluation = RankingEvaluation(["only"], [10, 1])
    rank = torch.tensor([1, 2.5, 3, 11, math.nan, 7], dtype=torch.float64)
    same = torch.zeros(6, dtype=torch.int64)
    evaluation.add(rank, torch.tensor([True] * 5 + [False]), same, same, torch.arange(6))
    found = evaluation.compute()["overall"]["next"]
    ndcg = (1 + 1 / math.log2(3.5) + 1 / 2) / 4
    assert found == {
        "rows": 4,
        "unranked": 1,
        "recall@1": 0.25,
        "recall@10": 0.75,
        "ndcg@1": 0.25,
        "ndcg@10": pytest.approx(ndcg, rel=1e-14),
        "mrr": pytest.approx((1 + 1 / 2.5 + 1 / 3 + 1 / 11) / 4, rel=1e-14),
    }


def test_no_rows_are_null_and_json_has_no_nan(single):
    assert json.loads(json.dumps(single, allow_nan=False)) == single
    assert set(single["domains"]["void"]["next"].values()) == {0, None}
    nobody = RankingEvaluation(DOMAINS, AT)
    assert nobody.compute()["overall"]["next"]["mrr"] is None and len(nobody.per_row()) == 0


def test_order_of_rows_and_repeated_compute_change_nothing(single):
    shuffled = np.random.default_rng(9).permutation(ROWS)
    evaluation = evaluate(shuffled[:700])
    evaluation.compute()
    add(evaluation, places(), shuffled[700:])
    assert evaluation.compute() == single
    assert evaluation.compute() == single


def test_every_row_is_kept_in_order():
    found, columns = evaluate(np.arange(ROWS)).per_row(), places()
    order = np.argsort(columns["row"])
    order = order[columns["valid"][order]]
    for name in ("row", "domain", "user", "rank"):
        np.testing.assert_array_equal(getattr(found, name), columns[name][order])


def test_misuse_is_refused_at_once():
    evaluation = RankingEvaluation(["a"], [10])
    one, zeros = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    valid = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        evaluation.add(torch.ones(3), valid, zeros, zeros, zeros)
    with pytest.raises(ValueError, match="there are 1"):
        evaluation.add(one, valid, torch.tensor([0, 1]), zeros, zeros)
    for place in (0.5, math.inf):
        with pytest.raises(ValueError, match="row 8 has place"):
            evaluation.add(torch.tensor([1.0, place]), valid, zeros, zeros, torch.tensor([7, 8]))
    with pytest.raises(ValueError, match="at least 1"):
        RankingEvaluation(["a"], [0, 10])


def test_the_evaluator_reads_batch_and_output(single):
    schema = from_dict(
        Schema,
        {"name": "s", "domains": {"names": DOMAINS}, "features": {"item": {"role": "item", "kind": "id"}},
         "labels": {"next": {}}},
        "s",
    )  # fmt: skip
    evaluator = RankingEvaluator(schema, AT)
    columns = {name: torch.as_tensor(column) for name, column in places().items()}
    evaluator.add_batch(SimpleNamespace(**columns), {"rank": columns["rank"]})
    assert evaluator.compute() == single and evaluator.ranks_rows


def test_kept_places_are_read_as_they_were_written(tmp_path):
    ranks = evaluate(np.arange(ROWS)).per_row()
    what = Evaluated(split="test", step=7, data="abc", domains=DOMAINS, at=AT, protocol={"mask_history": False})
    write_ranks(path_of(tmp_path, "test"), ranks, what)
    found, about = read_ranks(tmp_path, "test")
    assert about == what and found.domains == DOMAINS
    for name in ("row", "domain", "user", "rank"):
        np.testing.assert_array_equal(getattr(found, name), getattr(ranks, name))
    with pytest.raises(UserError, match="dist-rec evaluate .* --split valid"):
        read_ranks(tmp_path, "valid")
    with pytest.raises(UserError, match="no such run"):
        read_ranks(tmp_path / "nowhere", "test")
    path_of(tmp_path, "test").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="cannot be read"):
        read_ranks(tmp_path, "test")


def test_ranked_items_have_a_table_of_their_own(single, tmp_path, capsys):
    print_evaluation({"split": "test", "step": 3, "rates": {}, **single}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "R@10" in lines[2] and "N@50" in lines[2] and "auc" not in lines[2]
    assert any("toys" in line for line in lines) and max(map(len, lines[:8])) <= 80
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_gives_the_same_numbers(single, tmp_path, world_size):
    done = run_ranks(world_size, [__file__, str(tmp_path)], TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = evaluate(np.arange(ROWS)).per_row()
    for rank in range(world_size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["dealt"] == single
        assert found["last"] == single
        for case in ("dealt rows", "last rows"):
            if rank:
                assert found[case] is None
            else:
                assert found[case][:2] == [whole.row.tolist(), whole.user.tolist()]
                np.testing.assert_array_equal(np.array(found[case][2], np.float64), whole.rank)


def work(folder: Path) -> None:
    """One rank: rows dealt unevenly and shuffled, and all on the last rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    owner = np.minimum(np.random.default_rng(3).integers(0, world_size + 1, ROWS), world_size - 1)
    dealt = np.random.default_rng(rank).permutation(np.flatnonzero(owner == rank))
    last = np.arange(ROWS if rank == world_size - 1 else 0)
    found = {}
    for case, chosen in (("dealt", dealt), ("last", last)):
        evaluation = evaluate(chosen)
        found[case], rows = evaluation.compute(), evaluation.per_row()
        found[f"{case} rows"] = rows and [rows.row.tolist(), rows.user.tolist(), rows.rank.tolist()]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
