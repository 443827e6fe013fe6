"""What is asked for on a command line, as typed values. They are made once, in command_line.py, and handed on."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

PAPER_SEED = 99  # of everything that the released code draws


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How data are read.

    Args:
        folder: where they are, or go.
        variant: of made data, where there are several.
        workers: processes that load images from files; None for one per core.
    """

    folder: Path
    variant: str | None = None
    workers: int | None = None


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step is made up.

    Args:
        decay: of weights, L2 as torch's optimisers take it; None for the rule's own.
        batches: per step, each normalised by itself; None for one per process that trains the run.
        synchronised: a step is one batch, whose parts lie in the processes.
        centred: outputs are f - f0, f0 the function at the initial parameters.
    """

    batches: int | None = None
    synchronised: bool = False
    decay: float | None = None
    centred: bool = False


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """What is recorded beside the metrics.

    Args:
        angles: between the rule's gradients and backprop's.
        keep: epochs whose parameters are kept; None for the experiment's own.
        score_epochs: epochs of alignment scores; None for every one.
        shuffle_seed: of the control of alignment scores.
        evaluate_every: so many epochs the network is evaluated, and after the last.
    """

    angles: bool = False
    keep: tuple[int, ...] | None = None
    score_epochs: tuple[int, ...] | None = None
    shuffle_seed: int = PAPER_SEED
    evaluate_every: int = 1


@dataclasses.dataclass(frozen=True)
class ParallelOptions:
    """How many runs are trained side by side.

    Args:
        runs_per_gpu: on each GPU.
        threads: of a processor, for each run; on a processor also its share of the cores.
    """

    runs_per_gpu: int = 1
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of a training or alignment script.

    Args:
        experiment: its number.
        network: the kind: cnn, mlp or rnn; None for the experiment's own.
        data, step, record: see there.
        parallel: how runs are placed side by side; None for one after the other.
        device, precision: as given; "auto" among them.
        deterministic: use only algorithms that give the same every time.
        compile: hand steps to torch's compiler.
        threads: of a processor, for runs one after the other; None for as many as pay.
        outputs: where results go.
        grid: values that replace the experiment's own, by the names of its axes and settings.
        quick: a small grid, for a first look.
        action: "train", "list" the runs, "evaluate" what they kept, "report" what is there, or "profile" the loading
            of images.
    """

    experiment: int
    network: str | None
    data: DataOptions
    step: StepOptions = StepOptions()
    record: RecordOptions = RecordOptions()
    parallel: ParallelOptions | None = None
    device: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    compile: bool = False
    threads: int | None = None
    outputs: Path = Path("outputs")
    grid: Mapping[str, object] = dataclasses.field(default_factory=dict)
    quick: bool = False
    action: str = "train"
