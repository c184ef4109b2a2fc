"""`dist-rec plan` where nothing fits: ways out are true when they are applied, and what cannot be is said in words."""

from __future__ import annotations

import json

import pytest
import yaml

from dist_rec.embeddings import clusters
from dist_rec.embeddings.clusters import MACHINES, find_cluster
from dist_rec.errors import UserError
from dist_rec.plan.ask import find_answer
from dist_rec.plan.command import Wishes, run
from dist_rec.plan.request import parse_settings, read_request

SCHEMA = {
    "name": "s",
    "domains": {"names": ["a"]},
    "labels": {"y": {}},
    "features": {
        "u": {"role": "user", "kind": "id", "vocabulary": {"kind": "hash", "size": 1_000_000}},
        "i": {
            "role": "item",
            "kind": "id",
            "aspect": "id",
            "vocabulary": {"kind": "dictionary", "size": 1_000_000},
        },
        "h": {"role": "history", "kind": "ids", "shares": "i", "max_length": 50},
        "g": {"role": "item", "kind": "ids", "max_length": 10, "vocabulary": {"kind": "integer", "size": 100_000}},
        "r": {"role": "query", "kind": "id", "vocabulary": {"kind": "raw"}},
    },
}


@pytest.fixture
def plan(tmp_path):
    """Asks about the schema above: `plan(overrides of tables, settings, cluster)`."""
    schema = tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump(SCHEMA))

    def ask(overrides: dict, settings: list[str], cluster: str | None = "8xh100", **wishes):
        path = tmp_path / "config.yaml"
        tree = {
            "data": {"train": "nowhere", "batch_size": 8192, "streams": 64},
            "tables": {"dim": 64, "overrides": {"r": {"managed": 1_000_000}} | overrides},
            "model": {"width": 32, "history": {"kind": "mean"}},
        }
        path.write_text(yaml.safe_dump(tree))
        return run(path, {}, settings, schema, Wishes(cluster=cluster, **wishes))[1]

    ask.request = lambda: read_request(tmp_path / "config.yaml", {}, schema)
    return ask


def refused(plan, overrides: dict, settings: list[str], **wishes) -> str:
    with pytest.raises(UserError) as caught:
        plan(overrides, settings, **wishes)
    return str(caught.value)


def applied(way: dict, settings: list[str]) -> tuple[list[str], str | None]:
    """The command's settings and `--world` with a way's."""
    words = way["setting"].split(" ")
    chosen = [(option, value) for option, value in zip(words[::2], words[1::2], strict=True)]
    kept = [setting for setting in settings if setting not in way["replaces"]]
    world = [value for option, value in chosen if option == "--world"]
    return kept + [value for option, value in chosen if option == "--set"], world[0] if world else None


@pytest.mark.parametrize(
    "overrides, settings, cluster, expected",
    [
        ({}, ["tables.r.managed=4000000000"], "8xh100", ("tables.r.managed=", "tables.r.kernel=fused_uvm")),
        ({"u": {"size": 1_000_000_000}}, ["tables.i.rows=2e9"], "8xh100", ("--world 16", "tables.i.hash=")),
        ({"u": {"hash": 5_000_000_000, "sharding": "table_wise"}}, [], "8xh100", ("sharding=row_wise --world 32",)),
        (
            {"g": {"precision": "fp32"}},
            ["tables.i.rows=1e9", "tables.u.rows=1e9", "tables.g.rows=1e9"],
            "8xh100",
            ("--set tables.precision=fp16 --set tables.g.precision=fp16",),
        ),
        ({}, ["tables.u.rows=1e12"], "8xh100", ("tables.u.hash=",)),
        ({"u": {"kernel": "fused_uvm"}}, ["tables.u.rows=2e10"], "8xh100", ("--world 32", "tables.u.dim=20")),
        ({}, ["model.width=16384", "data.batch_size=65536"], "8xh100", ("model.width=", "dense.zero_stage=3")),
        ({}, ["data.batch_size=64000000"], "8xh100", ("data.batch_size=",)),
        ({}, ["tables.u.dim=1000000"], "8xh100", ("tables.u.dim=",)),
    ],
)
def test_every_way_out_is_true_when_it_is_applied(plan, overrides, settings, cluster, expected):
    told = plan(overrides, settings, cluster)
    assert not told["fits"] and len(told["ways_out"]) >= 3, told["tried"]
    for part in expected:
        assert any(part in way["setting"] for way in told["ways_out"]), (part, told["ways_out"])
    for way in told["ways_out"]:
        chosen, world = applied(way, settings)
        then = plan(overrides, chosen, cluster, world=world)
        assert then["fits"], way
        beside = then["per_rank"]["dense_bytes"] if way["memory"] == "device" else 0
        assert max(then["per_rank"][f"{way['memory']}_bytes"]) + beside == way["fullest"] <= way["capacity"]
        assert then["step_ms"]["tables"] == way["tables_ms"]
    assert json.loads(json.dumps(told)) == told


