"""The time of a training step: every rule, width and precision, on CIFAR-10's networks and on the recurrent one.

    python3 benchmarks/steps.py [--widths 8 32 128] [--precisions fp32 bf16] [--tensorflow] [--jax PYTHON]
                                [--side-by-side]

Steps are those of training, on made-up images in batches of 100 and on the Add task's sequences.
They are timed turn by turn, so that what else the machine does meets all of them: in every round each setting makes as
many steps, one after the other as in training, as take a twentieth of a second. A figure is the median over the rounds
of a step's time, and the quartiles are its spread.

"floor" is the time that a step's matrix products alone would take at the rate of a large one, measured in the same
rounds. "evaluation" is a batch without gradients. `--tensorflow` times the same steps as TensorFlow graphs, in the same
rounds but a process of its own (benchmarks/tensorflow_steps.py); `--jax` likewise backprop and Align-ada in JAX
(benchmarks/jax_steps.py), in an environment with benchmarks/requirements-jax.txt. `--side-by-side` tells how many runs
at once pay.

Prints a table and the hours that the paper's experiments would take at that pace; writes a .csv and a figure.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_add
import train_cifar
import train_kmnist
from benchmarks.neighbours import Neighbour, Request
from wide.data.datasets import Split
from wide.grids.experiments import Experiment, Subject
from wide.models.rules import RULES
from wide.runs.run import Run, effective_batch
from wide.training.capture import WARM_UP
from wide.training.devices import choose_device, choose_precision, device_name, usable_cores
from wide.training.loop import Training
from wide.training.memory import keep_memory
from wide.training.tasks import AddTask, ImageTask, Task, count_operations

SCRIPTS = {"cifar": train_cifar, "kmnist": train_kmnist, "add": train_add}
CHANNELS = {"cifar": 3, "kmnist": 1}
CLASSES = 10
HELD_OUT = {"cifar": (5000, 10000), "kmnist": (5000, 10000), "add": (100, 300)}  # examples that are evaluated
EVALUATION = "evaluation"
# How often each rule makes the products of a forward pass, of errors sent back, and of weight gradients. (The recurrent
# network's initial state learns with the last layer, so that there errors go back.)
PRODUCTS = {
    **dict.fromkeys(("backprop", "fa", "align_prop"), (1, 1, 1)),
    **dict.fromkeys(("align_ada", "align_zero"), (2, 1, 1)),
    "dfa": (1, 0, 1),
    **dict.fromkeys(("last_layer", EVALUATION), (1, 0, 0)),
}
PRODUCT = 2048  # rows and columns of the matrices whose product gives the matrix rate
TURN = 0.05  # seconds that a setting's steps take in a round, at least
COPIED = 2**20  # floats that are copied for the copy rate: 4 MB
# Frameworks that make the same steps beside ours, and the rules that they have there.
FRAMEWORKS = {"tensorflow": tuple(PRODUCTS)[:-1], "jax": ("backprop", "align_ada")}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed. `rule` is EVALUATION for a batch without gradients."""

    dataset: str
    rule: str
    width: int
    precision: str
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of a setting's steps, in seconds: median, quartiles, floor; by framework those beside it, first steps apart."""

    setting: Setting
    median: float
    quartiles: tuple[float, float]
    floor: float
    first: float
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)
    others_first: Mapping[str, float] = dataclasses.field(default_factory=dict)


def subject(dataset: str) -> Subject:
    return SCRIPTS[dataset].SUBJECT


def rules(dataset: str) -> tuple[str, ...]:
    """Those of a dataset's experiments, in the order of the first."""
    experiments = SCRIPTS[dataset].EXPERIMENTS.values()
    return tuple(dict.fromkeys(rule for experiment in experiments for rule in experiment.rules))


def make_task(dataset: str, device: torch.device) -> Task:
    """The Add task, or one of a batch of made-up images."""
    if dataset == "add":
        return AddTask("published", device)
    about = subject(dataset)
    shape, stream = (CHANNELS[dataset], *about.image_size), torch.Generator().manual_seed(0)
    images = torch.rand(about.batch_size, *shape, generator=stream)
    split = Split(images, torch.arange(len(images)) % CLASSES)
    data = SimpleNamespace(
        train=split, validation=split, test=split, classes=CLASSES, image_shape=shape, fingerprint=""
    )
    return ImageTask(data, about.strides, device)


