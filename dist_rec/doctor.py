"""What is installed, what fits together, and the one line that repairs each fault.

Versions are read from the metadata of the installed `dist_rec`, that is from pyproject.toml, and
stand nowhere here. torch, fbgemm and torchrec are loaded in a process of their own, so that a
library that crashes on load is a finding and not a crash of the doctor.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

State = Literal["ok", "warn", "fail"]
Check = dict[str, str | None]

BUILD = "bash launchers/env.sh"
PROBE_SECONDS = 90
# Extras that training does without, and who does not.
_OPTIONAL = {
    "demo": "; only the demo needs it",
    "dev": "; only tests and linting need it",
    "peers": "; only `dist-rec bench stream` needs it",
}
GIB = 2**30

# One line of JSON per library, so that a crash in one keeps what was found before it.
PROBE = """
import json, sys
def report(**found):
    print("DOCTOR", json.dumps(found), flush=True)
def attempt(name, look):
    try:
        report(name=name, loads=True, **look())
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        report(name=name, loads=False, reason=f"{type(error).__name__}: {lines[0]}")
def torch_():
    import torch, torch.distributed as d
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return dict(gpus=gpus, cuda=torch.version.cuda, gloo=d.is_gloo_available(), nccl=d.is_nccl_available())
def fbgemm():
    import torch, fbgemm_gpu
    lengths = torch.tensor([2, 0, 3])
    assert torch.ops.fbgemm.asynchronous_complete_cumsum(lengths).tolist() == [0, 2, 2, 5]
    return {}
def torchrec():
    import torchrec
    return {}
attempt("torch", torch_)
attempt("fbgemm", fbgemm)
attempt("torchrec", torchrec)
"""


def check(name: str, state: State, found: str, repair: str | None = None) -> Check:
    """One line of the report; `repair` is a command, or words where no command can do it."""
    return {"name": name, "state": state, "found": found, "repair": repair}


def diagnose() -> dict[str, Any]:
    """Look at everything a run needs.

    Returns:
        `{"ok": bool, "checks": [{"name", "state", "found", "repair"}]}`; `state` is `ok`, `warn` (something
        does without, or will be slow) or `fail` (runs will not work), `ok` says that nothing fails.
    """
    requirements = _requirements()
    if not requirements:
        checks = [check("dist_rec", "fail", "is not installed here, so its pins are unknown", BUILD)]
    else:
        smi = _first_lines(["nvidia-smi", "-L"])
        chosen = _accelerator(bool(smi))
        probe = _probe()
        checks = [
            _python(),
            *_packages(requirements, chosen),
            *_fit(requirements, chosen),
            *_loads(probe, requirements, chosen),
            *_backends(probe, smi),
            *_compiler(chosen),
            _shm_op(chosen),
            *_machine(),
        ]
    return {"ok": all(c["state"] != "fail" for c in checks), "checks": checks}


def print_report(diagnosis: dict[str, Any]) -> None:
    """The diagnosis as a table on stdout, then the repairs, each on a line that can be copied."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("", "check", "found", box=None, pad_edge=False)
    for line in diagnosis["checks"]:
        table.add_row(Text(line["state"], style=colours[line["state"]]), Text(line["name"]), Text(line["found"]))
    console.print(table)
    for line in diagnosis["checks"]:
        if line["repair"]:
            console.print(Text(f"\n{line['name']}:", style=colours[line["state"]]))
            console.print(Text(f"  {line['repair']}"), soft_wrap=True)
    failed = sum(line["state"] == "fail" for line in diagnosis["checks"])
    verdict = "Everything a run needs is here." if diagnosis["ok"] else f"{failed} checks fail; runs will not work."
    console.print(Text(f"\n{verdict}", style="green" if diagnosis["ok"] else "bold red"))


