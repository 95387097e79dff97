"""The card, its driver and the versions; what it reaches at most; which form scans take on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu import files
from benchmarks.gpu.job import Job
from benchmarks.gpu.measuring import on_device
from lightning_compressm.nn import _forms

PACKAGES = (
    "torch", "triton", "lightning", "pytorch-lightning", "pytest", "numpy", "transformers",
    "mamba-ssm", "causal-conv1d", "torchvision", "hypothesis", "rich",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of all packages that make a difference; "missing" for those that are not there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def card(device: torch.device) -> dict[str, Any]:
    """What torch and nvidia-smi say."""
    found: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count()}
    if device.type != "cuda":
        return found | {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    found |= {
        "name": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "memory": total,
        "memory free": free,
        "cuda of torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return found | {"nvidia-smi": _nvidia_smi()}


def _nvidia_smi() -> str:
    path = shutil.which("nvidia-smi")
    if path is None:
        return "nvidia-smi is missing"
    asked = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    done = subprocess.run(
        [path, f"--query-gpu={asked}", "--format=csv,noheader"],
        text=True,
        capture_output=True,
        timeout=15,
    )
    return (done.stdout or done.stderr).strip()


def scans(device: torch.device) -> dict[str, str]:
    """The form that scans take, and what was said where the kernel failed its trial."""
    where = torch.empty(0, device=device).device
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        form = _forms.form_for(where, torch.complex64).name
    return {"form": form, "warnings": "; ".join(str(w.message) for w in said)}


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a bf16 product."""
    source = torch.randn(size, size, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    copy = on_device(lambda: target.copy_(source), device)
    product = on_device(lambda: left @ right, device)
    for measure in (copy, product):
        measure(3)
    return {
        "copy, bytes/s": 2 * source.nbytes / copy(20),
        "bf16 product, flop/s": 2 * size**3 / product(20),
    }


def run(job: Job) -> str:
    found: dict[str, Any] = {"card": card(job.device), "versions": versions()}
    job.tell(found, _page(found))
    found["scans"] = scans(job.device)
    job.tell(found, _page(found))
    found["ceilings"] = ceilings(job.device, 64 if job.rehearsal else 8192)
    job.tell(found, _page(found))
    return ""


def _page(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{value:.4g}" if isinstance(value, float) else str(value)]
        for part in found.values()
        for name, value in part.items()
    ]
    return files.table(("what", "found"), rows)
