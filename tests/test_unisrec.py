"""UniSRec: one pass equals prefix by prefix, ranks together equal one process, and nothing but rows decides."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from ranks import gradients, run_ranks
from sequence_batches import (
    NUM_ITEMS,
    NUM_TEXTS,
    SCHEMA,
    TEXT_OF,
    TEXT_WIDTH,
    WIDTH,
    Row,
    Whole,
    as_batch,
    draws_of_rows,
    make_rows,
    text_vectors,
)
from torch import Tensor, nn
from torch.nn import functional as F

from dist_rec.config.unisrec import UniSRecConfig
from dist_rec.errors import UserError
from dist_rec.layers.augment import Draws
from dist_rec.layers.reduction import Reduction
from dist_rec.layers.whitening import WhiteningMixture
from dist_rec.models.unisrec import UniSRec, towers_of
from dist_rec.strict import from_dict

EVERY_ITEM = list(range(NUM_ITEMS))
ITEMS = ["text", "id", "text+id"]
LOSSES = ["in_batch", "full", "sampled", "full, repeats", "sampled, repeats"]
CONTRAST = {"weight": 0.7, "item_drop": 0.3, "word_drop": 0.4, "item_drop_share": 0.5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Naive:
    """The usual way, from a model's parameters: one padded sequence for each prefix, the adaptor at each occurrence."""

    def __init__(self, whole: Whole) -> None:
        self.whole, self.model, self.config = whole, whole.model, whole.model.config

    def item(self, item: int, dropped: bool = False) -> Tensor:
        found = torch.zeros(WIDTH, dtype=torch.float64)
        if self.config.with_text and TEXT_OF[item] < NUM_TEXTS:
            adaptor, words = self.model.adaptor, slice(TEXT_WIDTH, None) if dropped else slice(0, TEXT_WIDTH)
            x = torch.from_numpy(text_vectors()[TEXT_OF[item], words]).double()
            gate = torch.softmax(x @ adaptor.gate, 0)
            for k in range(len(gate)):
                found = found + gate[k] * ((x - adaptor.bias[k]) @ adaptor.weight[k])
        if self.config.with_ids:
            found = found + self.whole.table.weight[item]
        return found

    def state(self, vectors: list[Tensor]) -> Tensor:
        return F.normalize(self.last(vectors), dim=0)

    def last(self, vectors: list[Tensor]) -> Tensor:
        """The last state of a sequence of item vectors, padded on the right to the longest."""
        encoder, n = self.model.encoder, len(vectors)
        longest = len(encoder.positions)
        x = torch.stack(vectors + [torch.zeros(WIDTH, dtype=torch.float64)] * (longest - n)) + encoder.positions
        x = F.layer_norm(x, (WIDTH,), encoder.input_norm.weight, encoder.input_norm.bias, 1e-12)
        hidden = torch.ones(longest, longest, dtype=torch.bool).triu(1) | (torch.arange(longest) >= n)
        for block in encoder.blocks:
            heads, mixed = block.heads, []
            for h, (q, k, v) in enumerate(
                zip(*(part.chunk(heads, 1) for part in block.qkv(x).chunk(3, 1)), strict=True)
            ):
                scores = (q @ k.t()) / math.sqrt(WIDTH / heads)
                mixed.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), 1) @ v)
                assert h < heads
            x = block.attention_norm(x + block.out(torch.cat(mixed, 1)))
            x = block.feedforward_norm(x + block.contract(F.gelu(block.expand(x))))
        return x[n - 1]

    def logits(self, before: list[int], items: list[int]) -> Tensor:
        """Of items after what came before."""
        last = self.last([self.item(i) for i in before])
        raised = self.model.repeats(last)[0] if self.config.repeats else torch.zeros(()).double()
        state = F.normalize(last, dim=0)
        return torch.stack(
            [state @ self.direction(i) / self.config.temperature + raised * (i in before) for i in items]
        )

    def prefixes(self, rows: list[Row]) -> list[tuple[int, list[int], int]]:
        """Number of the row, what comes before, and the target, of every position."""
        longest = len(self.model.encoder.positions)
        found = []
        for row in rows:
            items = row.items[-longest - 1 :]
            found += [(row.number, items[:j], items[j]) for j in range(1, len(items))]
        return found

    def direction(self, item: int) -> Tensor:
        vector = self.item(item)
        return vector if not vector.any() else F.normalize(vector, dim=0)

    def sequence_item(self, rows: list[Row], candidates: list[int] | None, weight: list[float] | None) -> Tensor:
        prefixes, losses = self.prefixes(rows), []
        for _, before, target in prefixes:
            of = [t for _, _, t in prefixes] if candidates is None else candidates
            right, *scores = torch.exp(self.logits(before, [target, *of]))
            others = right
            for i, item in enumerate(of):
                if item != target:
                    others = others + (1.0 if weight is None else weight[i]) * scores[i]
            losses.append(-torch.log(right / others))
        return torch.stack(losses).mean()

    def sequence_sequence(self, rows: list[Row], draws: dict[int, tuple[float, list[float]]]) -> Tensor:
        """One copy of every sequence, cut at each prefix."""
        prefixes, contrast, copies = self.prefixes(rows), self.config.contrast, []
        for number, before, _ in prefixes:
            kind, drops = draws[number]
            if kind < contrast.item_drop_share:
                kept = [self.item(i) for j, i in enumerate(before) if j == 0 or drops[j] >= contrast.item_drop]
            else:
                kept = [self.item(i, dropped=drops[j] < contrast.word_drop) for j, i in enumerate(before)]
            copies.append(self.state(kept))
        losses = []
        for p, (number, before, target) in enumerate(prefixes):
            state = self.state([self.item(i) for i in before])
            right = torch.exp(state @ copies[p] / self.config.temperature)
            others = right
            for c, (other, _, of_other) in enumerate(prefixes):
                if other != number and of_other != target:
                    others = others + torch.exp(state @ copies[c] / self.config.temperature)
            losses.append(-torch.log(right / others))
        return torch.stack(losses).mean()


