"""UniSRec's parts: noise, dropout, initial values, precision, draws, and what is refused."""

from __future__ import annotations

import pytest
import torch
from naive_unisrec import CONTRAST, EVERY_ITEM, Naive, same_draws
from sequence_batches import (
    NUM_TEXTS,
    SCHEMA,
    TEXT_WIDTH,
    WIDTH,
    Whole,
    as_batch,
    draws_of_rows,
    make_rows,
    text_vectors,
)
from torch import nn
from torch.nn import functional as F

from dist_rec.config.unisrec import UniSRecConfig
from dist_rec.errors import UserError
from dist_rec.layers.augment import Draws
from dist_rec.layers.reduction import Reduction
from dist_rec.layers.whitening import WhiteningMixture
from dist_rec.models.unisrec import UniSRec, towers_of
from dist_rec.strict import from_dict

pytestmark = pytest.mark.usefixtures("seeded")


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
    from foundation_rows import SCHEMA as FOUNDATION

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
