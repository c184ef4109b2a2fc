"""The foundation model: masks, absences, and ranks that together equal one process."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from foundation_rows import (
    ABSENT,
    NUM_TEXTS,
    SCHEMA,
    TinyEncoder,
    Whole,
    as_batch,
    check_masked_rows,
    config,
    cut,
    make_rows,
    text_vectors,
)
from ranks import gradients, run_ranks

import dist_rec.layers
from dist_rec.data.rows import Rows
from dist_rec.errors import UserError

pytestmark = pytest.mark.usefixtures("seeded")


BODIES = {
    "shared_bottom": {"kind": "shared_bottom"},
    "mmoe": {"kind": "mmoe"},
    "ple-domain": {"kind": "ple", "levels": 2},
    "ple-task": {"kind": "ple", "levels": 2, "specific_to": "task"},
}
GLOBAL = [
    *({"body": body, "regulariser": {"kind": "js"}} for body in BODIES.values()),
    *({"regulariser": {"kind": kind}} for kind in ("none", "mmd")),
    {"regulariser": {"kind": "mmd"}, "gating": "cls", "adaptation": {"enabled": True, "width": 5}},
    {"regulariser": {"kind": "js"}, "gating": "mean", "adaptation": {"enabled": False}, "products": False},
    {"history": {"pooling": "last", "layers": 2}},
    {"history": {"kind": "mean"}, "text_match": {"enabled": False}},
    {"history": {"use_text": True}, "text_match": {"slope": 2.0}},
    {"embedding_l2": 0.1, "body": {"kind": "mmoe", "skip": True}},
]


@pytest.mark.parametrize("changes", GLOBAL, ids=str)
def test_ranks_together_equal_one_process_on_the_global_batch(changes):
    """Unequal parts, one without domain 2, one without any row, all padded with masked rows."""
    rows = make_rows(40)
    rank_of = np.random.default_rng(3).integers(0, 2, 40)
    rank_of[rows.domain == 2] = 1
    module = Whole(config(**changes))
    whole = module(as_batch(rows, 40))
    whole["loss"].backward()
    parts = [cut(rows, rank_of == r) for r in range(3)]
    assert len(parts[2]) == 0 and len(parts[0]) != len(parts[1])
    mean, outputs = run_ranks(module, [as_batch(p, 32) for p in parts])
    for name, grad in gradients(module).items():
        torch.testing.assert_close(mean[name], grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for output in outputs:
        for name, value in whole["losses"].items():
            torch.testing.assert_close(output["losses"][name], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack([o["loss"] for o in outputs]).mean(), whole["loss"])
    for task, logits in whole["logits"].items():
        for r in range(2):
            torch.testing.assert_close(outputs[r]["logits"][task][: len(parts[r])], logits[rank_of == r])


def test_mmd_is_the_same_where_a_row_is_repeated_on_two_ranks():
    rows = make_rows(30)
    twice = Rows.concat([rows, cut(rows, np.arange(30) < 10)])
    module = Whole(config(regulariser={"kind": "mmd", "samples": 30}))
    whole = module(as_batch(twice, 40))
    whole["loss"].backward()
    mean, outputs = run_ranks(module, [as_batch(rows, 30), as_batch(cut(rows, np.arange(30) < 10), 30)])
    torch.testing.assert_close(outputs[0]["losses"], whole["losses"])
    for name, grad in gradients(module).items():
        torch.testing.assert_close(mean[name], grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "js", "mmd"])
def test_masked_rows_change_nothing(kind):
    check_masked_rows(Whole(config(regulariser={"kind": kind})))


@pytest.mark.parametrize("absent", list(ABSENT))
@pytest.mark.parametrize("gating", ["mean", "cls", "domain"])
def test_every_parameter_has_a_gradient_whatever_is_absent(absent, gating):
    rows = make_rows(domains=[0, 2] * 12, empty=ABSENT[absent])
    for body, (kind, pooling), regulariser in itertools.product(
        BODIES.values(), [("transformer", "last"), ("mean", "mean")], ["js", "mmd"]
    ):
        changes = config(
            body=body, gating=gating, history={"kind": kind, "pooling": pooling}, regulariser={"kind": regulariser}
        )
        module = Whole(changes, encoder=TinyEncoder())
        output = module(as_batch(rows, 26))
        output["loss"].backward()
        for name, p in module.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
        owned = ("body.towers", "adaptation", "domains", "entities.query.gate.null")
        for name, p in module.model.named_parameters():
            if p.shape[0] == 3 and name.startswith(owned):
                assert p.grad[1].abs().max() == 0, name
                assert "null" in name or p.grad[0].abs().max() > 0, name


@pytest.mark.parametrize("kind", ["none", "js", "mmd"])
def test_a_batch_of_masked_rows_only_is_a_zero_loss_with_zero_gradients(kind):
    module = Whole(config(regulariser={"kind": kind}))
    output = module(as_batch(cut(make_rows(), np.zeros(24, bool)), 8))
    output["loss"].backward()
    assert output["loss"] == 0
    assert all((g == 0).all() for g in gradients(module).values())


def test_features_that_the_schema_lacks_leave_the_same_path():
    """No query, no user, no text, no history: null vectors and a constant user."""
    module = Whole(config(), features=["item", "price"])
    output = module(as_batch(make_rows(), 24))
    output["loss"].backward()
    for name, p in module.model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert module.model.entities["query"].gate.null.grad.abs().max() > 0


def test_texts_are_encoded_once_each():
    calls = []

    class Counting(TinyEncoder):
        def forward(self, tokens, mask):
            calls.append(len(tokens))
            return super().forward(tokens, mask)

    Whole(config(), encoder=Counting())(as_batch(make_rows(200), 200))
    assert calls == [NUM_TEXTS]


def test_loss_is_the_weighted_mean_of_soft_target_cross_entropies():
    rows, module = make_rows(), Whole(config())
    output = module(as_batch(rows, 24))
    total = 0.0
    for task, weight in (("ctr", 1.0), ("cvr", 0.5), ("relevance", 2.0)):
        p, y = output["logits"][task].sigmoid().detach().numpy(), rows.labels[task] / SCHEMA.labels[task].maximum
        expected = np.nanmean(-(y * np.log(p) + (1 - y) * np.log(1 - p)))
        np.testing.assert_allclose(output["losses"][task], expected, rtol=1e-6)
        total += weight * expected
    np.testing.assert_allclose(output["losses"]["loss"], total, rtol=1e-6)


def test_embedding_l2_is_the_mean_over_rows_of_their_squared_norms():
    module = Whole(config(embedding_l2=0.5))
    batch = as_batch(make_rows(), 30)
    embeddings = module.tables(batch)
    pooled = [n for n in embeddings if SCHEMA.features[n].role != "history"]
    expected = sum(float(embeddings[n][:24].detach().square().sum()) for n in pooled) / 24
    losses = {name: float(value) for name, value in module.model(embeddings, batch)["losses"].items()}
    assert losses["embedding_l2"] == pytest.approx(expected)
    tasks = losses["ctr"] + 0.5 * losses["cvr"] + 2 * losses["relevance"]
    assert losses["loss"] == pytest.approx(tasks + 0.5 * expected)


def test_text_matches_are_cosines_with_the_title():
    """Of the query's text, and of the mean direction of the texts of a history."""
    rows, module = make_rows(), Whole(config(history={"use_text": True}))
    batch = as_batch(rows, 24)
    assert list(module.model.matched) == ["query_text", "clicked_title"]
    matches = module.model._encode(module.tables(batch), batch)[1].detach().numpy()

    def directions(name: str, b: int) -> np.ndarray:
        found = text_vectors(rows.texts[name].slice(b, b + 1).values)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    for j, name in enumerate(module.model.matched):
        known = [len(directions(name, b)) and len(directions("title", b)) for b in range(24)]
        assert 0 < sum(map(bool, known)) < 24
        np.testing.assert_array_equal(matches[:, 2 + j], np.array(known) > 0)
        for b in range(24):
            mean = directions(name, b).sum(0)
            expected = mean @ directions("title", b)[0] / np.linalg.norm(mean) if known[b] else 0
            assert matches[b, j] == pytest.approx(expected, abs=1e-6)


