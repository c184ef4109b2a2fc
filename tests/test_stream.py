"""Batches hold what the raw rows say, whatever the ranks, windows and streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import build_small
from test_order import Case
from tokenizers import Tokenizer
from toy_shards import TOKENIZER, schema, values

from dist_rec.data.batch import make_batch
from dist_rec.data.blocks import text_key
from dist_rec.data.index import read_index
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.rows import Ragged, Rows
from dist_rec.data.stream import Stream
from dist_rec.data.textpool import TextPool
from dist_rec.data.window import Window, cut
from dist_rec.schema import Schema
from dist_rec.text.paths import tokenizer_file

IDS, TEXTS = ("user_id", "history", "item_id", "tags"), ("query", "title")


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory) -> str:
    """The small data set with token ids; its raw rows lie beside it."""
    return build_small(tmp_path_factory.mktemp("tokenised"), tokenizer=TOKENIZER)


def open_stream(
    root: str,
    *,
    batch_size=48,
    window=64,
    arrangement="shuffled",
    seed=1,
    rank=0,
    world_size=1,
    with_tokens=False,
    **options,
):
    index = read_index(root)
    order = Order(index, streams=8, batch_size=batch_size, window=window, arrangement=arrangement, seed=seed)
    reader = ShardReader(root, index, list(index.schema.features), with_tokens)
    return Stream(reader, order, rank=rank, world_size=world_size, **options)


def raw_rows(root: str) -> list[dict]:
    """The raw rows in the data set's order: by domain, within a domain as they came."""
    rows = pq.read_table(Path(root).parent / "raw.parquet").to_pylist()
    names = read_index(root).schema.domains.names
    return sorted(rows, key=lambda row: names.index(row["domain"]))


def jagged(values: np.ndarray, lengths: np.ndarray) -> list[list]:
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_hold_what_the_raw_rows_say(tokenised, world_size):
    raw, index = raw_rows(tokenised), read_index(tokenised)
    vocabulary = {name: values(Path(tokenised), name) for name in ("user_id", "item_id", "tags")}
    vocabulary["history"] = vocabulary["item_id"]
    known = sorted({row[name] for row in raw for name in TEXTS if row[name] is not None})
    number_of = {text_key(text): i for i, text in enumerate(known)}
    tokenizer = Tokenizer.from_file(str(tokenizer_file(TOKENIZER)))
    tokenizer.no_padding()

    def vectors(keys: np.ndarray, tokens: Ragged | None) -> np.ndarray:
        """As vector of a text, its number among the known ones."""
        assert len(set(keys.tolist())) == len(keys) == len(tokens)
        return np.array([number_of[key] for key in keys.tolist()], np.float32).reshape(-1, 1)

    masked = seen = 0
    keys = {"user": {}, "query": {}}
    for rank in range(world_size):
        stream = open_stream(tokenised, rank=rank, world_size=world_size, with_tokens=True, vectors=vectors)
        for batch in stream.batches(epoch=0):
            ids = batch.ids.to_dict()
            assert tuple(batch.ids.keys()) == IDS and batch.ids.stride() == len(batch) == stream.batch_rows
            lists = {name: jagged(ids[name].values().numpy(), ids[name].lengths().numpy()) for name in IDS}
            texts = {name: jagged(batch.text_index[name].numpy(), batch.text_lengths[name].numpy()) for name in TEXTS}
            distinct = [known[int(i)] for i in batch.text_vectors[:, 0]]
            used = {i for name in TEXTS for uses in texts[name] for i in uses}
            assert used == set(range(len(distinct)))
            for text, tokens, mask in zip(distinct, batch.text_tokens, batch.text_mask, strict=True):
                assert tokens[mask].tolist() == tokenizer.encode(text).ids and not tokens[~mask].any()
            for i, number in enumerate(batch.row.tolist()):
                if number < 0:
                    masked += 1
                    assert not batch.valid[i] and batch.domain[i] == 0 and batch.user[i] == batch.query[i] == -1
                    assert not any(lists[name][i] for name in IDS) and not any(texts[name][i] for name in TEXTS)
                    assert batch.dense["age"][i].isnan().all()
                    assert not any(batch.label_valid[name][i] or batch.labels[name][i] for name in batch.labels)
                    continue
                row, seen = raw[number], seen + 1
                assert batch.valid[i] and index.schema.domains.names[batch.domain[i]] == row["domain"]
                for name in IDS:
                    wanted = row[name] if isinstance(row[name], list) else [v for v in [row[name]] if v is not None]
                    assert [vocabulary[name][v] for v in lists[name][i]] == (wanted or [])
                for name in TEXTS:
                    assert [distinct[t] for t in texts[name][i]] == [t for t in [row[name]] if t is not None]
                age = batch.dense["age"][i]
                assert age.isnan().all() if row["age"] is None else age.tolist() == [row["age"]]
                for name in ("ctr", "relevance"):
                    assert batch.label_valid[name][i] == (row[name] is not None)
                    assert batch.labels[name][i] == (row[name] or 0)
                for key, column in (("user", "user_id"), ("query", "query")):
                    found = int(getattr(batch, key)[i])
                    assert (found == -1) == (row[column] is None)
                    assert keys[key].setdefault(found, row[column]) == row[column]
    assert seen == len(raw) and masked == stream.steps * stream.batch_rows * world_size - seen > 0
    for found in keys.values():
        assert len(set(found.values())) == len(found) > 4


