"""finetune.json: what a finetuned run keeps of the run that it came from, so that it never needs that one again."""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path

from pydantic import Field

from ...errors import UserError
from ...files import write_text
from ...schema import Schema
from ...strict import from_dict, parse_json, strict, to_dict

ORIGIN_NAME = "finetune.json"
SCHEMA_NAME = "schema.json"
MEAN = "mean"
# What the splits that are the test rows of runs that came before begin with.
OLD = "old"


@strict
class OldTest:
    """Test rows of a run that came before: its folder, the data set (None where its config names none), and the store
    of their text vectors."""

    run: str
    test: str | None = None
    store: str | None = None


@strict
class Origin:
    """Where a run started.

    * `run`, `step`: the foundation's run folder, and the step of the checkpoint that was taken.
    * `domains`: those that it knew, in order; the run's own begin with them.
    * `starts`: what each further domain began as: `mean`, or the name of one of `domains`.
    * `tables`: those that its checkpoint has.
    * `left_out`: features of the data that it did not read, and this run neither.
    * `test`, `store`: its test rows and their text vectors, to see what becomes of the domains that it knew.
    * `older`: likewise of the run that it started from itself, and so on, the nearest first.
    """

    run: str
    step: int = Field(ge=0)
    domains: list[str]
    starts: dict[str, str] = field(default_factory=dict)
    tables: list[str]
    left_out: list[str] = field(default_factory=list)
    test: str | None = None
    store: str | None = None
    older: list[OldTest] = field(default_factory=list)

    def old_tests(self) -> dict[str, OldTest]:
        """Of all runs that came before, by split: the foundation's first, and each data set once."""
        own = OldTest(run=self.run, test=self.test, store=self.store)
        older = [one for one in self.older if one.test != self.test]
        return {f"{OLD}-{n}": one for n, one in enumerate([own, *older])}

    def start_rows(self) -> list[int | None]:
        """For each further domain the number of the domain that it begins as, None for the mean of all."""
        return [None if start == MEAN else self.domains.index(start) for start in self.starts.values()]


def write_origin(folder: Path, origin: Origin) -> None:
    write_text(folder / ORIGIN_NAME, json.dumps(to_dict(origin), indent=1))


def read_origin(folder: Path) -> Origin:
    """What a finetuned run's folder says of where it came from.

    Raises:
        UserError: it says nothing, or something else.
    """
    path = folder / ORIGIN_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} says what this finetuned run started from, and cannot be read ({error.strerror}): restore it, or "
            "remove the run folder and finetune again."
        ) from None
    return from_dict(Origin, parse_json(text, str(path)), str(path))


def write_schema(folder: Path, schema: Schema) -> None:
    """schema.json: what the run's data looked like, for runs that start from it where the data itself is not."""
    write_text(folder / SCHEMA_NAME, json.dumps(to_dict(schema), indent=1))


def read_schema(folder: Path) -> Schema | None:
    """The schema that a run folder keeps; None where it was written before they kept one."""
    path = folder / SCHEMA_NAME
    if not path.is_file():
        return None
    return from_dict(Schema, parse_json(path.read_bytes(), str(path)), str(path))
