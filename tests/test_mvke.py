"""MVKE: scores are the paper's, ranks together equal one process, and nothing but fields decides."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from foundation_rows import (
    ABSENT,
    EVERYTHING,
    NUM_TEXTS,
    SCHEMA,
    TinyEncoder,
    as_batch,
    check_masked_rows,
    cut,
    make_rows,
)
from mvke_modules import GIVEN, ITEM, KINDS, USER, Whole, config
from ranks import gradients, run_ranks
from torch import nn
from torch.nn import functional as F

from dist_rec.config import Config, MVKEConfig
from dist_rec.config.mvke import PRESETS
from dist_rec.data.rows import Ragged
from dist_rec.errors import UserError
from dist_rec.models.objectives import both
from dist_rec.strict import from_dict, to_dict
from dist_rec.training.kinds import kind_of

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_fills_what_is_not_said(preset):
    said = from_dict(MVKEConfig, config(preset=preset, gate={"scaled": True}), "test")
    for (section, key), value in PRESETS[preset].items():
        if (section, key) == ("kernels", "init_std") and value is None:
            value = 6**-0.5
        assert getattr(getattr(said, section), key) == (True if (section, key) == ("gate", "scaled") else value)
    assert from_dict(MVKEConfig, to_dict(said), "saved") == said
    assert PRESETS["paper"].keys() == PRESETS["official"].keys()


def test_maps_of_attention_start_as_the_preset_says():
    maps = {preset: Whole(config(preset=preset)).model.experts.key for preset in PRESETS}
    # Those of nn.Linear are even within 1 / sqrt(6).
    assert maps["official"].weight.abs().max() < 0.06 and not maps["official"].bias.any()
    assert maps["paper"].weight.abs().max() > 0.3 and maps["paper"].bias.any()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"kernels": {"shared": 0, "specific": 0}}, "kernels.specific 0 beside kernels.shared 0"),
        ({"kernels": {"shared": 0}, "tasks": {"ctr": {"label": "ctr", "kernels": 0}}}, "tasks.ctr.kernels 0 beside"),
        ({"user": {"kind": "mmoe"}, "kernels": {"crossed": True}}, "kernels.crossed is of user.kind mvke, and"),
        ({"tasks": {"cvr": {"label": "cvr", "given": "ctrr"}}}, "tasks.cvr.given: 'ctrr' is no other task: there is"),
        ({"tasks": {"cvr": {"label": "cvr", "given": "cvr"}}}, "tasks.cvr.given: 'cvr' is no other task"),
        ({"tasks": GIVEN | {"relevance": {"label": "relevance", "given": "cvr"}}}, "cvr is given itself"),
        ({"width": 7}, "width 7 is not a multiple of history.heads 2"),
    ],
)
def test_what_no_model_could_be_is_refused(changes, fault):
    with pytest.raises(UserError, match=fault):
        from_dict(MVKEConfig, config(**changes), "test")


def test_kernels_that_every_task_has_of_its_own_suffice():
    tasks = {"ctr": {"label": "ctr", "kernels": 2}, "cvr": {"label": "cvr", "kernels": 1}}
    module = Whole(config(kernels={"shared": 0, "specific": 0}, tasks=tasks))
    assert module.model.owned == [(0, 2), (2, 3)]


def test_what_the_data_lacks_is_said():
    with pytest.raises(UserError, match="features of the item .* none of schema 'test'"):
        Whole(config(), features=USER)
    with pytest.raises(UserError, match="features of the user .* none of schema 'test'"):
        Whole(config(), features=ITEM)
    with pytest.raises(UserError, match="model.tasks.ctr.label: 'clik' is not known"):
        Whole(config(tasks={"ctr": {"label": "clik"}}))
    with pytest.raises(UserError, match="no task may be called 'loss'"):
        Whole(config(tasks={"loss": {"label": "ctr"}}))


def test_the_score_is_the_paper_s(doubles):
    """The whole forward of one task, its equations written out."""
    module = Whole(config(preset="paper", item={"hidden": []}, tasks={"ctr": {"label": "ctr"}}))
    model, batch = module.model, as_batch(make_rows(), 24)
    (fields, _), (items, _) = sides_of(module, batch)
    kernels, gate = model.kernels.weight, model.gate
    experts, _ = model.experts(kernels, fields)
    tag = items.values.flatten(1) @ model.item.tower.layers[0].weight[0, 0] + model.item.tower.layers[0].bias[0, 0]
    query, keys, values = gate.query(tag), gate.key(kernels), gate.value(experts)
    weights = torch.softmax(query @ keys.t() / 6**0.5, 1)
    user = (weights[:, :, None] * values).sum(1)
    torch.testing.assert_close(module(batch)["logits"]["ctr"], F.cosine_similarity(user, tag))


def sides_of(module: Whole, batch) -> list[tuple]:
    """The fields of the user and of the item, and the events of histories."""
    embeddings, lengths = module.tables(batch), batch.id_lengths()
    texts = module.model.text_projection(batch.text_vectors.double())
    sides = module.model.user_fields, module.model.item_fields
    return [side(embeddings, lengths, batch, texts, torch.float64) for side in sides]


def test_options_score_as_they_say(doubles):
    """Kernels of a row, one of them a task's own, and an item of two kernels that the user weighs: written out."""
    changes = {"item": {"kind": "vke_vkg", "kernels": 2}, "kernels": {"crossed": True, "shared": 1, "specific": 1}}
    module = Whole(config(tasks={t: {"label": t} for t in ("ctr", "cvr")}, score={"scale": 3.0}, **changes))
    for name, parameter in module.model.named_parameters():
        if "kernels" in name or "crossed" in name:
            nn.init.normal_(parameter)
    model, batch = module.model, as_batch(make_rows(), 24)
    (user, _), (item, _) = sides_of(module, batch)
    users, items = (x.values.sum(1) / x.present.sum(1).clamp_min(1)[:, None] for x in (user, item))
    moves = ((users * items) @ model.crossed.move.weight.t()).view(24, 3, 6)
    kernels = model.kernels.weight + moves
    experts, _ = model.experts(kernels, user)
    of_item = model.item.kernels.weight
    item_experts, _ = model.item.tower(of_item, item)
    for number, task in enumerate(("ctr", "cvr")):
        mine, its = [0, 1 + number], [2 * number, 2 * number + 1]
        tag = item_experts[:, its].mean(1)
        weights = torch.softmax(torch.einsum("bd,bkd->bk", tag, kernels[:, mine]), 1)
        of_user = torch.softmax(experts[:, mine].mean(1) @ of_item[its].t(), 1)
        tag = (of_user[:, :, None] * item_experts[:, its]).sum(1)
        wanted = 3 * ((weights[:, :, None] * experts[:, mine]).sum(1) * tag).sum(1)
        torch.testing.assert_close(module(batch)["logits"][task], wanted)


