"""The few-shot curve: every point once, on nested rows, whatever interrupts it; and what is drawn of it."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest
from conftest import kill_family, start
from finetunes import SECONDS, dist_rec

from dist_rec.data.index import read_index
from dist_rec.errors import UserError
from dist_rec.finetune.curve import draw_curve, parse_sizes
from dist_rec.finetune.curve_picture import draw, places
from dist_rec.finetune.curve_results import Entry, Results, summary
from dist_rec.finetune.derive import Wishes
from dist_rec.finetune.single import narrowed

COMMON = {"domain": "fresh", "task": "ctr", "logloss": 0.6, "ndcg": None, "seconds": 1.0}


def entry(n: int, seed: int, kind: str, auc: float | None, preset: str | None = None) -> Entry:
    return Entry(n=n, seed=seed, kind=kind, preset=preset, auc=auc, **COMMON)


def test_sizes_are_numbers_and_all():
    assert parse_sizes("0, 64,all") == [0, 64, "all"]
    with pytest.raises(UserError, match="'6x4' is no number of rows"):
        parse_sizes("0,6x4")


def test_the_difference_to_scratch_is_paired_by_seed_and_rows():
    entries = [entry(0, seed, "finetuned", 0.7, "none") for seed in (0, 1)]
    entries += [entry(64, seed, "finetuned", auc, "none") for seed, auc in ((0, 0.8), (1, 0.6))]
    entries += [entry(64, seed, "scratch", auc) for seed, auc in ((0, 0.7), (1, 0.5), (2, 0.9))]
    told = {(e["n"], e["line"]): e for e in summary(entries)}
    assert told[0, "finetuned, freeze none"]["difference"] is None
    tuned = told[64, "finetuned, freeze none"]
    assert tuned["auc"] == pytest.approx(0.7) and tuned["difference"] == pytest.approx(0.1) and tuned["seeds"] == 2
    assert tuned["difference_spread"] == pytest.approx(0, abs=1e-9) and tuned["spread"] == pytest.approx(0.02**0.5)
    assert told[64, "from scratch"]["difference"] is None


def test_zero_stands_left_of_the_logarithms_and_the_picture_is_drawn(tmp_path):
    at = places([0, 64, 256, 5000])
    assert sorted(at, key=at.get) == [0, 64, 256, 5000]
    assert at[256] - at[64] == pytest.approx(at[64] - at[0])
    assert places([0]) and places([0, 7])[0] < places([0, 7])[7]
    entries = [entry(n, s, k, 0.6, p) for n in (0, 64, 70) for s in (0, 1) for k, p in (("finetuned", "L0+L1"),)]
    draw([*entries, entry(64, 0, "scratch", None), entry(70, 0, "single", 0.5)], tmp_path / "c.png", 70)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        draw(entries, tmp_path / "none" / "c.png", 70)


def test_a_curve_of_other_settings_is_never_mixed_in(tmp_path):
    results = Results(tmp_path / "c", {"run": "a", "overrides": {}})
    results.begin()
    results.add([entry(64, 0, "scratch", 0.5)])
    assert Results(tmp_path / "c", {"run": "a", "overrides": {}}).entries == results.entries
    with pytest.raises(UserError, match="other settings .run differ"):
        Results(tmp_path / "c", {"run": "b", "overrides": {}})


def test_a_single_domain_is_read_as_a_data_set_of_its_own(foundation):
    index = read_index(f"{foundation[0].parent.parent}/base/shards/train")
    alone = narrowed(index, "middle")
    assert alone.schema.domains.names == ["middle"] and alone.rows == index.rows_of("middle") < index.rows
    with pytest.raises(UserError, match="no row of domain 'fresh'"):
        narrowed(index, "fresh")


def test_a_curve_grows_point_by_point_and_repeats_none(foundation, tmp_path):
    run, data = foundation
    out = tmp_path / "curve"
    keys = {"train.device": "cpu", "train.epochs": "1"}
    few = [*(word for key, value in keys.items() for word in (f"--{key}", value)), "--out", out, "--json"]
    few += ["--seeds", "1"]
    first = dist_rec("finetune", run, "--data", data, "--curve", "0,32,99999", "--freeze", "adaptor", *few)
    assert first.returncode == 0, first.stderr
    assert "left out 99,999, for there are" in first.stderr and "4/4" in first.stdout
    held = json.loads((out / "curve.json").read_text())
    kinds = {(e["n"], e["kind"], e["preset"]) for e in held if e["auc"] is not None}
    both = {(32, "scratch", None), (32, "single", None)}
    assert kinds == {(0, "finetuned", "adaptor"), (32, "finetuned", "adaptor"), *both}
    assert all(e["auc"] is None or 0 <= e["auc"] <= 1 for e in held) and (out / "curve.png").is_file()
    assert not [*out.glob("runs/*"), *out.glob("samples/*")]
    # One point is lost, another preset is asked for: what is missing is done, and only that.
    again = ["finetune", run, "--data", data, "--curve", "0,32", "--freeze", "adaptor", "--freeze", "none", *few]
    with pytest.raises(UserError, match=r"\(ranks differ\)"):
        draw_curve(run, data, Wishes(freeze="adaptor", keys=keys), ["adaptor"], [0, 32], 1, out, 2)
    (out / "curve.json").write_text(json.dumps([e for e in held if e["kind"] != "single"]))
    done = dist_rec(*again)
    assert done.returncode == 0 and "3/3" in done.stdout, done.stdout + done.stderr
    grown = json.loads((out / "curve.json").read_text())
    assert len(grown) == len(held) + 2 * 2
    single = [[e for e in one if e["kind"] == "single"] for one in (held, grown)]
    assert [{**e, "seconds": 0} for e in single[0]] == [{**e, "seconds": 0} for e in single[1]]


def test_a_curve_told_to_end_goes_on_and_loses_no_point(foundation, tmp_path):
    """What it was at, the next command begins anew, and leaves nothing of it lying about."""
    run, data = foundation
    out = tmp_path / "curve"
    asked = ["finetune", run, "--data", data, "--curve", "16,32", "--freeze", "adaptor", "--seeds", "1", "--out", out]
    asked += ["--train.device", "cpu", "--train.epochs", "2"]
    job = start([sys.executable, "-m", "dist_rec", *map(str, asked)])
    try:
        deadline = time.monotonic() + SECONDS
        while not (out / "curve.json").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=60)
    finally:
        kill_family(job)
    # Wherever it was struck, and also in the middle of drawing a sample.
    (out / "samples" / ".32-0.partial-1").mkdir(parents=True, exist_ok=True)
    held = json.loads((out / "curve.json").read_text())
    points = {(e["n"], e["kind"]) for e in held}
    assert job.returncode in (143, -signal.SIGTERM) and 1 <= len(points) < 6 and "Traceback" not in err, err
    done = dist_rec(*asked)
    assert done.returncode == 0 and f"{6 - len(points)}/{6 - len(points)}" in done.stdout, done.stdout + done.stderr
    grown = json.loads((out / "curve.json").read_text())
    assert grown[: len(held)] == held
    assert len({(e["n"], e["kind"], e["task"]) for e in grown}) == len(grown) == 6 * 2
    assert not [*out.glob("runs/*"), *out.glob("samples/*")] and (out / "curve.png").is_file()


@pytest.mark.parametrize("key", ["finetune.freeze", "data.train", "data.test", "data.domains"])
def test_keys_that_a_curve_sets_by_itself_are_refused(foundation, tmp_path, key):
    """Each would make every point's label untrue: all presets one, or all sizes the whole."""
    with pytest.raises(UserError, match=f"--{key}: a curve sets this key itself"):
        draw_curve(*foundation, Wishes(keys={key: "x"}), ["none"], [8], 1, tmp_path / "curve", 1)
    assert not (tmp_path / "curve").exists()