def test_a_batch_without_texts_still_offers_one_to_the_language_model(tokenised):
    stream = open_stream(tokenised, with_tokens=True)
    empty = stream.batch(0, stream.steps)
    assert len(empty) == stream.batch_rows and not empty.valid.any()
    assert empty.text_tokens.shape == (1, 1) and empty.text_mask.all()
    without = open_stream(tokenised).batch(0, 0)
    assert without.text_tokens.shape[1] == without.text_vectors.shape[1] == 0 and len(without.text_tokens) > 5


def invented_rows(draw: np.random.Generator, n: int, first: int) -> Rows:
    """Rows with every kind of column; tokens of a text are a function of its key."""
    keys = np.sort(draw.choice(30, draw.integers(1, 9), replace=False).astype(np.int64))

    def lists(values, most):
        lengths = draw.integers(0, most, n)
        return Ragged.from_lengths(draw.integers(0, values, lengths.sum()), lengths)

    return Rows(
        domain=draw.integers(0, 3, n),
        row=np.arange(first, first + n),
        ids={"a": lists(50, 4), "b": lists(9, 2)},
        dense={"d": draw.random((n, 2), np.float32)},
        texts={"t": lists(len(keys), 2), "u": lists(len(keys), 4)},
        text_keys=keys,
        tokens=Ragged.from_lengths(np.concatenate([np.full(k % 4, k, np.int32) for k in keys]), keys % 4),
        labels={"l": draw.random(n).astype(np.float32)},
        keys={"user": draw.integers(0, 5, n)},
    )


def plain(rows: Rows) -> list[dict]:
    """Rows as Python values, a text as its key and tokens."""

    def entry(ragged: Ragged, i: int) -> list:
        return ragged.values[ragged.offsets[i] : ragged.offsets[i + 1]].tolist()

    texts = [(int(key), entry(rows.tokens, t)) for t, key in enumerate(rows.text_keys)]
    return [
        {
            "domain": int(rows.domain[i]),
            "row": int(rows.row[i]),
            "dense": rows.dense["d"][i].tolist(),
            "label": float(rows.labels["l"][i]),
            "user": int(rows.keys["user"][i]),
            **{name: entry(column, i) for name, column in rows.ids.items()},
            **{name: [texts[t] for t in entry(column, i)] for name, column in rows.texts.items()},
        }
        for i in range(len(rows))
    ]


ROWS_SCHEMA = schema(
    {
        "a": {"role": "item", "kind": "ids"},
        "b": {"role": "item", "kind": "id"},
        "d": {"role": "item", "kind": "dense", "width": 2},
        "t": {"role": "item", "kind": "text"},
        "u": {"role": "history", "kind": "texts"},
    },
    keys={"user": "b"},
)


def test_rows_move_as_lists_do():
    draw = np.random.default_rng(0)
    for _ in range(50):
        parts = [invented_rows(draw, int(draw.integers(0, 7)), 10 * i) for i in range(draw.integers(1, 5))]
        whole = [row for part in parts for row in plain(part)]
        rows = Rows.concat(parts)
        assert plain(rows) == whole
        start, stop = sorted(draw.integers(0, len(whole) + 1, 2))
        assert plain(rows.slice(start, stop)) == whole[start:stop]
        # A slice of a slice, taken, and joined again: offsets must hold in every combination.
        chosen = draw.integers(0, stop - start, 5 if stop > start else 0)
        taken = rows.slice(start, stop).take(chosen)
        assert plain(taken) == [whole[start:stop][i] for i in chosen]
        joined = Rows.concat([taken, rows.slice(0, start)])
        assert plain(joined) == [whole[start:stop][i] for i in chosen] + whole[:start]


