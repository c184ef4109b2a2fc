"""`finetune`: what a run starts from, and which part of it stays as it was."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from ..strict import strict


@strict
class FinetuneConfig:
    """Start from another run's best or last good checkpoint instead of at random (CIKM'23: pretrain, then finetune).

    * `run`: folder of that run; null starts at random.
    * `domains`: how the parameters of domains that it does not know start: `mean` of those that it knows, `nearest`
      for the one whose texts' mean vector is closest, or the name of one.
    * `freeze`: what stays as it was, by the levels of the paper: `L0` embedding tables, `L1` encoders. `adaptor` trains
      the domains' own parameters alone, `lora` those and the language model's adapters, `head` the towers alone.
      Rows that a dictionary has for ids that the run does not know are trained under each of them; a table that is
      managed, hashed or sized by the config stays whole.
    * `freeze_names`, `train_names`: globs of names that stay, or train, whatever `freeze` says. A dense parameter is
      called as in the checkpoint, a table `tables.<name>`. The later list wins.
    """

    run: str | None = None
    domains: str = "mean"
    freeze: Literal["none", "L0", "L0+L1", "adaptor", "lora", "head"] = "none"
    freeze_names: list[str] = field(default_factory=list)
    train_names: list[str] = field(default_factory=list)
