"""UniSRec: one pass equals prefix by prefix, ranks together equal one process, and nothing but rows decides."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from naive_unisrec import CONTRAST, EVERY_ITEM, ITEMS, LOSSES, Naive, compared, loss_keys, same_draws
from ranks import gradients, run_ranks
from sequence_batches import NUM_ITEMS, NUM_TEXTS, Row, Whole, as_batch, draws_of_rows, make_rows

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("item", ITEMS)
def test_one_pass_equals_prefix_by_prefix(item, loss):
    """Also of sequences longer than the encoder's reach, of single items and of items without text."""
    rows = make_rows(10, longest=8)
    whole = Whole(item=item, **loss_keys(loss), contrast=CONTRAST)
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
    whole = Whole(item=item, **loss_keys(loss), contrast=contrast, official=official)
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
    whole = Whole(item=item, **loss_keys(loss), contrast=CONTRAST, adaptor={"noise": True, "dropout": 0.2})
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
