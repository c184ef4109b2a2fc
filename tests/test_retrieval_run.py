"""From a trained run to answers: export on any number of ranks, search, profile, and each refusal."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import build_small, run_command
from sequence_sets import NUM_ITEMS, NUM_USERS, WIDTH, build_sequences, config_of, sequence_rows, title

from dist_rec.config import load_config
from dist_rec.errors import UserError
from dist_rec.retrieval.export import Wishes, export
from dist_rec.retrieval.manifest import read_manifest
from dist_rec.retrieval.names import key_of
from dist_rec.retrieval.parts import Parts
from dist_rec.retrieval.search import profile, profile_all, search
from dist_rec.text.embed import embed

SECONDS = 240


def dist_rec(*arguments, code: int = 0):
    done = run_command([sys.executable, "-m", "dist_rec", *map(str, arguments)], SECONDS)
    assert done.returncode == code, done.stderr
    return done


def told(*arguments) -> dict:
    return json.loads(dist_rec(*arguments, "--json").stdout.splitlines()[-1])


def refused(*arguments) -> str:
    done = dist_rec(*arguments, code=2)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, tiny_model) -> Path:
    """A run of two ranks that reads items' ids and texts; its data below shards/."""
    folder = tmp_path_factory.mktemp("sequences")
    data = build_sequences(folder)
    embed([f"{data}/train"], tiny_model, str(folder / "store"), max_tokens=32, store_dtype="float32")
    tree = config_of(data, str(folder / "store"), item="text+id", loss="full")
    tree["run"] |= {"root": str(folder / "runs"), "name": "mine"}
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
    dist_rec("train", folder / "mine.yaml", "--nproc-per-node", "2")
    return folder / "runs" / "mine"


@pytest.fixture(scope="module")
def exported(sequences) -> tuple[Path, dict]:
    """An export by two ranks, in the run's folder, and what it said."""
    found = told("export", sequences, "--nproc-per-node", "2", "--pairs", "200")
    return sequences / "export", found


def columns(folder: Path, *names: str) -> dict[str, list]:
    return pq.read_table(folder).select(list(names)).to_pydict()


def test_every_item_and_user_has_a_vector_that_makes_the_models_score(exported):
    folder, found = exported
    manifest = read_manifest(folder)
    task = manifest.tasks["next"]
    assert (manifest.items.count, manifest.users.count, manifest.ranks) == (NUM_ITEMS, NUM_USERS, 2)
    assert task.exact and task.scores["pairs"] == 200 and task.scores["max_relative_error"] < 1e-6
    assert task.answers["recall_at_50"] == 1.0 and found["tasks"]["next"]["width"] == WIDTH
    items = columns(folder / "items", "id", "title", "domain")
    assert sorted(items["id"]) == sorted(f"i{i}" for i in range(NUM_ITEMS))
    for name, text, domain in zip(*items.values(), strict=True):
        number = int(name[1:])
        assert (text, domain) == (title(number) if number < NUM_ITEMS - 1 else None, ("books", "films")[number % 2])
    # No feature has users' raw values; their keys are hashes of those.
    assert len(set(columns(folder / "users", "key")["key"])) == NUM_USERS


@pytest.fixture(scope="module")
def alone(sequences, tmp_path_factory) -> Path:
    """An export by one rank, with another index."""
    out = tmp_path_factory.mktemp("alone") / "pq"
    dist_rec("export", sequences, "--out", out, "--index", "pq", "--k", "5")
    return out


def test_ranks_change_nothing(exported, alone):
    for part, names in (("items", ["id", "title", "domain", "row"]), ("users", ["key", "domain", "row"])):
        assert columns(alone / part, *names) == columns(exported[0] / part, *names)
        mine, other = (np.concatenate(list(Parts(at / part).vectors("next"))) for at in (alone, exported[0]))
        np.testing.assert_allclose(mine, other, atol=1e-6)


