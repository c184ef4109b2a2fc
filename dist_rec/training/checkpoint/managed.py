"""The ids of managed tables in a checkpoint: out, and in again on any number of ranks.

A managed table's piece has, beside weights and optimizer states, whole numbers a row: its id and what the policy keeps
of it (`VOCABULARY_KINDS`). The ids that wait for the next look are a tensor of their own, cut over ranks (`pending`).
The clock goes on from the run that this one started from.

On as many ranks as saved it, all is as it was, row for row. On another number every rank takes, by value, the ids that
are in its range now, with their vectors, states and numbers. It may have fewer rows than it gets ids: then the coldest
are dropped, which is said. The shared row becomes the mean of those that ids of its range would have read, which is
said where there were several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...embeddings.ids import COUNT, FREE, ID, LAST_SEEN, ManagedIds, owner_of, range_size
from ...embeddings.managed import managed_ids
from ...schema import RAW_IDS
from .boxes import Box
from .manifest import VOCABULARY_KINDS, WEIGHT, TensorInfo
from .reader import READ_BYTES, Saved

# Whole numbers read at once.
READ_ROWS = READ_BYTES // torch.int64.itemsize


@dataclass(frozen=True)
class Moved:
    """How one rank took up a table's ids by value.

    Attributes:
        ids: in its range.
        dropped: those of them that found no row.
        shared: rows of which its shared row is the mean.
    """

    ids: int
    dropped: int
    shared: int


def pending_parts(sharded: nn.Module) -> dict[str, tuple[int, int, dict[str, Tensor]]]:
    """By managed table: all ranks' pending ids in number, where this rank's begin, and these. Collective."""
    mine = {name: ids.pending() for name, ids in managed_ids(sharded).items()}
    if not mine:
        return {}
    everyone: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: len(pending[ID]) for name, pending in mine.items()})
    sizes = {name: [one[name] for one in everyone] for name in mine}
    rank = dist.get_rank()
    return {name: (sum(sizes[name]), sum(sizes[name][:rank]), pending) for name, pending in mine.items()}


def faults_of_ids(saved: Saved, tables: dict[str, ManagedIds], names: Collection[str]) -> Iterator[str]:
    """Where the checkpoint and the model differ in which of the tables `names` are managed, and how."""
    for name, info in saved.manifest.tables.items():
        if name not in names:
            continue
        found = sorted(kind for kind in info.kinds if kind in VOCABULARY_KINDS)
        wanted = sorted(tables[name].kinds) if name in tables else []
        if found != wanted:
            yield (
                f"table {name!r} keeps {', '.join(found) or 'no ids'} of a row, tables.overrides and "
                f"tables.managed.policy want {', '.join(wanted) or 'no ids'}"
            )
        elif found and name not in saved.manifest.pending:
            yield f"table {name!r} lacks its pending ids"
        elif found and any(piece.size[1] != info.shape[1] for piece in info.pieces):
            yield f"table {name!r} is managed, but not cut into rows"


def same_cut(saved: Saved, table: str, box: Box) -> bool:
    """Whether as many ranks saved the table as have it now, one of them these rows."""
    pieces = [piece.box for piece in saved.manifest.tables[table].pieces]
    return len(pieces) == dist.get_world_size() and box in pieces


def restore_ids(saved: Saved, table: str, box: Box, ids: ManagedIds) -> list[str]:
    """Take up the ids of this rank's rows as they were, after `same_cut`; returns faults."""
    info = saved.manifest.tables[table]
    by_row = {kind: whole_numbers(saved, table, info, kind, box) for kind in ids.kinds}
    faults = _faults_of_piece(table, by_row[ID], dist.get_rank(), dist.get_world_size(), is_end=True)
    taken = by_row[ID] != FREE
    faults += _faults_of_all(table, {kind: numbers[taken] for kind, numbers in by_row.items()}, saved.clock)
    more, pending = _pending(saved, table)
    if not (faults := faults + more):
        ids.restore({kind: numbers.to(ids.device) for kind, numbers in by_row.items()}, pending, saved.clock)
    return faults