def test_text_matches_add_to_the_logits_of_their_domain_and_task():
    batch, changes = as_batch(make_rows(), 24), {"history": {"use_text": True}}
    module = Whole(config(**changes, text_match={"slope": 4.0}))
    m = module.model._encode(module.tables(batch), batch)[1]
    assert m.shape == (24, 4)
    before = torch.stack(list(module(batch)["logits"].values()), 1)
    with torch.no_grad():
        # Domain 1, the history's cosine, the third task.
        module.model.text_match.map.weight[1, 0, 1, 2] += 0.5
    after = torch.stack(list(module(batch)["logits"].values()), 1)
    expected = torch.zeros_like(before)
    expected[:, 2] = torch.where(batch.domain == 1, 10 * 0.5 * m[:, 1], 0)
    assert expected.any()
    torch.testing.assert_close(after - before, expected)
    with torch.no_grad():
        module.model.text_match.map.weight.zero_()
    without = torch.stack(list(module(batch)["logits"].values()), 1)
    start = 4.0 * (m[:, :2] - 0.5 * m[:, 2:]).sum(1, keepdim=True)
    torch.testing.assert_close(before - without, start.expand(-1, 3))


def test_skip_adds_a_linear_function_of_the_experts_input_to_each_logit():
    module, batch = Whole(config(body={"kind": "mmoe", "skip": True})), as_batch(make_rows(), 24)
    before = module(batch)["logits"]
    with torch.no_grad():
        module.model.body.skip.bias += torch.tensor([1.0, 2.0, 3.0])
    for i, (task, logits) in enumerate(module(batch)["logits"].items()):
        torch.testing.assert_close(logits, before[task] + i + 1)


