"""Scoring bundles: a raw row's score without the training system is the run's own, whatever its columns are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import run_command

from dist_rec.data.build import build
from dist_rec.data.index import read_index
from dist_rec.data.reader import ShardReader
from dist_rec.retrieval.bundle import columns_of
from dist_rec.retrieval.names import RawIds
from dist_rec.retrieval.rows import RowSource, with_distinct_texts
from dist_rec.schema import Schema
from dist_rec.scoring.bundle import Bundle, BundleError
from dist_rec.scoring.hashes import text_key
from dist_rec.scoring.raw import RowError
from dist_rec.strict import from_dict
from dist_rec.text.embed import embed

SECONDS = 240
ROOT = Path(__file__).parent.parent
# Every kind of vocabulary and of column that a model of users and items reads.
SCHEMA = {
    "name": "everything",
    "domains": {"column": "shop", "names": ["books", "films"]},
    "features": {
        "user": {"role": "user", "kind": "id", "column": "user_name", "vocabulary": {"kind": "raw"}},
        "city": {"role": "user", "kind": "id", "vocabulary": {"kind": "hash", "size": 11}},
        "age": {"role": "user", "kind": "dense"},
        "taste": {"role": "user", "kind": "dense", "width": 3, "separator": ";"},
        "history": {
            "role": "history",
            "kind": "ids",
            "shares": "item",
            "max_length": 4,
            "events": {"of": "item", "label": "like"},
        },
        "history_text": {
            "role": "history",
            "kind": "texts",
            "max_length": 4,
            "events": {"of": "title", "label": "like"},
        },
        "query": {"role": "query", "kind": "text"},
        "item": {"role": "item", "kind": "id", "aspect": "id"},
        "genres": {"role": "item", "kind": "ids", "separator": "|", "max_length": 3},
        "shelf": {"role": "item", "kind": "id", "vocabulary": {"kind": "integer", "size": 9}},
        "ean": {"role": "item", "kind": "id", "vocabulary": {"kind": "raw"}},
        "title": {"role": "item", "kind": "text"},
    },
    "labels": {"like": {}, "love": {}},
    "keys": {"user": "user_name", "time": "time"},
}
USER = ("user_name", "city", "age", "taste", "history", "history_text")
PREFIXES = {"item": "film: "}
MOST_TOKENS = 12


def raw_rows(count: int, items: int, seed: int) -> list[dict]:
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        user, item = int(draw.integers(0, 20)), int(draw.integers(0, items))
        like = float((user * 7 + item * 3) % 5 < 3)
        row = {
            "shop": ("books", "films")[int(draw.integers(0, 2))],
            # "007" is no number, and 7 is its own.
            "user_name": f"00{user}" if user % 3 else str(user),
            "city": f"town {user % 6}",
            "age": float(user),
            "taste": f"{user / 7};-1.5;{item}",
            "item": f"i{item}",
            "genres": "|".join(f" g{g} " for g in range(item % 6)),
            "shelf": str(item % 9),
            "ean": str(10**12 + item) if item % 2 else f"x{item}",
            "title": f"thing number {item}",
            "like": like,
            "love": float(like and item % 2),
            "time": number,
        }
        nullable = ("user_name", "city", "age", "taste", "item", "genres", "shelf", "ean", "title")
        rows.append(row | {name: None for name in nullable if draw.random() < 0.1})
    return rows


def write(rows: list[dict], path: Path) -> str:
    kinds = dict.fromkeys(("age", "like", "love"), pa.float32()) | {"time": pa.int64()}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([(n, kinds.get(n, pa.string())) for n in rows[0]])), path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    """Data in train/ and, with ids and texts that train has not, in test/; vectors of the texts in store/; a config."""
    folder = tmp_path_factory.mktemp("bundle")
    schema = from_dict(Schema, SCHEMA | {"features": SCHEMA["features"]}, "everything")
    options = {
        "tokenizer": tiny_model,
        "max_tokens": MOST_TOKENS,
        "prefixes": PREFIXES,
        "workers": 1,
        "block_rows": 64,
        "shard_rows": 128,
    }
    train = [row | {"query": None} for row in raw_rows(400, 25, 0)]
    test = [row | {"query": "a thing"} for row in raw_rows(90, 40, 1)]
    build(schema, [write(train, folder / "train.parquet")], str(folder / "train"), **options)
    vocabulary = str(folder / "train" / "vocabulary")
    test_file = write(test, folder / "test.parquet")
    build(schema, [test_file], str(folder / "test"), vocabulary=vocabulary, **options)
    embed([str(folder / "train")], tiny_model, str(folder / "store"), max_tokens=MOST_TOKENS, store_dtype="float32")
    tree = {
        "run": {"root": str(folder / "runs"), "name": "mvke", "seed": 3},
        "data": {split: str(folder / split) for split in ("train", "test")}
        | {"batch_size": 32, "streams": 8, "shuffle_window": 64},
        "tables": {"dim": 8, "overrides": {"user": {"managed": 16}, "ean": {"hash": 31}, "genres": {"dim": 12}}},
        "text": {"mode": "frozen", "store": str(folder / "store"), "missing": "encode", "model": tiny_model},
        "model": {"kind": "mvke", "width": 8, "history": {"use_text": True, "dropout": 0.0, "max_length": 3}},
        "dense": {"learning_rate": 0.02},
        "train": {"epochs": 2, "device": "cpu"},
    }
    (folder / "mvke.yaml").write_text(yaml.safe_dump(tree))
    return folder


def dist_rec(*arguments, code: int = 0):
    done = run_command([sys.executable, "-m", "dist_rec", *map(str, arguments)], SECONDS)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def run(folder) -> Path:
    dist_rec("train", folder / "mvke.yaml", "--nproc-per-node", "2")
    return folder / "runs" / "mvke"


@pytest.fixture(scope="module")
def bundles(folder, run) -> dict[str, dict]:
    """Manifests by precision; the folders are called like those."""
    made = [dist_rec("export", run, "--bundle", folder / p, "--precision", p, "--json") for p in ("fp32", "int8")]
    return {p: json.loads(done.stdout.splitlines()[-1]) for p, done in zip(("fp32", "int8"), made, strict=True)}


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    """The raw rows of test/ in its order, with the histories that its builder collected."""
    root, index = str(folder / "test"), read_index(str(folder / "test"))
    raw = sorted(pq.read_table(folder / "test.parquet").to_pylist(), key=lambda row: row["shop"])
    decoded = RowSource(ShardReader(root, index, ["history", "history_text"])).take(np.arange(index.rows))[0]
    lists = {"history": decoded.ids["history"], "history_text": decoded.texts["history_text"]}
    names = RawIds(root, index.schema, "item", folder / "train" / "vocabulary")
    values = {"history": names(lists["history"].values.astype(np.int64)).to_pylist()}
    # A text that is missing beside an id is the empty one.
    texts = {key: text for text, key in text_keys(folder).items()}
    values["history_text"] = [texts[k] for k in decoded.text_keys[lists["history_text"].values].tolist()]
    for name, of in lists.items():
        for row, start, stop in zip(raw, of.offsets[:-1], of.offsets[1:], strict=True):
            row[name] = values[name][start:stop]
    return raw


def text_keys(folder: Path) -> dict[str | None, int]:
    titles = {row["title"] for row in pq.read_table(folder / "test.parquet").to_pylist()} - {None}
    return {title: text_key(PREFIXES["item"] + title) for title in titles} | {None: text_key("")}


def test_raw_rows_are_read_as_the_builder_reads_them(folder, bundles, rows):
    bundle = Bundle(folder / "fp32")
    root, index = str(folder / "test"), read_index(str(folder / "test"))
    features = list(bundle.features)
    reader = ShardReader(root, index, features)
    wanted = columns_of(with_distinct_texts(RowSource(reader).take(np.arange(index.rows))[0]))
    found = bundle.raw(rows, features)
    np.testing.assert_array_equal(found.domain, wanted.domain)
    np.testing.assert_array_equal(found.text_keys, wanted.text_keys)
    assert set(found.ids) == {"user", "city", "history", "item", "genres", "shelf", "ean"}
    for mine, theirs in ((found.ids, wanted.ids), (found.texts, wanted.texts)):
        for name, lists in mine.items():
            np.testing.assert_array_equal(lists.lengths, theirs[name].lengths, name)
            np.testing.assert_array_equal(lists.values, theirs[name].values, name)
    for name, values in found.dense.items():
        np.testing.assert_allclose(values, wanted.dense[name], rtol=1e-7, err_msg=name)
    # Some ids are not in the vocabulary, some texts are empty.
    assert (found.ids["item"].values == 0).any() and (found.ids["history"].values == 0).any()
    assert bundles["fp32"]["tables"]["user"]["ids"] == "managed" and bundles["fp32"]["tables"]["ean"]["ids"] == "hash"


ALONE = """
import json, sys
from pathlib import Path

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchrec", "deepspeed", "dist_rec", "pyarrow", "duckdb", "pydantic", "transformers"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Nothing())
folder, given, out, columns = sys.argv[1:]
sys.path.insert(0, folder)
from scoring.bundle import Bundle