def move_ids(saved: Saved, table: str, tensors: dict[str, Tensor], ids: ManagedIds) -> tuple[list[str], Moved | None]:
    """Take up by value the ids of this rank's range with their rows; returns faults, and what came of it.

    Args:
        tensors: the live memory to fill, `[rows, dim]` or `[rows]`, by kind.
    """
    info, ranks, rank = saved.manifest.tables[table], dist.get_world_size(), dist.get_rank()
    faults, rows, kept = _in_range(saved, table, info, ids.kinds, rank, ranks)
    more, pending = _pending(saved, table)
    if faults := faults + more:
        return faults, None
    capacity, found = len(tensors[WEIGHT]) - 1, len(rows)
    if found > capacity:
        best = torch.argsort(ids.worth(kept, saved.clock), descending=True, stable=True)[:capacity].sort().values
        rows, kept = rows[best], {kind: numbers[best] for kind, numbers in kept.items()}
    sources = _shared_sources(info, rank, ranks)
    for kind, target in tensors.items():
        _take(saved, table, info, kind, rows, target)
        _share(saved, table, info, kind, sources, target)
    by_row = {}
    for kind in ids.kinds:
        by_row[kind] = torch.full((capacity + 1,), FREE if kind == ID else 0, dtype=torch.int64, device=ids.device)
        by_row[kind][: len(rows)] = kept[kind].to(ids.device)
    ids.restore(by_row, pending, saved.clock)
    return [], Moved(found, found - len(rows), len(sources))


def said_of(moved: dict[str, list[Moved]]) -> Iterator[str]:
    """What users must know of tables that all ranks took up by value, in words."""
    for table, parts in sorted(moved.items()):
        total, dropped = sum(part.ids for part in parts), sum(part.dropped for part in parts)
        if dropped:
            yield (
                f"table {table}: {dropped:,} of {total:,} ids lost their rows, the coldest of ranks with more ids than "
                "rows"
            )
        if max(part.shared for part in parts) > 1:
            yield f"table {table}: the vector of ids without a row is the mean of those that several ranks had"


def whole_numbers(saved: Saved, table: str, info: TensorInfo, kind: str, box: Box) -> Tensor:
    """Those of the rows of `box`, int64 `[rows]`, on the host, exactly."""
    found = torch.empty(box.size[0], dtype=torch.int64)
    for _, block, values in saved.slices(table, info, kind, box):
        found[block.within(box)[0]] = values
    return found


def _pending(saved: Saved, table: str) -> tuple[list[str], dict[str, Tensor]]:
    """Faults, and the pending ids of this rank's range, on the host."""
    info, rank, ranks = saved.manifest.pending[table], dist.get_rank(), dist.get_world_size()
    faults, found = [], {kind: [torch.empty(0, dtype=torch.int64)] for kind in (ID, COUNT, LAST_SEEN)}
    if sorted(info.kinds) != sorted(found):
        return [f"table {table!r} has strange pending ids"], {}
    for block in Box.whole(info.space).rows(READ_ROWS):
        numbers = {kind: torch.empty(block.size[0], dtype=torch.int64) for kind in found}
        for kind, target in numbers.items():
            saved.fill(table, info, kind, block, target)
        if bool(((numbers[ID] < 0) | (numbers[ID] >= RAW_IDS)).any()):
            faults.append(f"table {table!r} has pending ids out of range")
        mine = owner_of(numbers[ID], ranks) == rank
        for kind, parts in found.items():
            parts.append(numbers[kind][mine])
    pending = {kind: torch.cat(parts) for kind, parts in found.items()}
    return faults + _faults_of_all(table, pending, saved.clock), pending


def _pieces(info: TensorInfo) -> list[Box]:
    """In the order of the ranks that wrote them."""
    return sorted((piece.box for piece in info.pieces), key=lambda box: box.offset)