@pytest.mark.parametrize("most_rows", [7, 60])
def test_a_batch_is_cut_from_windows_with_each_text_once(most_rows):
    """Whether rows use few of the texts that are held or most; however windows come, go and grow."""
    draw = np.random.default_rng(1)
    pool = TextPool([0, 1, 0, 1])
    held = {}
    for _ in range(60):
        segment = int(draw.integers(4))
        parts = [invented_rows(draw, int(draw.integers(0, most_rows)), 10 * i) for i in range(draw.integers(1, 5))]
        whole = [row for part in parts for row in plain(part)]
        arrangement = draw.permutation(len(whole))
        window = Window(parts, arrangement, ROWS_SCHEMA, pool, segment)
        held[segment] = window, [whole[i] for i in arrangement]
        slices, expected = [], []
        for window, whole in held.values():
            start, stop = sorted(draw.integers(0, len(whole) + 1, 2))
            slices.append((window, start, stop))
            expected += whole[start:stop]
        rows = cut(slices, pool)
        assert plain(rows) == expected
        assert list(rows.ids) == ["a", "b"] and list(rows.texts) == ["t", "u"]
        used = {key for row in expected for name in ("t", "u") for key, _ in row[name]}
        assert rows.text_keys.tolist() == sorted(used)


def in_window(parts: list[Rows], schema: Schema) -> Rows:
    """All rows of `parts` through a window."""
    n, pool = sum(map(len, parts)), TextPool([0])
    return cut([(Window(parts, np.arange(n), schema, pool, 0), 0, n)], pool)


def test_void_rows_hold_their_places_and_are_masked(tokenised):
    """A batch with void rows is the batch without them, its other rows where they were."""
    index = read_index(tokenised)
    features = list(index.schema.features)
    blocks = ShardReader(tokenised, index, features, with_tokens=True)
    first, last = blocks.rows(0), blocks.rows(len(blocks.places) - 1)
    void = Rows.void(index.schema, features, True, domain=2, n=9)
    assert {c.values.dtype for c in void.ids.values()} <= {c.values.dtype for c in first.ids.values()}
    whole = Rows.concat([first.slice(3, 20), void, last]).take(np.arange(17 + 9 + len(last))[::-1])
    held = make_batch(in_window([whole], index.schema), index.schema, 48)
    known = held.row >= 0
    assert held.valid.equal(known) and int(known.sum()) == 17 + len(last)
    assert not held.domain[~known].any() and (held.user[~known] == -1).all() and (held.query[~known] == -1).all()
    assert all(v[~known].isnan().all() for v in held.dense.values())
    assert not any(v[~known].any() for v in (*held.labels.values(), *held.label_valid.values()))
    assert not held.ids.lengths().view(-1, 48)[:, ~known].any()
    assert not any(lengths[~known].any() for lengths in held.text_lengths.values())
    lone = Rows.concat([first.slice(3, 20), last]).take(np.arange(17 + len(last))[::-1])
    lone = make_batch(in_window([lone], index.schema), index.schema, 48)
    assert held.ids.values().equal(lone.ids.values()) and held.row[known].equal(lone.row[lone.valid])
    only = make_batch(in_window([void.slice(2, 5), void], index.schema), index.schema, 48)
    assert not only.valid.any() and only.text_tokens.shape == (1, 1)


def test_skipping_ahead_reads_no_block_before_its_place():
    """Late in a big epoch, a batch costs the blocks of the windows that it lies in, as at the beginning."""
    case = Case(((100,) * 2000, (100,) * 500, (70,) * 40), streams=8, per_stream=16, window=4096)
    blocks, read = sum(map(len, case.blocks)), []
    for share in (0.0, 0.9):
        stream = case.rank()
        numbers, rows = [], stream.reader.rows
        stream.reader.rows = lambda number, numbers=numbers, rows=rows: numbers.append(number) or rows(number)
        stream.batch(0, int(share * stream.steps))
        read.append(len(numbers))
    window = read[0]
    assert 8 * (4096 // 8) // 100 <= window < blocks / 20 and abs(read[1] - window) <= window


@pytest.mark.parametrize("streams", [1, 8])
def test_a_block_that_windows_share_is_decoded_once(streams):
    case = Case(((100,) * 30, (100,) * 12, (70,)), streams=streams, per_stream=16, window=streams * 250)
    stream = case.rank()
    numbers, rows = [], stream.reader.rows
    stream.reader.rows = lambda number: numbers.append(number) or rows(number)
    for step in range(stream.steps):
        stream.batch(0, step)
    # Streams that meet in a block do so at different times, and a domain begins and ends inside a block.
    apart = streams * len(case.blocks)
    assert set(numbers) == set(range(43)) and len(numbers) <= 43 + apart
