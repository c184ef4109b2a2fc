"""What needs no training, on the same rows and by the same metrics: BM25, and the cosine of frozen text vectors.

Both rank the rows that a query has in the split (its candidates are no more than that). BM25 is bm25s' Lucene
variant over the words of the item's text, every distinct text of the domain in any of the run's splits being a
document; the cosine is that of the query's and the item's vector in the run's store. Knows no model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch.nn import functional as F

from ..data.batch import Batch
from ..data.index import SPLITS
from ..data.reader import ShardReader
from ..data.validate import WrongSchema
from ..errors import UserError
from ..layers.features import row_texts
from .exchange import Exchange
from .metrics import Evaluation
from .prepared import Prepared
from .process import Process
from .reading import retry_of

BM25, COSINE = "bm25", "cosine"
K1, B = 1.5, 0.75
WORD = re.compile(r"[^\W_]+")
# Rows that are scored at once.
CHUNK_ROWS = 65_536

Predict = Callable[[Iterator[Batch]], Iterator[tuple[Batch, dict[str, Any]]]]


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits, in order; nothing is stemmed or stopped."""
    return WORD.findall(text.lower())


class Baselines:
    """Scores the rows with a query while the model does. Collective: made and computed by all ranks.

    Args:
        prepared: the run's config and data.
        tasks: label of each task.
        split: the split that is evaluated.
        process: this rank.

    Raises:
        UserError: the data have no text of the query or of the item.
    """

    def __init__(self, prepared: Prepared, tasks: dict[str, str], split: str, process: Process) -> None:
        self.tasks, self.schema = tasks, prepared.schema
        without = set(prepared.config.data.exclude_features)
        texts = {n: f.role for n, f in prepared.schema.features.items() if f.kind == "text" and n not in without}
        self.query, self.item = (next((n for n, r in texts.items() if r == role), None) for role in ("query", "item"))
        if self.query is None or self.item is None:
            lacks = "query" if self.query is None else "item"
            raise UserError(
                f"the baselines compare the texts of query and item, and these data have none of the {lacks}."
            )
        self.ndcg_at = prepared.config.evaluate.ndcg_at
        self.scores, self.asked = bm25_scores(prepared, split, self.query, self.item, process)
        self.about = {
            BM25: f"Lucene's BM25, k1 {K1:g}, b {B:g}, over lower-cased runs of letters and digits of {self.item}; "
            "documents: every distinct text of the domain in all splits"
        }
        self.left_out = {}
        if prepared.store is None:
            mode = prepared.config.text.mode
            self.left_out[COSINE] = f"this run reads no frozen vectors (its text.mode is {mode})"
        elif unread := [name for name in (self.query, self.item) if name not in prepared.features]:
            # A finetuned run leaves out what its foundation did not read.
            self.left_out[COSINE] = f"this run does not read {' and '.join(unread)}"
        else:
            self.about[COSINE] = (
                f"cosine of the vectors of {self.query} and {self.item} in {prepared.config.text.store}"
            )
        domains = self.schema.domains.names
        self.evaluations = {name: Evaluation(domains, list(tasks), self.ndcg_at) for name in self.about}

    def watch(self, predict: Predict) -> Predict:
        """`predict`, with the rows of every batch that it gives scored here too."""

        def watched(batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Any]]]:
            for batch, output in predict(batches):
                self._add(batch)
                yield batch, output

        return watched

    def _add(self, batch: Batch) -> None:
        row = batch.row.cpu().numpy()
        found = np.where(row >= 0, self.scores[row], 0).astype(np.float64)
        # Metrics want numbers in 0 .. 1; both maps keep the order.
        given = {BM25: torch.from_numpy(found / (1 + found))}
        if COSINE in self.evaluations:
            directions = F.normalize(batch.text_vectors.double(), dim=1)
            of = [row_texts(directions, batch.text_index[n], batch.text_lengths[n]) for n in (self.query, self.item)]
            given[COSINE] = (((of[0] * of[1]).sum(1) + 1) / 2).clamp(0, 1)
        asked = torch.from_numpy((row >= 0) & self.asked[row]).to(batch.valid.device)
        for name, scores in given.items():
            for task, label in self.tasks.items():
                gains = batch.labels[label]
                self.evaluations[name].add(
                    task,
                    scores,
                    gains / self.schema.labels[label].maximum,
                    gains,
                    batch.label_valid[label] & batch.valid & asked,
                    batch.domain,
                    batch.user,
                    batch.query,
                    batch.row,
                )

    def compute(self) -> dict[str, Any]:
        """By baseline: `about`, and `overall` and `domains` as `Evaluation.compute` has them. Collective.

        Only metrics of order are there (a BM25 score is no probability), and only tasks with rows that have a query.
        One that cannot be had is `{"left_out": why}`.
        """
        kept = ("rows", "positives", "auc", "gauc", f"ndcg@{self.ndcg_at}")

        def order_only(tasks: dict[str, Any]) -> dict[str, Any]:
            return {task: {m: metrics[m] for m in kept} for task, metrics in tasks.items() if metrics["rows"]}

        result: dict[str, Any] = {}
        for name, evaluation in self.evaluations.items():
            found = evaluation.compute()
            domains = {domain: order_only(tasks) for domain, tasks in found["domains"].items()}
            result[name] = {"about": self.about[name], "overall": order_only(found["overall"]), "domains": domains}
        return result | {name: {"left_out": why} for name, why in self.left_out.items()}