@pytest.mark.parametrize("kind", ["multi_interest", "mmoe"])
def test_baselines_score_as_they_say(kind, doubles):
    user = {"kind": kind, "interests": 3, "sharpness": 2.0}
    module = Whole(config(user=user, item={"hidden": [], "kind": "vke", "kernels": 2}))
    model, batch = module.model, as_batch(make_rows(), 24)
    (user, events), (item, _) = sides_of(module, batch)
    assert len(events) == (2 if kind == "multi_interest" else 0)
    tags = model.item.tower(model.item.kernels.weight, item)[0].view(24, 3, 2, 6).mean(2)
    for number, task in enumerate(model.tasks):
        if kind == "multi_interest":
            products = torch.einsum("bid,bd->bi", model.interests(user, events), tags[:, number])
            wanted = (torch.softmax(2 * products, 1) * products).sum(1)
        else:
            wanted = (model.towers(user)[:, number] * tags[:, number]).sum(1)
        torch.testing.assert_close(module(batch)["logits"][task], wanted)


def test_fields_are_what_a_row_has():
    module = Whole(config(), dtype=torch.float64)
    rows = make_rows(40)
    batch = as_batch(rows, 40)
    texts = module.model.text_projection(batch.text_vectors.double())
    fields, events = module.model.user_fields(module.tables(batch), batch.id_lengths(), batch, texts, torch.float64)
    names = module.model.user_fields.names
    assert names == ["user", "interests", "age", "bio", "clicked", "bought"] and not events
    assert not fields.values[~fields.present].any() and fields.present.any(0).all() and not fields.present.all(0).any()
    at = names.index("interests")
    assert torch.equal(fields.present[:, at], torch.from_numpy(rows.ids["interests"].lengths > 0))
    assert torch.equal(fields.present[:, names.index("age")], ~torch.isnan(batch.dense["age"]).all(1))
    wanted = module.tables(batch)["interests"] @ module.model.user_fields.id_maps[1].weight.t()
    torch.testing.assert_close(fields.values[:, at], wanted)
    # A table of the fields' own width needs no map.
    assert isinstance(module.model.item_fields.id_maps[0], nn.Identity)