def misfit(torch: str | None, fbgemm: str | None, torchrec: str | None) -> dict[str, str]:
    """Why these versions do not belong together, by package; empty where they do.

    fbgemm 1.X is compiled against torch 2.(X+5) and its binary loads on no other; torchrec 1.X calls the
    operators of fbgemm 1.X. A package that is None is not judged.
    """
    faults = {}
    try:
        on, ops, rec = (Version(v) if v else None for v in (torch, fbgemm, torchrec))
    except InvalidVersion as error:
        return {"torch": f"{error}: the rule cannot be applied"}
    if on and ops and (on.major, on.minor) != (2, ops.minor + 5):
        right = f"1.{on.minor - 5}" if on.major == 2 and on.minor >= 5 else "none"
        faults["fbgemm"] = f"fbgemm {ops} loads on torch 2.{ops.minor + 5} only; torch {on} needs fbgemm {right}"
    if ops and ops.major != 1:
        faults["fbgemm"] = f"fbgemm {ops}: only the 1.X series follows the known rule"
    if ops and rec and (rec.major, rec.minor) != (ops.major, ops.minor):
        faults["torchrec"] = f"torchrec {rec} belongs to fbgemm {rec.major}.{rec.minor}, not {ops}"
    return faults


def _requirements() -> list[Requirement]:
    """What pyproject.toml asked for when this environment was built, extras included."""
    try:
        return [Requirement(line) for line in metadata.requires("dist_rec") or []]
    except metadata.PackageNotFoundError:
        return []


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerator(has_gpu: bool) -> str:
    """The extra this environment was built with; where none was, the one that fits the machine."""
    if _installed("fbgemm-gpu"):
        return "gpu"
    return "cpu" if _installed("fbgemm-gpu-cpu") or not has_gpu else "gpu"


def _extra(requirement: Requirement) -> str | None:
    found = re.search(r"""extra\s*==\s*['"](\w+)['"]""", str(requirement.marker or ""))
    return found[1] if found else None


def _pip(requirement: Requirement, alone: bool) -> str:
    pin = f"{requirement.name}{requirement.specifier}"
    arguments = ["install", "--no-deps", pin] if alone else ["install", pin]
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def _named(requirements: Iterable[Requirement], name: str) -> Requirement:
    return next(r for r in requirements if r.name == name)


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata("dist_rec")["Requires-Python"]
    found = platform.python_version()
    if SpecifierSet(wanted).contains(found):
        return check("python", "ok", f"{found} ({sys.executable})")
    return check("python", "fail", f"{found}, needs {wanted}", "PYTHON=/path/to/python3.11 bash launchers/env.sh")


def _packages(requirements: list[Requirement], chosen: str) -> list[Check]:
    """Installed versions against pins: one line per exact pin or fault, one for all the rest."""
    checks, rest = [], 0
    for requirement in requirements:
        extra = _extra(requirement)
        # torchrec is pinned under `gpu` only, because on CPU it must come without its dependencies; what brings further
        # language models is read from its package by launchers/models.sh, not installed.
        if extra == "models" or extra in {"cpu", "gpu"} - {chosen} and requirement.name != "torchrec":
            continue
        needed: State = "warn" if extra in _OPTIONAL else "fail"
        purpose = _OPTIONAL.get(extra, "")
        alone = extra in ("demo", "peers") or (requirement.name == "torchrec" and chosen == "cpu")
        version, wanted = _installed(requirement.name), str(requirement.specifier)
        if version is None:
            found = f"is missing, needs {wanted}{purpose}"
            checks.append(check(requirement.name, needed, found, _pip(requirement, alone)))
        elif not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, needs {wanted}{purpose}"
            checks.append(check(requirement.name, needed, found, _pip(requirement, alone)))
        elif wanted.startswith("=="):
            checks.append(check(requirement.name, "ok", version))
        else:
            rest += 1
    return [*checks, check("other packages", "ok", f"{rest} are there in versions that will do")]


