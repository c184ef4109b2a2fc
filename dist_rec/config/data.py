"""`data`: what is read, and how its canonical order is made."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..strict import strict


def check_multiple(batch_size: int, streams: int) -> None:
    """Refuse a global batch that the streams do not divide."""
    if batch_size % streams:
        near = max(batch_size // streams, 1) * streams
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of data.streams {streams}: take {near}, for instance"
        )


@strict
class DataConfig:
    """What is read, and how its canonical order is made (docs: shards/README.md).

    * `train`, `valid`, `test`: data sets (folder or URL); `valid` is evaluated while training,
      `test` once at the end.
    * `catalogue`: of sequence models: a data set of the same schema and vocabularies, with one row an item.
    * `batch_size`: rows of a *global* batch, over all ranks; a multiple of `streams`.
    * `streams`: logical streams S; at least the largest world size this run will ever have.
    * `order`: `shuffled`, or `time`: the earliest rows of all domains first.
    * `shuffle_window`: rows, over all streams, within which rows are shuffled.
    * `domains`: the domains to train on; empty means all of the schema.
    * `weights`: share of each domain in an epoch; empty means natural, every row exactly once.
    * `temperature`: T of shares proportional to rows ** (1 / T); 1 is natural.
    * `from_watermark`: train on what was appended since the run's checkpoint, once.
    * `drop_last`: drop the short last batch of an epoch instead of padding it.
    * `read_ahead`: batches prepared in the background.
    * `damaged`, `max_damaged_share`: stop at a block that cannot be read, or leave out and count
      the rows of such blocks up to this share of the data set's.
    * `retries`, `retry_seconds`, `timeout_seconds`: of reading; the wait doubles each time.
    * `exclude_features`: features of the schema that this run leaves alone.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    catalogue: str | None = None
    batch_size: int = Field(default=4096, ge=1)
    streams: int = Field(default=8, ge=1)
    order: Literal["shuffled", "time"] = "shuffled"
    shuffle_window: int = Field(default=262144, ge=1)
    domains: list[str] = field(default_factory=list)
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = field(default_factory=dict)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    from_watermark: bool = False
    drop_last: bool = False
    read_ahead: int = Field(default=4, ge=1)
    damaged: Literal["stop", "quarantine"] = "stop"
    max_damaged_share: float = Field(default=0.01, ge=0, le=1)
    retries: int = Field(default=5, ge=0)
    retry_seconds: float = Field(default=0.5, gt=0)
    timeout_seconds: float = Field(default=60.0, gt=0)
    exclude_features: list[str] = field(default_factory=list)

    @model_validator(mode="after")
    def _one_way_to_mix(self):
        if self.weights and self.temperature != 1:
            raise ValueError("weights and temperature are two ways to mix domains: give one of them")
        return self

    @model_validator(mode="after")
    def _batch_divides(self):
        check_multiple(self.batch_size, self.streams)
        return self

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float]) -> dict[str, float]:
        if weights and not any(weights.values()):
            raise ValueError("not all weights may be 0")
        return weights
