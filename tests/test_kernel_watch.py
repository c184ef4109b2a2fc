"""What a report says of virtual kernels is what the model did, row by row."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foundation_rows import SCHEMA, as_batch, make_rows, text_vectors
from mvke_modules import Whole, config

from dist_rec.config import TablesConfig
from dist_rec.data.batch import make_batch
from dist_rec.data.vocabulary import id_maps
from dist_rec.embeddings.tables import table_specs
from dist_rec.report.kernels import KernelWatch, _tag_of, kernels_part
from dist_rec.schema import Schema
from dist_rec.strict import from_dict, to_dict


def test_sums_are_of_the_valid_rows_and_of_each_tag():
    torch.manual_seed(0)
    module, rows = Whole(config()).eval(), make_rows(40)
    model, size = module.model, SCHEMA.table_sizes()["item"]
    torch.nn.init.normal_(model.kernels.weight)
    watch, seen = KernelWatch(model, {"item": 0}, size), {"attention": [], "present": [], "gates": []}

    def attends(_, given, out) -> None:
        seen["attention"].append(out[1][:20])
        seen["present"].append(given[1].present[:20])

    def weighs(_, given, out) -> None:
        seen["gates"].append(out[:20])

    handles = [model.experts.register_forward_hook(attends), model.gate.register_forward_hook(weighs)]
    with watch.hooks(), torch.no_grad():
        for half in (rows.take(np.arange(20)), rows.take(np.arange(20, 40))):
            module(as_batch(half, 26))
    for handle in handles:
        handle.remove()
    sums = {name: torch.from_numpy(held) for name, held in watch.totals().items()}
    assert float(sums["rows"]) == 40
    torch.testing.assert_close(sums["attention"], torch.cat(seen["attention"]).sum(0))
    torch.testing.assert_close(sums["present"], torch.cat(seen["present"]).double().sum(0))
    items, at = rows.ids["item"], 0
    of_row = [None if not n else int(items.values[(at := at + n) - 1]) for n in items.lengths.tolist()]
    for number in range(3):
        # Of each half, the gates of three tasks.
        weights = torch.cat([seen["gates"][number], seen["gates"][3 + number]])
        for tag in range(size):
            mine = [row for row, held in enumerate(of_row) if held == tag]
            assert int(sums["tags"][tag]) == len(mine)
            torch.testing.assert_close(sums[f"gate {number}"][tag], weights[mine].sum(0))


def test_tags_that_an_extension_added_are_told_too():
    """Their rows are a table of their own, and keys of their own in a batch."""
    torch.manual_seed(0)
    module, rows = Whole(config()).eval(), make_rows(40)
    vocabulary = {"size": 30, "inherited": [12]}
    tree = to_dict(SCHEMA)
    tree["features"]["item"]["vocabulary"] |= vocabulary
    schema, features, left_out = from_dict(Schema, tree, "test"), list(SCHEMA.features), {}
    tables = TablesConfig(dim=4)
    prepared = SimpleNamespace(schema=schema, features=features, config=SimpleNamespace(tables=tables))
    prepared.specs = table_specs(schema, tables, features)
    tag, keys, size = _tag_of(SimpleNamespace(prepared=prepared), left_out)
    assert (tag, keys, size, left_out) == ("item", {"item": 0, "item@1": 12}, 30, {})
    whole = as_batch(rows, 46)
    divided = make_batch(rows, schema, 46, text_vectors, id_maps(schema, {}, ["item"]))
    divided.dense = whole.dense
    found = []
    for batch, of_batch in ((whole, {"item": 0}), (divided, keys)):
        watch = KernelWatch(module.model, of_batch, size)
        with watch.hooks(), torch.no_grad():
            module.model(module.tables(whole), batch)
        found.append(watch.totals())
    assert found[0]["tags"][12:].any() and found[0]["tags"][:12].any()
    for name, sums in found[0].items():
        np.testing.assert_allclose(found[1][name], sums, err_msg=name)


def test_a_page_escapes_names_and_needs_no_kernels():
    assert kernels_part(None) == []
    tag = {"tag": "<b> & " + "x" * 60, "rows": 3, "weights": [0.75, 0.25]}
    kernels = {
        "names": ["shared 1", "a<b 1"],
        "fields": ["age", "zip"],
        "present": [1.0, 0.5],
        "attention": [[0.4, 0.6], [1.0, 0.0]],
        "tasks": {"a<b": {"kernels": [0, 1], "tags": [tag], "best": [[tag], [tag]]}},
    }
    text = "".join(kernels_part(kernels))
    assert "<b>" not in text and "a<b" not in text and "&lt;b&gt; &amp; xxx" in text and "0.75" in text


@pytest.mark.parametrize("tag", [None, "item"])
def test_without_an_id_of_the_item_attention_is_told(tag):
    module = Whole(config()).eval()
    watch = KernelWatch(module.model, {tag: 0} if tag else {}, 30 if tag else 0)
    with watch.hooks(), torch.no_grad():
        module(as_batch(make_rows(), 24))
    assert ("gate 0" in watch.totals()) == (tag is not None)
