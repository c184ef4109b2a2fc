"""`dist-rec report`: its numbers are the model's, its page stands alone, and what a run lacks is said."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command

from dist_rec.config import load_config
from dist_rec.layers.experts import ExpertBody, ExpertLevel
from dist_rec.layers.gating import AspectGate
from dist_rec.report import figures
from dist_rec.report.curves import read_curves
from dist_rec.report.page import page
from dist_rec.training.evaluate import trained
from dist_rec.training.setup import build_stream

SECONDS = 240


@pytest.fixture(scope="module")
def reports(toy_run) -> dict[int, dict]:
    """What `report --json` says on one and on two ranks, of all rows."""
    found = {}
    for ranks in (1, 2):
        out = toy_run.parent / f"on-{ranks}.html"
        command = [sys.executable, "-m", "dist_rec", "report", str(toy_run), "--rows", "0", "--out", str(out)]
        done = run_command([*command, "--json", "--nproc-per-node", str(ranks)], SECONDS)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        found[ranks] = json.loads(done.stdout.splitlines()[-1])
        assert found[ranks] == json.loads(out.with_suffix(".json").read_text())
        found[ranks]["html"] = out.read_text()
    return found


def test_two_ranks_report_what_one_does(reports):
    one, two = reports[1], reports[2]
    assert one["rows"] == two["rows"] and sum(one["rows"].values()) == one["rows_of_split"]
    for role, domains in one["aspects"].items():
        for domain, aspects in domains.items():
            for aspect, values in aspects.items():
                assert two["aspects"][role][domain][aspect] == pytest.approx(values, abs=1e-5)
    for left, right in zip(one["experts"], two["experts"], strict=True):
        assert left["experts"] == right["experts"] and len(left["lines"]) == len(right["lines"])
        for a, b in zip(left["lines"], right["lines"], strict=True):
            assert a["weights"] == pytest.approx(b["weights"], abs=1e-5) and a["rows"] == b["rows"]
    assert np.array(one["distances"]["js"]) == pytest.approx(np.array(two["distances"]["js"]), abs=1e-6)


def test_the_numbers_are_those_of_the_model_row_by_row(toy_run, reports, monkeypatch):
    """Gates, experts and x_hat of every row, taken from the modules' own calls, against the report's sums."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "DS_ACCELERATOR",
    ):
        # What joining a group of one sets is unset again after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    aspects, levels, adapted, batches = defaultdict(list), [], [], []
    gate, level, body = AspectGate.forward, ExpertLevel.weights, ExpertBody.forward

    def seen_gate(self, given, present, domain, keys):
        out = gate(self, given, present, domain, keys)
        aspects[id(self)].append((out[1], present))
        return out

    def seen_level(self, own, sizes):
        levels.append(level(self, own, sizes))
        return levels[-1]

    def seen_body(self, x, sizes):
        adapted.append(x)
        return body(self, x, sizes)

    monkeypatch.setattr(AspectGate, "forward", seen_gate)
    monkeypatch.setattr(ExpertLevel, "weights", seen_level)
    monkeypatch.setattr(ExpertBody, "forward", seen_body)
    with trained(load_config(toy_run / "config.yaml"), toy_run, "test") as loaded:
        for batch, _ in loaded.predict(build_stream(loaded.prepared, "test", 0, 1).batches(0)):
            batches.append(batch)
        model, domains = loaded.model, loaded.prepared.schema.domains.names
    report = reports[1]
    order = [torch.argsort(b.domain, stable=True) for b in batches]
    domain, valid = (torch.cat([getattr(b, name) for b in batches]) for name in ("domain", "valid"))
    in_order = torch.cat([b.domain[o] for b, o in zip(batches, order, strict=True)])
    valid_in_order = torch.cat([b.valid[o] for b, o in zip(batches, order, strict=True)])
    assert report["rows"] == {d: int(((domain == k) & valid).sum()) for k, d in enumerate(domains)}
    p = torch.softmax(torch.cat(adapted).double(), 1)
    means = {}
    for k, name in enumerate(domains):
        mine = (domain == k) & valid
        for role, entity in model.entities.items():
            weights, present = (torch.cat(parts) for parts in zip(*aspects[id(entity.gate)], strict=True))
            rows = mine & present.any(1)
            assert (name in report["aspects"][role]) == bool(rows.any())
            for a, aspect in enumerate(entity.aspects if rows.any() else []):
                found = report["aspects"][role][name][aspect]
                assert found["weight"] == pytest.approx(float(weights[rows, a].double().mean()), abs=1e-6)
                assert found["present"] == pytest.approx(float(present[mine, a].double().mean()), abs=1e-9)
        sorted_mine = (in_order == k) & valid_in_order
        means[name] = p[sorted_mine].mean(0)
        for t, (task, spec) in enumerate(model.tasks.items()):
            labelled = torch.cat([b.label_valid[spec.label][o] for b, o in zip(batches, order, strict=True)])
            rows = sorted_mine & labelled
            lines = [w for w in report["experts"][0]["lines"] if (w["domain"], w["task"]) == (name, task)]
            assert len(lines) == int(rows.any())
            if lines:
                wanted = torch.cat(levels)[rows, t].double().mean(0)
                assert lines[0]["weights"] == pytest.approx(wanted.tolist(), abs=1e-6)
                assert lines[0]["rows"] == int(rows.sum()) and sum(lines[0]["weights"]) == pytest.approx(1)

    def entropy(q: torch.Tensor) -> float:
        return float(-(q * q.log()).sum())

    for i, left in enumerate(domains):
        for j, right in enumerate(domains):
            a, b = means[left], means[right]
            js = entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2
            assert report["distances"]["js"][i][j] == pytest.approx(js, abs=1e-6)
    assert max(map(max, report["distances"]["js"])) > 1e-4


