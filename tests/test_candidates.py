"""Candidates: every item of the catalogue once over all ranks, or a sample whose weighted sum expects the whole's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sequence_sets import NUM_ITEMS, build_sequences, item_rows, sequence_rows

from dist_rec.config import Config
from dist_rec.data.batch import Batch
from dist_rec.data.blocks import text_key
from dist_rec.data.candidates import CANDIDATES, CANDIDATES_TEXT, Sampled, Whole
from dist_rec.data.catalogue import Catalogue, contents, count_targets, read_catalogue
from dist_rec.data.index import read_index
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.rows import Ragged
from dist_rec.data.stream import Stream
from dist_rec.errors import UserError
from dist_rec.strict import from_dict
from dist_rec.training.kinds import kind_of

FEATURES = ["history", "history_text", "item_id", "title"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return build_sequences(tmp_path_factory.mktemp("candidates"))


def reader_of(root: str, features: list[str]) -> ShardReader:
    return ShardReader(root, read_index(root), features)


def read(data: str) -> Catalogue:
    return read_catalogue(reader_of(f"{data}/catalogue", ["item_id", "title"]), "item_id", "title")


def stream_of(data: str, candidates=None, rank: int = 0, world_size: int = 1, look_up: bool = True) -> Stream:
    """Of the training rows, with vectors that are the texts' keys."""
    reader = reader_of(f"{data}/train", FEATURES)
    order = Order(reader.index, streams=8, batch_size=32, window=64, seed=3)
    tree = {"data": {"train": "x", "catalogue": "y"}, "text": {"mode": "frozen", "store": "s"}}
    tree["model"] = {"kind": "unisrec", "item": "text+id", "loss": "full", "contrast": {"weight": 0}}
    config = from_dict(Config, tree, "test")
    schema, _ = kind_of(config).given(reader.index.schema, config, FEATURES)
    return Stream(
        reader,
        order,
        rank=rank,
        world_size=world_size,
        vectors=lambda keys, tokens: np.stack([keys >> 32, keys & 0xFFFF], 1).astype(np.float32),
        identify=["history", "item_id"],
        look_up=look_up,
        candidates=candidates,
        schema=schema,
    )


def key_of(vectors: torch.Tensor) -> list[tuple[float, float]]:
    return [tuple(v) for v in vectors.tolist()]


def test_the_catalogue_is_read_whole(data):
    found = read(data)
    assert len(found) == NUM_ITEMS == len(set(found.ids.tolist())) and found.without_text == 1
    index = read_index(f"{data}/catalogue")
    assert index.schema == read_index(f"{data}/train").schema
    texts = {text_key(row["title"]) for row in item_rows() if row["title"]}
    assert set(found.text_keys[found.has_text].tolist()) == texts
    assert sorted(np.bincount(found.domain).tolist()) == [15, 15] and sorted(found.row) == list(range(NUM_ITEMS))