def bm25_scores(
    prepared: Prepared, split: str, query: str, item: str, process: Process
) -> tuple[np.ndarray, np.ndarray]:
    """BM25 of every row of a split. Collective: each rank scores whole domains.

    A rank holds one domain at a time: the words of its distinct item texts as lists of numbers and as a sparse
    matrix, about 40 bytes a word, and 24 bytes a row of the split.

    Args:
        query, item: text features.

    Returns:
        float32 `[rows]` by number of the row in the split, 0 where query and item share no word; and bool `[rows]`,
        whether the row has a query.
    """
    readers = {name: _reader(prepared, name) for name in SPLITS if name in prepared.indexes}
    rows = prepared.indexes[split].rows
    scores, asked = np.zeros(rows, np.float32), np.zeros(rows, np.uint8)
    for number, domain in enumerate(prepared.schema.domains.names):
        if number % process.world_size == process.rank:
            _score_domain(domain, readers, split, query, item, scores, asked)
    exchange = Exchange()
    # Every row is some rank's and 0 on the others, so the sums are exact.
    return exchange.sum(scores), exchange.sum(asked) > 0


def _reader(prepared: Prepared, split: str) -> ShardReader:
    data = prepared.config.data
    return ShardReader(
        prepared.root(split),
        prepared.indexes[split],
        [],
        damaged=data.damaged,
        max_damaged_share=data.max_damaged_share,
        retry=retry_of(data),
    )


def _score_domain(
    domain: str,
    readers: dict[str, ShardReader],
    split: str,
    query: str,
    item: str,
    scores: np.ndarray,
    asked: np.ndarray,
) -> None:
    """Fill in `scores` and `asked` where the split's rows of a domain have a query."""
    found = [
        (first + np.flatnonzero(has), query_keys[has], item_keys[has], texts)
        for first, (query_keys, texts), (item_keys, _) in _blocks(readers[split], domain, [query, item])
        if (has := query_keys.mask == 0).any()
    ]
    if not found:
        return
    numbers: dict[str, int] = {}
    place, documents = _documents(readers, domain, item, numbers)
    queries: dict[int, list[int]] = {}
    for _, _, _, texts in found:
        for key, text in texts.items():
            if key not in queries:
                queries[key] = [numbers[word] for word in words_of(text) if word in numbers]
    of_query = {key: at for at, key in enumerate(queries)}
    asking = _counts(list(queries.values()), len(numbers))
    weights = _bm25(documents, numbers)
    for rows, query_keys, item_keys, _ in found:
        asked[rows] = 1
        for start in range(0, len(rows), CHUNK_ROWS):
            at = slice(start, start + CHUNK_ROWS)
            known = ~np.ma.getmaskarray(item_keys[at])
            which = np.array([of_query[key] for key in query_keys[at][known].tolist()], np.int64)
            what = np.array([place[key] for key in item_keys[at][known].tolist()], np.int64)
            scores[rows[at][known]] = asking[which].multiply(weights[what]).sum(axis=1).A1