def same_draws(rows: list[Row], longest: int = 5) -> dict[int, tuple[float, list[float]]]:
    """What `draws_of_rows` draws."""
    found = {}
    for row in rows:
        generator = np.random.default_rng(row.number)
        kind = float(generator.random(1)[0])
        found[row.number] = kind, generator.random(min(len(row.items) - 1, longest)).tolist()
    return found


def compared(loss: str, share: slice = slice(None)) -> dict:
    """What a rank compares with: of the catalogue, or of five items with weights, some part."""
    if loss == "in_batch":
        return {}
    if loss.startswith("full"):
        return {"candidates": EVERY_ITEM[share]}
    return {"candidates": [3, 8, 21, 6, 0][share], "weight": [2.5, 1.0, 4.0, 0.5, 3.0][share]}


def of(loss: str) -> dict:
    """Keys of the config."""
    return {"loss": loss.partition(",")[0], "repeats": "repeats" in loss}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("item", ITEMS)
def test_one_pass_equals_prefix_by_prefix(item, loss):
    """Also of sequences longer than the encoder's reach, of single items and of items without text."""
    rows = make_rows(10, longest=8)
    whole = Whole(item=item, **of(loss), contrast=CONTRAST)
    whole.model._draws = draws_of_rows
    output = whole(as_batch(rows, 12, **compared(loss)))
    output["loss"].backward()
    found, parts = gradients(whole), compared(loss)
    whole.zero_grad()
    naive = Naive(whole)
    assert {len(before) for _, before, _ in naive.prefixes(rows)} == {1, 2, 3, 4, 5}
    # Some targets came before, some sequences have an item twice.
    assert any(target in before for _, before, target in naive.prefixes(rows))
    assert any(len(set(before)) < len(before) for _, before, _ in naive.prefixes(rows))
    sequence_item = naive.sequence_item(rows, parts.get("candidates"), parts.get("weight"))
    if item == "id":
        # There are no words to drop: every copy loses items.
        whole.model.config.contrast.item_drop_share = 1.0
    sequence_sequence = naive.sequence_sequence(rows, same_draws(rows))
    expected = sequence_item + CONTRAST["weight"] * sequence_sequence
    expected.backward()
    losses = {"sequence_item": sequence_item, "sequence_sequence": sequence_sequence, "loss": expected}
    for name, value in losses.items():
        torch.testing.assert_close(output["losses"][name], value.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output["loss"], expected)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("item", ITEMS)
