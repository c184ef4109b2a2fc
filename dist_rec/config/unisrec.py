"""`model` with `kind: unisrec`: universal sequence representations (Hou et al., KDD'22)."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import Field, model_validator

from ..strict import strict
from .data import DataConfig
from .model import TextConfig


@strict
class AdaptorConfig:
    """From a text's vector to an item's: a mixture of whitening experts.

    * `experts`: G of them.
    * `dropout`: on the text's vector, before whitening.
    * `noise`: of the gate, in training.
    * `scale`: what a text's vector is multiplied by before all that. Weights, positions and embeddings start to suit
      BERT's [CLS], about 15 long, which the paper took; shorter ones, as sentence-transformers' of length 3, are
      drowned by them unless scaled up.
    """

    experts: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    noise: bool = True
    scale: float = Field(default=1.0, gt=0)


@strict
class SequenceEncoderConfig:
    """The causal transformer over a sequence of items.

    * `feedforward`: width between the two layers of a block.
    * `dropout`, `attention_dropout`: of the input and of blocks' outputs, and of attention's weights.
    * `max_length`: events, counted from the newest, that it reads; older ones of a training sequence are no targets
      either, so that data should be built with a --max-length no larger.
    """

    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=2, ge=1)
    feedforward: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    attention_dropout: float = Field(default=0.5, ge=0, lt=1)
    max_length: int = Field(default=50, ge=1)


@strict
class ContrastConfig:
    """The sequence-sequence loss: a sequence against an augmented copy of itself.

    * `weight`: lambda, of this loss beside the sequence-item loss; 0 leaves it out.
    * `item_drop`: share of a sequence's items that are dropped from its copy.
    * `word_drop`: share of a sequence's items that read their word-dropped text in its copy.
    * `item_drop_share`: probability that a sequence's copy lacks items; the others have words dropped.
    """

    weight: float = Field(default=1e-3, ge=0)
    item_drop: float = Field(default=0.2, ge=0, lt=1)
    word_drop: float = Field(default=0.2, ge=0, le=1)
    item_drop_share: float = Field(default=0.9, ge=0, le=1)

    @property
    def drops_words(self) -> bool:
        return self.weight > 0 and self.word_drop > 0 and self.item_drop_share < 1


@strict
class UniSRecConfig:
    """UniSRec (KDD'22), and what it contains: SASRec is `item: id`.

    * `item`: what an item is: its `text` (inductive), its `id`, or both (transductive, `text+id`).
    * `width`: of items and sequences; a table that is looked up must have it too.
    * `loss`: what the next item is told from: `in_batch` the targets of the global batch (pretraining), `full` the
      whole catalogue, `sampled` some `samples` of it, of the whole job, drawn anew each step.
    * `sampling`: `uniform`, or `popularity`: in proportion to how often the training rows ask for an item, plus one.
    * `temperature`: tau, by which cosines are divided.
    * `repeats`: the logits of items that a sequence has already had are raised by a number that is read off its state.
    * `official`: do as the authors' public code does where it differs from the paper.
    """

    kind: Literal["unisrec"] = "unisrec"
    item: Literal["text", "id", "text+id"] = "text"
    width: int = Field(default=300, ge=1)
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    encoder: SequenceEncoderConfig = field(default_factory=SequenceEncoderConfig)
    loss: Literal["in_batch", "full", "sampled"] = "in_batch"
    samples: int = Field(default=0, ge=0)
    sampling: Literal["uniform", "popularity"] = "uniform"
    temperature: float = Field(default=0.07, gt=0)
    repeats: bool = False
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    official: bool = False

    @model_validator(mode="after")
    def _consistent(self):
        faults = []
        if self.width % self.encoder.heads:
            faults.append(f"width {self.width} is not a multiple of encoder.heads {self.encoder.heads}")
        if self.loss == "sampled" and not self.samples:
            faults.append("loss: sampled needs samples: how many items of the catalogue a step draws")
        if self.loss != "sampled" and self.samples:
            faults.append(f"samples {self.samples} is of loss: sampled, and loss is {self.loss}: leave it out")
        if self.repeats and self.loss == "in_batch":
            faults.append("repeats needs loss full or sampled: other sequences' targets are few of a sequence's items")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def with_text(self) -> bool:
        return self.item != "id"

    @property
    def with_ids(self) -> bool:
        return self.item != "text"


def unisrec_faults(model: UniSRecConfig, data: DataConfig, text: TextConfig) -> list[str]:
    """What of a UniSRec model does not go with the data and the texts that the config names."""
    faults, drops = [], model.contrast.drops_words
    if model.loss != "in_batch" and data.catalogue is None:
        faults.append(f"loss: {model.loss} needs data.catalogue: a data set with one row an item")
    if model.with_ids and model.loss == "in_batch":
        faults.append(
            f"item: {model.item} needs loss full or sampled: in_batch is pretraining's, whose items are their texts"
        )
    if model.with_text and text.mode == "none":
        faults.append(f"item: {model.item} needs texts: set text.mode")
    if drops and not model.with_text:
        faults.append("contrast: an item that is its id has no words to drop: set item_drop_share: 1, or weight: 0")
    elif drops and text.dropped_store is None:
        faults.append(
            f"contrast: item_drop_share {model.contrast.item_drop_share:g} drops words in the other sequences, which "
            "needs text.dropped_store (`dist-rec embed --word-drop`): name it, or set item_drop_share: 1, or weight: 0"
        )
    return faults
