"""What is studied: every study is a grid of runs, as a command asks for it. Which of them are here: keeping.py."""

import dataclasses
import functools
import importlib
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from wide.command_line import asked
from wide.grids.study import Machine
from wide.grids.study import Study as Grid
from wide.runs.run import Run

ROOT = Path(__file__).parents[2]
DATA = " --data-dir DATA"  # in commands: the folder of the data
ALL = "backprop align_ada align_zero align_prop fa dfa last_layer sign_symmetry kolen_pollack weight_mirror"
SEVEN = "backprop align_ada align_zero align_prop fa dfa last_layer"
SIX = "backprop align_ada align_zero fa dfa last_layer"
FIVE = "backprop align_ada align_zero fa dfa"
THREE = "backprop align_ada align_zero"
ADD_RULES = "backprop align_ada align_zero last_layer fa align_prop"
THREE_SEEDS, SEEDS = "99 100 101", "99 100 101 102 103"


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid whose runs are in results/, all or some, and what its report is called there.

    Args:
        name: of the report's files in results/reports/.
        command: script, number and options: what would train the whole grid.
    """

    name: str
    title: str
    command: str

    @functools.cached_property
    def grid(self) -> Grid:
        """As the script itself reads its command."""
        script, *words = shlex.split(self.command)
        module = importlib.import_module(script.removesuffix(".py"))
        words += ["--device", "cpu", "--outputs", str(ROOT / "results")]
        options = asked(module.SUBJECT, module.EXPERIMENTS, words)
        return Grid.of(module.SUBJECT, module.EXPERIMENTS, options, Machine.alone(options))


AXES = {
    "seeds": "seed",
    "rules": "rule",
    "data_limits": "data_limit",
    "learning_rates": "learning_rate",
    "widths": "width",
}


def commands(study: Study, runs: Collection[Run]) -> list[str]:
    """Commands that train these runs of a study and no others: its own, cut into grids that are whole."""
    whole, found = study.grid.experiment, []
    planned = {field: {getattr(run, field) for run in study.grid.runs} for field in AXES.values()}
    for block in sorted(blocks(runs), key=lambda block: [sorted(map(str, values)) for values in block]):
        command = study.command
        for (axis, field), values in zip(AXES.items(), block, strict=True):
            if values != planned[field]:
                option = "--" + axis.replace("_", "-")
                texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in getattr(whole, axis) if v in values]
                command, replaced = re.subn(rf"{option}( [^-\s]\S*)+", f"{option} {' '.join(texts)}", command)
                if not replaced:
                    script, number, *rest = command.split(" ", 2)
                    command = " ".join([script, number, option, *texts, *rest])
        found.append(command)
    return found


def blocks(runs: Collection[Run]) -> set[tuple[frozenset, ...]]:
    """The runs as few whole grids: values of AXES, every combination of which is a run; each is in one grid."""
    found = {tuple(frozenset([getattr(run, field)]) for field in AXES.values()) for run in runs}
    for k in range(len(AXES)):
        merged: dict[tuple, frozenset] = {}
        for block in found:
            rest = block[:k] + block[k + 1 :]
            merged[rest] = merged.get(rest, frozenset()) | block[k]
        found = {(*rest[:k], values, *rest[k:]) for rest, values in merged.items()}
    return found


# The learning rate of every rule on fully connected networks, chosen as wide/results/rates.py says.
RATES: Mapping[str, float] = dict.fromkeys(ALL.split(), 5.0) | {"align_zero": 2.0}
CENTRED_RATES: Mapping[str, float] = dict.fromkeys(ALL.split(), 5.0)
FP32 = " --precision fp32"  # on GPUs, too, which have TF32 by default
MLP = "train_kmnist.py 1 --network mlp"
FIFTY = f"--epochs 50 --evaluate-every 10{FP32}{DATA}"
# Training images and epochs: 900 updates each, in batches of 100 or all images.
LITTLE = {30: 900, 100: 900, 300: 300, 1000: 90, 3000: 30}


def by_rate(name: str, title: str, rates: Mapping[str, float], options: str) -> tuple[Study, ...]:
    """A study of all rules, each at its rate: one command, and so one report, for each rate."""
    found = []
    for rate in sorted(set(rates.values()), reverse=True):
        rules = " ".join(rule for rule in rates if rates[rule] == rate)
        called = name if rate == max(rates.values()) else f"{name}_lr{rate:g}"
        command = f"{MLP} --rules {rules} --learning-rates {rate:g} {options}"
        found.append(Study(called, f"{title}, learning rate {rate:g}", command))
    return tuple(found)


WIDTHS = "16 32 64 128 256 512 1024 2048"
STUDIES = (
    Study(
        "mlp_rates", "fully connected: learning rates, 50 epochs",
        f"{MLP} --rules {ALL} --widths 64 1024 --learning-rates 5 2 1 10 --seeds 99 {FIFTY}",
    ),
    *by_rate(
        "mlp_width", "fully connected: accuracy against width, 50 epochs", RATES,
        f"--widths {WIDTHS} 4096 --seeds {SEEDS} {FIFTY}",
    ),
    Study(
        "mlp_width_align_zero", "fully connected: Align-zero at the rate of the others, 50 epochs",
        f"{MLP} --rules align_zero --learning-rates 5 --widths {WIDTHS} 4096 --seeds {SEEDS} {FIFTY}",
    ),
    Study(
        "mlp_decay", "fully connected: accuracy at equal weight decay, 50 epochs, learning rate 5",
        f"{MLP} --rules backprop align_ada kolen_pollack --widths 64 256 --learning-rates 5 --seeds {THREE_SEEDS} "
        f"--weight-decay 0.0001 {FIFTY}",
    ),
    Study(
        "mlp_centred_rates", "fully connected, centred outputs: learning rates, 50 epochs",
        f"{MLP} --centred --rules {ALL} --widths 64 256 --learning-rates 5 2 1 10 --seeds 99 {FIFTY}",
    ),
    *by_rate(
        "mlp_centred", "fully connected, centred outputs: accuracy against width, 50 epochs",
        {rule: CENTRED_RATES[rule] for rule in SEVEN.split()},
        f"--centred --widths {WIDTHS} --seeds {THREE_SEEDS} {FIFTY}",
    ),
    *(
        Study(
            f"mlp_{images}_images{'_centred' * bool(centred)}",
            f"fully connected{', centred outputs' * bool(centred)}: {images} training images, 900 updates",
            f"{MLP} {centred}--rules {SEVEN} --widths 1024 --learning-rates 5 --data-limits {images} --seeds {SEEDS} "
            f"--epochs {epochs} --evaluate-every {epochs}{FP32}{DATA}",
        )
        for centred in ("", "--centred ")
        for images, epochs in LITTLE.items()
    ),
    Study(
        "mlp_theory", "fully connected: distance from theory against width, after 9 updates",
        f"train_kmnist.py 3 --network mlp --widths {WIDTHS} 4096 --seeds {THREE_SEEDS}{FP32}{DATA}",
    ),
    Study(
        "mlp_outputs", "fully connected: distance of outputs from those of backprop's network against width",
        f"train_kmnist.py 4 --network mlp --widths {WIDTHS} 4096 --seeds {THREE_SEEDS} "
        f"--evaluate-every 1000{FP32}{DATA}",
    ),
    Study(
        "kmnist_seeds", "convolutional: accuracy against width, 100 epochs, learning rate 5",
        f"train_kmnist.py 1 --rules {SEVEN} --widths 8 16 32 --learning-rates 5 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "kmnist_wider", "convolutional: wider networks, 100 epochs, learning rate 5",
        "train_kmnist.py 1 --rules backprop align_ada align_zero fa --widths 64 128 --learning-rates 5 "
        f"--seeds {THREE_SEEDS}{FP32}{DATA}",
    ),
    Study(
        "kmnist_early", "convolutional: accuracy against width after 20 epochs, learning rate 5",
        f"train_kmnist.py 1 --rules {THREE} --widths 8 16 32 64 --learning-rates 5 --epochs 20 "
        f"--seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "kmnist_rules", "convolutional: all rules, 100 epochs, learning rate 5 (Kolen-Pollack alone has weight decay)",
        f"train_kmnist.py 1 --rules {ALL} --widths 8 16 --learning-rates 5{DATA}",
    ),
    Study(
        "kmnist_decay", "convolutional: accuracy at equal weight decay, learning rate 5",
        "train_kmnist.py 1 --rules backprop align_ada kolen_pollack --widths 8 --learning-rates 5 "
        f"--weight-decay 0.0001{DATA}",
    ),
    Study(
        "kmnist_rates", "convolutional: accuracy against learning rate, 100 epochs",
        f"train_kmnist.py 2 --rules {SIX} --widths 8 --learning-rates 1 2 5{DATA}",
    ),
    Study(
        "kmnist_diverging", "convolutional: rates at which training diverges",
        f"train_kmnist.py 2 --rules backprop align_ada --widths 8 --learning-rates 5 10 20{DATA}",
    ),
    Study(
        "kmnist_theory", "convolutional: distance from theory against width, after 9 updates",
        f"train_kmnist.py 3 --widths 8 16 32 64 128 256 512 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "kmnist_alignment", "convolutional: alignment scores of pairs against width, after 20 epochs",
        f"alignment_kmnist.py 2 --widths 8 16 32 64 --epochs 20 --seeds {THREE_SEEDS}{DATA}",
    ),
    *(
        Study(
            f"kmnist_{precision}", f"convolutional: accuracy and angles in {precision}, 10 epochs, learning rate 5",
            f"train_kmnist.py 1 --rules {SIX} --widths 8 32 --learning-rates 5 --seeds {SEEDS} "
            f"--epochs 10 --log-alignment --precision {precision}{DATA}",
        )
        for precision in ("fp32", "bf16")
    ),
    *(
        Study(
            f"kmnist_alignment_{precision}", f"convolutional: alignment scores of pairs in {precision}, 10 epochs",
            f"alignment_kmnist.py 2 --widths 8 32 --epochs 10 --seeds {SEEDS} --precision {precision}{DATA}",
        )
        for precision in ("fp32", "bf16")
    ),
    Study(
        "cifar_width", "convolutional: accuracy against width, all 45,000 training images, 5 epochs, learning rate 5",
        f"train_cifar.py 1 --rules {SEVEN} --widths 8 16 --learning-rates 5 "
        f"--epochs 5 --evaluate-every 5 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_early",
        "convolutional: accuracy against width after 600 updates (3,000 training images, batch 50, 10 epochs), rate 5",
        f"train_cifar.py 1 --rules {THREE} --widths 8 16 32 --learning-rates 5 --data-limits 3000 "
        f"--batch-size 50 --epochs 10 --evaluate-every 10 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_seeds", "convolutional: accuracy over seeds, 5 epochs, learning rate 5",
        f"train_cifar.py 6 --widths 8 --learning-rates 5 --epochs 5 --evaluate-every 5{DATA}",
    ),
    Study(
        "cifar_images", "convolutional, width 8: accuracy against number of training images, learning rate 5",
        f"train_cifar.py 4 --rules {FIVE} --widths 8 --learning-rates 5 "
        f"--data-limits 45 150 450 1500 --evaluate-every 150 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_images_16", "convolutional, width 16: accuracy against number of training images, learning rate 5",
        f"train_cifar.py 4 --rules {FIVE} --widths 16 --learning-rates 5 "
        f"--data-limits 45 150 450 --evaluate-every 150 --seeds {THREE_SEEDS}{DATA}",
    ),
    Study(
        "cifar_ntk", "convolutional, 4,500 images, NTK parameterisation, 10 epochs: what the next is compared with",
        f"train_cifar.py 1 --rules {THREE} --widths 8 16 --data-limits 4500 --epochs 10 --evaluate-every 10{DATA}",
    ),
    Study(
        "cifar_standard", "convolutional, 4,500 images, standard parameterisation with Adam, 10 epochs",
        f"train_cifar.py 3 --widths 8 16 --learning-rates 0.0005 0.001 0.002 0.005 0.01 "
        f"--data-limits 4500 --epochs 10 --evaluate-every 10{DATA}",
    ),
    Study(
        "cifar_time", "convolutional: training time of an epoch of 1,000 images against width",
        f"train_cifar.py 7 --widths 8 16 32 --learning-rates 5 --data-limits 1000 --seeds 100 101 102{DATA}",
    ),
    Study(
        "cifar_alignment", "convolutional: alignment scores of pairs against width, 5 epochs",
        f"alignment_cifar.py 2 --widths 8 16 --epochs 5 --seeds {THREE_SEEDS}{DATA}",
    ),
    *(
        Study(
            f"add_{variant}", f"Add task, {variant} variant: loss against width",
            f"train_add.py 1 --variant {variant} --rules {ADD_RULES} --widths 8 16 32 64 128 256 512 1024 "
            f"--seeds {SEEDS}{FP32}",
        )
        for variant in ("published", "corrected")
    ),
    Study(
        "add_alignment", "Add task: alignment scores of pairs against width, after 40 epochs",
        f"alignment_add.py 2 --widths 16 64 256 1024 --epochs 40 --seeds {THREE_SEEDS}",
    ),
)  # fmt: skip
