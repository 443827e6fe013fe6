"""The learning rate of every rule, chosen before the runs that use it: which, and why.

Of the rates that were tried with one seed at several widths, and at none of them diverged, a rule gets the one with
the highest validation accuracy after the last epoch, averaged over the widths. One rate for all widths of a rule, so
that no curve mixes them.
"""

import statistics
from collections.abc import Mapping

from wide.models.rules import RULES
from wide.results.keeping import Kept, done
from wide.results.studies import Study

Tried = Mapping[str, Mapping[float, Mapping[int, float | None]]]


def tried(study: Study, kept: list[Kept]) -> Tried:
    """Validation accuracy in percent, {rule: {rate: {width: accuracy}}}; None where training diverged."""
    found: dict[str, dict[float, dict[int, float | None]]] = {}
    for one in done(study, kept):
        last = one.rows[study.grid.epochs - 1 :]
        value = None if one.diverged(study.grid.epochs) else 100 * last[0]["validation_accuracy"]
        found.setdefault(one.run.rule, {}).setdefault(one.run.learning_rate, {})[one.run.width] = value
    return {rule: dict(sorted(found[rule].items())) for rule in RULES if rule in found}


def mean(accuracies: Mapping[int, float | None], widths: tuple[int, ...]) -> float | None:
    """Over the widths; None where one is missing or diverged."""
    values = [accuracies.get(width) for width in widths]
    return None if None in values else statistics.fmean(values)


def chosen(rates: Mapping[float, Mapping[int, float | None]], widths: tuple[int, ...]) -> float | None:
    """The best, the largest of several within a tenth of a point (three validation images); None as long as a rate that
    might be it has not been tried at every width."""
    means = {rate: mean(row, widths) for rate, row in rates.items() if None not in row.values()}
    if None in means.values() or not means:
        return None
    return max(rate for rate, accuracy in means.items() if accuracy > max(means.values()) - 0.1)


def why(rates: Mapping[float, Mapping[int, float | None]], rate: float) -> str:
    """Whether the choice lies within the rates that were tried."""
    larger, smaller = [r for r in rates if r > rate], [r for r in rates if r < rate]
    if not smaller:
        return "at the edge: no smaller one was tried"
    if not larger:
        return "at the edge: no larger one was tried"
    if all(None in rates[r].values() for r in larger):
        return "the largest that does not diverge at every width"
    return "between others"


def table(study: Study, kept: list[Kept], used: Mapping[str, float]) -> list[str]:
    """Lines of a table: mean validation accuracies, the choice, and what the runs here use."""
    found, widths = tried(study, kept), study.grid.experiment.widths
    rates = sorted({rate for row in found.values() for rate in row})
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " | best | | used |", "|---" * (len(rates) + 4) + "|"]
    for rule, row in found.items():
        best = chosen(row, widths)
        cells = [_cell(row.get(rate, {}), widths) for rate in rates]
        ends = [f"{best:g}", why(row, best)] if best is not None else ["-", "not all done"]
        lines.append(f"| {RULES[rule].title} | {' | '.join([*cells, *ends])} | {used[rule]:g} |")
    return lines


def _cell(accuracies: Mapping[int, float | None], widths: tuple[int, ...]) -> str:
    """The accuracy at each width, and their mean."""
    texts = [("diverged" if a is None else f"{a:.1f}") for a in (accuracies.get(w, "") for w in widths) if a != ""]
    value = mean(accuracies, widths)
    return " / ".join(texts) + ("" if value is None else f" (mean {value:.1f})")
