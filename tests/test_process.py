"""What a rank sets of its process: how malloc keeps memory, and how exact matrix products are."""

from __future__ import annotations

import os
import platform
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run_command
from torch import nn

from dist_rec.training.hybrid import Hybrid

FAULTS = """
import resource, sys, torch
from dist_rec.training import process
if sys.argv[1] == "kept":
    process._keep_freed_memory()
def step():
    a, b = (torch.ones(2**22) for _ in range(2))
    return torch.cat([a, a + b])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another malloc")
@pytest.mark.parametrize(
    "how, variables, kept",
    [("kept", {}, True), ("left", {}, False), ("kept", {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, False)],
    ids=["kept", "left", "the user's own"],
)
def test_a_step_s_tensors_lie_where_the_last_one_s_did(monkeypatch, how, variables, kept):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended = run_command([sys.executable, "-c", FAULTS, how], 120)
    # 80 MiB a step, in pages that the kernel gives one by one. Kept memory needs next to none, now and then a tenth.
    pages = 10 * 80 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert (int(ended.stdout) < 0.25 * pages) == kept, ended.stdout


def test_matrix_products_are_as_exact_as_asked_for_in_training_alone():
    seen = []
    hybrid = Hybrid.__new__(Hybrid)
    hybrid.matmul_precision, hybrid.sharded, hybrid.engine = "medium", nn.Identity(), nn.Identity()
    hybrid.pipeline = SimpleNamespace(progress=lambda _: seen.append(torch.get_float32_matmul_precision()))
    hybrid.train_step(iter([]))
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == "highest"