def _fit(requirements: list[Requirement], chosen: str) -> list[Check]:
    cpu, gpu = _installed("fbgemm-gpu-cpu"), _installed("fbgemm-gpu")
    if cpu and gpu:
        remove = shlex.join([sys.executable, "-m", "pip", "uninstall", "-y", "fbgemm-gpu", "fbgemm-gpu-cpu"])
        right = _named(requirements, "fbgemm-gpu" if chosen == "gpu" else "fbgemm-gpu-cpu")
        found = "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files"
        return [check("fbgemm build", "fail", found, f"{remove} && {_pip(right, alone=True)}")]
    versions = _installed("torch"), gpu or cpu, _installed("torchrec")
    faults = misfit(*versions)
    if None in versions and not faults:
        return []  # what is missing has its own line, and the rest says nothing against each other
    if not faults:
        return [check("versions fit", "ok", "fbgemm 1.X with torch 2.(X+5) and torchrec 1.X")]
    pins = [_named(requirements, "torch"), _fbgemm(requirements, chosen), _named(requirements, "torchrec")]
    together = shlex.join(
        [sys.executable, "-m", "pip", "install", "--no-deps", *(f"{pin.name}{pin.specifier}" for pin in pins)]
    )
    return [check(f"{name} fits", "fail", reason, together) for name, reason in faults.items()]


def _fbgemm(requirements: list[Requirement], chosen: str) -> Requirement:
    return _named(requirements, "fbgemm-gpu" if chosen == "gpu" else "fbgemm-gpu-cpu")


def _probe() -> dict[str, dict[str, Any]]:
    """What torch, fbgemm and torchrec said when they were loaded, by name."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        output, ending = done.stdout, f"the process died on loading it (exit code {done.returncode})"
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        ending = f"did not load within {PROBE_SECONDS} s"
    lines = [json.loads(line.removeprefix("DOCTOR ")) for line in output.splitlines() if line.startswith("DOCTOR ")]
    found = {line.pop("name"): line for line in lines}
    for name in ("torch", "fbgemm", "torchrec"):
        if name not in found:
            found[name] = {"loads": False, "reason": ending}
            ending = "not tried, because the one before it failed"
    return found


def _loads(probe: dict[str, dict[str, Any]], requirements: list[Requirement], chosen: str) -> list[Check]:
    pins = {
        "torch": _named(requirements, "torch"),
        "fbgemm": _fbgemm(requirements, chosen),
        "torchrec": _named(requirements, "torchrec"),
    }
    checks = []
    for name, pin in pins.items():
        if probe[name]["loads"]:
            checks.append(check(f"{name} loads", "ok", "yes"))
        else:
            again = _pip(pin, alone=name != "torch").replace(" install ", " install --force-reinstall ", 1)
            checks.append(check(f"{name} loads", "fail", probe[name]["reason"], again))
    return checks


def _backends(probe: dict[str, dict[str, Any]], smi: list[str]) -> list[Check]:
    torch = probe["torch"]
    if not torch["loads"]:
        return []
    rebuild = f"DIST_REC_ACCELERATOR=gpu {BUILD}"
    checks = [
        check("gloo", "ok", "available")
        if torch["gloo"]
        else check("gloo", "fail", "this torch was built without gloo, which every run uses", BUILD)
    ]
    if torch["gpus"]:
        names = ", ".join(f"{torch['gpus'].count(name)} x {name}" for name in dict.fromkeys(torch["gpus"]))
        checks.append(check("gpu", "ok", f"{names}, CUDA {torch['cuda']}"))
        if torch["nccl"]:
            checks.append(check("nccl", "ok", "available"))
        else:
            checks.append(check("nccl", "fail", "this torch was built without NCCL, which CUDA runs use", rebuild))
    elif smi and torch["cuda"] is None:
        checks.append(check("gpu", "warn", f"{len(smi)} in this machine, but this torch is a CPU build", rebuild))
    elif smi:
        found = f"{len(smi)} in this machine, but torch (CUDA {torch['cuda']}) sees none"
        checks.append(check("gpu", "warn", found, "compare the driver's CUDA version in `nvidia-smi` with torch's"))
    else:
        checks.append(check("gpu", "ok", "none; runs use the CPU and gloo"))
    return checks


def _compiler(chosen: str) -> list[Check]:
    """DeepSpeed compiles ops with these; where its op is there already, nothing waits for them."""
    state: State = "warn" if chosen == "gpu" or _prebuilt_op() else "fail"
    compiler = shutil.which("c++") or shutil.which("g++")
    version = _first_lines([compiler, "--version"]) if compiler else []
    ninja = shutil.which("ninja")
    checks = []
    if version:
        checks.append(check("C++ compiler", "ok", f"{version[0]} ({compiler})"))
    else:
        found = "neither c++ nor g++ is on PATH" if not compiler else f"{compiler} does not run"
        checks.append(check("C++ compiler", state, found, "apt-get install -y g++"))
    if ninja:
        checks.append(check("ninja", "ok", ninja))
    else:
        checks.append(check("ninja", state, "is not on PATH", "source launchers/env.sh"))
    return checks


def _prebuilt_op() -> Path | None:
    """DeepSpeed's shared-memory op as compiled into the package by launchers/env.sh."""
    package = importlib.util.find_spec("deepspeed")
    if package is None or package.origin is None:
        return None
    return next((Path(package.origin).parent / "ops" / "comm").glob("deepspeed_shm_comm_op*.so"), None)