def test_search_answers_with_exact_scores_and_titles(sequences, exported, alone):
    folder, _ = exported
    found = search(sequences, "u3", None, 5, None)
    users, items = Parts(folder / "users"), Parts(folder / "items")
    at = columns(folder / "users", "key")["key"].index(key_of("u3"))
    scores = np.concatenate(list(items.vectors("next"))) @ users.vectors_at(np.array([at]), "next")[0] / 0.07
    order = np.argsort(-scores)[:5]
    names = columns(folder / "items", "id", "title")
    assert [item["id"] for item in found["items"]] == [names["id"][i] for i in order]
    assert [item["title"] for item in found["items"]] == [names["title"][i] for i in order]
    assert [item["score"] for item in found["items"]] == pytest.approx(scores[order].tolist(), rel=1e-4)
    assert found["exact"] and found["milliseconds"] > 0 and [i["rank"] for i in found["items"]] == [1, 2, 3, 4, 5]
    # The export answers without the run, and with no more items than there are.
    assert len(search(folder, "u3", None, 99, "next")["items"]) == NUM_ITEMS
    # What codes lose is made good by the vectors.
    assert read_manifest(alone).tasks["next"].index["kind"] == "pq"
    again = search(alone, "u3", None, 5, None)
    assert [i["score"] for i in again["items"]] == pytest.approx([i["score"] for i in found["items"]], rel=1e-4)


def test_profiles_of_all_users_are_what_one_is_told(sequences, exported, tmp_path):
    found = told("profile", sequences, "--out", tmp_path / "all", "--k", "4", "--nproc-per-node", "2")
    assert found["users"] == NUM_USERS
    table = columns(tmp_path / "all", "key", "items:next", "scores:next")
    one = profile(sequences, "u7", 4)["tasks"]["next"]["items"]
    at = table["key"].index(key_of("u7"))
    assert len(table["key"]) == NUM_USERS and table["items:next"][at] == [item["id"] for item in one]
    assert table["scores:next"][at] == pytest.approx([item["score"] for item in one], rel=1e-4)
    with pytest.raises(UserError, match="is there already"):
        profile_all(sequences, tmp_path / "all", 4)


def test_what_cannot_be_answered_is_refused(sequences, exported, tmp_path):
    folder, changed = exported[0], tmp_path / "changed"
    assert f"no user 'nobody' among the {NUM_USERS} of " in refused("search", sequences, "--user", "nobody")
    assert "say whom to search for" in refused("search", sequences)
    assert "reads history, history_text, and no query" in refused("search", sequences, "--query", "red")

    def refusal(place: Path, task: str | None = None) -> str:
        with pytest.raises(UserError) as caught:
            search(place, "u3", None, 5, task)
        return str(caught.value)

    assert "--task buy is not known" in refusal(sequences, "buy")
    assert "no export at" in refusal(tmp_path)
    shutil.copytree(folder, changed)
    tree = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(tree | {"checkpoint": "0" * 64}))
    assert "does not belong to the checkpoint of" in refusal(changed)
    (changed / "manifest.json").write_text(json.dumps(tree | {"users": None}))
    assert "has no users: export with --users" in refusal(changed)
    (changed / "manifest.json").write_text(json.dumps(tree))
    index = changed / "index" / "0.faiss"
    index.write_bytes(index.read_bytes()[:-4] + b"\0\0\0\0")
    assert "is not the index that manifest.json describes" in refusal(changed)
    index.write_bytes(b"short")
    assert "of another size than manifest.json says" in refusal(changed)


