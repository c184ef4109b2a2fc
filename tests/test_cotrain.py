"""Co-training the language model: gradients, what trains, precision, checkpoints of such runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from conftest import build_small, check_verdicts, run_command, run_ranks
from language_models import make_language_model
from torch import Tensor

from dist_rec.config import LoraConfig, TextConfig
from dist_rec.errors import UserError
from dist_rec.layers.reduction import Reduction
from dist_rec.text.cotrain import CotrainedEncoder, cotrained_encoder
from dist_rec.text.encoder import TextEncoder
from dist_rec.training.start.warm_start import fill_dense, shape_faults, shapes_of

FAMILIES = ("bert", "mpnet", "llama", "gpt2")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("language_models")
    return {family: make_language_model(family, folder / family) for family in (*FAMILIES, "albert")}


def make(model: str, mode: str = "full", reduction: Reduction | None = None, **options) -> CotrainedEncoder:
    """A co-trained encoder in training mode, whose adapters already do something."""
    torch.manual_seed(1)
    config = TextConfig(mode=mode, model=model, **options)
    encoder = cotrained_encoder(config, reduction or Reduction())
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return encoder.train()


def texts(lengths: list[int], width: int | None = None) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    wide = width or max([*lengths, 1])
    mask = torch.arange(wide)[None] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    return torch.randint(1, 3000, mask.shape, generator=draw).where(mask, 0), mask


LENGTHS = [3, 17, 1, 9, 9, 24, 0, 5, 12, 2]
# Rows' queries and titles: most texts are used several times, one never.
QUERIES, TITLES = torch.tensor([0, 2, 2, 0, 7, 9, 0, 2]), torch.tensor([1, 3, 5, 1, 8, 1, 6, 4])


def loss_of(queries: Tensor, titles: Tensor) -> Tensor:
    """Something that every row bends otherwise; `[B, D]` each."""
    turned = queries @ torch.linspace(-1, 1, 256).reshape(16, 16)
    weights = torch.linspace(0.5, 2, len(queries))
    ahead = torch.linspace(-1, 2, 16)
    return (((turned * titles).mean(1) + queries @ ahead / 16).tanh() * weights).sum()


def gradients(encoder: CotrainedEncoder) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-5) -> None:
    """Equal to `limit` of the largest gradient, and to a hundred times that of each parameter's own.

    Those of keys' biases are zero but for rounding.
    """
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-2
    for name, gradient in wanted.items():
        own, difference = float(gradient.abs().max()), float((found[name] - gradient).abs().max())
        assert difference <= limit * largest, name
        assert difference <= 100 * limit * own or own <= 1e-4 * largest, name


def naive_gradients(encoder: CotrainedEncoder, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Every row encodes its own query and title, alone and padded to the longest of all."""

    def encode(rows: Tensor) -> Tensor:
        return torch.cat([TextEncoder.forward(encoder, tokens[i : i + 1], mask[i : i + 1]) for i in rows.tolist()])

    loss_of(encode(QUERIES), encode(TITLES)).backward()
    return gradients(encoder)


