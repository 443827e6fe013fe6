"""Devices beside the CPU, as far as one without them allows; sums, memory, deterministic algorithms."""

import dataclasses
import json

import pytest
import torch
from running import script

import align_rules
from wide import UserError
from wide.runs.run import Run
from wide.training import devices
from wide.training.devices import (
    choose_compiler,
    choose_device,
    choose_precision,
    choose_threads,
    device_name,
    exact,
    memory_for,
)
from wide.training.loop import Averages
from wide.training.processes import join
from wide.training.session import warm_up
from wide.training.tasks import AddTask

RUN = Run("add", "rnn", "fa", 4, 0.001, 99, 50, variant="published")


@pytest.fixture
def here(monkeypatch):
    """Say which kinds of devices torch finds."""

    def have(*kinds):
        found = {name: ((lambda name=name: name in kinds), text) for name, (_, text) in devices.ACCELERATORS.items()}
        monkeypatch.setattr(devices, "ACCELERATORS", found)
        for kind in ("cuda", "xpu"):
            monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 2)
            monkeypatch.setattr(getattr(torch, kind), "get_device_name", lambda device: f"a GPU of {device.type}")

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return have


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [((), "cpu"), (("mps",), "mps:0"), (("xpu", "mps"), "xpu:0"), (("cuda", "xpu", "mps"), "cuda:0")],
)
def test_auto_takes_the_first_of_cuda_xpu_and_mps(here, kinds, chosen):
    here(*kinds)
    assert choose_device("auto") == torch.device(chosen)
    assert choose_device("cpu") == torch.device("cpu")
    for kind in kinds:
        assert choose_device(kind) == torch.device(kind, 0)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_here(here, kind):
    here()
    with pytest.raises(UserError, match=f"--device {kind}: torch finds no .* use --device cpu"):
        choose_device(kind)


def test_one_device_per_process(here, monkeypatch):
    here("xpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("xpu", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="2 GPUs are here"):
        choose_device("auto")


def test_names_of_devices(here):
    here("xpu", "mps")
    assert device_name(torch.device("xpu", 0)) == "a GPU of xpu"
    assert device_name(torch.device("mps", 0)).startswith("Apple GPU")


def test_apple_gpus_have_no_double_precision():
    mps = torch.device("mps")
    with pytest.raises(UserError, match=r"--precision fp64: .* use fp32"):
        choose_precision("fp64", mps)
    assert choose_precision("auto", mps) == "fp32"
    assert exact(mps) == torch.float32
    assert exact(torch.device("cpu")) == torch.float64


def test_processes_on_apple_gpus(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="several processes cannot train together on mps; use --device cpu"):
        join(torch.device("mps"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_averages_stay_close_in_single_precision(monkeypatch, dtype):
    monkeypatch.setattr("wide.training.loop.exact", lambda device: dtype)
    averages, values = Averages(), torch.rand(1000, generator=torch.Generator().manual_seed(1))
    for value in values:
        averages.add({"loss": value}, 100)
    (mean,) = averages.values(join(torch.device("cpu"))).values()
    assert averages.sums["loss"].dtype == dtype
    assert mean == pytest.approx(values.double().mean().item(), rel=1e-6 if dtype == torch.float64 else 1e-5)


def test_angles_do_without_double_precision_on_a_device_that_has_none(monkeypatch):
    class Apple(torch.Tensor):
        """As a tensor on mps: it cannot be double."""

        device = torch.device("mps")

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    one, other = torch.tensor([1.0, 0.0]).as_subclass(Apple), torch.tensor([0.0, 1.0]).as_subclass(Apple)
    assert align_rules._angle(one, other) == pytest.approx(90)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError("Unable to allocate 8.00 EiB for an array"),
    ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger than the maximum possible size."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_lacks_memory_is_said(error):
    lacking = "out of memory on cpu: rule fa at width 4 with batches of 50; use smaller --widths or --batch-size"
    with pytest.raises(UserError, match=lacking), memory_for(RUN, torch.device("cpu")):
        raise error


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), memory_for(RUN, torch.device("cpu")):
        raise RuntimeError("shapes do not match")


def test_a_warm_up_that_lacks_memory():
    with pytest.raises(UserError, match="width 10000000"):
        warm_up(AddTask("published", torch.device("cpu")), Run(**{**vars(RUN), "width": 10**7}))


def test_a_run_that_lacks_memory_fails_and_the_others_go_on(tmp_path):
    options = ["--widths", 10**7, 8, "--rules", "backprop", "--epochs", 1, "--outputs", tmp_path, "--deterministic"]
    done = script("train_add.py", 1, *options)
    assert done.returncode == 1
    assert "| Backprop | 28.2 / 28.2 | failed at epoch 0 |" in done.stdout
    assert done.stderr.count("out of memory on cpu: rule backprop at width 10000000 with batches of 50") == 1
    # The session says that its algorithms were deterministic.
    (config,) = tmp_path.glob("add/*width8-*/config.json")
    assert json.loads(config.read_text())["sessions"][0]["deterministic"] is True


def test_a_width_beyond_all_bounds_is_a_wrong_command_line(tmp_path):
    done = script("train_add.py", 1, "--widths", 10**23, "--outputs", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "is not a positive whole number below 2**31" in done.stderr


def test_threads_by_width(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    try:
        wide = dataclasses.replace(RUN, width=devices.WIDE[RUN.network])
        assert [choose_threads(run, None) for run in (RUN, wide)] == [1, 2]
        assert choose_threads(wide, 1) == 1  # --threads
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert choose_threads(wide, None) == 1
    finally:
        torch.set_num_threads(before)


def test_the_compiler_is_chosen_for_the_process():
    """And rules hand their graphs to it: numbers of a run agree to rounding (tests/rules/test_rules_compiled.py)."""
    try:
        choose_compiler(True, torch.device("cpu"))
        assert align_rules.AlignAda.compiler == "inductor"
    finally:
        choose_compiler(False, torch.device("cpu"))
    assert align_rules.AlignAda.compiler is None