def _blocks(
    reader: ShardReader, domain: str, features: list[str]
) -> Iterator[tuple[int, tuple[np.ma.MaskedArray, dict[int, str]], ...]]:
    """Of each block of a domain: its first row's number, and per feature its rows' text keys and the texts by key.

    Keys are int64 `[rows]`, masked where the row has no text. Texts are without the prefix of their role, which is for
    language models. A block that cannot be had is left out where the run
    leaves it out too.
    """
    for number, (shard, _) in enumerate(reader.places):
        if shard.domain != domain:
            continue
        try:
            batch = reader.batch(number)
        except WrongSchema:
            raise
        except UserError:
            if reader.damaged == "stop":
                raise
            continue
        of_roles = reader.index.tokenizer.prefixes if reader.index.tokenizer else {}
        roles = {name: reader.index.schema.features[name].role for name in features}
        yield int(reader.first_rows[number]), *(_texts(batch, name, of_roles.get(roles[name], "")) for name in features)


def _texts(batch: pa.RecordBatch, feature: str, prefix: str) -> tuple[np.ma.MaskedArray, dict[int, str]]:
    if feature not in batch.schema.names:
        # Written before the schema had it.
        return np.ma.masked_all(batch.num_rows, np.int64), {}
    column = batch.column(feature)
    keys = column.dictionary.field("key").to_numpy()
    missing = ~column.indices.is_valid().to_numpy(zero_copy_only=False)
    at = column.indices.fill_null(0).to_numpy()
    of_rows = keys[at] if len(keys) else np.zeros(len(at), np.int64)
    words = (text.removeprefix(prefix) for text in column.dictionary.field("text").to_pylist())
    texts = dict(zip(keys.tolist(), words, strict=True))
    return np.ma.MaskedArray(of_rows, missing), texts


def _documents(
    readers: dict[str, ShardReader], domain: str, item: str, numbers: dict[str, int]
) -> tuple[dict[int, int], list[list[int]]]:
    """The domain's distinct item texts: the place of each by its key, and its words' `numbers`, which grow."""
    place: dict[int, int] = {}
    documents: list[list[int]] = []
    for reader in readers.values():
        for _, (_, texts) in _blocks(reader, domain, [item]):
            for key, text in texts.items():
                if key not in place:
                    place[key] = len(documents)
                    documents.append([numbers.setdefault(word, len(numbers)) for word in words_of(text)])
    return place, documents


def _bm25(documents: list[list[int]], numbers: dict[str, int]) -> csr_matrix:
    """What each word adds to the score of each document, float32 `[documents, words]`."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    if not numbers:
        return csr_matrix((len(documents), 0), dtype=np.float32)
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index((documents, numbers), create_empty_token=False, show_progress=False)
    parts = (index.scores["data"], index.scores["indices"], index.scores["indptr"])
    return csc_matrix(parts, shape=(len(documents), len(numbers))).tocsr()


def _counts(lists: list[list[int]], width: int) -> csr_matrix:
    """How often each number is in each list, float32 `[lists, width]`."""
    ends = np.cumsum([0] + [len(entries) for entries in lists])
    entries = np.array([entry for entries in lists for entry in entries], np.int64)
    counts = csr_matrix((np.ones(len(entries), np.float32), entries, ends), shape=(len(lists), width))
    counts.sum_duplicates()
    return counts