@pytest.mark.parametrize(
    ("items", "fault"),
    [
        ([*item_rows(), item_rows()[3]], "has item .* of 'item_id' in rows .* 1 items are there more than once"),
        ([*item_rows(), {"domain": "books", "item_id": None, "title": "x"}], "row .*: 'item_id' is null"),
    ],
)
def test_a_faulty_catalogue_is_refused(tmp_path, items, fault):
    data = build_sequences(tmp_path, sequence_rows(4), items)
    with pytest.raises(UserError, match=fault):
        read(data)


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_together_have_every_item_once(data, world_size):
    catalogue = read(data)
    shares = [Whole(catalogue, rank, world_size)(0, 0) for rank in range(world_size)]
    assert np.concatenate([share.ids for share in shares]).tolist() == catalogue.ids.tolist()
    assert all((share.weight == 1).all() for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def invented(items: int) -> Catalogue:
    numbers = np.arange(items)
    return Catalogue(numbers + 7, numbers, numbers * 0, numbers * 3, numbers % 4 > 0, None)


@pytest.mark.parametrize("odds", [None, 1.0 / (1 + np.arange(40.0))])
def test_a_sample_is_of_its_step_and_expects_the_whole(odds):
    catalogue, samples, steps = invented(40), 12, 4000
    ranks = [Sampled(catalogue, samples, 5, rank, 3, odds) for rank in range(3)]
    value, whole = np.random.default_rng(0).random(40), 0.0
    sums, seen = [], np.zeros(40)
    for step in range(steps):
        shares = [rank(2, step) for rank in ranks]
        items = np.concatenate([share.ids for share in shares]) - 7
        weights = np.concatenate([share.weight for share in shares])
        assert len(set(items.tolist())) == len(items) <= samples
        counts = np.rint(weights * ranks[0].expected[items])
        assert counts.sum() == samples and weights == pytest.approx(counts / ranks[0].expected[items], rel=1e-6)
        seen[items] += counts
        sums.append((weights * value[items]).sum())
    whole = value.sum()
    assert np.mean(sums) == pytest.approx(whole, abs=4 * np.std(sums) / steps**0.5)
    assert seen / steps == pytest.approx(ranks[0].expected, abs=0.04)
    assert ranks[0].expected.sum() == pytest.approx(samples)
    again = Sampled(catalogue, samples, 5, 0, 3, odds)
    assert (again(2, 7).ids == ranks[0](2, 7).ids).all()
    mine = Sampled(catalogue, samples, 5, 0, 1, odds)(2, 7)
    others = [Sampled(catalogue, samples, seed, 0, 1, odds)(*at) for seed, *at in ((6, 2, 7), (5, 3, 7), (5, 2, 8))]
    assert all(set(other.ids) != set(mine.ids) for other in others)


def test_a_sample_of_all_is_the_catalogue():
    share = Sampled(invented(40), 40, 5, 0, 1)(0, 0)
    assert share.ids.tolist() == list(range(7, 47)) and share.weight == pytest.approx(1.0)


def test_what_rows_ask_for_is_counted(data):
    catalogue, reader = read(data), reader_of(f"{data}/train", ["history", "item_id"])
    found = count_targets((reader.rows(n) for n in range(len(reader.places))), "history", "item_id", catalogue)
    asked: list[int] = []
    for number in range(len(reader.places)):
        rows = reader.rows(number)
        histories = np.split(rows.ids["history"].values, rows.ids["history"].offsets[1:-1])
        for history, item in zip(histories, rows.ids["item_id"].values.tolist(), strict=True):
            asked += [*history.tolist(), item][1:]
    assert found.tolist() == [asked.count(i) for i in catalogue.ids.tolist()] and found.sum() > 0
    part = count_targets([reader.rows(0)], "history", "item_id", invented(3))
    assert part.shape == (3,)


def test_the_event_that_two_windows_share_is_counted_once():
    """A sequence 7 8 9 7 10 whole, and cut into windows that overlap by an event; and what no row asks for."""
    whole, cut = [([7, 8, 9, 7], 10)], [([7, 8], 9), ([9, 7], 10)]
    odd = [([], 8), ([], None), ([8], None), ([9], 99)]

    def counts(rows):
        ids = {}
        for name, lists in (("h", [h for h, _ in rows]), ("i", [[i] if i else [] for _, i in rows])):
            values = np.array(sum(lists, []), np.int64)
            ids[name] = Ragged.from_lengths(values, np.array([len(x) for x in lists], np.int64))
        return count_targets([SimpleNamespace(ids=ids)], "h", "i", invented(4)).tolist()

    assert counts(whole) == counts(cut) == [1, 1, 1, 1]
    assert counts(odd) == [0, 0, 0, 0]


def test_a_catalogue_is_known_by_its_items_however_it_is_built(data, tmp_path):
    """Another order and other numbers are the same items; another text, or domain, is not."""
    known = contents(read(data), ["books", "films"])
    turned = [dict(item, item_id=f"other {item['item_id']}") for item in reversed(item_rows())]
    assert contents(read(build_sequences(tmp_path / "turned", sequence_rows(9), turned)), ["books", "films"]) == known
    assert contents(read(data), ["books", "games"]) != known
    other = [dict(item_rows()[0], title="a thing of its own"), *item_rows()[1:]]
    assert contents(read(build_sequences(tmp_path / "other", sequence_rows(9), other)), ["books", "films"]) != known


def rows_of(batch: Batch, name: str) -> list[list[int]]:
    return [x.tolist() for x in batch.identity[name].split(batch.identity_lengths[name].tolist())]


def test_batches_carry_identities_and_candidates(data):
    catalogue = read(data)
    plain, sampled = stream_of(data), stream_of(data, Whole(catalogue, 0, 1))
    for step in range(plain.steps):
        before, batch = plain.batch(0, step), sampled.batch(0, step)
        size = len(batch)
        # The rows are as they are without candidates.
        assert batch.row.tolist() == before.row.tolist()
        for name in ("history", "item_id"):
            assert batch.ids[name].values().tolist() == before.ids[name].values().tolist()
            assert batch.identity[name].tolist() == batch.ids[name].values().tolist()
            assert batch.identity_lengths[name].tolist() == batch.ids[name].lengths().tolist()
            assert (batch.identity_lengths[name][~batch.valid] == 0).all()
        for name in ("history_text", "title"):
            assert batch.text_lengths[name].tolist() == before.text_lengths[name].tolist()
            of = [key_of(b.text_vectors[b.text_index[name]]) for b in (batch, before)]
            assert of[0] == of[1]
        assert before.identity.keys() == {"history", "item_id"} and before.candidate_weight.shape == (0,)
        # All candidates stand on the first row, their texts beside them.
        assert batch.ids[CANDIDATES].lengths().tolist() == [NUM_ITEMS] + [0] * (size - 1)
        assert rows_of(batch, CANDIDATES)[0] == catalogue.ids.tolist() == batch.ids[CANDIDATES].values().tolist()
        assert batch.text_lengths[CANDIDATES_TEXT].tolist() == [NUM_ITEMS] + [0] * (size - 1)
        assert batch.candidate_weight.tolist() == [1.0] * NUM_ITEMS
        index = batch.text_index[CANDIDATES_TEXT]
        assert (index == len(batch.text_vectors)).tolist() == (~catalogue.has_text).tolist()
        known = torch.from_numpy(catalogue.has_text)
        keys = catalogue.text_keys[catalogue.has_text]
        wanted = [(float(np.float32(k >> 32)), float(np.float32(k & 0xFFFF))) for k in keys]
        assert key_of(batch.text_vectors[index[known]]) == wanted
        assert len(set(key_of(batch.text_vectors))) == len(batch.text_vectors)
        moved = batch.to(torch.device("cpu"))
        assert moved.candidate_weight.equal(batch.candidate_weight) and moved.identity.keys() == batch.identity.keys()


def test_a_pass_of_evaluation_carries_the_catalogue_once(data):
    stream = stream_of(data, Whole(read(data), 0, 1, once=True))
    batches = [stream.batch(epoch, step) for epoch in (0, 1) for step in range(stream.steps)]
    assert stream.steps > 2
    assert [len(b.identity[CANDIDATES]) for b in batches] == 2 * [NUM_ITEMS, *[0] * (stream.steps - 1)]
    # Tables are asked for the same keys in every batch; of texts, the batch's own are left.
    assert len({tuple(b.ids.keys()) for b in batches}) == 1
    used = torch.cat([batches[1].text_index[name] for name in ("history_text", "title", CANDIDATES_TEXT)])
    assert sorted(set(used.tolist())) == list(range(len(batches[1].text_vectors)))


def test_an_event_without_text_has_none_as_its_item_has(tmp_path):
    rows = sequence_rows(20)
    for row in rows:
        row["history_text"][::2] = [None] * len(row["history_text"][::2])
    data = build_sequences(tmp_path, rows)
    batch = stream_of(data, Whole(read(data), 0, 1)).batch(0, 0)
    none = len(batch.text_vectors)
    for found in batch.text_index["history_text"].split(batch.text_lengths["history_text"].tolist()):
        assert (found == none).tolist() == [place % 2 == 0 for place in range(len(found))]
    assert (batch.text_index["title"] < none).all() and (batch.text_index[CANDIDATES_TEXT] == none).sum() == 1


def test_without_tables_nothing_is_looked_up(data):
    batch = stream_of(data, Whole(read(data), 0, 1), look_up=False).batch(0, 0)
    assert batch.ids.keys() == [] and batch.id_lengths() == {}
    assert batch.identity.keys() == {"history", "item_id", CANDIDATES}


def test_a_rank_without_rows_has_its_candidates(tmp_path):
    """A batch past a rank's last row is all masked, and still ranks its share for the others."""
    data = build_sequences(tmp_path, [row for row in sequence_rows(6) if row["split"] == "train"])
    catalogue = read(data)
    stream = stream_of(data, Whole(catalogue, 7, 8), rank=7, world_size=8)
    batch = stream.batch(0, stream.steps - 1)
    assert not batch.valid.any() and len(batch.identity[CANDIDATES]) == len(batch.candidate_weight) > 0
    assert len(batch.text_vectors) == int((batch.text_index[CANDIDATES_TEXT] < len(batch.text_vectors)).sum())


def test_tokens_of_candidates_are_those_of_their_texts(tmp_path):
    from toy_shards import TOKENIZER

    data = build_sequences(tmp_path, sequence_rows(20), tokenizer=TOKENIZER)
    root = f"{data}/catalogue"
    catalogue = read_catalogue(
        ShardReader(root, read_index(root), ["item_id", "title"], with_tokens=True), "item_id", "title"
    )
    stream = stream_of(data, Whole(catalogue, 0, 1))
    stream.reader.with_tokens = True
    stream.vectors = None
    batch = stream.batch(0, 0)
    tokens = [t[m].tolist() for t, m in zip(batch.text_tokens, batch.text_mask, strict=True)]
    for i, at in enumerate(batch.text_index[CANDIDATES_TEXT].tolist()):
        assert tokens[at] == catalogue.tokens.slice(i, i + 1).values.tolist() if at < len(tokens) else i == 29
    assert isinstance(catalogue.tokens, Ragged) and (batch.text_index[CANDIDATES_TEXT] == len(tokens)).sum() == 1