class Page(HTMLParser):
    """Ids and references of a page, its tags balanced."""

    VOID = ("meta", "br", "img", "path", "use", "rect", "image", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.references, self.ids, self.open = set(), [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        held = dict(attributes)
        self.references += [held[k] for k in ("href", "src", "xlink:href") if k in held]
        self.ids += [held["id"]] if "id" in held else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        if tag in self.VOID:
            self.handle_starttag(tag, attributes)
        else:
            self.handle_starttag(tag, attributes)
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone(reports):
    text = reports[2]["html"]
    read = Page(text)
    assert len(text) < 5 << 20 and text.count("<svg") >= 4
    assert not read.tags & {"script", "link", "iframe", "object"}
    assert all(reference.startswith(("#", "data:")) for reference in read.references)
    assert "url(http" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and figures.INK not in text
    sections = ("curves", "aspects-query", "aspects-item", "experts-1-own", "distances")
    assert set(sections) <= set(read.ids)
    assert {i for i in read.ids if i.startswith(sections)} and "Evaluation: test split" in text
    for name in ("big", "middle", "tiny", "item_id", "shared 3", "data.batch_size"):
        assert name in text


def test_fewer_rows_are_drawn_from_every_domain(toy_run):
    out = toy_run.parent / "few.html"
    command = [sys.executable, "-m", "dist_rec", "report", str(toy_run), "--rows", "64", "--split", "train"]
    done = run_command([*command, "--out", str(out)], SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.with_suffix(".json").read_text())
    assert sum(found["rows"].values()) == 64 < found["rows_of_split"] and all(found["rows"].values())
    assert f"dist-rec evaluate {toy_run} --split train" in found["left_out"]["evaluation"]
    assert "not evaluated on train yet" in done.stdout


PLAIN = {
    "--model.adaptation.enabled": "false",
    "--model.body.kind": "shared_bottom",
    "--text.mode": "none",
    "--text.store": "null",
    "--data.exclude_features": "[query]",
    "--model.regulariser.kind": "none",
    "--data.domains": "[big]",
    "--train.evaluate_every": "0",
}
DEEP = {
    "--model.body.kind": "ple",
    "--model.body.levels": "2",
    "--model.body.specific_to": "task",
    "--model.gating": "cls",
    "--model.tasks": "{ctr: {label: ctr}}",
}


def trained_like(toy_run: Path, name: str, keys: dict[str, str]) -> dict:
    given = [part for pair in keys.items() for part in pair]
    command = [sys.executable, "-m", "dist_rec", "train", str(toy_run.parents[1] / "toy.yaml"), "--run.name", name]
    done = run_command([*command, *given, "--train.steps", "3"], SECONDS)
    assert done.returncode == 0, done.stderr
    run = toy_run.parent / name
    done = run_command([sys.executable, "-m", "dist_rec", "report", str(run)], SECONDS)
    assert done.returncode == 0, done.stderr
    Page((run / "report.html").read_text())
    return json.loads((run / "report.json").read_text())


def test_a_plain_run_says_what_it_lacks(toy_run):
    found = trained_like(toy_run, "plain", PLAIN)
    assert found["left_out"]["experts"] == "a shared bottom has one expert and no gates"
    assert found["left_out"]["aspects of the query"] == "this run reads no feature of the query"
    assert found["experts"] == [] and set(found["aspects"]) == {"item"}
    # One domain trains, but all are evaluated and looked at.
    assert len(found["distances"]["domains"]) == 3
    assert set(found["aspects"]["item"]["big"]) == {"sparse"} or "text" not in found["aspects"]["item"]["big"]
    assert found["config"]["changed"]["model.body.kind"] == "shared_bottom"
    assert "model.body.experts" in found["config"]["changed"] and "text.mode" not in found["config"]["changed"]


def test_experts_of_tasks_are_named_on_every_level(toy_run):
    found = trained_like(toy_run, "deep", DEEP)
    gates = {(entry["level"], entry["gate"]): entry for entry in found["experts"]}
    assert set(gates) == {(1, "own"), (1, "shared"), (2, "own")}
    assert gates[1, "shared"]["experts"] == ["ctr 1", "ctr 2", "shared 1", "shared 2", "shared 3"]
    assert gates[1, "own"]["experts"] == ["own 1", "own 2", "shared 1", "shared 2", "shared 3"]
    assert {line["task"] for line in gates[2, "own"]["lines"]} == {"ctr"}
    assert {line["domain"] for line in gates[2, "own"]["lines"]} == {"big", "tiny"}
    assert {line["domain"] for line in gates[1, "shared"]["lines"]} == {"big", "middle", "tiny"}
    for entry in found["experts"]:
        assert all(sum(line["weights"]) == pytest.approx(1, abs=1e-5) for line in entry["lines"])


def test_what_finetuning_left_is_shown(toy_run, reports, tmp_path):
    found = json.loads((toy_run.parent / "on-1.json").read_text())
    metrics = {"big": {"ctr": {"auc": 0.75, "logloss": 0.5, "ndcg@10": None}}}
    after = {"big": {"ctr": {"auc": 0.7, "logloss": 0.5, "ndcg@10": None}}}
    old = {"before": {"domains": metrics}, "after": {"domains": after}}
    (tmp_path / "curve.png").write_bytes(b"\x89PNG")
    text = page({**found, "old_domains": old, "curve": {}}, tmp_path)
    Page(text)
    assert "<td>-0.0500</td>" in text and "data:image/png;base64," in text
    assert "Not looked at: no rows" in page({**found, "old_domains": {"skipped": "no rows"}}, tmp_path / "none")


def test_names_are_text_and_never_markup(toy_run, reports):
    found = json.loads((toy_run.parent / "on-1.json").read_text())
    found["aspects"] = {"item": {"<b>x</b>": found["aspects"]["item"]["big"]}}
    found["left_out"] = {"<script>": "alert(1)"}
    text = page(found, Path("<i>"))
    assert "<script>" not in text and "<b>x</b>" not in text and "<i>" not in text
    assert "&lt;b&gt;x" in text


def test_curves_leave_out_what_was_cut_off_and_never_defined(tmp_path):
    lines = [
        {"step": 2, "losses": {"loss": 1.0}, "rows_per_s": 5.0},
        {"step": 2, "evaluation": {"ctr": {"auc": None, "logloss": 0.5, "rows": 3}}},
        {"step": 4, "losses": {"loss": 0.5}, "rows_per_s": 7.0},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 6, "lo')
    found = read_curves(tmp_path / "m.jsonl")
    assert found["losses"] == {"loss": ([2, 4], [1.0, 0.5])} and found["rows_per_s"] == ([2, 4], [5.0, 7.0])
    assert found["evaluation"] == {"logloss": {"ctr": ([2], [0.5])}}
    assert read_curves(tmp_path / "none")["losses"] == {}


def test_figures_stay_readable_however_many_domains():
    names = [f"domain_with_a_long_name_{n}" for n in range(11)]
    values = np.linspace(0, 1, 121).reshape(11, 11)
    np.fill_diagonal(values, math.nan)
    text = figures.svg(figures.heat_maps([("JS", values, names)], names, label="domain", largest=1.0), "x")
    said = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert said.count(names[0]) == 2 and len([s for s in said if re.fullmatch(r"\.\d\d|1\.00", s)]) == 110
    assert "nan" not in said
    many = [str(n) for n in range(300)]
    large = figures.svg(figures.heat_maps([("JS", np.eye(300), many)], many, label="domain", largest=1.0), "y")
    assert len(large) < 1 << 20 and "<image" in large
    x = list(range(100_000))
    assert len(figures.thinned(x, x)[0]) == figures.MOST_POINTS
