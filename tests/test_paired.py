"""The paired bootstrap of two runs agrees with scipy's, keeps its coverage, and refuses what cannot be compared."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import run_command
from sequence_sets import NUM_USERS, build_sequences, config_of

from dist_rec.errors import UserError
from dist_rec.report.table import print_against
from dist_rec.training import paired
from dist_rec.training.paired import bootstrap, compare, pair
from dist_rec.training.ranking import RowRanks
from dist_rec.training.row_ranks import Evaluated

ROWS = 400


def run(ranks: np.ndarray, data: str = "same", **changes) -> tuple[RowRanks, Evaluated]:
    """What a run keeps: a row a user, in two domains."""
    n = len(ranks)
    found = RowRanks(["toys", "books"], np.arange(n), (np.arange(n) % 2).astype(np.int32), np.arange(n) + 100, ranks)
    what = {"split": "test", "step": 5, "domains": ["toys", "books"], "at": [10], "protocol": {"mask_history": False}}
    return replace(found, **changes), Evaluated(data=data, **what)


def two(seed: int = 0, rows: int = ROWS, shift: float = 0.85) -> tuple[np.ndarray, np.ndarray]:
    """Places of two runs that agree about rows, the first a little better."""
    draw = np.random.default_rng(seed)
    common = draw.exponential(15, rows)
    return tuple(np.ceil(common * draw.uniform(0.5, 1.5, rows) * s) for s in (shift, 1.0))


def test_intervals_and_p_agree_with_scipy():
    from scipy.stats import bootstrap as theirs
    from scipy.stats import norm

    ours, other = (1 / rank for rank in two(shift=0.88))
    difference = ours - other
    found = bootstrap(difference[:, None], np.ones(ROWS, np.int64), 10_000, 0)
    expected = theirs((difference,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    width = expected.high - expected.low
    assert found["low"][0] == pytest.approx(expected.low, abs=0.03 * width)
    assert found["high"][0] == pytest.approx(expected.high, abs=0.03 * width)
    z = difference.mean() / (difference.std() / ROWS**0.5)
    assert found["p"][0] == pytest.approx(2 * norm.sf(abs(z)), rel=0.15)
    assert 0.01 < found["p"][0] < 0.5


def test_users_are_drawn_with_all_their_rows():
    """Two like rows a user say no more than one: the interval is as wide, and wider than of rows drawn alone."""
    ours, other = two()
    once = compare(pair(run(ours), run(other)), [10], 4000)["overall"]
    doubled = [run(np.repeat(r, 2), user=np.repeat(np.arange(ROWS), 2)) for r in (ours, other)]
    twice = compare(pair(*doubled), [10], 4000)["overall"]
    alone = [run(np.repeat(r, 2), user=np.full(2 * ROWS, -1)) for r in (ours, other)]
    unknown = compare(pair(*alone), [10], 4000)["overall"]
    assert (twice["users"], twice["rows"], unknown["users"]) == (ROWS, 2 * ROWS, 2 * ROWS)

    def width(found):
        return found["metrics"]["mrr"]["high"] - found["metrics"]["mrr"]["low"]

    assert width(twice) == pytest.approx(width(once), rel=1e-9)
    assert width(unknown) == pytest.approx(width(once) / 2**0.5, rel=0.1)


def test_what_is_told_is_the_runs_own_metrics_by_domain():
    ours, other = two()
    other[3] = np.nan
    found = compare(pair(run(ours), run(other)), [10], 200)
    known = ~np.isnan(other)
    assert (found["unranked"], found["paired_by"], found["overall"]["rows"]) == (1, "row", ROWS - 1)
    assert list(found["overall"]["metrics"]) == ["recall@10", "ndcg@10", "mrr"]
    recall = found["overall"]["metrics"]["recall@10"]
    assert recall["ours"] == pytest.approx((ours[known] <= 10).mean(), rel=1e-12)
    assert recall["other"] == pytest.approx((other[known] <= 10).mean(), rel=1e-12)
    assert recall["difference"] == pytest.approx(recall["ours"] - recall["other"], rel=1e-9)
    assert recall["low"] < recall["difference"] < recall["high"]
    books = found["domains"]["books"]
    assert books["rows"] == (known & (np.arange(ROWS) % 2 == 1)).sum()
    assert books["metrics"]["mrr"]["ours"] == pytest.approx((1 / ours[known & (np.arange(ROWS) % 2 == 1)]).mean())


def test_a_run_against_itself_differs_by_nothing():
    ours, _ = two()
    for metric in compare(pair(run(ours), run(ours)), [10], 100)["overall"]["metrics"].values():
        assert (metric["difference"], metric["low"], metric["high"], metric["p"]) == (0, 0, 0, 1)


def test_a_clear_difference_is_never_certain():
    better, worse = np.full(50, 1.0), np.full(50, 20.0)
    metric = compare(pair(run(better), run(worse)), [10], 999)["overall"]["metrics"]["recall@10"]
    assert (metric["difference"], metric["low"], metric["p"]) == (1, 1, 2 / 1000)


def test_false_alarms_are_as_rare_as_they_should_be():
    """Of runs that differ by luck alone, about 5 % have p < 0.05."""
    alarms = 0
    for seed in range(300):
        difference = np.subtract(*(1 / rank for rank in two(seed, 120, shift=1.0)))
        alarms += bootstrap(difference[:, None], np.ones(120, np.int64), 400, seed)["p"][0] < 0.05
    assert 5 <= alarms <= 28


def test_the_seed_decides_and_pieces_of_the_work_do_not(monkeypatch):
    pairs = pair(*map(run, two()))
    whole = compare(pairs, [10], 500)
    assert compare(pairs, [10], 500) == whole
    assert compare(pairs, [10], 500, seed=1) != whole
    monkeypatch.setattr(paired, "CELLS", 7 * ROWS)
    assert compare(pairs, [10], 500) == whole


def test_rows_in_other_shards_are_recognised_by_their_users():
    ours, other = two()
    shuffled = np.random.default_rng(4).permutation(ROWS)
    there = RowRanks(
        ["books", "new", "toys"],
        np.arange(ROWS),
        np.where(shuffled % 2 == 1, 0, 2).astype(np.int32),
        shuffled + 100,
        other[shuffled],
    )
    about = replace(run(other)[1], data="in other shards", domains=there.domains)
    found = compare(pair(run(ours), (there, about)), [10], 200)
    expected = compare(pair(run(ours), run(other)), [10], 200)
    assert found.pop("paired_by") == "user" and expected.pop("paired_by") == "row"
    assert found == expected


def test_what_cannot_be_compared_is_refused_in_words():
    ours, other = two()
    with pytest.raises(UserError, match=r"400 rows here, 399 there, 399 of them in both"):
        pair(run(ours), run(other[:-1]))
    with pytest.raises(UserError, match=r"not evaluated on the same test rows"):
        pair(run(ours), run(other, "moved", user=np.arange(ROWS) + 101))
    with pytest.raises(UserError, match=r"without a user .* 400 there"):
        pair(run(ours), run(other, "moved", user=np.full(ROWS, -1)))
    with pytest.raises(UserError, match=r"users have several rows"):
        pair(run(ours, user=np.arange(ROWS) // 4), run(other, "moved", user=np.arange(ROWS) // 4))
    ranks, about = run(other)
    with pytest.raises(UserError, match=r"mask_history False here and True there"):
        pair(run(ours), (ranks, replace(about, protocol={"mask_history": True})))
    with pytest.raises(UserError, match="no row that both give a place"):
        compare(pair(run(ours), run(np.full(ROWS, np.nan))), [10], 10)


def test_the_table_shows_every_metric(tmp_path, capsys):
    found = compare(pair(*map(run, two())), [10], 500)
    print_against({"run": "other", "step": 9, **found}, 5, tmp_path)
    out = capsys.readouterr().out
    assert out.count("recall@10") == 3 and "books" in out and "95 % interval" in out and "400 users" in out


def dist_rec(*arguments) -> tuple[int, str, str]:
    done = run_command([sys.executable, "-m", "dist_rec", *map(str, arguments)], 180)
    return done.returncode, done.stdout, done.stderr


def test_two_runs_are_compared_by_the_verb(tmp_path):
    tree = config_of(build_sequences(tmp_path), "", item="id", loss="full")
    tree |= {"text": {"mode": "none"}, "run": {"root": str(tmp_path / "runs"), "seed": 5}}
    (config := tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    long, short = tmp_path / "runs" / "long", tmp_path / "runs" / "short"
    for run, epochs in ((long, 30), (short, 1)):
        code, _, err = dist_rec("train", config, "--run.name", run.name, "--train.epochs", epochs)
        assert code == 0, err
    code, out, err = dist_rec("evaluate", long, "--against", short, "--json", "--nproc-per-node", 2)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    against = found["against"]
    assert (against["run"], against["paired_by"], against["resamples"]) == (str(short), "row", 10_000)
    assert against["step"] < found["step"] and against["overall"]["users"] == NUM_USERS
    metric = against["overall"]["metrics"]["mrr"]
    before = json.loads((short / "evaluation.json").read_text())["overall"]["next"]["mrr"]
    assert metric["other"] == pytest.approx(before, rel=1e-9)
    assert metric["ours"] == pytest.approx(found["overall"]["next"]["mrr"], rel=1e-9)
    assert metric["low"] <= metric["difference"] <= metric["high"] and 0 < metric["p"] <= 1
    assert "95 % interval" in out and set(against["domains"]) == {"books", "films"}
    code, _, err = dist_rec("evaluate", long, "--against", short, "--evaluate.mask_history", "true")
    assert code == 2 and "mask_history True here and False there" in err
    code, _, err = dist_rec("evaluate", long, "--against", short, "--split", "valid")
    assert code == 2 and "--split valid" in err and "Traceback" not in err
