"""Distributed metrics equal scikit-learn's on all rows, and do not depend on how ranks share the rows.

Run as a script, this file is one rank of the several-process tests.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_rec.errors import UserError
from dist_rec.training.exchange import Exchange
from dist_rec.training.metrics import Evaluation, fixed, mean

DOMAINS = ["web", "shop", "silent", "void"]
TASKS = ["ctr", "relevance"]
K = 5
TIME_LIMIT = 120


def table(task: str, rows: int = 3000, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with tied scores, missing labels, unknown keys, a domain without positives and one without rows."""
    rng = np.random.default_rng([seed, TASKS.index(task)])
    domain = rng.choice(3, rows, p=[0.5, 0.4, 0.1])
    grades = [0, 1, 4 / 3, 5 / 3, 2, 7 / 3, 3] if task == "relevance" else [0, 1]
    gain = np.where(domain == 2, 0, rng.choice(grades, rows)).astype(np.float32)
    maximum = gain.max()
    score = np.clip(rng.normal(0.4 + 0.1 * gain, 0.2), 0, 1).astype(np.float32)
    score[::3] = np.round(score[::3], 1)
    return {
        "scores": score,
        "labels": gain / maximum,
        "gains": gain,
        "valid": rng.random(rows) < 0.9,
        "domain": domain,
        "user": rng.integers(-1, 60, rows),
        "query": rng.integers(-1, 100, rows),
        "row": np.arange(rows),
    }


def add(evaluation: Evaluation, task: str, columns: dict[str, np.ndarray], chosen: np.ndarray, batch: int = 257):
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        evaluation.add(task, **{name: torch.as_tensor(column[part]) for name, column in columns.items()})


def evaluate(shares: dict[str, np.ndarray], group=None) -> dict:
    evaluation = Evaluation(DOMAINS, TASKS, ndcg_at=K, group=group)
    for task, chosen in shares.items():
        add(evaluation, task, table(task), chosen)
    return evaluation.compute()


def everything() -> dict[str, np.ndarray]:
    return {task: np.arange(3000) for task in TASKS}


def reference(columns: dict[str, np.ndarray]) -> dict:
    """The same metrics by scikit-learn and plain loops."""
    from sklearn.metrics import ndcg_score, roc_auc_score

    label, score, gain = (columns[name].astype(np.float64) for name in ("labels", "scores", "gains"))
    positive = label >= 0.5
    if not len(label):
        return dict.fromkeys(["auc", "gauc", "logloss", "calibration", f"ndcg@{K}", "mean_label", "mean_score"]) | {
            "rows": 0,
            "positives": 0,
        }
    p = np.clip(score, 1e-7, 1 - 1e-7)
    weights, areas, ndcgs = [], [], []
    for user in set(columns["user"]) - {-1}:
        mine = columns["user"] == user
        if len(set(positive[mine])) == 2:
            areas.append(roc_auc_score(positive[mine], score[mine]))
            weights.append(mine.sum())
    for query in set(columns["query"]) - {-1}:
        mine = columns["query"] == query
        if gain[mine].max() > 0:
            one = mine.sum() == 1  # scikit-learn refuses a single document; its NDCG is 1
            ndcgs.append(1.0 if one else ndcg_score([2 ** gain[mine] - 1], [score[mine]], k=K))
    return {
        "rows": len(label),
        "positives": int(positive.sum()),
        "auc": roc_auc_score(positive, score) if len(set(positive)) == 2 else None,
        "gauc": np.average(areas, weights=weights) if areas else None,
        "logloss": float(-(label * np.log(p) + (1 - label) * np.log(1 - p)).mean()),
        "calibration": score.mean() / label.mean() if label.any() else None,
        f"ndcg@{K}": np.mean(ndcgs) if ndcgs else None,
        "mean_label": label.mean(),
        "mean_score": score.mean(),
    }


@pytest.fixture(scope="module")
def single() -> dict:
    return evaluate(everything())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("domain", [None, *range(4)])
def test_metrics_equal_scikit_learn(single, task, domain):
    columns = table(task)
    chosen = columns["valid"] & (True if domain is None else columns["domain"] == domain)
    expected = reference({name: column[chosen] for name, column in columns.items()})
    found = single["overall"][task] if domain is None else single["domains"][DOMAINS[domain]][task]
    assert found.keys() == expected.keys()
    for metric, value in expected.items():
        assert found[metric] == (None if value is None else pytest.approx(value, rel=1e-12)), metric