def our_gradients(encoder: CotrainedEncoder, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    vectors = encoder(tokens, mask)
    loss_of(vectors[QUERIES], vectors[TITLES]).backward()
    return gradients(encoder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("freeze_layers", [0, 1])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_naive_computation(models, family, mode, freeze_layers, checkpointing):
    encoder = make(models[family], mode, freeze_layers=freeze_layers, checkpointing=checkpointing, batch_tokens=30)
    tokens, mask = texts(LENGTHS, width=26)
    found, wanted = our_gradients(encoder, tokens, mask), naive_gradients(encoder, tokens, mask)
    assert found.keys() == {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert_close(found, wanted)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit(tmp_path, family, mode):
    """Dropout included: what is computed again draws the same masks."""
    model = make_language_model(family, tmp_path, dropout=0.3)
    tokens, mask = texts(LENGTHS)
    found = []
    for checkpointing in (False, True):
        encoder = make(model, mode, checkpointing=checkpointing, lora=LoraConfig(dropout=0.2))
        torch.manual_seed(5)
        found.append(our_gradients(encoder, tokens, mask))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_every_family_reads_short_batches_and_keeps_the_order(models):
    """Padding is cut batch by batch; the vectors are those of each text alone."""
    tokens, mask = texts(LENGTHS, width=64)
    for family in FAMILIES:
        encoder = make(models[family], batch_tokens=30).eval()
        seen = []
        encoder.model.register_forward_pre_hook(
            lambda _, __, named, seen=seen: seen.append(named["input_ids"].shape), with_kwargs=True
        )
        found = encoder(tokens, mask)
        assert found.dtype == torch.float32 and found.shape == (len(LENGTHS), 16)
        assert max(width for _, width in seen) == 24 and sum(count for count, _ in seen) == len(LENGTHS)
        assert all(count * width <= 30 or count == 1 for count, width in seen)
        for i in range(len(LENGTHS)):
            assert torch.allclose(
                found[i], TextEncoder.forward(encoder, tokens[i : i + 1], mask[i : i + 1])[0], atol=1e-5
            )


class ManyBatches(Reduction):
    """Stands for a rank beside others of which one has 5 batches."""

    def largest(self, number: int, device: torch.device) -> int:
        return max(number, 5)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_batches_that_only_other_ranks_have_change_no_gradient(models, mode):
    tokens, mask = texts(LENGTHS)
    calls = []
    found = []
    for reduction in (Reduction(), ManyBatches()):
        encoder = make(models["llama"], mode, reduction, batch_tokens=1000)
        encoder.model.register_forward_hook(lambda *_, reduction=reduction: calls.append(reduction))
        found.append(our_gradients(encoder, tokens, mask))
    assert [type(one) for one in calls] == [Reduction, *[ManyBatches] * 5]
    assert_close(found[1], found[0], 1e-6)


@pytest.mark.parametrize("reduction", [Reduction(), ManyBatches()])
@pytest.mark.parametrize("count", [0, 1])
def test_a_rank_of_no_text_or_one_takes_part(models, reduction, count):
    """Every parameter has a gradient, of zero where there is no text."""
    encoder = make(models["bert"], reduction=reduction)
    tokens, mask = texts([7] * count, width=9)
    vectors = encoder(tokens, mask)
    assert vectors.shape == (count, 16)
    vectors.square().sum().backward()
    found = gradients(encoder)
    assert found.keys() == dict(encoder.named_parameters()).keys()
    assert any(gradient.any() for gradient in found.values()) == bool(count)


def test_frozen_layers_have_neither_gradient_nor_backward(models):
    for family in FAMILIES:
        for mode in ("full", "lora"):
            encoder = make(models[family], mode, freeze_layers=1)
            graphs = []
            for name, module in encoder.model.named_modules():
                if name.endswith((".0", "embeddings", "embed_tokens", "wte")):
                    module.register_forward_hook(
                        lambda _, __, output, name=name, graphs=graphs: graphs.append(
                            (name, (output[0] if isinstance(output, tuple) else output).requires_grad)
                        )
                    )
            our_gradients(encoder, *texts(LENGTHS))
            assert len(graphs) >= 2 and not any(requires for _, requires in graphs), (family, mode, graphs)
            trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
            assert trained and not any(".0." in name.split("lora_")[0] for name in trained)
            assert all(".1." in name or "norm" in name or "ln_f" in name for name in trained), trained


def test_adapters_are_added_where_they_are_asked_for(models):
    def adapted(model, **lora):
        encoder = make(model, "lora", lora=LoraConfig(**lora))
        trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        return trained

    assert len(adapted(models["bert"])) == 2 * 2 * 6
    assert len(adapted(models["llama"])) == 2 * 2 * 7
    assert len(adapted(models["gpt2"])) == 2 * 2 * 4
    some = adapted(models["mpnet"], rank=3, targets=["attn.q", "output.dense"])
    assert len(some) == 2 * 2 * 2 and all(3 in parameter.shape for parameter in some.values())
    with pytest.raises(UserError, match=r"targets query: no linear layer .* have .*mlp\.up_proj.*self_attn\.q_proj"):
        adapted(models["llama"], targets=["query", "q_proj"])


def test_what_a_model_does_not_have_is_refused(models):
    for mode in ("full", "lora"):
        with pytest.raises(UserError, match=r"freeze_layers is 2, but language model .* has 2 layers"):
            make(models["bert"], mode, freeze_layers=2)
    for options in ({"mode": "lora"}, {"freeze_layers": 1}, {"checkpointing": True}):
        with pytest.raises(UserError, match="uses one layer again and again"):
            make(models["albert"], **options)
    encoder = make(models["albert"])
    assert our_gradients(encoder, *texts(LENGTHS))


def test_dropout_is_the_models_own_in_training_and_none_in_evaluation(tmp_path, models):
    """A seed repeats it, as seeds of steps do; a text has one mask, however many rows use it."""
    encoder = make(make_language_model("bert", tmp_path, dropout=0.3))
    tokens, mask = texts(LENGTHS)

    def encode(seed):
        torch.manual_seed(seed)
        return encoder(tokens, mask).detach()

    assert torch.equal(encode(0), encode(0)) and not torch.allclose(encode(0), encode(1), atol=1e-3)
    encoder.eval()
    assert torch.equal(encode(0), encode(1))
    still = make(models["bert"])
    assert torch.equal(still(tokens, mask), still.eval()(tokens, mask))


def test_bf16_keeps_the_frequencies_of_positions(models):
    encoder = make(models["llama"])
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers() if buffer.is_floating_point()}
    assert before
    nn_parent = torch.nn.ModuleDict({"text_encoder": encoder}).bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in nn_parent.parameters())
    for name, buffer in encoder.named_buffers():
        assert name not in before or torch.equal(buffer, before[name])
    found = encoder(*texts(LENGTHS))
    assert found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.parametrize("family,checkpointing", [("bert", "false"), ("mpnet", "true"), ("llama", "true")])
def test_ranks_of_any_zero_stage_equal_one_process(models, family, checkpointing):
    """Ranks with another number of texts each, one with none in one step; and bf16 trains."""
    options = ["full,lora", "1,2,3", f"checkpointing={checkpointing}"]
    check_verdicts(run_ranks(2, ["tests/cotrain_worker.py", models[family], *options], 400), 18)


def test_frozen_layers_under_every_zero_stage(models):
    options = ["full,lora", "0,1,3", "checkpointing=true", "freeze_layers=1"]
    check_verdicts(run_ranks(3, ["tests/cotrain_worker.py", models["llama"], *options], 400), 16)


SAVED = {"lora+0": 1, "lora+1": 3, "full+1": 2}
LOADED = {1: {"lora+0": 3, "lora+1": 0, "full+1": 1}, 2: {"lora+0": 2, "lora+1": 1, "full+1": 3}}


def test_checkpoints_of_any_ranks_and_zero_stage(tmp_path, models):
    """Adapters and frozen base parameters come back to the bit; the same layout goes on bit by bit."""
    data, folder = build_small(tmp_path, tokenizer=models["bert"]), tmp_path / "checkpoints"
    folder.mkdir()

    def jobs(kind, stages):
        for how, stage in stages.items():
            layout = f"row_wise/rowwise_adagrad/{stage}/fp32/adamw"
            yield f"{kind}:{how.replace('+', '')}:{layout}:{how}@{models['bert']}"

    words = [*jobs("save", SAVED), *jobs("load", SAVED), *jobs("load", LOADED[2])]
    check_verdicts(run_ranks(2, ["tests/checkpoint_worker.py", data, str(folder), *words], 400), len(words))
    words = list(jobs("load", LOADED[1]))
    check_verdicts(run_ranks(1, ["tests/checkpoint_worker.py", data, str(folder), *words], 400), len(words))


class Saved:
    """What a checkpoint of a language model alone holds, with every parameter one higher than `text.model` has it."""

    def __init__(self, encoder: CotrainedEncoder) -> None:
        self.folder, self.manifest = "saved", self
        self.dense = {f"text_encoder.{name}": parameter for name, parameter in encoder.named_parameters()}

    def fill(self, name: str, info: Tensor, kind: str, box: object, target: Tensor) -> None:
        with torch.no_grad():
            target.copy_(info.flatten() + 1)


@pytest.mark.parametrize("targets", [[], ["query"]])
def test_adapters_start_beside_a_model_that_was_trained_whole(models, targets):
    """peft renames the layers that get one; what an adapter has learnt is never dropped unsaid."""
    whole, adapted = make(models["bert"]), make(models["bert"], "lora", lora=LoraConfig(targets=targets))
    model = torch.nn.ModuleDict({"text_encoder": adapted})
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    fill_dense(Saved(whole), model, (), 1, [])
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name] + ("lora_" not in name)), name
    faults = shape_faults(shapes_of(torch.nn.ModuleDict({"text_encoder": whole})), (), Saved(adapted), 1)
    assert any("lora_A.default.weight is in the foundation's checkpoint" in fault for fault in faults)
    more = make(models["bert"], "lora")
    assert not shape_faults(shapes_of(torch.nn.ModuleDict({"text_encoder": more})), (), Saved(adapted), 1)


def test_a_run_with_adapters_trains_and_is_evaluated(tmp_path, models):
    """By the command line on 2 ranks; `evaluate` on one finds the frozen base and the adapters again."""
    data = build_small(tmp_path, tokenizer=models["bert"])
    config = {
        "run": {"root": str(tmp_path / "runs"), "name": "adapters"},
        "data": {"train": data, "test": data, "batch_size": 64},
        "tables": {"dim": 8},
        "text": {"mode": "lora", "model": models["bert"], "learning_rate": 0.01, "checkpointing": True},
        "model": {"width": 16, "history": {"feedforward": 16}},
        "train": {"epochs": 1},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = run_ranks(2, ["-m", "dist_rec", "train", str(tmp_path / "c.yaml")], 240)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "adapters"
    before = json.loads((run / "evaluation.json").read_text())
    done = run_command([sys.executable, "-m", "dist_rec", "evaluate", str(run), "--json"], 240)
    assert done.returncode == 0, done.stderr[-3000:]
    after = json.loads(done.stdout.splitlines()[-1])
    assert after["step"] == before["step"] > 0
    for task, wanted in before["overall"].items():
        assert after["overall"][task] == pytest.approx(wanted, abs=1e-5), task
