"""The paper's claims, and the figures of each from the runs in results/. How they are judged: judging.py."""

import dataclasses
import math
import statistics
from collections.abc import Mapping

from wide.models.rules import RULES
from wide.reports.distance_report import read_distances
from wide.reports.distances import ACTIVITY, AFTER, ANGLE, GAP, WEIGHT
from wide.results import intervals
from wide.results.judging import (
    LEAST_SEEDS,
    MARGIN,
    SCORE_MARGIN,
    Claim,
    Figure,
    Setting,
    at_widest,
    at_width,
    behind,
    by_place,
    by_width,
    gaps,
    over_widths,
    unit,
)
from wide.results.keeping import Kept
from wide.results.settings import (
    ACCURACIES,
    ADDS,
    AT_5,
    CENTRED,
    EARLY,
    FEW,
    IMAGES,
    KMNIST,
    LAST_ADDS,
    OUTPUTS,
    PAIRS,
    PLAIN,
    PRECISION_PAIRS,
    PRECISIONS,
    THEORIES,
)
from wide.results.studies import SIX


def align_with_width(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in PAIRS:
        tables = scores(setting, kept)
        above = {w: {s: v["last"] - v["control"] for s, v in row.items()} for w, row in tables.items()}
        last = {w: {s: v["last"] for s, v in row.items()} for w, row in tables.items()}
        where = f"{setting.title}: alignment score, mean of layers, after {setting.epochs} epochs"
        found.append(at_widest(above, f"{where}, above its control", lower=0))
        found.append(over_widths(last, where, lower=0))
    return found


def falls_with_training(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in PAIRS:
        tables = scores(setting, kept)
        change = {w: {s: v["last"] - v["first"] for s, v in row.items()} for w, row in tables.items()}
        above = {w: {s: v["last"] - v["control"] for s, v in row.items()} for w, row in tables.items()}
        where = f"{setting.title}: alignment score, mean of layers"
        found.append(at_widest(change, f"{where}, epoch {setting.epochs} less epoch 1", upper=0))
        what = f"{where}, above its control after {setting.epochs} epochs"
        found.append(at_width(min(above, default=0), above, what, lower=0))  # where they are closest
    return found


def scores(setting: Setting, kept: list[Kept]) -> dict[int, dict[int, dict[str, float]]]:
    """{width: {seed: {"first", "last", "control"}}}: means over layers, of runs that came through."""
    table: dict[int, dict[int, dict[str, float]]] = {}
    for one in setting.runs(kept):
        if len(one.rows) < setting.epochs or one.diverged():
            continue
        first, last = one.rows[0], one.rows[setting.epochs - 1]
        found = {
            "first": _mean_of(first, "score_"), "last": _mean_of(last, "score_"), "control": _mean_of(last, "control_")
        }  # fmt: skip
        if all(value is not None for value in found.values()):
            table.setdefault(one.run.width, {})[one.run.seed] = found
    return {width: dict(sorted(row.items())) for width, row in sorted(table.items()) if len(row) >= LEAST_SEEDS}


def _mean_of(row: Mapping[str, float | None], beginning: str) -> float | None:
    values = [value for name, value in row.items() if name.startswith(beginning) and value is not None]
    return statistics.fmean(values) if values else None


def approach(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in (*ACCURACIES, *ADDS, AT_5):
        for rule in ("align_ada", "align_zero") if setting is not AT_5 else ("align_zero",):
            runs = [one for one in setting.runs(kept) if one.run.rule in ("backprop", rule)]
            unstable = {one.run.width for one in runs if one.diverged(setting.epochs)}
            table = {width: row for width, row in gaps(setting, kept, rule).items() if width not in unstable}
            what = f"{setting.title}: {RULES[rule].title} behind backprop, change in {unit(setting)}"
            found.append(over_widths(table, what, upper=0))
    return found


def comparable(kept: list[Kept]) -> list[Figure]:
    places = [(setting, rule) for setting in (*ACCURACIES, *ADDS, *LAST_ADDS) for rule in ("align_ada", "align_zero")]
    return [behind(setting, kept, (rule, "backprop")) for setting, rule in [*places, (AT_5, "align_zero")]]


def grows_with_training(kept: list[Kept]) -> list[Figure]:
    """At the narrowest width and at the widest."""
    found = []
    for setting, first in ((PLAIN, 10), (CENTRED, 10), (KMNIST, EARLY.epochs)):
        for rule in ("align_ada", "align_zero"):
            early, late = (gaps(dataclasses.replace(setting, epochs=e), kept, rule) for e in (first, setting.epochs))
            growth = {w: {s: late[w][s] - early[w][s] for s in row if s in early.get(w, {})} for w, row in late.items()}
            what = f"{setting.title}: {RULES[rule].title}, points behind backprop, epoch {setting.epochs} less {first}"
            ends = sorted({min(growth), max(growth)}) if growth else [0]
            found += [at_width(width, growth, what, lower=0) for width in ends]
    return found


def fall_behind(kept: list[Kept]) -> list[Figure]:
    places = [(setting, rule) for setting in IMAGES for rule in ("fa", "dfa")]
    places += [(setting, "fa") for setting in ADDS]
    return [behind(setting, kept, (rule, "align_ada"), most=False) for setting, rule in places]


def little_data(kept: list[Kept]) -> list[Figure]:
    found = []
    for setting in (one for row in FEW.values() for one in row.values()):
        learned = by_width(
            setting.values(kept), ("backprop", "align_ada"), lambda a, b, chance=setting.chance: a - chance
        )
        premise = at_widest(learned, "backprop less guessing, points", lower=0)
        found.append(dataclasses.replace(behind(setting, kept, ("align_ada", "backprop")), premise=premise))
    return found


def align_prop(kept: list[Kept]) -> list[Figure]:
    return [behind(setting, kept, ("align_prop", "backprop")) for setting in (*IMAGES, *ADDS)]


def robust(kept: list[Kept]) -> list[Figure]:
    """The deviation over seeds, at the paper's width where it was run, and how many runs failed."""
    found = []
    for setting in IMAGES:
        for rule in ("align_ada", "align_zero"):
            table = by_width(setting.values(kept), (rule,), lambda a: a)
            what = f"{setting.title}: {RULES[rule].title}, standard deviation over seeds, points"
            figure = at_width(256 if 256 in table else max(table, default=0), table, what, upper=MARGIN)
            found.append(dataclasses.replace(figure, estimate=intervals.of_deviation))
    for setting in (*IMAGES, *ADDS):
        for rule in ("align_ada", "align_zero"):
            runs = [one for one in setting.runs(kept) if one.run.rule == rule]
            widths = sorted({one.run.width for one in runs})
            where = f", runs of widths {widths[0]} to {widths[-1]}" if widths else ""
            what = f"{setting.title}: {RULES[rule].title}, share of runs that failed{where}"
            values = tuple(float(setting.failed(one)) for one in runs)
            found.append(Figure(what, values, upper=0.05, missing="no runs", estimate=intervals.of_share))
    return found


def cost(kept: list[Kept]) -> list[Figure]:
    """On every machine that took times, at every width."""
    found = []
    machines = sorted({one.run.timed_on for one in kept} - {None})
    for rule in ("align_ada", "align_zero"):
        what, range_ = f"{RULES[rule].title}: time of an epoch, in multiples of backprop's", {"upper": 2.0}
        for machine in machines:
            timed = [one for one in kept if one.run.timed_on == machine]
            seconds = by_place(timed, lambda one: one.rows[-1]["seconds"], f"times on {machine}")
            table = by_width(seconds, ("backprop", rule), lambda a, b: b / a)
            found += [at_width(width, table, f"{what}, on {machine}", **range_) for width in table]
        if not machines:
            found.append(Figure(what, (), **range_, missing="no timed runs (train_cifar.py 7) are here"))
    return found


def theory(kept: list[Kept]) -> list[Figure]:
    """Exponents of the width, for every seed over all widths that have enough seeds."""
    found = []
    for setting in THEORIES:
        for quantity, layers, predicted in (
            (ACTIVITY, ("blocks.1", "blocks.2", "readout"), -0.5),
            (WEIGHT, ("blocks.0", "readout"), -0.5),
            (WEIGHT, ("blocks.1", "blocks.2"), -1.0),
        ):
            names = {-0.5: "1/sqrt(width)", -1.0: "1/width"}
            what = f"{quantity.replace('_', ' ')} under backprop ({', '.join(layers)}), exponent of the width "
            what += f"({names[predicted]})"
            values = distances(setting, kept, "backprop", (quantity, layers))
            found.append(exponent(setting, values, what, lower=predicted - 0.25, upper=predicted + 0.25))
        for rule in ("align_ada", "align_zero", "align_prop"):
            for layer in ("blocks.0", "blocks.1", "blocks.2"):
                values = distances(setting, kept, rule, (ANGLE, (layer,)))
                what = f"angle of {RULES[rule].title} to backprop in {layer}, exponent of the width"
                found.append(exponent(setting, values, what, upper=0))
    return found


def outputs(kept: list[Kept]) -> list[Figure]:
    """Exponents of the width. After the first update, which is backprop's own, there is no distance."""
    found = []
    for rule in ("align_ada", "align_zero", "align_prop"):
        for after in AFTER[1:]:
            what = (
                f"mean squared distance of {RULES[rule].title}'s outputs from backprop's {after}, exponent of the width"
            )
            values = distances(OUTPUTS, kept, rule, (GAP, (after,)))
            found.append(exponent(OUTPUTS, values, what, upper=0))
    return found


def distances(setting: Setting, kept: list[Kept], rule: str, source: tuple[str, tuple[str, ...]]) -> dict:
    """log2 of the geometric mean over layers of a recorded quantity, {width: {seed: value}}.

    Args:
        source: quantity, layers.
    """
    quantity, layers = source
    logs = {}
    for one in setting.runs(kept):
        if one.run.rule == rule:
            there = read_distances(one.folder, setting.epochs)
            values = [d.value for d in there if d.quantity == quantity and d.layer in layers]
            if len(values) == len(layers):
                logs[rule, one.run.width, one.run.seed] = statistics.fmean(math.log2(value) for value in values)
    return by_width(logs, (rule,), lambda a: a)


def exponent(setting: Setting, table: dict[int, dict[int, float]], what: str, **range_) -> Figure:
    figure = over_widths(table, f"{setting.title}: {what}", **range_)
    return dataclasses.replace(figure, what=figure.what.replace(", per doubling of the width", ", widths"))


def in_bf16(kept: list[Kept]) -> list[Figure]:
    """What bf16 changes, seed by seed, at every width that was trained in both."""
    found = []
    for rule in SIX.split():
        accuracies = {name: _of_rule(setting.values(kept), rule) for name, setting in PRECISIONS.items()}
        found += less_fp32(accuracies, f"{KMNIST.title}: {RULES[rule].title}, 10 epochs, test accuracy, points", MARGIN)
    for rule in ("align_ada", "align_zero", "fa", "dfa"):
        angles = {name: _angles(setting, kept, rule) for name, setting in PRECISIONS.items()}
        what = f"{KMNIST.title}: after 10 epochs, angle of {RULES[rule].title} to backprop, mean of layers, degrees"
        found += less_fp32(angles, what, MARGIN)
    last = {
        name: {(w, s): v["last"] for w, row in scores(setting, kept).items() for s, v in row.items()}
        for name, setting in PRECISION_PAIRS.items()
    }
    return found + less_fp32(last, f"{KMNIST.title}: after 10 epochs, alignment score, mean of layers", SCORE_MARGIN)


def less_fp32(values: Mapping[str, Mapping[tuple[int, int], float]], what: str, margin: float) -> list[Figure]:
    """Figures of what bf16 gives less what fp32 gives. `values`: by precision and (width, seed)."""
    flat = {(name, *place): value for name, table in values.items() for place, value in table.items()}
    table = by_width(flat, ("fp32", "bf16"), lambda fp32, bf16: bf16 - fp32)
    what, range_ = f"{what}: bf16 less fp32", {"lower": -margin, "upper": margin}
    return [at_width(width, table, what, **range_) for width in table] or [at_widest(table, what, **range_)]


def _of_rule(values: Mapping[tuple[str, int, int], float], rule: str) -> dict[tuple[int, int], float]:
    return {(width, seed): value for (name, width, seed), value in values.items() if name == rule}


def _angles(setting: Setting, kept: list[Kept], rule: str) -> dict[tuple[int, int], float]:
    """The mean over layers of a rule's angle to backprop, by width and seed."""
    found = {}
    for one in setting.runs(kept):
        angles = [d.value for d in read_distances(one.folder, setting.epochs) if d.quantity == ANGLE]
        if one.run.rule == rule and angles:
            found[one.run.width, one.run.seed] = statistics.fmean(angles)
    return found


EXPERIMENT_1 = "`train_cifar.py 1`, `train_kmnist.py 1`, `train_add.py 1`"
WIDTHS_1 = "8 to 512 (Add: to 4,096); CIFAR-10 150 epochs, KMNIST 100, Add 200"
WIDE, ADD = (PLAIN.title, CENTRED.title), tuple(one.title for one in ADDS)
PAIRED = (KMNIST.title, ADDS[0].title)
CLAIMS = (
    Claim(
        "In wide networks Align-ada and Align-zero are comparable to backprop", f"abstract; {EXPERIMENT_1}", WIDTHS_1,
        (*WIDE, AT_5.title, *ADD), "backprop, Align-ada, Align-zero at one width", comparable,
    ),
    Claim(
        "The wider the network, the closer they are to backprop",
        f"abstract (equal at infinite width); {EXPERIMENT_1}", WIDTHS_1, (*WIDE, *ADD), "the same at two widths",
        approach,
    ),
    Claim(
        "FA and DFA fall behind Align-ada", EXPERIMENT_1, WIDTHS_1, (*WIDE, *ADD), "Align-ada, FA, DFA", fall_behind,
    ),
    Claim(
        "With little data Align-ada is comparable to backprop", "abstract; `train_cifar.py 4`",
        "45 to 45,000 images of CIFAR-10, the best of widths 8 to 512; 150 epochs", WIDE,
        "runs with 30 to 3,000 images; train_cifar.py 4", little_data,
    ),
    Claim(
        "Align-prop is comparable to backprop", "`train_cifar.py 5`", "8 to 512; 150 epochs", (*WIDE, *ADD),
        "backprop, Align-prop", align_prop,
    ),
    Claim(
        "The Align rules are robust over seeds", "`train_cifar.py 6`", "256; 150 epochs, five seeds", WIDE,
        "Align-ada, Align-zero", robust,
    ),
    Claim(
        "Weights and activities change less, and angles to backprop fall, with width", "its theory",
        "infinite width; any fixed number of updates", (PLAIN.title,), "train_kmnist.py 3", theory,
    ),
    Claim(
        "The Align rules' networks compute what backprop's does, the more so the wider",
        "abstract (equivalent at infinite width)", "infinite width; any fixed number of updates", (PLAIN.title,),
        "train_kmnist.py 4", outputs,
    ),
    Claim(
        "Weight changes align, and alignment grows with width", "abstract; `alignment_*.py 2`",
        "8 to 512; KMNIST 100 epochs, CIFAR-10 150", PAIRED, "pairs at two widths or more", align_with_width,
    ),
    Claim(
        "Alignment falls with training, and stays above its control", "`alignment_*.py 3`", "512; to 300 epochs",
        PAIRED, "pairs", falls_with_training,
    ),
    Claim(
        "A step of the Align rules costs at most twice one of backprop", "`train_cifar.py 7`", "8 to 512",
        ("Align-ada", "Align-zero"), "train_cifar.py 7", cost,
    ),
    Claim(
        "The Align rules' gap grows with training (found in convolutional runs of widths 8 to 32)", "", "", WIDE,
        "runs that were evaluated after an early epoch, too", grows_with_training,
    ),
    Claim("bf16 does no harm", "", "", (KMNIST.title,), "the same runs in fp32 and bf16, with angles", in_bf16),
)  # fmt: skip