class Step:
    """A setting's step, to be made any number of times."""

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device, about = setting, device, subject(setting.dataset)
        choose_precision(setting.precision, device)
        rule = "backprop" if setting.rule == EVALUATION else setting.rule
        run = Run(
            setting.dataset,
            about.networks[0],
            rule,
            setting.width,
            learning_rate=1e-3,
            seed=99,
            batch_size=about.batch_size,
            variant=about.variants[0] if about.variants else None,
            precision=setting.precision,
        )
        task = make_task(setting.dataset, device)
        self.training = Training(task, run)
        self.training.rule.compiler = "inductor" if setting.compiled else None
        self.batches = task.evaluated_together if setting.rule == EVALUATION else 1  # that `make` goes through
        self.order = np.arange(run.batch_size * self.batches)
        (self.batch,) = task.batches(run, "train", [self.order], 0)

    def make(self) -> None:
        if self.setting.rule == EVALUATION:
            self.training.evaluate("train", self.order)
        else:
            self.training.step([self.batch])

    def seconds(self, times: int = 1) -> float:
        """Of a batch, the mean over so many steps."""
        choose_precision(self.setting.precision, self.device)
        start = self.training.clock()
        for _ in range(times):
            self.make()
        return (self.training.clock() - start) / self.batches / times


@functools.cache
def operations(dataset: str, width: int, device: torch.device) -> tuple[int, int, int]:
    """Floating-point operations of a batch's matrix products: forward, of errors sent back, of weight gradients."""
    forward, whole = (_counted(Step(Setting(dataset, r, width, "fp32"), device)) for r in (EVALUATION, "backprop"))
    return forward, whole - 2 * forward, forward


def _counted(step: Step) -> int:
    step.training.captured = None
    with count_operations() as counter:
        step.make()
    return counter.get_total_flops() // step.batches


def needed(setting: Setting, device: torch.device) -> int:
    """Operations of the matrix products that a setting's step cannot do without."""
    times = (1, 1, 0) if (setting.dataset, setting.rule) == ("add", "last_layer") else PRODUCTS[setting.rule]
    return sum(n * count for n, count in zip(times, operations(setting.dataset, setting.width, device), strict=True))


class MatrixRate:
    """The rate of a large matrix product, in operations a second: what the machine shows at best."""

    def __init__(self, precision: str, device: torch.device):
        self.precision, self.device = precision, device
        dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
        self.size = PRODUCT * (4 if device.type == "cuda" else 1)
        self.factors = torch.randn(2, self.size, self.size, device=device).to(dtype)

    def seconds(self) -> float:
        choose_precision(self.precision, self.device)
        return _seconds(self.device, lambda: torch.mm(*self.factors))

    def operations(self) -> int:
        return 2 * self.size**3


class CopyRate:
    """The rate of copying a block's activity, in bytes read and written a second."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tensors = torch.ones(2, COPIED, device=device)

    def seconds(self) -> float:
        return _seconds(self.device, lambda: self.tensors[0].copy_(self.tensors[1]))

    def operations(self) -> int:
        return 2 * self.tensors[0].nbytes


def _seconds(device: torch.device, work) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def request(step: Step, updates: int = 1, evaluations: int = 0) -> Request:
    """A step as other frameworks take it; or so many, and batches that are evaluated."""
    rule, run = step.training.rule, step.training.run
    feedback = rule.feedback if run.rule in ("fa", "dfa") else ()
    images, targets = step.batch
    recurrent = run.network == "rnn"
    return Request(
        network=run.network,
        rule=run.rule,
        strides=list(subject(run.dataset).strides),
        shapes=[_shape(name, p.shape) for name, p in rule.network.named_parameters()],
        feedback=[_shape("", B.shape) for B in feedback],
        inputs=list(images.shape if recurrent else images.movedim(1, -1).shape),
        outputs=list(targets.shape) if recurrent else [len(targets), CLASSES],
        updates=updates,
        evaluations=evaluations,
    )


def _shape(name: str, shape: torch.Size) -> list[int]:
    """In TensorFlow's layout, the output last."""
    if name == "initial_state" or len(shape) == 1:
        return list(shape)
    return [*shape[2:], shape[1], shape[0]]