def test_ranks_together_equal_one_process_on_the_global_batch(item, loss, official):
    """Three ranks: many rows, few, none; unequal parts of the candidates, one without any."""
    rows = make_rows(14)
    contrast = CONTRAST | ({"item_drop_share": 1.0} if official else {})
    whole = Whole(item=item, **of(loss), contrast=contrast, official=official)
    whole.model._draws = draws_of_rows
    one = whole(as_batch(rows, 14, **compared(loss)))
    one["loss"].backward()
    shares = [slice(0, 2), slice(2, None), slice(0, 0)]
    parts = [rows[:10], [], rows[10:]]
    batches = [as_batch(p, 11, **compared(loss, s)) for p, s in zip(parts, shares, strict=True)]
    mean, outputs = run_ranks(whole, batches)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(mean[name], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for output in outputs:
        torch.testing.assert_close(output["losses"], one["losses"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack([o["loss"] for o in outputs]).mean(), one["loss"])


@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("item", [*ITEMS, "text, repeats", "text+id, repeats"])
def test_ranks_of_items_are_those_of_all_ranks_candidates(item, mask_history):
    rows, item, repeats = make_rows(14), item.partition(",")[0], "repeats" in item
    whole = Whole(item=item, loss="full" if repeats else "in_batch", repeats=repeats).eval()
    whole.model.mask_history = mask_history
    one = whole(as_batch(rows, 16, EVERY_ITEM))
    naive = Naive(whole)
    for b, row in enumerate(rows):
        *before, target = row.items
        expected, left = 1.0, set(before) if mask_history else set()
        scores = naive.logits(before[-5:], EVERY_ITEM).detach() if before else torch.zeros(NUM_ITEMS).double()
        for other in set(EVERY_ITEM) - {target} - left:
            difference = float(scores[other] - scores[target])
            expected += 0.5 if abs(difference) < 1e-6 else float(difference > 0)
        if before:
            assert float(one["logits"]["next"][b]) == pytest.approx(float(scores[target]), abs=1e-9)
        assert float(one["rank"][b]) == expected, (b, row)
    assert one["rank"][14:].isnan().all()
    # Items that share a text tie; a row without history ties with all.
    assert item != "text" or any(float(r) % 1 == 0.5 for r in one["rank"][:14])
    parts = [(rows[:10], EVERY_ITEM[:20]), ([], EVERY_ITEM[20:]), (rows[10:], [])]
    _, outputs = run_ranks(whole, [as_batch(p, 11, c) for p, c in parts])
    torch.testing.assert_close(outputs[0]["rank"][:10], one["rank"][:10])
    torch.testing.assert_close(outputs[2]["rank"][:4], one["rank"][10:14])
    assert outputs[1]["rank"].isnan().all()


@pytest.mark.parametrize(("item", "loss"), [("text", "in_batch"), ("text+id", "full")])
def test_a_catalogue_is_kept_for_the_batches_of_a_pass_that_list_none(item, loss):
    """Ranks and losses as if every batch listed it, until the model trains."""
    first, second = make_rows(14)[:8], make_rows(14)[8:]
    whole = Whole(item=item, loss=loss).eval()
    listed = whole(as_batch(second, 8, EVERY_ITEM))
    whole(as_batch(first, 8, EVERY_ITEM))
    kept = whole(as_batch(second, 8, []))
    for key in ("rank", "loss"):
        torch.testing.assert_close(kept[key], listed[key], equal_nan=True)
    # The next pass is of other items.
    whole(as_batch(first, 8, EVERY_ITEM[:9]))
    assert (
        float(kept["rank"].nan_to_num().max()) > 10 >= float(whole(as_batch(second, 8, []))["rank"].nan_to_num().max())
    )
    whole.train().eval()
    with pytest.raises(ValueError, match="without 'candidates'") if loss == "full" else nullcontext():
        assert "rank" not in whole(as_batch(second, 8, []))


def test_evaluation_is_of_the_rows_item_alone_and_has_ranks_only_with_candidates():
    rows = make_rows(8)
    whole = Whole(contrast={"weight": 0.5}).eval()
    output = whole(as_batch(rows, 8))
    assert set(output["losses"]) == {"sequence_item", "sequence_sequence", "loss"} and "rank" not in output
    assert "rank" not in whole(as_batch(rows, 8, []))
    naive = Naive(whole)
    ends = [(r.items[-6:-1], r.items[-1]) for r in rows if len(r.items) > 1]
    losses = []
    for before, target in ends:
        state = naive.state([naive.item(i) for i in before])
        scores = torch.stack([state @ naive.direction(t) for _, t in ends if t != target]) / 0.3
        right = state @ naive.direction(target) / 0.3
        losses.append(torch.logsumexp(torch.cat([scores, right[None]]), 0) - right)
    torch.testing.assert_close(output["losses"]["sequence_item"], torch.stack(losses).mean().detach())


def test_a_row_without_history_ranks_all_items_alike_and_one_without_item_ranks_none():
    whole = Whole(item="text+id").eval()
    batch = as_batch([Row(1, 0, [4]), Row(2, 0, [4, 5, 9])], 2, EVERY_ITEM)
    # The second row loses its item: what is left is history.
    batch.identity["item"], batch.identity_lengths["item"] = batch.identity["item"][:1], torch.tensor([1, 0])
    output = whole(batch)
    assert float(output["rank"][0]) == 1 + (NUM_ITEMS - 1) / 2 and output["rank"][1].isnan()
    assert output["losses"]["sequence_item"] == 0
    # Its own item is none of them, whichever there are.
    output = whole(as_batch([Row(1, 0, [4])], 1, [4]))
    assert float(output["rank"][0]) == 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("what", ["single items", "no rows", "no texts"])
def test_every_parameter_has_a_gradient_whatever_is_absent(what, item, loss):
    whole = Whole(item=item, **of(loss), contrast=CONTRAST, adaptor={"noise": True, "dropout": 0.2})
    rows = {"single items": [Row(i, 0, [i]) for i in range(4)], "no rows": [], "no texts": [Row(7, 0, [6, 13, 20])]}
    batch = as_batch(rows[what], 4, **compared(loss))
    if what == "no texts":
        batch.text_vectors = batch.text_vectors[:0]
        for index in batch.text_index.values():
            index.zero_()
    output = whole(batch)
    output["loss"].backward()
    assert output["loss"].isfinite() and (what == "no texts" or output["loss"] == 0)
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert what == "no texts" or not parameter.grad.any(), name


def test_masked_rows_change_nothing():
    rows, found = make_rows(), []
    whole = Whole(item="text+id", contrast=CONTRAST)
    whole.model._draws = draws_of_rows
    for size in (12, 19):
        whole.zero_grad()
        output = whole(as_batch(rows, size))
        output["loss"].backward()
        found.append((output["losses"], gradients(whole)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    # Whatever a masked row claims to hold.
    batch = as_batch(rows, 12)
    batch.valid[3:] = False
    whole.zero_grad()
    losses = whole(batch)["losses"]
    torch.testing.assert_close(losses, whole(as_batch(rows[:3], 3))["losses"])


def test_the_same_item_elsewhere_is_no_negative():
    """Of another user, in another domain: the loss of everybody else's positions stays what it was."""
    rows = [Row(1, 0, [1, 2]), Row(2, 1, [3, 4])]
    whole = Whole(contrast={"weight": 0.5, "item_drop": 0.0, "item_drop_share": 1.0})
    before = whole(as_batch(rows, 3))["losses"]
    # A third user with the first one's target: the first has as many negatives as before, the second one more.
    third = Naive(whole).sequence_item([*rows, Row(3, 2, [5, 2])], None, None)
    after = whole(as_batch([*rows, Row(3, 2, [5, 2])], 3))["losses"]
    torch.testing.assert_close(after["sequence_item"], third.detach())
    alone = whole(as_batch([rows[0]], 3))["losses"]
    twice = whole(as_batch([rows[0], Row(9, 1, [1, 2])], 3))["losses"]
    assert all(abs(float(value)) < 1e-12 for value in [*alone.values(), *twice.values()])
    assert float(before["sequence_item"]) > 1e-3


def test_in_batch_negatives_are_of_all_domains_and_ranks():
    rows = [Row(1, 0, [1, 2]), Row(2, 2, [3, 4])]
    whole = Whole()
    _, outputs = run_ranks(whole, [as_batch(rows[:1], 1), as_batch(rows[1:], 1)])
    alone = [float(whole(as_batch([row], 1))["loss"]) for row in rows]
    assert max(alone) < 1e-12 < 1e-3 < float(outputs[0]["losses"]["loss"])


def test_the_adaptor_sees_each_distinct_text_once():
    calls = []
    whole = Whole(contrast=CONTRAST, item="text+id", loss="full")
    whole.model._draws = draws_of_rows
    whole.model.adaptor.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    whole(as_batch(make_rows(200), 200, EVERY_ITEM))
    assert len(calls) == 1 and NUM_TEXTS < calls[0] <= 2 * NUM_TEXTS
    whole.eval()(as_batch(make_rows(200), 200, EVERY_ITEM))
    assert calls[1:] == [NUM_TEXTS]


def test_longer_sequences_keep_their_newest():
    whole = Whole(contrast={"weight": 0.3, "item_drop": 0.0, "item_drop_share": 1.0}, item="text+id")
    long, short = Row(1, 0, list(range(20))), Row(1, 0, list(range(14, 20)))
    torch.testing.assert_close(whole(as_batch([long], 1))["losses"], whole(as_batch([short], 1))["losses"])


def test_an_item_without_text_is_zeros_before_positions():
    whole = Whole().eval()
    output = whole(as_batch([Row(1, 0, [1, 2, 6])], 1, [6, 1, 2, 3]))
    state = Naive(whole).state([Naive(whole).item(i) for i in (1, 2)])
    higher = sum(float(state @ Naive(whole).direction(i)) > 0 for i in (1, 2, 3))
    assert float(output["rank"][0]) == 1 + higher
    with torch.no_grad():
        whole.model.adaptor.bias.add_(1.0)
    naive = Naive(whole)
    assert not naive.item(6).any()
    one = whole(as_batch([Row(1, 0, [6, 2]), Row(2, 0, [3, 4])], 2))["losses"]["sequence_item"]
    losses = []
    for before, target, other in ((6, 2, 4), (3, 4, 2)):
        state = naive.state([naive.item(before)])
        scores = torch.stack([state @ naive.direction(target), state @ naive.direction(other)]) / 0.3
        losses.append(-torch.log_softmax(scores, 0)[0])
    torch.testing.assert_close(one, torch.stack(losses).mean().detach())


def test_noise_and_dropout_are_of_training_only():
    batch = as_batch(make_rows(), 12)
    quiet = {"encoder": {"dropout": 0.0, "attention_dropout": 0.0}}
    for changes in (
        {"adaptor": {"noise": True}},
        {"adaptor": {"dropout": 0.3}},
        {"encoder": {"dropout": 0.4}},
        {"encoder": {"attention_dropout": 0.4}},
    ):
        whole = Whole(**{**quiet, **changes})
        assert float(whole(batch)["loss"]) != float(whole(batch)["loss"])
        torch.manual_seed(3)
        first = float(whole(batch)["loss"])
        torch.manual_seed(3)
        assert float(whole(batch)["loss"]) == first
        whole.eval()
        assert float(whole(batch)["loss"]) == float(whole(batch)["loss"])


def test_a_scaled_adaptor_reads_longer_vectors():
    plain = WhiteningMixture(TEXT_WIDTH, 6, 3, 0.2, True)
    scaled = WhiteningMixture(TEXT_WIDTH, 6, 3, 0.2, True, scale=15.0)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(7, TEXT_WIDTH)
    for mode in (True, False):
        found = []
        for adaptor, given in ((plain.train(mode), 15 * x), (scaled.train(mode), x)):
            torch.manual_seed(0)
            found.append(adaptor(given))
        torch.testing.assert_close(*found)


def test_the_gates_noise_has_the_deviation_it_should():
    adaptor = Whole(adaptor={"noise": True}).model.adaptor
    x = torch.randn(1, TEXT_WIDTH).double().expand(20_000, -1)
    noise = adaptor.gates(x).log() - adaptor.eval().gates(x).log()
    deviation = F.softplus(x[0] @ adaptor.gate_noise) + 0.01
    # Softmax leaves differences: their variances are sums.
    for k in range(3):
        i, j = k, (k + 1) % 3
        found = (noise[:, i] - noise[:, j]).std()
        assert float(found / torch.hypot(deviation[i], deviation[j])) == pytest.approx(1, abs=0.03)


def test_parameters_start_as_the_paper_says():
    torch.manual_seed(1)
    config = Whole(width=64, adaptor={"noise": True, "experts": 8}, encoder={"max_length": 50, "feedforward": 64})
    model = UniSRec(SCHEMA, config.model.config, {}, 384, None, list(SCHEMA.features), Reduction())
    stds = {n: float(p.std()) for n, p in model.named_parameters() if p.ndim > 1}
    for name, std in stds.items():
        expected = 0.0 if name in ("adaptor.gate", "adaptor.gate_noise", "adaptor.bias") else 0.02
        assert std == pytest.approx(expected, rel=0.1), name
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == ("norm.weight" in name)).all()), name
    assert model.encoder.input_norm.eps == 1e-12


def test_half_precision_parameters_give_full_precision_losses():
    whole = Whole(item="text+id", contrast=CONTRAST)
    whole.model.bfloat16()
    output = whole(as_batch(make_rows(), 12))
    output["loss"].backward()
    assert output["loss"].dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in whole.parameters())
    full = Whole(item="text+id", contrast=CONTRAST)
    full.load_state_dict(whole.state_dict())
    full.model._draws = whole.model._draws = draws_of_rows
    expected = full(as_batch(make_rows(), 12))["losses"]["loss"]
    torch.testing.assert_close(whole(as_batch(make_rows(), 12))["losses"]["loss"], expected.float(), rtol=0.03, atol=0)


def test_a_model_that_trains_learns_the_next_item():
    """Item i is followed by i + 1: after some steps it ranks first."""
    rows = [Row(i, 0, [(i + j) % 20 for j in range(5)]) for i in range(20)]
    whole = Whole(loss="full", item="text+id", temperature=0.1)
    optimizer = torch.optim.Adam(whole.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        whole(as_batch(rows, 20, EVERY_ITEM))["loss"].backward()
        optimizer.step()
    ranks = whole.eval()(as_batch(rows, 20, EVERY_ITEM))["rank"]
    assert float(ranks.mean()) < 1.5


def test_dropped_words_need_a_second_store():
    """Without one every copy loses items."""
    whole = Whole(contrast=CONTRAST | {"item_drop_share": 0.0, "item_drop": 0.5})
    whole.model._draws = draws_of_rows
    rows = make_rows()
    two = whole(as_batch(rows, 12))["losses"]["sequence_sequence"]
    one = whole(as_batch(rows, 12, vectors=text_vectors()[:, :TEXT_WIDTH]))["losses"]["sequence_sequence"]
    whole.model.config.contrast.item_drop_share = 1.0
    items = Naive(whole).sequence_sequence(rows, same_draws(rows))
    torch.testing.assert_close(one, items.detach())
    assert abs(float(one - two)) > 1e-6


def test_a_schema_without_sequences_and_a_table_of_another_width_are_refused():
    config = Whole(item="text+id").model.config
    features = list(SCHEMA.features)
    with pytest.raises(UserError, match="tables.overrides.item.dim: 8"):
        UniSRec(SCHEMA, config, {"item": 12}, TEXT_WIDTH, None, features, Reduction())
    with pytest.raises(UserError, match="needs texts"):
        UniSRec(SCHEMA, config, {"item": WIDTH}, 0, None, features, Reduction())
    with pytest.raises(UserError, match="temperature 0.01"):
        Whole(temperature=0.01)
    from test_foundation import SCHEMA as FOUNDATION

    with pytest.raises(UserError, match=r"one history feature of kind ids.* has 3 \(clicked, clicked_category, bought"):
        UniSRec(FOUNDATION, config, {"item": WIDTH}, TEXT_WIDTH, None, list(FOUNDATION.features), Reduction())
    chosen = ["clicked", "clicked_title", "item", "title"]
    UniSRec(FOUNDATION, config, {"item": WIDTH}, TEXT_WIDTH, None, chosen, Reduction())


def test_officially_a_catalogue_has_no_other_occurrence_of_a_target():
    losses = []
    for official in (False, True):
        torch.manual_seed(0)
        losses.append(Whole(loss="full", official=official)(as_batch(make_rows(), 12, EVERY_ITEM))["loss"])
    torch.testing.assert_close(*losses)


def test_a_loss_over_the_catalogue_needs_one():
    with pytest.raises(ValueError, match="without 'candidates'"):
        Whole(loss="full")(as_batch(make_rows(), 12))


@pytest.mark.parametrize("item", ["text", "text+id"])
def test_a_co_trained_encoder_reads_each_text_once(item):
    whole = Whole(item=item, contrast=CONTRAST)
    batch = as_batch(make_rows(), 12)
    expected = whole(as_batch(make_rows(), 12, vectors=text_vectors()[:, :TEXT_WIDTH]))

    class Encoder(torch.nn.Module):
        def forward(self, tokens, mask):
            return torch.from_numpy(text_vectors()[:, :TEXT_WIDTH]).double()

    whole.model.text_encoder = Encoder()
    batch.text_tokens, batch.text_vectors = torch.zeros(NUM_TEXTS, 1), batch.text_vectors[:, :0]
    torch.testing.assert_close(whole(batch)["losses"]["sequence_item"], expected["losses"]["sequence_item"])


def test_repeats_start_as_nothing_and_make_an_index_of_inner_products_inexact():
    changes = {"width": WIDTH, "loss": "full"}
    plain, raised = (from_dict(UniSRecConfig, changes | {"repeats": r}, "test") for r in (False, True))
    model = UniSRec(SCHEMA, raised, {}, TEXT_WIDTH, None, list(SCHEMA.features), Reduction())
    assert not model.repeats.weight.any() and not model.repeats.bias.any()
    assert towers_of(SCHEMA, plain, list(SCHEMA.features)).exact == {"next": True}
    towers = towers_of(SCHEMA, raised, list(SCHEMA.features))
    assert towers.exact == {"next": False} and "repeats" in towers.why["next"]


def test_draws_follow_torchs_generator():
    whole, batch = Whole(contrast=CONTRAST), as_batch(make_rows(), 12)
    torch.manual_seed(4)
    first = whole(batch)["losses"]
    second = whole(batch)["losses"]
    torch.manual_seed(4)
    torch.testing.assert_close(whole(batch)["losses"], first, rtol=0, atol=0)
    assert float(first["sequence_sequence"]) != float(second["sequence_sequence"])
    assert isinstance(whole.model._draws(batch, _sequences(batch)), Draws)


def _sequences(batch):
    from dist_rec.layers.causal import Sequences

    return Sequences(torch.tensor([1]), torch.tensor([0]), torch.tensor([0]))
