"""`dist-rec plan`, from what was asked to what is printed, written and returned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..embeddings.clusters import THIS_MACHINE, Cluster, find_cluster, this_machine
from ..embeddings.plan_file import write_plan
from ..errors import UserError
from ..training.process import quieten
from .answer import Answer, Refused
from .ask import describe, find_answer
from .request import Request, parse_settings, read_request

# Exit code where nothing fits: the user's request is what is wrong.
DOES_NOT_FIT = 2


@dataclass(frozen=True)
class Wishes:
    """The options of the verb."""

    cluster: str | None = None
    clusters: str | None = None
    world: str | None = None
    out: Path | None = None
    plot: Path | None = None
    verify: bool = False
    suggest: bool = False
    all_tables: bool = False


def run(
    path: Path, keys: dict[str, str], settings: list[str], schema: Path | None, wishes: Wishes
) -> tuple[int, dict[str, Any]]:
    """Plan, print, and write what was asked for.

    Args:
        keys, settings: config overrides and what-ifs (see `read_request`).

    Returns:
        Exit code, 0 or 2 where it does not fit any of the clusters, and what to print as JSON: of one cluster, its
        answer; of several, `clusters`, a list of them; with `suggestions`, `verified`.

    Raises:
        UserError: something asked for cannot be.
    """
    quieten()
    _check(wishes, schema)
    request = read_request(path, keys | parse_settings(settings), schema)
    told: dict[str, Any] = {}
    if wishes.suggest:
        from .suggest import describe_suggestions, print_suggestions, suggest

        found = suggest(request)
        print_suggestions(found)
        told["suggestions"] = describe_suggestions(found)
        if wishes.cluster is None and wishes.clusters is None and wishes.world is None and not wishes.verify:
            return 0, told
    answers = _answers(_clusters(wishes), request)
    from .text import print_answer, print_side_by_side

    if len(answers) == 1:
        print_answer(answers[0], wishes.all_tables)
        told = describe(answers[0]) | told
    else:
        print_side_by_side(answers)
        told = {"clusters": [describe(one) for one in answers]} | told
    if all(isinstance(one, Refused) or one.planned is None for one in answers):
        return DOES_NOT_FIT, told
    _write(answers[0], wishes)
    if wishes.verify:
        from .verify import print_verified, verify

        verified = verify(answers[0])
        print_verified(verified)
        told["verified"] = verified
    return 0, told


def _check(wishes: Wishes, schema: Path | None) -> None:
    if wishes.cluster and wishes.clusters:
        raise UserError("--cluster and --clusters are two ways to say the same: give one of them.")
    one = wishes.clusters is None and (wishes.world is None or "," not in wishes.world)
    for name in ("out", "plot", "verify"):
        if getattr(wishes, name) and not one:
            raise UserError(f"--{name} is of one plan: name one cluster and one --world.")
    if wishes.verify and wishes.cluster:
        raise UserError("--verify runs the plan on this machine: leave --cluster out.")
    if wishes.verify and schema:
        raise UserError("--verify runs the plan on built data: leave --schema out.")
    for name in ("out", "plot"):
        place = getattr(wishes, name)
        if place and not place.absolute().parent.is_dir():
            raise UserError(f"--{name} {place}: there is no folder {place.parent}.")


def _clusters(wishes: Wishes) -> list[tuple[str, int | None]]:
    """What `--cluster` names, or `here`, each with every `--world`."""
    names = [name.strip() for name in (wishes.clusters or wishes.cluster or "").split(",") if name.strip()]
    if not names and (wishes.clusters is not None or wishes.cluster is not None):
        raise UserError("--cluster needs a name, such as 8xh100.")
    worlds = [_ranks(part) for part in wishes.world.split(",")] if wishes.world is not None else [None]
    return [(name, ranks) for name in names or [THIS_MACHINE] for ranks in worlds]


def _answers(clusters: list[tuple[str, int | None]], request: Request) -> list[Answer | Refused]:
    """Of several, one that cannot be asked about does not keep the others from being answered.

    Raises:
        UserError: there is only one, or none of them can be.
    """
    answers: list[Answer | Refused] = []
    for name, ranks in clusters:
        try:
            cluster = _here(request, ranks) if name == THIS_MACHINE else find_cluster(name, ranks)
            answers.append(find_answer(request, cluster, name))
        except UserError as error:
            if len(clusters) == 1:
                raise
            answers.append(Refused(f"{name} on {ranks} ranks" if ranks else name, str(error)))
    if all(isinstance(one, Refused) for one in answers):
        raise UserError("\n".join(dict.fromkeys(one.why for one in answers)))
    return answers


def _ranks(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"--world {text!r}: ranks are whole numbers above 0, several by commas: 16,64,256.")
    return int(text)


def _here(request: Request, ranks: int | None) -> Cluster:
    """This machine: a rank a GPU, else a rank a core, no more than there are logical streams."""
    import torch

    wanted = request.config.train.device
    device = "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"
    if ranks is None:
        units = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
        ranks = max(min(units, request.config.data.streams), 1)
    return this_machine(ranks, device)


def _write(answer: Answer, wishes: Wishes) -> None:
    if wishes.out:
        request = answer.request
        write_plan(wishes.out, answer.planned, request.specs, request.config.tables)
        print(f"plan: {wishes.out} (train CONFIG --plan {wishes.out})")
    if wishes.plot:
        from .picture import draw

        draw(answer, wishes.plot)
        print(f"picture: {wishes.plot}")