def test_binary_logloss_is_scikit_learns(single):
    from sklearn.metrics import log_loss

    columns = table("ctr")
    label, score = columns["labels"][columns["valid"]], columns["scores"][columns["valid"]].astype(np.float64)
    # 1e-7 is our clip; scikit-learn would take the smallest float64.
    expected = log_loss(label, np.clip(score, 1e-7, 1 - 1e-7))
    assert single["overall"]["ctr"]["logloss"] == pytest.approx(expected, rel=1e-12)


def test_undefined_is_null_and_json_has_no_nan(single):
    text = json.dumps(single, allow_nan=False)
    assert json.loads(text) == single
    silent, void = (single["domains"][name]["ctr"] for name in ("silent", "void"))
    assert silent["rows"] > 0 and silent["auc"] is silent["gauc"] is silent["calibration"] is silent["ndcg@5"] is None
    assert silent["logloss"] is not None
    assert void == dict.fromkeys(void) | {"rows": 0, "positives": 0}


def test_order_of_rows_and_repeated_compute_change_nothing(single):
    shuffled = {task: np.random.default_rng(9).permutation(rows) for task, rows in everything().items()}
    evaluation = Evaluation(DOMAINS, TASKS, ndcg_at=K)
    for task, chosen in shuffled.items():
        add(evaluation, task, table(task), chosen[:1000])
    evaluation.compute()
    for task, chosen in shuffled.items():
        add(evaluation, task, table(task), chosen[1000:])
    assert evaluation.compute() == single
    assert evaluation.compute() == single


def one_task(**columns) -> dict:
    rows = len(columns["scores"])
    zeros, unknown = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), -1)
    defaults = {"valid": torch.ones(rows, dtype=torch.bool), "domain": zeros, "user": unknown, "query": unknown}
    columns = {name: torch.as_tensor(column) for name, column in columns.items()}
    columns.setdefault("gains", columns["labels"])
    evaluation = Evaluation(["only"], ["ctr"], ndcg_at=3)
    evaluation.add("ctr", **(defaults | {"row": torch.arange(rows)} | columns))
    return evaluation.compute()["overall"]["ctr"]


def test_constant_scores_are_half_right():
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    found = one_task(scores=torch.full((5,), 0.25), labels=labels, user=torch.zeros(5, dtype=torch.int64))
    assert found["auc"] == found["gauc"] == 0.5
    assert found["calibration"] == 0.25 / 0.4


def test_unknown_keys_are_no_group():
    found = one_task(scores=torch.tensor([0.9, 0.1]), labels=torch.tensor([1.0, 0.0]))
    assert found["auc"] == 1.0 and found["gauc"] is None and found["ndcg@3"] is None


def test_certain_predictions_keep_logloss_finite():
    found = one_task(scores=torch.tensor([1.0, 0.0]), labels=torch.tensor([0.0, 1.0]))
    assert found["logloss"] == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_huge_gains_do_not_overflow_and_ideal_order_is_one():
    gains, query = torch.tensor([5000.0, 4999.0, 1.0]), torch.zeros(3, dtype=torch.int64)
    labels = gains / 5000
    assert one_task(scores=torch.tensor([0.9, 0.5, 0.1]), labels=labels, gains=gains, query=query)["ndcg@3"] == 1.0
    discounts = 1 / np.log2([2, 3])
    swapped = one_task(scores=torch.tensor([0.5, 0.9, 0.1]), labels=labels, gains=gains, query=query)["ndcg@3"]
    assert swapped == pytest.approx(np.dot([0.5, 1], discounts) / np.dot([1, 0.5], discounts), rel=1e-12)


def test_ndcg_of_a_tie_has_no_rounding_by_row_order():
    rng = np.random.default_rng(0)
    gains = torch.as_tensor(rng.random(40))
    found = set()
    for _ in range(20):
        columns = {"scores": torch.full((40,), 0.5), "query": torch.zeros(40, dtype=torch.int64)}
        shuffled = gains[torch.as_tensor(rng.permutation(40))]
        found.add(one_task(labels=shuffled, gains=shuffled, **columns)["ndcg@3"])
    assert len(found) == 1


def test_sums_are_good_to_the_last_bit_and_cannot_overflow():
    values = np.random.default_rng(0).exponential(5, 10_000)
    sums = fixed(values)
    assert int(abs(sums[:, 1]).max()) * 2**31 < 2**63  # two billion rows
    exact = math.fsum(values) / len(values)
    assert mean(sums.sum(axis=0), len(values)) == pytest.approx(exact, rel=1e-15)


def test_bfloat16_scores_are_read():
    assert one_task(scores=torch.tensor([0.5, 0.25], dtype=torch.bfloat16), labels=torch.tensor([1.0, 0.0]))["auc"] == 1