def _in_range(
    saved: Saved, table: str, info: TensorInfo, kinds: list[str], rank: int, ranks: int
) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    """Faults; and of the saved ids in a rank's range the rows, int64 `[n]`, and the numbers."""
    pieces, faults = _pieces(info), []
    rows, found = [], {kind: [] for kind in kinds}
    for number, piece in enumerate(pieces):
        for block in piece.rows(READ_ROWS):
            numbers = whole_numbers(saved, table, info, ID, block)
            faults += _faults_of_piece(table, numbers, number, len(pieces), is_end=block.end == piece.end)
            mine = ((numbers != FREE) & (owner_of(numbers, ranks) == rank)).nonzero().flatten()
            if len(mine):
                rows.append(mine + block.offset[0])
                found[ID].append(numbers[mine])
                for kind in found.keys() - {ID}:
                    found[kind].append(whole_numbers(saved, table, info, kind, block)[mine])
    nothing = torch.empty(0, dtype=torch.int64)
    kept = {kind: torch.cat([nothing, *parts]) for kind, parts in found.items()}
    return faults + _faults_of_all(table, kept, saved.clock), torch.cat([nothing, *rows]), kept


def _faults_of_piece(table: str, ids: Tensor, number: int, pieces: int, is_end: bool) -> list[str]:
    """Ids of rows that the `number`-th rank wrote must be in its range; the last of its rows has none."""
    taken = ids[ids != FREE]
    if bool((taken < 0).any()) or bool((owner_of(taken, pieces) != number).any()):
        return [f"table {table!r} has ids of other ranks in the piece of rank {number}"]
    if is_end and int(ids[-1]) != FREE:
        return [f"table {table!r} has an id in the shared row of rank {number}"]
    return []


def _faults_of_all(table: str, kept: dict[str, Tensor], clock: int) -> list[str]:
    """Of ids that stand in rows or wait for one, each stands once, has come, and by `clock`."""
    faults = [f"table {table!r} has an id twice"] if len(kept[ID].unique()) < len(kept[ID]) else []
    if COUNT in kept and bool((kept[COUNT] < 1).any()):
        faults.append(f"table {table!r} has an id that never came")
    if LAST_SEEN in kept and bool(((kept[LAST_SEEN] < 1) | (kept[LAST_SEEN] > clock)).any()):
        faults.append(f"table {table!r} has an id that came at no step up to {clock}")
    return faults


def _take(saved: Saved, table: str, info: TensorInfo, kind: str, rows: Tensor, target: Tensor) -> None:
    """Copy these rows of what was saved, int64 `[n]` in ascending order, to the first n of `target`."""
    whole = Box.whole(info.space)
    with torch.no_grad():
        for part in whole.rows(max(READ_BYTES // (whole.size[1] * torch.float64.itemsize), 1)):
            if torch.searchsorted(rows, part.offset[0]) == torch.searchsorted(rows, part.end[0]):
                continue
            for _, block, values in saved.slices(table, info, kind, part):
                first, last = (int(torch.searchsorted(rows, row)) for row in (block.offset[0], block.end[0]))
                target[first:last].copy_(values[rows[first:last] - block.offset[0]])


def _shared_sources(info: TensorInfo, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Saved shared rows that ids of a rank's range would have read, and how many such ids there are."""
    pieces, found = _pieces(info), []
    first, last = rank * range_size(ranks), min((rank + 1) * range_size(ranks), RAW_IDS)
    for number, piece in enumerate(pieces):
        size = range_size(len(pieces))
        common = min(last, (number + 1) * size, RAW_IDS) - max(first, number * size)
        if common > 0:
            found.append((piece.end[0] - 1, common))
    return found


def _share(
    saved: Saved, table: str, info: TensorInfo, kind: str, sources: list[tuple[int, int]], target: Tensor
) -> None:
    """Set the last row of `target` to the mean of the `sources`, to the bit where there is one."""
    total = torch.zeros(target[-1].shape, dtype=torch.float64)
    for row, common in sources:
        one = Box((row, 0), (1, info.shape[1]))
        for _, _, values in saved.slices(table, info, kind, one):
            total += values[0].double() * (common / sum(number for _, number in sources))
    with torch.no_grad():
        target[-1] = total.to(target)
