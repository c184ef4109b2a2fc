"""One rank of the checks of the language model in its engine: parity with one process, and bf16.

    torchrun --standalone --nproc-per-node 2 tests/cotrain_worker.py MODEL full,lora 1,2,3 [text option=value ..]

Every rank encodes its own texts in every step, rank 1 none in the second one, and each another number of batches.
Held to one process that encodes every row's two texts by themselves, padded to the longest of all: the first step's
gradients and the parameters after 4 steps of SGD, to 1e-5 of the largest. bf16: the loss falls.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from hybrids import end
from torch import Tensor, nn
from whole import full_parameters

from dist_rec.config import Config, DenseConfig, TextConfig
from dist_rec.layers.reduction import Reduction
from dist_rec.strict import from_dict
from dist_rec.text.cotrain import cotrained_encoder
from dist_rec.text.encoder import TextEncoder
from dist_rec.training.collectives import DistributedReduction
from dist_rec.training.engine import make_engine
from dist_rec.training.process import choose_device, process_group

RATE, STEPS, ROWS = 0.02, 4, 6
FAULTS = []


class Scored(nn.Module):
    """A stand-in for the foundation model: the loss of rows of two texts each."""

    def __init__(self, config: TextConfig, reduction: Reduction) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.text_encoder = cotrained_encoder(config, reduction)
        self.head = nn.Linear(self.text_encoder.width, self.text_encoder.width)
        with torch.no_grad():
            for name, parameter in self.text_encoder.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)

    def forward(self, tokens: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
        return self.loss(self.text_encoder(tokens, mask), pairs)

    def loss(self, vectors: Tensor, pairs: Tensor) -> Tensor:
        vectors = self.head(vectors.to(self.head.weight.dtype)).float()
        return (vectors[pairs[:, 0]] * vectors[pairs[:, 1]]).mean(1).tanh().sum() + vectors[pairs].square().sum() / 50

    def naive(self, tokens: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
        encoder = self.text_encoder
        alone = [TextEncoder.forward(encoder, tokens[i : i + 1], mask[i : i + 1]) for i in pairs.flatten().tolist()]
        vectors = torch.cat(alone) if alone else torch.zeros(0, encoder.width)
        return self.loss(vectors, torch.arange(len(vectors)).reshape(-1, 2))


def texts(step: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and pairs of one rank's step; rank 1 has none in step 1."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    count = 0 if (step, rank) == (1, 1) else 3 + 4 * rank + step
    lengths = torch.randint(1, 24, (count,), generator=draw)
    mask = torch.arange(24)[None] < lengths[:, None]
    tokens = torch.randint(1, 3000, mask.shape, generator=draw).where(mask, 0)
    return tokens, mask, torch.randint(0, max(count, 1), (ROWS if count else 0, 2), generator=draw)


def check_parity(name: str, text: TextConfig, stage: int, process) -> None:
    dense = DenseConfig(zero_stage=stage, optimizer="sgd", learning_rate=RATE)
    world, rank = process.world_size, process.rank
    plain = Scored(text, Reduction()).train()
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    engine = make_engine(Scored(text, DistributedReduction()), dense, text, ROWS, world, process.device)
    engine.train()
    for step in range(STEPS):
        engine.backward(world * engine(*texts(step, rank)))
        engine.step()
        optimizer.zero_grad()
        sum(plain.naive(*texts(step, r)) for r in range(world)).backward()
        optimizer.step()
        if step == 0:
            wanted = {n: p.grad for n, p in trained.items()}
            found = {n: (start[n] - p) / RATE for n, p in full_parameters(engine).items() if n in trained}
            tell(f"{name} gradients", found, wanted)
    tell(f"{name} parameters", full_parameters(engine), {n: p.detach() for n, p in plain.named_parameters()})


def tell(what: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare, to 1e-5 of the largest number; what stands for gradients has lost the digits of its parameter."""
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    worst = max(wanted, key=lambda n: float((found[n] - wanted[n]).abs().max()))
    difference = float((found[worst] - wanted[worst]).abs().max()) / scale
    report(what, difference <= 1e-5 and scale > 1e-2, f"{difference:.1e} {worst}")


def check_bf16(name: str, text: TextConfig, stage: int, process) -> None:
    dense = DenseConfig(zero_stage=stage, precision="bf16", learning_rate=1e-3)
    engine = make_engine(Scored(text, DistributedReduction()), dense, text, ROWS, process.world_size, process.device)
    engine.train()
    before, losses = full_parameters(engine), []
    for _ in range(6):
        loss = engine(*texts(0, process.rank))
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    after = full_parameters(engine)
    trains = {n for n, p in engine.module.named_parameters() if p.requires_grad}
    moved = {n for n in after if n.startswith("text_encoder.") and not torch.equal(after[n], before[n])}
    frozen_moved = sorted(moved - trains)
    report(f"{name} bf16", losses[-1] < losses[0] and moved and not frozen_moved, f"{losses[0]:.4f} {losses[-1]:.4f}")


def report(what: str, good: bool, told: str) -> None:
    if dist.get_rank() == 0:
        print(f"{'ok  ' if good else 'FAIL'} {what:50s} {told}", flush=True)
    if not good:
        FAULTS.append(what)


def main() -> None:
    model, modes, stages, *options = sys.argv[1:]
    extra = {}
    for option in options:
        key, value = option.split("=")
        extra[key] = {"true": True, "false": False}.get(value, value if not value.isdigit() else int(value))
    config = from_dict(Config, {"data": {"train": "none"}}, "worker")
    with process_group(config, choose_device(config)) as process:
        for mode in modes.split(","):
            text = TextConfig(mode=mode, model=model, learning_rate=RATE, batch_tokens=40, **extra)
            for stage in map(int, stages.split(",")):
                check_parity(f"{mode} ZeRO-{stage}", text, stage, process)
                if stage:  # which bf16 needs
                    check_bf16(f"{mode} ZeRO-{stage}", text, stage, process)
    end(bool(FAULTS))


if __name__ == "__main__":
    main()