@pytest.mark.parametrize("bad", [{"scores": [0.5, math.nan]}, {"scores": [0.5, 1.5]}, {"labels": [0.0, 1.2]}])
def test_what_is_no_probability_is_refused_by_row(bad):
    columns = {"scores": [0.5, 0.5], "labels": [0.0, 1.0], "gains": [0.0, 1.0]} | bad
    columns = {name: torch.tensor(column) for name, column in columns.items()}
    with pytest.raises(UserError, match=r"'ctr': 1 rows .* rank 0 is row 71"):
        one_task(**columns, row=torch.tensor([70, 71]))
    masked = one_task(**columns, row=torch.tensor([70, 71]), valid=torch.tensor([True, False]))
    assert masked["rows"] == 1


def test_misuse_is_refused_at_once():
    evaluation = Evaluation(["a"], ["ctr"])
    arguments = [torch.zeros(2)] * 3 + [torch.ones(2, dtype=torch.bool)] + [torch.zeros(2, dtype=torch.int64)] * 4
    with pytest.raises(ValueError, match="none of"):
        evaluation.add("cvr", *arguments)
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        evaluation.add("ctr", torch.zeros(3), *arguments[1:])
    with pytest.raises(ValueError, match="there are 1"):
        evaluation.add("ctr", *arguments[:4], torch.tensor([0, 1]), *arguments[5:])


def test_consecutive_keys_spread_over_the_ranks():
    exchange = Exchange()
    exchange.world_size = 8
    keys = np.concatenate([np.arange(80_000), -np.arange(2, 80_002)])
    counts = np.bincount(exchange.hashed(keys), minlength=8)
    assert counts.min() > 0.95 * counts.mean()


def shares_of(case: str, rank: int, world_size: int) -> dict[str, np.ndarray]:
    """Which rows a rank adds: `dealt` unevenly and shuffled, or all on the `last` rank and none elsewhere."""
    if case == "last":
        return everything() if rank == world_size - 1 else {}
    owner = np.minimum(np.random.default_rng(3).integers(0, world_size + 1, 3000), world_size - 1)
    return {task: np.random.default_rng(rank).permutation(np.flatnonzero(owner == rank)) for task in TASKS}


def run_ranks(tmp_path: Path, world_size: int) -> list[dict]:
    """What each of `world_size` processes found; none outlives the time limit."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    logs = [tmp_path / f"{rank}.log" for rank in range(world_size)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, __file__, str(rank), str(world_size), str(tmp_path)]
            with log.open("w") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        deadline = time.monotonic() + TIME_LIMIT
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() not in (None, 0) for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
        assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_numbers(single, tmp_path, world_size):
    for found in run_ranks(tmp_path, world_size):
        assert found["dealt"] == single
        assert found["last"] == single
        assert found["empty"]["overall"]["ctr"]["rows"] == 0
        assert "rank 1 is row 7 of the data set" in found["fault"]
        assert found["balance"] < 1.1
        assert found["subgroup"] in (None, single)
    # Of three ranks, the first and the last form a subgroup.
    assert found["subgroup"] == (single if world_size == 3 else None)


def work(rank: int, world_size: int, folder: Path) -> None:
    """One rank: every case, the results as JSON."""
    import torch.distributed as dist

    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found: dict = {case: evaluate(shares_of(case, rank, world_size)) for case in ("dealt", "last")}
    found["empty"] = evaluate({})

    evaluation = Evaluation(DOMAINS, ["ctr"])
    if rank == 1:
        broken = table("ctr") | {"scores": np.full(3000, np.nan, dtype=np.float32)}
        add(evaluation, "ctr", broken | {"valid": np.ones(3000, dtype=bool)}, np.array([7]))
    try:
        evaluation.compute()
    except UserError as error:
        found["fault"] = str(error)

    exchange = Exchange()
    # Each rank's values lie elsewhere, and the ranks have unequally many.
    values = rank + np.random.default_rng(rank).beta(0.3, 5, size=20_000 * (rank + 1))
    ranks = np.searchsorted(exchange.split_points(values), values, side="right")
    (mine,) = exchange.route(ranks, [values])
    lengths = exchange.gather(np.array([len(mine)]))
    found["balance"] = float(lengths.max() / lengths.mean())

    found["subgroup"] = None
    if world_size == 3:
        group = dist.new_group([0, 2])
        member = {0: 0, 2: 1}.get(rank)
        found["subgroup"] = None if member is None else evaluate(shares_of("dealt", member, 2), group=group)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