assert Path(sys.modules["scoring.bundle"].__file__).parent.parent == Path(folder)
bundle, rows = Bundle(folder), json.loads(Path(given).read_text())
found = bundle.score(rows)
ones = [bundle.score([row]) for row in rows[:5]]
users = [{name: row[name] for name in columns.split()} for row in rows]
sides = {"users": bundle.users(users), "items": bundle.items(rows)}
told = {"score": found, "none": bundle.score([]), **sides}
told = {what: {task: of.tolist() for task, of in by.items()} for what, by in told.items()}
told["ones"] = [{task: of.item() for task, of in one.items()} for one in ones]
Path(out).write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def own(folder, run) -> list[dict[str, float]]:
    worker = [sys.executable, str(ROOT / "tests" / "bundle_worker.py"), str(run), "test", str(folder / "own.json")]
    done = run_command(worker, SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "own.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_scores_without_the_training_system_are_the_runs(folder, bundles, rows, own, precision, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    columns = " ".join([*USER, "shop"])
    command = [sys.executable, "-c", ALONE, *map(str, (folder / precision, tmp_path / "rows.json", tmp_path / "out"))]
    done = run_command(["env", "-u", "PYTHONPATH", *command, columns], SECONDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, scores = json.loads((tmp_path / "out").read_text()), bundles[precision]["scores"]
    assert (scores["data"], scores["rows"]) == ("data.test", len(rows)) and set(found["score"]) == {"like", "love"}
    for task, mine in found["score"].items():
        wanted = np.array([row[task] for row in own])
        error, told = np.abs(np.array(mine) - wanted), scores["tasks"][task]
        if precision == "fp32":
            assert (error <= 1e-5 * np.abs(wanted).max()).all() and told["max_relative_error"] <= 1e-6
        else:
            assert 1e-6 < error.max() <= 1.01 * told["max_score_error"] < 0.1
        assert wanted.std() > 0.01 and found["none"][task] == []
        np.testing.assert_allclose([one[task] for one in found["ones"]], mine[:5], rtol=1e-5, atol=1e-6)
        # The two sides make the score.
        about = bundles[precision]["towers"][task]
        products = (np.array(found["users"][task]) * np.array(found["items"][task])).sum(1)
        np.testing.assert_allclose(about["scale"] * products + about["bias"], mine, rtol=1e-4, atol=1e-5)


def test_tables_are_quantised_and_there_once(folder, bundles):
    for precision, bits in (("int8", 8), ("fp32", 32)):
        program = torch.export.load(folder / precision / "programs" / "tables.pt2")
        tables = bundles[precision]["tables"].values()
        # A row of int8 has its scale and offset beside it, and begins at a multiple of 16 bytes.
        row = [-(-(t["dim"] * bits // 8 + (4 if bits == 8 else 0)) // 16) * 16 for t in tables]
        wanted = sum(t["rows"] * size for t, size in zip(tables, row, strict=True))
        held = [x for x in [*program.state_dict.values(), *program.constants.values()] if isinstance(x, torch.Tensor)]
        assert wanted <= sum(x.nbytes for x in held if x.dtype == torch.uint8) < 1.5 * wanted
        assert sum(x.nbytes for x in held if x.dtype.is_floating_point) < 64


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"colour": "red"}, "row 1 has 'colour', which the schema does not know"),
        ({"ages": 3}, "'ages', which the schema does not know. Did you mean 'age'?"),
        ({"age": "old"}, "row 1: 'age' is 'old', which is neither a number nor a list of numbers"),
        ({"age": [1.0, 2.0]}, "row 1: 'age' has 2 values, its width is 1"),
        ({"item": ["i1"]}, r"row 1: 'item' is \['i1'\]: a string or a number was expected, or None"),
        ({"history": "i1"}, "row 1: 'history' is no list: give a list, a JSON list, or None"),
        ({"shelf": "12"}, "row 1: 'shelf' is '12', but its integer vocabulary holds 0 .. 8"),
        ({"shop": "toys"}, "row 1: 'shop' is 'toys': it must be one of books, films"),
    ],
)
def test_rows_that_are_none_are_refused(folder, bundles, rows, change, fault):
    with pytest.raises(RowError, match=fault):
        Bundle(folder / "int8").score([rows[0], rows[1] | change])


def test_what_a_bundle_lacks_is_said(folder, bundles, rows, tmp_path):
    bundle = Bundle(folder / "int8")
    with pytest.raises(RowError, match="row 0 lacks 'age', 'history': give None where"):
        bundle.score([{name: value for name, value in rows[0].items() if name not in ("age", "history")}])
    with pytest.raises(BundleError, match="is no bundle: manifest.json cannot be read"):
        Bundle(tmp_path)
    said = dist_rec("export", folder / "runs" / "mvke", "--bundle", folder / "train", code=2).stderr
    assert "is there already and is no bundle" in said
    said = dist_rec(
        "export", folder / "runs" / "mvke", "--bundle", tmp_path / "x", "--precision", "int3", code=2
    ).stderr
    assert "--precision int3 is not known" in said and not (tmp_path / "x").exists()


def test_a_text_without_a_vector_is_encoded_or_refused(folder, bundles, rows):
    without = folder / "without"
    refusing = ["--text.missing", "refuse", "--data.test", "null", "--precision", "fp16"]
    dist_rec("export", folder / "runs" / "mvke", "--bundle", without, *refusing, "--pairs", "20")
    bundle = Bundle(without)
    assert (bundle.manifest["scores"]["data"], bundle.manifest["scores"]["rows"]) == ("data.train", 20)
    with pytest.raises(BundleError, match="1 of .* texts have no vector in .*the first is 'film: never heard of'"):
        bundle.score([rows[0] | {"title": "never heard of"}])
    long = Bundle(folder / "fp32").score([rows[0] | {"title": "never heard of " * n} for n in (0, 1, 30, 60)])["like"]
    # Texts are cut as in training.
    assert long[2] == pytest.approx(long[3], rel=1e-6) and len({round(float(score), 5) for score in long}) == 3


def test_a_trained_language_model_is_in_the_bundle(folder, tiny_model, rows):
    tree = yaml.safe_load((folder / "mvke.yaml").read_text())
    tree["run"]["name"], tree["text"] = "full", {"mode": "full", "model": tiny_model}
    (folder / "full.yaml").write_text(yaml.safe_dump(tree | {"train": {"steps": 3, "device": "cpu"}}))
    dist_rec("train", folder / "full.yaml")
    done = dist_rec("export", folder / "runs" / "full", "--bundle", folder / "full", "--precision", "fp32", "--json")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["texts"]["encoder"] and told["scores"]["rows"] == len(rows)
    assert all(task["max_relative_error"] < 1e-6 for task in told["scores"]["tasks"].values())
    assert not (folder / "full" / "texts" / "keys.npy").exists()
    found = Bundle(folder / "full").score([row | {"title": title} for row, title in zip(rows, "abc", strict=False)])
    assert len(set(found["like"].tolist())) == 3


def test_a_damaged_bundle_is_refused(folder, bundles, tmp_path):
    shutil.copytree(folder / "int8", tmp_path / "changed")
    keys = tmp_path / "changed" / "vocabulary" / "item-keys.npy"
    keys.write_bytes(keys.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match="item-keys.npy is not the file that manifest.json describes"):
        Bundle(tmp_path / "changed")
