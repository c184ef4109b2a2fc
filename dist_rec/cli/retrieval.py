"""The verbs of retrieval: export, search, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Json, Ranks, is_main, launch_if_asked, overrides, print_json

INDEX = "index."

Place = Annotated[Path, typer.Argument(help="Run folder that was exported, or an export.")]


def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder; its best or latest checkpoint is exported.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the export; default RUN/export.")] = None,
    items: Annotated[
        str | None, typer.Option(help="Data set of the items, each one's last row; default data.catalogue.")
    ] = None,
    users: Annotated[
        str | None,
        typer.Option(
            help="Data set of the users, each one's last row; default data.test (--judge: data.train); none: nobody."
        ),
    ] = None,
    index: Annotated[str, typer.Option(help="flat, ivf, hnsw or pq; its sizes are --index.KEY VALUE.")] = "flat",
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Export a model whose scores an index does not give exactly.")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Items as one vector and the weights of their kernels, of an mvke model.")
    ] = False,
    pairs: Annotated[
        int, typer.Option(help="Pairs, or a bundle's rows, whose score is compared with the model's own.", min=1)
    ] = 1000,
    queries: Annotated[int, typer.Option(help="Users that the index is measured with.", min=1)] = 1000,
    k: Annotated[int, typer.Option(help="Answers at which recall is measured.", min=1)] = 50,
    judge: Annotated[
        str | None,
        typer.Option(help="Data set of held-out rows: recall and NDCG of users' answers."),
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Folder of the dictionaries, where they do not lie beside the data.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Write a scoring bundle to this folder instead: raw rows to scores, by torch alone."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the bundle's tables: int8, fp16 or fp32.")] = "int8",
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """Vectors of all items and users, and an index of the items (a torchrun job); --section.key value overrides."""
    keys = overrides(context.args)
    if bundle is not None:
        if nproc_per_node > 1:
            raise UserError("a bundle is written by one process: leave --nproc-per-node out.")
        _bundle(run, keys, bundle, precision, pairs, vocabulary, as_json)
        return
    of_index = {key.removeprefix(INDEX): keys.pop(key) for key in list(keys) if key.startswith(INDEX)}
    from ..config import load_config

    loaded = load_config(run / "config.yaml", keys)
    launch_if_asked(nproc_per_node)
    from ..retrieval.export import Wishes
    from ..retrieval.export import export as make
    from ..retrieval.index import parse_index
    from ..retrieval.manifest import EXPORT, print_manifest
    from ..strict import to_dict

    sizes = parse_index(index, of_index)
    out = out or run / EXPORT
    found = make(
        loaded, run, Wishes(out, items, users, sizes, approximate, pairs, queries, k, vocabulary, compact, judge)
    )
    if is_main():
        print_manifest(found, out)
        print_json(as_json, {"export": str(out), **to_dict(found)})


def _bundle(
    run: Path, keys: dict[str, str], out: Path, precision: str, rows: int, vocabulary: Path | None, as_json: bool
) -> None:
    if precision not in ("int8", "fp16", "fp32"):
        raise UserError(f"--precision {precision} is not known: there is int8, fp16, fp32.")
    from ..config import load_config

    loaded = load_config(run / "config.yaml", keys)
    from ..retrieval.bundle import BundleWishes, export_bundle, print_bundle

    manifest = export_bundle(loaded, run, BundleWishes(out, precision, rows, vocabulary))
    print_bundle(manifest, out)
    print_json(as_json, {"bundle": str(out), **manifest})


def search(
    place: Place,
    user: Annotated[str | None, typer.Option(help="A user, as the raw data names it.")] = None,
    query: Annotated[str | None, typer.Option(help="Text of a query, for a model that reads queries.")] = None,
    k: Annotated[int, typer.Option(help="How many items.", min=1)] = 10,
    task: Annotated[str | None, typer.Option(help="Whose scores; default the first task.")] = None,
    as_json: Json = False,
) -> None:
    """The best items of a user, or of a query's text, by an export's index, with titles and scores."""
    if (user is None) == (query is None):
        raise UserError("say whom to search for: --user ID, or --query TEXT.")
    from ..retrieval.search import print_answers
    from ..retrieval.search import search as ask

    found = ask(place, user, query, k, task)
    print_answers(found)
    print_json(as_json, found)


def profile(
    place: Place,
    user: Annotated[str | None, typer.Option(help="A user, as the raw data names it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every user's instead, as Parquet below this folder.")] = None,
    k: Annotated[int, typer.Option(help="How many items (tags) a task.", min=1)] = 10,
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """A user's best items (tags) for every task, with scores; or, as a torchrun job, every user's."""
    if (user is None) == (out is None):
        raise UserError("say whom to profile: --user ID, or --out FOLDER for everybody.")
    if out is None:
        from ..retrieval.search import print_answers
        from ..retrieval.search import profile as ask

        found = ask(place, user, k)
        for task, answers in found["tasks"].items():
            print(f"{task}:")
            print_answers(answers)
        print_json(as_json, found)
        return
    launch_if_asked(nproc_per_node)
    from ..retrieval.search import profile_all

    found = profile_all(place, out, k)
    if is_main():
        print(f"{out}: the best {k} items of {found['users']:,} users, in {found['seconds']:.1f} s")
        print_json(as_json, found)
