"""Where and how precisely a run is computed: choosing a device and a precision."""

import contextlib
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from align_rules import Rule
from wide import UserError
from wide.runs.run import Run
from wide.training.processes import local_rank

PRECISIONS = ("auto", "fp64", "fp32", "tf32", "bf16")


# Kinds of devices beside the CPU, in the order in which `auto` looks for them: whether torch finds one, and what is
# said where it does not.
ACCELERATORS: dict[str, tuple[Callable[[], bool], str]] = {
    "cuda": (torch.cuda.is_available, "torch finds no GPU here; use --device cpu, or install torch with CUDA or ROCm"),
    "xpu": (torch.xpu.is_available, "torch finds no Intel GPU here; use --device cpu, or install torch for XPU"),
    "mps": (torch.backends.mps.is_available, "torch finds no Apple GPU here; use --device cpu"),
}
DEVICES = ("auto", "cpu", *ACCELERATORS)

# What is said where memory is lacking, beside errors of that kind: by torch on the host and on devices, and by NumPy.
NO_MEMORY = re.compile("out of memory|can't allocate memory|array is too big|Maximum allowed dimension|overflow")


def choose_device(name: str) -> torch.device:
    """The CPU, or this process' own GPU.

    Raises:
        UserError: a GPU is asked for and there is none, or none for this process.
    """
    if name in ACCELERATORS and not ACCELERATORS[name][0]():
        raise UserError(f"--device {name}: {ACCELERATORS[name][1]}")
    found = [kind for kind, (is_there, _) in ACCELERATORS.items() if name in (kind, "auto") and is_there()]
    if not found:
        return torch.device("cpu")
    kind, number = found[0], local_rank()
    count = 1 if kind == "mps" else getattr(torch, kind).device_count()
    if number >= count:
        raise UserError(f"{count} GPUs are here; start no more processes than that")
    return torch.device(kind, number)


def choose_precision(name: str, device: torch.device) -> str:
    """fp64, fp32, tf32 or bf16; set for the whole process. `auto` is tf32 on a GPU that has it (as TensorFlow's did),
    else fp32.

    Raises:
        UserError: tf32 without a GPU that has it, or fp64 on one that has it not.
    """
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "tf32" and not has_tf32:
        raise UserError("--precision tf32 needs an NVIDIA GPU of compute capability 8 or more; use fp32")
    if name == "fp64" and device.type == "mps":
        raise UserError("--precision fp64: Apple GPUs have no double precision; use fp32, or --device cpu")
    precision = ("tf32" if has_tf32 else "fp32") if name == "auto" else name
    torch.set_default_dtype(torch.float64 if precision == "fp64" else torch.float32)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def device_name(device: torch.device) -> str:
    """The GPU's name; or the processor's, and on how many threads."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, {platform.processor() or platform.machine()}"
    information = Path("/proc/cpuinfo")  # platform.processor() says less, where it says anything
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or "CPU"
    return f"{model}, {torch.get_num_threads()} threads"


def usable_cores() -> int:
    """How many cores this process may use: what its affinity and, in a container, its quota leave it."""
    # macOS and Windows do not say which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):  # none, or no limit: "max"
        return cores


# From these widths on a step of training gains by a second thread (docs/speed.md).
WIDE = {"cnn": 1, "mlp": 1024, "rnn": 512}


def threads_for(run: Run, wanted: int | None) -> int | None:
    """How many threads of a processor a run takes: as many as are asked for; else one per core where the network is
    wide enough for them, and one where it is not. None: as torch has them, by OMP_NUM_THREADS or for a timed run."""
    if wanted is None and "OMP_NUM_THREADS" not in os.environ and run.timed_on is None:
        return usable_cores() if run.width >= WIDE[run.network] else 1
    return wanted


def choose_threads(run: Run, wanted: int | None) -> int:
    """Set them for the whole process; how many they are."""
    if (chosen := threads_for(run, wanted)) is not None:
        torch.set_num_threads(chosen)
    return torch.get_num_threads()


def finish(device: torch.device) -> None:
    """Wait until all that was queued on a device is done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def exact(device: torch.device) -> torch.dtype:
    """The type of sums on a device: double precision, where it has that."""
    return torch.float32 if device.type == "mps" else torch.float64


def choose_algorithms(deterministic: bool) -> None:
    """For the whole process, before it uses a GPU: with `deterministic` only algorithms that give the same every time.

    An operation that has none raises a RuntimeError that names it.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic  # else cuDNN takes what is fastest when it is tried
    if deterministic:
        # cuBLAS is deterministic with workspaces of its own (its manual, "Results reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_compiler(wanted: bool, device: torch.device) -> None:
    """For the whole process: whether rules hand their graphs to torch's compiler (Inductor, with Triton on GPUs).

    Numbers then agree to rounding.

    Raises:
        UserError: it is asked for, and Triton is missing on a GPU.
    """
    if wanted and device.type == "cuda" and not has_triton():
        raise UserError("--compile needs Triton on a GPU, which torch does not find here; leave it out")
    Rule.compiler = "inductor" if wanted else None


@contextlib.contextmanager
def memory_for(run: Run, device: torch.device):
    """
    Raises:
        UserError: in place of the many errors that say that memory is lacking, one that says what for.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not NO_MEMORY.search(str(error)):
            raise
        raise UserError(
            f"out of memory on {device}: rule {run.rule} at width {run.width} with batches of {run.batch_size}; use "
            "smaller --widths or --batch-size, or another --device"
        ) from error
