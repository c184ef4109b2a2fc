"""Texts with words dropped: the same words in every run, in a store that is not taken for one of whole texts."""

from __future__ import annotations

import numpy as np
import pytest
from test_text import TITLES, reference, token_ids, write_data_set

from dist_rec.data.blocks import text_key
from dist_rec.errors import UserError
from dist_rec.text.embed import embed
from dist_rec.text.onthefly import FrozenVectors, SideBySide
from dist_rec.text.store import Recipe, VectorStore, read_store_info
from dist_rec.text.words import drop_words

LONG = " ".join(f"w{i}" for i in range(2000))
OPTIONS = {"store_dtype": "float32", "max_tokens": 32}


def test_words_are_dropped_by_seed_and_key():
    kept = drop_words(LONG, 7, 0.3, 0).split()
    assert kept == [word for word in LONG.split() if word in set(kept)], "the order is the text's"
    # Four standard errors of a binomial share.
    assert len(kept) / 2000 == pytest.approx(0.7, abs=0.041)
    assert drop_words(LONG, 7, 0.3, 0) == " ".join(kept)
    assert drop_words(LONG, 8, 0.3, 0).split() != kept != drop_words(LONG, 7, 0.3, 1).split()
    assert set(drop_words(LONG, -7, 0.6, 0).split()) < set(drop_words(LONG, -7, 0.3, 0).split())


def test_a_text_keeps_a_word():
    assert {drop_words("one two", key, 0.999, 0) for key in range(50)} == {"one", "two"}
    assert drop_words("one", 3, 0.999, 0) == "one" and drop_words("", 3, 0.5, 0) == ""
    assert drop_words("  a \n b  ", 3, 0.0, 0) == "a b"


@pytest.mark.parametrize("tokenised", [True, False])
def test_the_store_has_the_vectors_of_what_is_left_under_the_keys_of_the_whole(tiny_model, tmp_path, tokenised):
    data = write_data_set(tmp_path / "data", TITLES, **({} if tokenised else {"tokenizer": None}))
    out = str(tmp_path / "dropped")
    embed([data], tiny_model, out, word_drop=0.5, drop_seed=3, **OPTIONS)
    store, keys = VectorStore.open(out), [text_key(title) for title in TITLES]
    assert (store.info.recipe.word_drop, store.info.recipe.drop_seed) == (0.5, 3)
    left = [drop_words(title, key, 0.5, 3) for title, key in zip(TITLES, keys, strict=True)]
    assert left != TITLES
    np.testing.assert_allclose(store.lookup(np.array(keys)), reference(tiny_model, token_ids(left)), atol=1e-5)
    again = embed([data], tiny_model, out, word_drop=0.5, drop_seed=3, **OPTIONS)
    assert again.added == 0
    # Another recipe never shares a store.
    for other in ({}, {"word_drop": 0.4, "drop_seed": 3}, {"word_drop": 0.5}):
        with pytest.raises(UserError, match="another recipe"):
            embed([data], tiny_model, out, **OPTIONS, **other)
    # A missing text is told with a command that makes the same.
    with pytest.raises(UserError, match=r"--word-drop 0\.5 --drop-seed 3`\.$"):
        FrozenVectors(store, data)(np.array([5]), None)


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(tiny_model, tmp_path, share):
    with pytest.raises(UserError, match="word_drop is a share"):
        embed([write_data_set(tmp_path / "data", TITLES)], tiny_model, str(tmp_path / "x"), word_drop=share)


def test_whole_and_dropped_lie_side_by_side_and_are_told_apart(tiny_model, tmp_path):
    data = write_data_set(tmp_path / "data", TITLES)
    for name, drop in (("whole", 0.0), ("dropped", 0.5)):
        embed([data], tiny_model, str(tmp_path / name), word_drop=drop, **OPTIONS)
    whole, dropped = VectorStore.open(tmp_path / "whole"), VectorStore.open(tmp_path / "dropped")
    whole.check_words(dropped=False)
    dropped.check_words(dropped=True)
    with pytest.raises(UserError, match="text.dropped_store .*whole holds vectors of texts with no words dropped"):
        whole.check_words(dropped=True)
    with pytest.raises(UserError, match="text.store .*dropped holds .* a share of 0.5 has words dropped"):
        dropped.check_words(dropped=False)
    keys = np.sort([text_key(title) for title in TITLES])
    found = SideBySide(FrozenVectors(whole, data), FrozenVectors(dropped, data))(keys, None)
    assert found.dtype == np.float32 and found.shape == (len(TITLES), 2 * whole.width)
    np.testing.assert_array_equal(found[:, : whole.width], whole.lookup(keys))
    np.testing.assert_array_equal(found[:, whole.width :], dropped.lookup(keys))


def test_stores_that_were_written_before_words_could_be_dropped_are_whole(tiny_model, tmp_path):
    embed([write_data_set(tmp_path / "data", TITLES)], tiny_model, str(tmp_path / "store"))
    recipe = read_store_info(tmp_path / "store").recipe
    fields = {name: value for name, value in vars(recipe).items() if name not in ("word_drop", "drop_seed")}
    assert Recipe(**fields) == recipe