def test_data_that_cannot_be_exported_is_refused(sequences, tmp_path):
    other, out = build_small(tmp_path), tmp_path / "x"
    said = refused("export", sequences, "--items", other, "--out", out, "--nproc-per-node", "2")
    assert "its schema or vocabularies are not those of the run's data" in said and not out.exists()
    keys = {"data.catalogue": "null", "model.loss": "in_batch", "model.item": "text"}
    config = load_config(sequences / "config.yaml", keys)
    with pytest.raises(UserError, match="names no data.catalogue"):
        export(config, sequences, Wishes(out))
    config = load_config(sequences / "config.yaml", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is there already and is no export"):
        export(config, sequences, Wishes(tmp_path / "full"))


def test_a_catalogue_without_items_is_refused(sequences, tmp_path):
    data = sequences.parent.parent / "shards"
    vocabulary = data / "vocabulary"
    rows = [row for row in sequence_rows(20) if row["split"] == "train"]
    items = [
        {"domain": "books", "item_id": None, "title": "nobody knows"},
        {"domain": "films", "item_id": "never seen"},
    ]
    empty = build_sequences(tmp_path / "empty", rows, items, vocabulary=str(vocabulary))
    said = refused("export", sequences, "--items", f"{empty}/catalogue", "--out", tmp_path / "x")
    assert "the catalogue" in said and "is empty: none of its 2 rows has an id of 'item_id'" in said


def test_an_experts_model_is_exported_as_an_approximation_only(toy_run, tmp_path):
    data = yaml.safe_load((toy_run / "config.yaml").read_text())["data"]["train"]
    out, items = tmp_path / "out", ["--items", data, "--users", data]
    said = refused("export", toy_run, *items, "--out", out)
    assert "text: the experts look at user, query and item together" in said and "--approximate" in said
    found = told("export", toy_run, *items, "--out", out, "--approximate", "--nproc-per-node", "2")
    task = found["tasks"]["text"]
    assert not task["exact"] and task["scores"]["max_score_error"] is None
    assert set(task["scores"]["rank_correlation"]) == {"ctr", "relevance"}
    assert found["users"]["key"] == "query" and found["users"]["count"] == 5
    assert set(columns(out / "users", "id")["id"]) == {f"find thing {i}" for i in range(5)}
    # A query that is an item's text, and one that the store has no vector of.
    known, new = (told("search", out, "--query", text, "--k", "3") for text in ("thing number 3", "entirely new words"))
    assert not known["exact"] and "experts" in known["why"] and len(known["items"]) == 3
    assert known["items"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert known["items"][0]["title"] == "thing number 3"
    assert -1 <= new["items"][-1]["score"] <= new["items"][0]["score"] <= 1


def test_what_has_no_graph_is_no_bundle(sequences, toy_run, tmp_path):
    said = refused("export", sequences, "--bundle", tmp_path / "b")
    assert "cannot be exported as a bundle: its events are packed" in said and not (tmp_path / "b").exists()
    assert "leave --nproc-per-node out" in refused(
        "export", toy_run, "--bundle", tmp_path / "b", "--nproc-per-node", "2"
    )


def test_experts_of_domains_are_a_bundle(toy_run, tmp_path):
    found = told("export", toy_run, "--bundle", tmp_path / "b", "--precision", "fp32")
    assert set(found["scores"]["tasks"]) == {"ctr", "relevance"} and found["scores"]["rows"] > 50
    assert all(task["max_relative_error"] < 1e-6 for task in found["scores"]["tasks"].values())


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    """An mvke run of two ranks and two tasks; its data below shards/."""
    folder = tmp_path_factory.mktemp("kernels")
    data = build_small(folder, {"big": 500, "middle": 400, "tiny": 20}, split="random:4,1,1")
    tree = {
        "run": {"root": str(folder / "runs"), "name": "mvke", "seed": 5},
        "data": {split: f"{data}/{split}" for split in ("train", "valid", "test")}
        | {"batch_size": 40, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8},
        "model": {"kind": "mvke", "width": 8, "history": {"kind": "mean"}, "user": {"hidden": [8]}},
        "dense": {"learning_rate": 0.02},
        "train": {"epochs": 2, "device": "cpu"},
    }
    (folder / "mvke.yaml").write_text(yaml.safe_dump(tree))
    dist_rec("train", folder / "mvke.yaml", "--nproc-per-node", "2")
    return folder / "runs" / "mvke"


def of_kernels(run: Path, out: Path, *options: str) -> dict:
    data = run.parent.parent / "shards"
    return told("export", run, "--items", data / "train", "--users", data / "train", "--out", out, *options)


@pytest.fixture(scope="module")
def concatenated(kernels, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("concatenated") / "export"
    judged = ["--judge", str(kernels.parent.parent / "shards" / "test"), "--k", "5"]
    return out, of_kernels(kernels, out, "--nproc-per-node", "2", *judged)


def test_concatenated_kernels_make_the_score_of_every_task(concatenated):
    out, found = concatenated
    assert set(found["tasks"]) == {"ctr", "relevance"} and found["users"]["count"] == 40
    for about in found["tasks"].values():
        # Two shared kernels and one of its own.
        assert about["exact"] and about["width"] == 3 * 8 and about["compact"] is None
        assert about["scores"]["pairs"] == 1000 and about["scores"]["max_relative_error"] < 1e-6
        assert about["answers"]["recall_at_5"] == 1.0
        judged = about["quality"]
        assert judged["users"] > 5 and judged["positives"] >= judged["users"] and judged["strangers"] > 0
        assert judged["index"] == judged["exact"] and 0 < judged["popularity"]["recall_at_5"] < 1
    assert found["tasks"]["ctr"]["quality"] != found["tasks"]["relevance"]["quality"]
    assert len(profile(out, "u7", 4)["tasks"]["relevance"]["items"]) == 4


def answers(out: Path, task: str) -> list[tuple[str, float]]:
    return [(i["id"], i["score"]) for i in search(out, "u7", None, 6, task)["items"]]


def test_compact_form_answers_the_same_and_is_smaller(kernels, concatenated, tmp_path):
    found = of_kernels(kernels, tmp_path / "compact", "--compact")
    for task, about in found["tasks"].items():
        whole = concatenated[1]["tasks"][task]
        assert about["exact"] and about["scores"]["max_relative_error"] < 1e-6
        assert about["compact"] == {"kernels": 3, "width": 8, "concatenated_bytes": 30 * 3 * 8 * 4}
        assert about["bytes"] < whole["bytes"] and about["answers"]["recall_at_50"] == 1.0
        mine, theirs = answers(tmp_path / "compact", task), answers(concatenated[0], task)
        assert [name for name, _ in mine] == [name for name, _ in theirs]
        assert [score for _, score in mine] == pytest.approx([score for _, score in theirs], abs=1e-5)
    names = pq.ParquetFile(next((tmp_path / "compact" / "items").glob("*.parquet"))).schema_arrow.names
    assert {"tag:ctr", "weights:ctr"} <= set(names) and "vector:ctr" not in names


def test_an_arg_max_gate_has_an_index_for_every_kernel(kernels, tmp_path):
    gate = ["--model.gate.kind", "argmax"]
    whole = of_kernels(kernels, tmp_path / "whole", *gate)
    found = of_kernels(kernels, tmp_path / "compact", "--compact", "--index", "hnsw", *gate)
    for task, about in found["tasks"].items():
        assert about["exact"] and about["scores"]["max_relative_error"] < 1e-6
        assert sum(about["compact"]["items"]) == 30 and whole["tasks"][task]["exact"]
        for mine, theirs in zip(answers(tmp_path / "compact", task), answers(tmp_path / "whole", task), strict=True):
            assert mine[1] == pytest.approx(theirs[1], abs=1e-5)


def test_compact_form_is_of_virtual_kernels(sequences, kernels, tmp_path):
    assert "--compact is of virtual kernels" in refused("export", sequences, "--compact", "--out", tmp_path / "x")
    data = kernels.parent.parent / "shards" / "train"
    some = ["--items", data, "--out", tmp_path / "x"]
    assert "a softmax gate weighs every kernel" in refused("export", kernels, "--compact", "--index", "ivf", *some)
    said = refused("export", kernels, "--judge", data, "--users", "none", *some)
    assert "--judge compares what users are answered" in said and not (tmp_path / "x").exists()


def test_an_invented_run_is_measured(tmp_path):
    sizes = ["--items", "2000", "--users", "300", "--queries", "50", "--folder", tmp_path]
    found = told("bench", "export", *sizes, "--nproc-per-node", "1")
    assert found["invented"] and (found["items"], found["users"], found["ranks"]) == (2000, 300, 1)
    assert found["max_relative_error"] < 1e-5 and set(found["indexes"]) == {"flat", "ivf", "hnsw", "pq"}
    assert found["recall_at_50"] >= 0.95 and found["vectors_per_s"] > 0 and not list(tmp_path.iterdir())
