"""Where and how precisely a run is computed: choosing a device and a precision."""

import os
import platform
from pathlib import Path

import torch

from wide import UserError
from wide.processes import local_rank

PRECISIONS = ("auto", "fp64", "fp32", "tf32", "bf16")


def choose_device(name: str) -> torch.device:
    """The CPU, or this process' own GPU.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu, or install torch with CUDA")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (number := local_rank()) >= torch.cuda.device_count():
        raise UserError(f"{torch.cuda.device_count()} GPUs are here; start no more processes than that")
    return torch.device("cuda", number)


def choose_precision(name: str, device: torch.device) -> str:
    """fp64, fp32, tf32 or bf16; set for the whole process. `auto` is tf32 on a GPU that has it (as TensorFlow's did),
    else fp32.

    Raises:
        UserError: tf32 without a GPU that has it.
    """
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "tf32" and not has_tf32:
        raise UserError("--precision tf32 needs an NVIDIA GPU of compute capability 8 or more; use fp32")
    precision = ("tf32" if has_tf32 else "fp32") if name == "auto" else name
    torch.set_default_dtype(torch.float64 if precision == "fp64" else torch.float32)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def device_name(device: torch.device) -> str:
    """The GPU's name; or the processor's, and on how many threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")  # platform.processor() says less, where it says anything
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or "CPU"
    return f"{model}, {torch.get_num_threads()} threads"


def usable_cores() -> int:
    """How many cores this process may use: what its affinity and, in a container, its quota leave it."""
    # macOS and Windows do not say which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):  # none, or no limit: "max"
        return cores