def test_cold_item_depends_on_its_text_alone():
    """An item without an id row scores the same whatever the id aspect's weights are."""
    rows = make_rows(empty=("item", "category", "price"))
    module = Whole(config())
    before = module(as_batch(rows, 24))["logits"]
    with torch.no_grad():
        for p in module.model.entities["item"].layers.parameters():
            p.add_(torch.randn_like(p))
    torch.testing.assert_close(module(as_batch(rows, 24))["logits"], before)


def test_initialisation_follows_the_seed_and_default_heads_are_the_labels():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(Whole(config(tasks={})).state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert list(Whole({"width": 8}).model.tasks) == ["ctr", "cvr", "relevance"]


def test_half_precision_parameters_give_full_precision_losses():
    module = Whole(config(regulariser={"kind": "js"}))
    module.model.bfloat16()
    output = module(as_batch(make_rows(), 24))
    output["loss"].backward()
    assert output["loss"].dtype == torch.float32 and output["logits"]["ctr"].dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("tasks", [{"ctr": {"label": "crt"}}, {"loss": {"label": "ctr"}}])
def test_tasks_are_checked(tasks):
    bad = config()
    bad["tasks"] = tasks
    with pytest.raises(UserError, match="model.tasks"):
        Whole(bad)


def test_layers_and_models_import_no_engine_and_no_process_group():
    root = Path(dist_rec.layers.__file__).parent.parent
    allowed = ("data.batch", "config", "errors", "schema", "layers")
    for file in [*root.glob("layers/*.py"), *root.glob("models/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if node.level == 2:
                    assert node.module.startswith(allowed), (file.name, node.module)
            else:
                continue
            for name in names:
                assert not name.startswith(("deepspeed", "torch.distributed", "torchrec.distributed")), file.name
