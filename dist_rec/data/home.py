"""Where a data set's vocabularies, texts and tokenizer lie: what new rows need to be as the old ones are.

A split shares the first two with its sisters, in the folder above. Knows files, not rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..schema import Schema
from ..text.paths import tokenizer_file
from . import steps
from .index import INDEX_NAME, SPLITS, Index, TokenizerInfo, read_index
from .steps import TEXTS_NAME, VOCABULARY_NAME


def home_of(folder: Path, schema: Schema) -> Path:
    """Where the vocabularies and texts of a data set lie: in its folder, or in the one above its splits.

    Raises:
        UserError: it has dictionaries, and they are in neither.
    """
    needed = bool(dictionaries(schema))
    for place in (folder, folder.parent):
        if (place / VOCABULARY_NAME).is_dir() if needed else (place / TEXTS_NAME).is_file():
            return place
    if needed:
        raise UserError(
            f"{folder}: its vocabularies are missing, so new rows cannot be numbered as the old ones were. Restore "
            f"{folder / VOCABULARY_NAME} or {folder.parent / VOCABULARY_NAME}, which the build wrote."
        )
    return folder


def dictionaries(schema: Schema) -> list[str]:
    """Names of the tables whose vocabulary is a dictionary."""
    tables = schema.select(kinds=("id", "ids")).items()
    return [name for name, f in tables if f.shares is None and f.vocabulary.kind == "dictionary"]


def token_file_of(info: TokenizerInfo | None, given: str | None, root: str) -> Path | None:
    """tokenizer.json of the tokenizer that the data set at `root` was built with; None if it has no token ids.

    Args:
        info: of its index.
        given: model folder to look in instead of the one that was named then.

    Raises:
        UserError: it is not there, is another one, or none is needed.
    """
    if info is None:
        if given is not None:
            raise UserError(f"{root} has no token ids, so it takes no tokenizer: leave --tokenizer out.")
        return None
    try:
        path = tokenizer_file(given or info.name)
    except UserError as error:
        raise UserError(
            f"{root} was built with tokenizer {info.name}; name its folder with --tokenizer. {error}"
        ) from None
    found = steps.tokenizer_info(given or info.name, path, info.max_length, info.prefixes)
    if found.fingerprint != info.fingerprint:
        raise UserError(
            f"{root} was built with tokenizer {info.name}, and {path} is not the file that was used: name the folder "
            "of that one with --tokenizer."
        )
    return path


@dataclass(frozen=True)
class Parent:
    """A data set that another extends.

    Attributes:
        root: as it was named.
        index: of it, or of one of its splits.
        vocabulary: folder of its dictionaries; None if it has none.
    """

    root: str
    index: Index
    vocabulary: Path | None

    def check_options(self, vocabulary: str | None, max_tokens: int | None, prefixes: Mapping[str, str] | None) -> None:
        """Refuse options of a build that would make texts or ids other than the parent's, which one model is to read.

        Raises:
            UserError: for each of them.
        """
        info = self.index.tokenizer
        faults = []
        if vocabulary is not None:
            faults.append(f"--vocabulary is {vocabulary!r}: the dictionaries are those of {self.root}; leave it out")
        if max_tokens is not None and (info is None or max_tokens != info.max_length):
            had = f"at most {info.max_length} tokens" if info else "no token ids"
            faults.append(f"--max-tokens is {max_tokens}, the texts of {self.root} have {had}: leave it out")
        if prefixes and (info is None or dict(prefixes) != info.prefixes):
            had = ", ".join(f"{role}={text!r}" for role, text in info.prefixes.items()) if info else ""
            faults.append(f"--prefix differs from that of {self.root}, {had or 'which has none'}: leave it out")
        if faults:
            raise UserError("one model reads both data sets:\n" + "\n".join(f"  - {fault}" for fault in faults))


def parent_of(root: str) -> Parent:
    """The data set at `root`, or the one whose splits lie there, as what another extends.

    Raises:
        UserError: it is no local data set, its splits disagree, or its vocabularies are missing.
    """
    if "://" in root:
        raise UserError(f"{root}: a data set is extended from a local folder with its vocabulary: copy both here.")
    folder = Path(root).absolute()
    if (folder / INDEX_NAME).is_file() or not any(_splits(folder)):
        index, home = read_index(str(folder)), None
    else:
        indexes = [read_index(str(split)) for split in _splits(folder)]
        index, home = indexes[0], folder
        if any(other.schema != index.schema or other.tokenizer != index.tokenizer for other in indexes):
            raise UserError(f"{root}: its splits are of different schemas or tokenizers. Name the split to extend.")
    if not dictionaries(index.schema):
        return Parent(root, index, None)
    home = home or home_of(folder, index.schema)
    if not (home / VOCABULARY_NAME).is_dir():
        raise UserError(
            f"{root}: its vocabularies are missing, so the values of new rows cannot be told from old ones. Restore "
            f"{home / VOCABULARY_NAME}, which the build wrote."
        )
    return Parent(root, index, home / VOCABULARY_NAME)


def _splits(folder: Path) -> Iterator[Path]:
    return (folder / name for name in SPLITS if (folder / name / INDEX_NAME).is_file())