def test_the_fill_is_of_the_memory_that_is_short(plan, capsys):
    told = plan({"u": {"kernel": "fused_uvm"}}, ["tables.u.rows=2e10"])
    assert told["failure"]["memory"] == "host" and {way["memory"] for way in told["ways_out"]} == {"host"}
    assert "GiB of host memory" in " ".join(capsys.readouterr().out.split())


def test_this_machine_is_told_to_be_started_on_more_hosts(plan, monkeypatch):
    monkeypatch.setattr(clusters, "host_memory_bytes", lambda: 24 * 2**30)
    ways = plan({}, ["tables.u.rows=5e9", "train.device=cpu"], None, world="2")["ways_out"]
    hosts = [way for way in ways if "such hosts" in way["change"]]
    assert hosts and all(way["setting"] is None for way in hosts)
    assert not [way for way in ways if way["setting"] and "--world" in way["setting"]]


def test_a_machine_of_ones_own_gets_ranks_by_its_path(plan, tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text((MACHINES / "h100.yaml").read_text().replace("name: h100", "name: ours"))
    told = plan({}, ["tables.u.rows=5e9"], f"8x{path}")
    assert "--world 32" in [way["setting"] for way in told["ways_out"]]


def test_what_was_tried_in_vain_is_said(plan, capsys):
    told = plan({}, ["model.width=16384", "data.batch_size=65536"])
    said = " ".join(capsys.readouterr().out.split())
    assert told["tried"] and "Tried, and does not make it fit" in said
    assert all(what in said for what in ("ZeRO 2", "smaller dims of tables"))


def test_kernels_and_sizes_that_cannot_be_are_refused_in_words(plan):
    assert "are for CUDA" in refused(plan, {}, ["tables.u.kernel=fused_uvm_caching"], cluster="2xcpu")
    for setting, message in {
        "tables.u.rows=1e17": "below 2**58",
        "tables.u.dim=100000000000000000": "a smaller dim",
        "features.g.mean_length=4e18": "at most 10 (max_length)",
        "features.g.mean_length=500": "at most 10 (max_length)",
        "features.u.mean_length=2": "a row has one at most",
    }.items():
        assert message in refused(plan, {}, [setting]), setting


def test_rows_of_a_table_that_has_its_own_are_refused_with_the_right_key(plan):
    assert "--set tables.r.managed=5000 instead" in refused(plan, {}, ["tables.r.rows=5000"])
    for key in ("hash", "size"):
        own = {"u": {key: 2_000_000}}
        assert f"--set tables.u.{key}=5000 instead" in refused(plan, own, ["tables.u.rows=5000"])
    # What a way out asks for: many ids, and fewer rows for them.
    told = plan({}, ["tables.u.rows=5e9", "tables.u.hash=1e6"])
    assert told["tables"]["u"]["rows"] == 1_000_000
    assert "u: its vocabulary has 5,000,000,000 ids, and the table the rows of hash." in told["assumptions"]


def test_a_key_given_twice_is_refused(plan):
    for settings in (
        ["tables.u.rows=5", "tables.u.rows=6"],
        ["tables.u.dim=8", "tables.u.dim=8"],
        ["tables.u.dim=8", "tables.overrides.u.dim=16"],
    ):
        with pytest.raises(UserError, match=r"tables\.u\.\w+ is given twice"):
            parse_settings(settings)


def test_a_cluster_that_cannot_be_asked_about_keeps_its_row(plan, capsys):
    told = plan({}, ["tables.r.managed=70"], None, clusters="8xh100,64xh100,12xh100")["clusters"]
    said = " ".join(capsys.readouterr().out.split())
    assert [one["fits"] for one in told] == [True, False, False]
    assert "too few for 64 ranks" in told[1]["refused"] and "a multiple of that" in told[2]["refused"]
    assert "64xh100 cannot: r: a managed table" in said
    told = plan({}, ["tables.r.managed=70"], "h100", world="8,64")["clusters"]
    assert told[1]["cluster"]["name"] == "h100 on 64 ranks"
    assert "too few for 64 ranks" in refused(plan, {}, ["tables.r.managed=70"], cluster="h100", world="64,128")


def test_ways_out_leave_the_request_alone(plan):
    plan({}, ["tables.u.rows=5e9"])
    request = plan.request().with_settings({"tables.u.rows": "5e9"})
    before = list(request.specs)
    assert find_answer(request, find_cluster("8xh100")).ways and request.specs == before