def _shm_op(chosen: str) -> Check:
    name = "DeepSpeed shm op"
    if _prebuilt_op():
        return check(name, "ok", "compiled into the package")
    if chosen == "gpu":
        return check(name, "ok", "not there, and not used on CUDA")
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        folders = [Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm"]
    else:
        version = f"py{sys.version_info.major}{sys.version_info.minor}"
        folders = list(Path.home().glob(f".cache/torch_extensions/{version}*/deepspeed_shm_comm"))
    for folder in folders:
        if (folder / "lock").exists():
            found = f"{folder} is locked: being compiled now, or left by a killed process, and then runs hang"
            return check(name, "warn", found, shlex.join(["rm", str(folder / "lock")]))
    for folder in folders:
        if (folder / "deepspeed_shm_comm.so").exists():
            return check(name, "ok", f"compiled in {folder}")
    load = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
    repair = f"DS_ACCELERATOR=cpu {shlex.join([sys.executable, '-c', load])}"
    return check(name, "warn", "not compiled yet: the first run will take a minute for it", repair)


def _machine() -> list[Check]:
    cores, memory = len(os.sched_getaffinity(0)), _memory()
    checks = [check("cores", "ok", str(cores))]
    if memory < 4 * GIB:
        found = f"{memory / GIB:.1f} GiB: a rank takes 1 GiB before it has any table"
        checks.append(check("memory", "warn", found, "start fewer ranks (torchrun --nproc-per-node 1)"))
    else:
        checks.append(check("memory", "ok", f"{memory / GIB:.0f} GiB"))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        checks.append(
            check("OMP_NUM_THREADS", "ok", "unset: torchrun gives several ranks 1 each; torch takes all cores")
        )
    elif threads.isdigit() and 1 <= int(threads) <= cores:
        checks.append(check("OMP_NUM_THREADS", "ok", threads))
    else:
        found = f"{threads!r}, but there are {cores} cores"
        checks.append(check("OMP_NUM_THREADS", "warn", found, "export OMP_NUM_THREADS=1"))
    # deepspeed/ops/csrc/cpu/comm/shm.cpp: 2 x 1 MiB + 2 x 32 MiB a rank; Docker gives 64 MiB unless told.
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    if shared < GIB // 2:
        found = f"{shared // 2**20} MiB in /dev/shm: DeepSpeed takes 66 MiB of it for every CPU rank, NCCL some too"
        checks.append(check("shared memory", "warn", found, "start the container with --shm-size=2g"))
    else:
        checks.append(check("shared memory", "ok", f"{shared / GIB:.1f} GiB in /dev/shm"))
    return checks


def _memory() -> int:
    """Bytes that this process may use: the machine's, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _first_lines(command: list[str]) -> list[str]:
    """What a small tool prints, empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
