"""What sequence domains share: users by raw id, items by raw id or, where either has none, by title.

Sources differ in what they tell, so a count is of what is known to be shared. An item of a domain is shared with a
target if an item of the target has its raw id, or if one of the two has no raw id and both have one title (in lower
case, without blanks and full stops around it). A target whose texts hold titles and more (scientific) is compared by
every beginning of a text that ends in a full stop. A user is shared if the target has the raw id; a domain without
raw ids shares no user that could be known, which the counts of known ids show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sequence_rows import Sequences, whole

SIDES = ("pretraining", "target")


class Identities:
    """What tells users and items of a domain's sequences from those of others.

    Attributes:
        raw_users: raw user ids.
        users: the same, and the source's own names of users without one, which only the domain itself has.
        num_users: all users, named or not.
        asins: raw ids of items, None where unknown.
        titles: of every item, the titles that it may have.
    """

    def __init__(self, sequences: Sequences):
        targets, catalog, domain = sequences.targets, sequences.catalog, sequences.domain
        names, raw = targets.user.to_pylist(), targets.user_id.to_pylist()
        # Raw ids hold no colon.
        known = [
            f"{domain}:{name}" if user is None and name is not None else user
            for name, user in zip(names, raw, strict=True)
        ]
        self.of_row: list[str | None] = known
        self.raw_users = {user for user in raw if user is not None}
        self.users = {user for user in known if user is not None}
        self.num_users = len(np.unique(targets.owner))
        self.asins = [None] * len(catalog) if sequences.asins is None else sequences.asins.to_pylist()
        if sequences.titles is None:
            self.titles = [_beginnings(text) for text in catalog.texts.to_pylist()]
        else:
            self.titles = [[_bare(title)] if title else [] for title in sequences.titles.to_pylist()]


def _bare(title: str) -> str:
    return title.strip().strip(".").strip().lower()


def _beginnings(text: str) -> list[str]:
    parts = text.split(". ")
    return [bare for end in range(1, len(parts) + 1) if (bare := _bare(". ".join(parts[:end])))]


def shared_items(one: Identities, other: Identities) -> tuple[np.ndarray, np.ndarray]:
    """Which items of `one` the `other` has: bool `[items]` by raw id, and by title where a raw id is missing."""
    ids = {asin for asin in other.asins if asin is not None}
    by_id = np.array([asin in ids for asin in one.asins], bool)
    everyone = {title for titles in other.titles for title in titles}
    nameless = {
        title for titles, asin in zip(other.titles, other.asins, strict=True) if asin is None for title in titles
    }
    by_title = [
        any(title in (everyone if asin is None else nameless) for title in titles)
        for titles, asin in zip(one.titles, one.asins, strict=True)
    ]
    return by_id, np.array(by_title, bool) & ~by_id


class Overlap:
    """What several pretraining domains have in common with several targets, domain by domain and together."""

    def __init__(self, targets: Sequence[Sequences], removed: Sequence[str] = ()):
        """`removed` names the targets whose users and items are left out of pretraining."""
        self.targets = {target.domain: (target, Identities(target)) for target in targets}
        self.removed = removed
        self.pairs: list[dict] = []
        self._users: dict[str, set[str]] = {name: set() for name in self.targets}
        self._items = {name: np.zeros(len(target.catalog), bool) for name, (target, _) in self.targets.items()}

    def add(self, source: Sequences) -> tuple[set[str], np.ndarray]:
        """Measure one pretraining domain.

        Returns:
            the raw ids of users and bool `[items]`, the items, that it shares with targets that are to be removed.
        """
        one = Identities(source)
        users: set[str] = set()
        items = np.zeros(len(one.asins), bool)
        for name, (target, other) in self.targets.items():
            both = one.users & other.users
            here, shared_here = _side(source, one, other, both)
            there, shared_there = _side(target, other, one, both)
            removed = name in self.removed
            self.pairs.append({"pretraining_domain": source.domain, "target_domain": name, "removed": removed})
            self.pairs[-1] |= {"users_shared": len(both), "pretraining": here, "target": there}
            self._users[name] |= both
            self._items[name] |= shared_there
            if removed:
                users |= both
                items |= shared_here
        return users, items

    def totals(self) -> dict[str, dict]:
        """By target, how many of its users and items any pretraining domain has."""
        return {
            name: {
                "users": other.num_users,
                "users_shared": len(self._users[name]),
                "items": len(other.asins),
                "items_shared": int(self._items[name].sum()),
                "held_out_items_shared": _share(
                    int(self._items[name][target.targets.item[target.targets.split > 0]].sum()),
                    int((target.targets.split > 0).sum()),
                ),
            }
            for name, (target, other) in self.targets.items()
        }

    def in_words(self) -> list[str]:
        """A line a pair that shares anything, and one a target."""
        lines = []
        for pair in self.pairs:
            here, there = pair["pretraining"], pair["target"]
            if pair["users_shared"] or here["items_shared"]:
                lines.append(
                    f"{pair['pretraining_domain']} and {pair['target_domain']}: {pair['users_shared']:,} users in both"
                    f"; {here['items_shared']:,} of {here['items']:,} items are the target's, "
                    f"{there['items_shared']:,} of whose {there['items']:,} are shared "
                    f"({there['items_shared_by_id']:,} by raw id)" + (": left out" if pair["removed"] else "")
                )
        for name, total in self.totals().items():
            pairs = [pair for pair in self.pairs if pair["target_domain"] == name]
            sides = [_known([pair["pretraining"] for pair in pairs]), _known([pair["target"] for pair in pairs[:1]])]
            lines.append(
                f"target {name}: {total['users_shared']:,} of {total['users']:,} users and {total['items_shared']:,}"
                f" of {total['items']:,} items are known to occur in pretraining. Raw ids are known of {sides[0]} of "
                f"pretraining, and of {sides[1]} of the target."
            )
            for what in ("users", "items"):
                if any(not sum(pair[side][f"{what}_with_raw_id"] for pair in pairs) for side in SIDES):
                    told = "by title alone" if what == "items" else "by nothing"
                    lines.append(f"    one side has no raw ids of {what}, so {what} are told {told}")
        return lines


def _known(sides: Sequence[dict]) -> str:
    """How many users and items have a raw id, in words."""
    counts = [
        f"{sum(side[f'{what}_with_raw_id'] for side in sides):,} of {sum(side[what] for side in sides):,} {what}"
        for what in ("users", "items")
    ]
    return " and ".join(counts)


def _side(sequences: Sequences, here: Identities, there: Identities, both: set[str]) -> tuple[dict, np.ndarray]:
    """What one of two has of the other, in numbers, and bool `[items]`, the items."""
    by_id, by_title = shared_items(here, there)
    shared, targets = by_id | by_title, sequences.targets
    trained, held = np.flatnonzero(targets.split == 0), np.flatnonzero(targets.split > 0)
    events = whole(targets, trained)
    also = np.array([here.of_row[row] in both for row in trained.tolist()], bool)
    return {
        "users": here.num_users,
        "users_with_raw_id": len(here.raw_users),
        "users_shared_of_named": _share(len(both), len(here.users)),
        "items": len(shared),
        "items_with_raw_id": sum(asin is not None for asin in here.asins),
        "items_shared": int(shared.sum()),
        "items_shared_by_id": int(by_id.sum()),
        "items_shared_by_title": int(by_title.sum()),
        "training_events_of_shared_items": _share(int(shared[events.values].sum()), len(events.values)),
        "training_events_of_shared_users": _share(int(events.lengths[also].sum()), len(events.values)),
        "held_out_items_shared": _share(int(shared[targets.item[held]].sum()), len(held)),
    }, shared


def _share(part: int, of: int) -> float | None:
    return round(part / of, 6) if of else None