def measure(settings: list[Setting], device: torch.device, rounds: int, others: Mapping[str, Neighbour]):
    """Time all settings turn by turn.

    Returns:
        Timings, in order; and the matrix rate of each precision, in operations a second, with the copy rate, "copy".
    """
    steps = [Step(setting, device) for setting in settings]
    rates = {name: MatrixRate(name, device) for name in dict.fromkeys(s.precision for s in settings)}
    rates["copy"] = CopyRate(device)
    compared = {
        (step, name): functools.partial(_others_seconds, other, step)
        for step in steps
        for name, other in others.items()
        if step.setting.precision == "fp32" and step.setting.rule in FRAMEWORKS[name]
    }
    firsts = {key: make(1) for key, make in compared.items()}
    work = {}
    for key, make in [*((step, step.seconds) for step in steps), *compared.items()]:
        firsts.setdefault(key, make(1))
        for _ in range(WARM_UP):  # before a CUDA graph is captured
            make(1)
        work[key] = functools.partial(make, math.ceil(TURN / make(1)))
    work |= {rate: rate.seconds for rate in rates.values()}
    times: dict[object, list[float]] = {key: [] for key in work}
    for _ in range(rounds):
        for key, make in work.items():
            times[key].append(make())
    found = {name: rate.operations() / statistics.median(times[rate]) for name, rate in rates.items()}
    timings = [
        Timing(
            step.setting,
            statistics.median(times[step]),
            _quartiles(times[step]),
            needed(step.setting, device) / found[step.setting.precision],
            firsts[step],
            {name: statistics.median(times[step, name]) for name in others if (step, name) in times},
            {name: firsts[step, name] for name in others if (step, name) in times},
        )
        for step in steps
    ]
    return timings, found


def _others_seconds(other: Neighbour, step: Step, times: int) -> float:
    return other.seconds(request(step, times)) / times


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# -------------------------------------------------------------------------------------------------------- what is shown


def columns(timing: Timing, backprop: Mapping[tuple, float]) -> dict[str, object]:
    """A row of the .csv. Times in milliseconds."""
    setting = timing.setting
    row = dataclasses.asdict(setting) | {
        "ms": 1e3 * timing.median,
        "ms_low": 1e3 * timing.quartiles[0],
        "ms_high": 1e3 * timing.quartiles[1],
        "floor_ms": 1e3 * timing.floor,
        "of_floor": timing.floor / timing.median,
        "x_backprop": None,
        "first_ms": 1e3 * timing.first,
    }
    place = setting.dataset, setting.width, setting.precision, setting.compiled
    if (reference := backprop.get(place)) is not None:
        row["x_backprop"] = timing.median / reference
    for name in FRAMEWORKS:
        other, first = timing.others.get(name), timing.others_first.get(name)
        row |= {f"{name}_ms": _times(other, 1e3), f"of_{name}": other and timing.median / other}
        row[f"{name}_first_ms"] = _times(first, 1e3)
    return row


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def as_rows(timings: Iterable[Timing]) -> list[dict[str, object]]:
    backprop = {
        (t.setting.dataset, t.setting.width, t.setting.precision, t.setting.compiled): t.median
        for t in timings
        if t.setting.rule == "backprop"
    }
    return [columns(timing, backprop) for timing in timings]