CASES = [
    *({"user": {"kind": kind}} for kind in KINDS),
    {"preset": "paper", "embedding_l2": 0.1},
    {"preset": "paper", "score": {"kind": "parts"}, "gate": {"kind": "argmax"}},
    {"item": {"kind": "vke_vkg"}, "kernels": {"crossed": True, "combine": "sum"}},
    {"item": {"kind": "vke", "shared": True}, "tasks": GIVEN | {"ctr": {"label": "ctr"}}},
    {"history": {"kind": "mean", "use_text": False}, "tasks": {}},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_ranks_together_equal_one_process_on_the_global_batch(changes):
    """Unequal parts, one without any row, all padded with masked rows."""
    rows = make_rows(40)
    rank_of = np.random.default_rng(3).integers(0, 2, 40)
    module = Whole(config(**changes))
    whole = module(as_batch(rows, 40))
    whole["loss"].backward()
    parts = [cut(rows, rank_of == r) for r in range(3)]
    mean, outputs = run_ranks(module, [as_batch(p, 32) for p in parts])
    for name, grad in gradients(module).items():
        torch.testing.assert_close(mean[name], grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for output in outputs:
        torch.testing.assert_close(output["losses"], whole["losses"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack([o["loss"] for o in outputs]).mean(), whole["loss"])
    for task, logits in whole["logits"].items():
        for r in range(2):
            torch.testing.assert_close(outputs[r]["logits"][task][: len(parts[r])], logits[rank_of == r])


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_masked_rows_change_nothing(changes):
    check_masked_rows(Whole(config(**changes)))


@pytest.mark.parametrize("absent", list(ABSENT))
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_every_parameter_has_a_gradient_whatever_is_absent(changes, absent):
    module = Whole(config(**changes), encoder=TinyEncoder())
    module(as_batch(make_rows(empty=ABSENT[absent]), 26))["loss"].backward()
    for name, p in module.model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("side", ["user", "item"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_side_reads_its_own_features_and_no_labels(side, kind):
    module, batch = Whole(config(user={"kind": kind})), as_batch(make_rows(), 24)
    wanted = module(batch, side=side)["vectors"]
    own = USER if side == "user" else ITEM
    bare = copy.copy(batch)
    for of_feature in ("dense", "text_index", "text_lengths"):
        setattr(bare, of_feature, {n: x for n, x in getattr(batch, of_feature).items() if n in own})
    bare.labels, bare.label_valid = {}, {}
    embeddings = {name: x for name, x in module.tables(batch).items() if name in own}
    torch.testing.assert_close(module.model(embeddings, bare, side=side)["vectors"], wanted)


def test_a_task_s_own_kernels_are_nobody_else_s():
    tasks = {"ctr": {"label": "ctr"}, "cvr": {"label": "cvr", "kernels": 2}, "relevance": {"label": "relevance"}}
    module = Whole(config(tasks=tasks))
    assert module.model.kernels.weight.shape == (2 + 1 + 2 + 1, 6)
    for number, task in enumerate(tasks):
        module.zero_grad()
        module(as_batch(make_rows(), 24))["logits"][task].sum().backward()
        moved = module.model.experts.experts.layers[-1].bias.grad[0].any(1).nonzero()[:, 0].tolist()
        assert moved == [0, 1, *[[2], [3, 4], [5]][number]]
        # Nor are tags, unless they are said to be.
        tags = module.model.item.tower.layers[-1].bias.grad[0].any(1).nonzero()[:, 0].tolist()
        assert tags == [number]
    assert len(Whole(config(item={"shared": True})).model.item.tower.layers[-1].bias[0]) == 1


def test_losses_are_of_known_labels_alone():
    rows, module = make_rows(), Whole(config(embedding_l2=0.2))
    batch = as_batch(rows, 30)
    output = module(batch)
    total = 0.0
    for task, weight, maximum in (("ctr", 1.0, 1), ("cvr", 0.5, 1), ("relevance", 2.0, 3)):
        known = ~np.isnan(rows.labels[task])
        targets = torch.from_numpy(rows.labels[task][known] / maximum).double()
        logits = output["logits"][task][:24][torch.from_numpy(known)]
        wanted = F.binary_cross_entropy(torch.sigmoid(logits), targets)
        torch.testing.assert_close(output["losses"][task], wanted, check_dtype=False)
        total = total + weight * wanted
    read = {name: x for name, x in module.tables(batch).items() if SCHEMA.features[name].role in ("user", "item")}
    norms = sum(x[:24].square().sum(1) for x in read.values()).mean()
    torch.testing.assert_close(output["losses"]["embedding_l2"], norms)
    torch.testing.assert_close(output["loss"], total + 0.2 * norms, check_dtype=False)


def test_embeddings_that_are_not_there_have_no_norm():
    """A user of numbers and an item of a text: no table has anything to be kept small."""
    module = Whole(config(embedding_l2=0.2), features=["age", "title"])
    output = module(as_batch(make_rows(), 30))
    assert float(output["losses"]["embedding_l2"]) == 0 and output["loss"].isfinite()
    output["loss"].backward()


def test_a_given_task_learns_from_all_rows_of_the_other():
    rows = make_rows(60)
    clicks, buys = rows.labels["ctr"], rows.labels["cvr"]
    module = Whole(config(tasks={"ctr": {"label": "ctr"}} | GIVEN))
    output = module(as_batch(rows, 64))
    alone = Whole(config(tasks={"ctr": {"label": "ctr"}, "cvr": {"label": "cvr"}}))
    alone.load_state_dict(module.state_dict())
    raw = alone(as_batch(rows, 64))["logits"]
    click, buy = (torch.sigmoid(raw[task][:60]) for task in ("ctr", "cvr"))
    torch.testing.assert_close(torch.sigmoid(output["logits"]["cvr"][:60]), click * buy)
    # Known where the click is, and, where there was one, the purchase.
    known = ~np.isnan(clicks) & (~np.isnan(buys) | (clicks == 0))
    assert (known & np.isnan(buys)).any() and (~known & ~np.isnan(buys)).any()
    happened = torch.from_numpy(np.where(clicks == 1, np.nan_to_num(buys), 0.0))[torch.from_numpy(known)].double()
    wanted = F.binary_cross_entropy((click * buy)[torch.from_numpy(known)], happened)
    torch.testing.assert_close(output["losses"]["cvr"], wanted)


def test_what_is_learned_is_what_is_measured():
    """Of a given task too: purchases of all rows whose click is known, by the probability of both."""
    model = config(tasks={"ctr": {"label": "ctr"}, "relevance": {"label": "relevance"}} | GIVEN)
    whole = from_dict(Config, {"data": {"train": "x"}, "model": model}, "test")
    rows, module, evaluator = make_rows(60), Whole(model), kind_of(whole).evaluator(SCHEMA, whole)
    batch = as_batch(rows, 64)
    output = module(batch)
    evaluator.add_batch(batch, output)
    found = evaluator.compute()["overall"]
    for task, loss in output["losses"].items():
        if task != "loss":
            assert found[task]["logloss"] == pytest.approx(float(loss), abs=1e-6), task
    clicks, buys = rows.labels["ctr"], rows.labels["cvr"]
    assert found["cvr"]["rows"] == int((~np.isnan(clicks) & (~np.isnan(buys) | (clicks == 0))).sum())
    assert found["cvr"]["positives"] == int(((clicks == 1) & (buys == 1)).sum())


def test_products_of_probabilities_neither_vanish_nor_burst():
    edge = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0])
    a, b = torch.meshgrid(edge, edge, indexing="ij")
    a, b = a.flatten().requires_grad_(), b.flatten().requires_grad_()
    logit = both(a, b)
    exact = -np.logaddexp.reduce([-a.detach().double(), -b.detach().double(), -(a + b).detach().double()])
    torch.testing.assert_close(logit.detach().double(), torch.from_numpy(exact))
    F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, 0.5)).backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all() and logit.isfinite().all()


def test_queries_are_left_alone():
    module, rows = Whole(config(), features=EVERYTHING), make_rows()
    wanted = module(as_batch(rows, 24))["logits"]
    other = make_rows(seed=0)
    random = np.random.default_rng(9)
    lengths = random.integers(0, 2, 24)
    other.texts["query_text"] = Ragged.from_lengths(random.integers(0, NUM_TEXTS, lengths.sum()), lengths)
    other.ids["query_id"] = Ragged.from_lengths(random.integers(0, 15, lengths.sum()), lengths)
    torch.testing.assert_close(module(as_batch(other, 24))["logits"], wanted)


def test_half_precision_scores_in_float32():
    module = Whole(config(), dtype=torch.float32)
    batch = as_batch(make_rows(), 24)
    wanted = module(batch)["logits"]
    module.model.to(torch.bfloat16)
    found = module(batch)
    for task, logits in found["logits"].items():
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, wanted[task], rtol=0.1, atol=0.05)
    assert all(x.dtype == torch.float32 for x in module(batch, side="item")["vectors"].values())
    found["loss"].backward()