def as_table(rows: list[dict[str, object]]) -> str:
    """Markdown; the columns of other frameworks where they were timed."""
    compared = [name for name in FRAMEWORKS if any(row[f"{name}_ms"] is not None for row in rows)]
    head = ["", "width", "precision", "rule", "ms", "quartiles", "floor/time", "x backprop"]
    head += [title for name in compared for title in (f"{name} ms", f"ours/{name}")]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        rule = f"{row['rule']}{', compiled' * row['compiled']}"
        cells = [row["dataset"], row["width"], row["precision"], rule, f"{row['ms']:.2f}"]
        cells += [f"{row['ms_low']:.2f} to {row['ms_high']:.2f}", f"{row['of_floor']:.2f}", _ratio(row["x_backprop"])]
        cells += [cell for n in compared for cell in (_ratio(row[f"{n}_ms"]), _ratio(row[f"of_{n}"]))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _ratio(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, rows: list[dict[str, object]]) -> None:
    """Time against width, a panel for each dataset and precision, with backprop's floor as a line."""
    panels = {}
    for row in rows:
        panels.setdefault((row["dataset"], row["precision"]), []).append(row)
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, (place, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for rule in dict.fromkeys(row["rule"] for row in shown if row["rule"] in RULES):
            _line(
                axes, [row for row in shown if row["rule"] == rule], "ms", label=RULES[rule].title, **RULES[rule].style
            )
        own = [row for row in shown if row["rule"] == "backprop"]
        _line(axes, own, "floor_ms", label="floor of backprop", color="#111111", linestyle=":")
        for name, marker in zip(FRAMEWORKS, "ox", strict=True):
            if any(row[f"{name}_ms"] for row in own):
                _line(axes, own, f"{name}_ms", label=f"backprop, {name}", color="#8a8a8a", marker=marker)
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="ms a step", title=" ".join(place))
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _line(axes, rows: list[dict[str, object]], column: str, **style) -> None:
    axes.plot([row["width"] for row in rows], [row[column] for row in rows], **style)


def hours(rows: list[dict[str, object]], precision: str) -> str:
    """For each of the paper's experiments whose rules were timed, how long it takes; a table."""
    lines = ["| experiment | runs | hours |", "|---|---|---|"]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        times: dict[str, dict[int, float]] = {}
        for row in rows:
            if (row["dataset"], row["precision"]) == (dataset, precision):
                own = times.setdefault(row["rule"], {})
                own[row["width"]] = min(row["ms"] / 1e3, own.get(row["width"], math.inf))  # compiled or not
        for number, experiment in SCRIPTS[dataset].EXPERIMENTS.items():
            if {*experiment.rules, EVALUATION} <= times.keys():
                runs, seconds = _experiment(dataset, experiment, times)
                title = f"`train_{dataset}.py {number}`: {experiment.title}"
                lines.append(f"| {title} | {runs} | {seconds / 3600:.3g} |")
    return "\n".join(lines)


def _experiment(dataset: str, experiment: Experiment, times: Mapping[str, Mapping[int, float]]) -> tuple[int, float]:
    """The number of an experiment's runs, and the seconds that they take one after the other."""
    about, runs, seconds = subject(dataset), 0, 0.0
    same = len(experiment.learning_rates) * len(experiment.seeds)
    for rule, width, limit in itertools.product(experiment.rules, experiment.widths, experiment.data_limits):
        examples = min(limit or about.examples, about.examples)
        batch = effective_batch(about.batch_size, limit)
        share = batch / about.batch_size  # a smaller batch is taken to cost in proportion
        evaluated = sum(min(limit or size, size) if k == 0 else min(max(limit or size, 1000), size)
                        for k, size in enumerate(HELD_OUT[dataset]))  # fmt: skip
        epoch = examples // batch * at_width(times[rule], width) + evaluated // batch * at_width(
            times[EVALUATION], width
        )
        runs += same
        seconds += same * experiment.epochs * share * epoch
    return runs, seconds


def at_width(times: Mapping[int, float], width: int) -> float:
    """The time at a width, a power of it between and beyond the two nearest that were measured."""
    if width in times or len(times) == 1:
        return times.get(width, next(iter(times.values())))
    one, other = sorted(sorted(times, key=lambda known: abs(math.log(known / width)))[:2])
    power = math.log(times[other] / times[one]) / math.log(other / one)
    return times[one] * (width / one) ** power


# ------------------------------------------------------------------------------------------------------ runs at a time


def side_by_side(settings: list[Setting], counts: list[int], device: str, seconds: float) -> str:
    """Steps a second of all runs together: one of one thread, and several numbers that share the cores; a table."""
    cores = usable_cores()
    placed = list(dict.fromkeys([(1, 1), *((count, max(cores // count, 1)) for count in counts)]))
    heads = [f"{count} with {threads} thread{'s' * (threads > 1)}" for count, threads in placed]
    lines = [f"| steps a second | {' | '.join(heads)} |", "|---" * (len(counts) + 1) + "|"]
    for setting in settings:
        together = [_together(setting, count, threads, (device, seconds)) for count, threads in placed]
        cells = [f"{rate:.1f}" for rate in together]
        place = f"{setting.dataset}, {setting.rule}, width {setting.width}, {setting.precision}"
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _together(setting: Setting, count: int, threads: int, how: tuple[str, float]) -> float:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(count)
    with spawn.Pool(count, initializer=_prepare, initargs=(start, threads)) as pool:
        return sum(pool.starmap(_steps_a_second, [(setting, *how)] * count, chunksize=1))


def _prepare(start, threads: int) -> None:
    """Make a process ready; `begin`, for all to start together, can only be handed over here."""
    global begin
    keep_memory()
    torch.set_num_threads(threads)
    begin = start


def _steps_a_second(setting: Setting, device: str, seconds: float) -> float:
    step, made = Step(setting, choose_device(device)), 0
    step.seconds()
    begin.wait()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        step.seconds()
        made += 1
    return made / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SCRIPTS, default=["cifar", "add"])
    add("--widths", nargs="+", type=int, default=[8, 32], help="of images' networks (default 8 32)")
    add("--recurrent-widths", nargs="+", type=int, default=[16, 64, 256], help="(default 16 64 256)")
    add("--precisions", nargs="+", default=["fp32"], help="fp32, tf32, bf16, fp64 (default fp32)")
    add("--compiled", nargs="+", choices=("no", "yes"), default=["no"], help="by torch's compiler (default: no)")
    add("--rules", nargs="+", choices=list(PRODUCTS)[:-1], help="default: all of each dataset's experiments")
    add("--rounds", type=int, default=9, help="timed rounds (default %(default)s)")
    add("--threads", type=int, default=1, help="of a processor (default %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--tensorflow", action="store_true", help="time TensorFlow graphs of the same steps beside them")
    add("--jax", metavar="PYTHON", help="time the same steps in JAX beside them, with the interpreter that has it")
    add("--side-by-side", nargs="*", type=int, metavar="RUNS", help="numbers of runs at once (default 1 2)")
    add("--output", type=Path, default=Path("outputs/steps"), help="of .csv and .png, without suffix (%(default)s)")
    arguments = parser.parse_args()
    kept = keep_memory()
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    settings = [
        Setting(dataset, rule, width, precision, choice == "yes" and rule != EVALUATION)
        for dataset in arguments.datasets
        for width in (arguments.recurrent_widths if dataset == "add" else arguments.widths)
        for precision in arguments.precisions
        for choice in arguments.compiled
        for rule in [*(arguments.rules or rules(dataset)), EVALUATION]
        if rule == EVALUATION or subject(dataset).networks[0] not in RULES[rule].unsuited
    ]
    settings = list(dict.fromkeys(settings))  # an evaluation is not compiled
    others = {"tensorflow": Neighbour("tensorflow_steps.py", arguments.threads)} if arguments.tensorflow else {}
    if arguments.jax:
        others["jax"] = Neighbour("jax_steps.py", arguments.threads, arguments.jax)
    timings, rates = measure(settings, device, arguments.rounds, others)
    for other in others.values():
        other.close()
    rows = as_rows(timings)
    memory = "kept" if kept else "not kept"
    print(f"{device_name(device)}; torch {torch.__version__}; memory {memory}; medians of {arguments.rounds} rounds")
    print("; ".join(_rate_text(name, rate) for name, rate in rates.items()), end="\n\n")
    print(as_table(rows), hours(rows, arguments.precisions[0]), sep="\n\n", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.output.with_suffix(".csv"), rows)
    draw(arguments.output.with_suffix(".png"), rows)
    if arguments.side_by_side is not None:
        chosen = [setting for setting in settings if setting.rule == "backprop"]
        print("", side_by_side(chosen, arguments.side_by_side or [1, 2], arguments.device, seconds=10), sep="\n")


def _rate_text(name: str, rate: float) -> str:
    if name == "copy":
        return f"copying {4 * COPIED / 2**20:.0f} MB {rate / 1e9:.1f} GB/s read and written"
    return f"products in {name} {rate / 1e9:.0f} GFLOP/s"


if __name__ == "__main__":
    main()
