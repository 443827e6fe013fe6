"""docs/claims.md, a row for each claim, and docs/claims_in_detail.md, every figure: made of results/, none is typed."""

from collections.abc import Mapping

from wide.results.claims import CLAIMS
from wide.results.judging import DOES_NOT, HOLDS, RULES_OF_JUDGING, UNTOLD, Claim, Figure, verdict
from wide.results.keeping import Kept, done
from wide.results.rates import table as rates_table
from wide.results.results_page import DATASETS
from wide.results.studies import CENTRED_RATES, RATES, STUDIES

SHOWN = 5  # figures in a row of the first page; of more, how many, and from where to where

Found = Mapping[Claim, list[Figure]]


def pages(kept: list[Kept]) -> tuple[str, str]:
    """docs/claims.md and docs/claims_in_detail.md."""
    found = {claim: claim.figures(kept) for claim in CLAIMS}
    return overview(found), details(found, kept)


def overview(found: Found) -> str:
    count = sum(one.enough for figures in found.values() for one in figures)
    lines = [OVERVIEW.format(holds=HOLDS, does_not=DOES_NOT, count=count, chance=f"{count / 20:.0f}")]
    heads = ((False, "claim | in the paper | its widths and epochs"), (True, "not the paper's: asked here | | "))
    for ours, head in heads:
        lines += [f"| {head} | run here | figure | verdict |", "|---" * 6 + "|"]
        chosen = [(claim, figures) for claim, figures in found.items() if ours != bool(claim.paper)]
        lines += [line for claim, figures in chosen for line in rows(claim, figures)]
        lines.append("")
    return "\n".join(lines)


def rows(claim: Claim, found: list[Figure]) -> list[str]:
    """A row for every setting that decides; where runs of some are missing altogether, of the others."""
    shown: dict[str, list[Figure]] = {}
    for one in found:
        if one.setting in claim.decides and one.values:
            shown.setdefault(one.setting, []).append(one)
    heads = [f"[{claim.title}](claims_in_detail.md#{anchor(claim.title)}) | {claim.paper} | {claim.about}"]
    heads += [" | | "] * (len(shown) - 1)
    lines = [
        f"| {head} | {setting} | {in_short(figures)} | {verdict(figures)} |"
        for head, (setting, figures) in zip(heads, shown.items(), strict=False)
    ]
    return lines or [f"| {heads[0]} | never | | {UNTOLD} |"]


def in_short(figures: list[Figure]) -> str:
    if len(figures) <= SHOWN:
        return "<br>".join(f"{one.what.partition(': ')[2]}: {one.text}" for one in figures)
    values = sorted(one.centre for one in figures)
    return f"{len(figures)} figures, {values[0]:.3g} to {values[-1]:.3g}"


def anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def details(found: Found, kept: list[Kept]) -> str:
    intervals = sum(one.enough for figures in found.values() for one in figures)
    lines = [
        JUDGED,
        RULES_OF_JUDGING,
        f"There are {intervals} intervals on this page. Of as many, some {intervals / 20:.0f} miss what they are of by",
        "chance alone (they are of 95%): a single verdict among many that say otherwise is weak evidence.",
        "",
        "Data:",
        "",
        *(f"- {text}." for text in DATASETS.values()),
    ]
    for claim, figures in found.items():
        lines += [
            "",
            f"## {claim.title}",
            "",
            f"In the paper: {claim.paper or 'not a claim of it'}{'; ' * bool(claim.about)}{claim.about}. "
            f"Needs: {claim.needs}.",
        ]
        lines += ["", "| figure | mean [95% interval] | verdict | why |", "|---|---|---|---|"]
        lines += [f"| {one.what} | {one.text} | {one.verdict} | {one.why} |" for one in figures if one.values]
        lacking = sorted({one.setting for one in figures} - {one.setting for one in figures if one.values})
        if lacking:
            lines += ["", f"Not run: {'; '.join(lacking)}."]
        if note := NOTES.get(claim.title):
            lines += ["", note]
    return "\n".join([*lines, *rates(kept), ""])


def rates(kept: list[Kept]) -> list[str]:
    """The choice of learning rates."""
    studies = {study.name: study for study in STUDIES}
    lines = ["", "## Learning rates", "", SEARCHED]
    for name, used in (("mlp_rates", RATES), ("mlp_centred_rates", CENTRED_RATES)):
        study = studies[name]
        widths = " and ".join(map(str, study.grid.experiment.widths))
        if done(study, kept):
            lines += ["", f"{study.title}, widths {widths}:", "", *rates_table(study, kept, used)]
    return lines


OVERVIEW = """\
# The paper's claims, and what the runs here say

Made from [results/](../results/README.md) by `python3 collect_results.py`. A figure is the mean over n seeds [95%
interval]; "{holds}" or "{does_not}" means that the whole interval lies within the claim's range, or outside of it.
The rules of judging, and every figure: [claims_in_detail.md](claims_in_detail.md). There are {count} intervals; of as
many some {chance} miss what they are of by chance. The paper is about wide networks, so wide fully connected ones
(three hidden layers, 5,334 images of KMNIST, 50 epochs) and the Add task decide; "centred": outputs are
f - f<sub>0</sub>, a control that the paper does not have. Where the paper makes a claim is said by abstract and by
experiment, as its released code numbers them; the numbers of its sections and figures were not at hand.
"""
JUDGED = """\
# Every figure of every claim

Made from [results/](../results/README.md) by `python3 collect_results.py`; in short: [claims.md](claims.md).

## How claims are judged

The rules were written when the first runs were there (the Add task, distance from theory of convolutional networks) and
before all others, and have been made stricter since. Which networks decide, on the first page, was settled when a first
look at fully connected ones had been taken (widths 16, 64, 256 and 1024, three seeds, six rules, rate 5); the Add task,
and Align-zero at the rate of the others, joined them when their runs were there.
"""
SEARCHED = """\
Convolutional networks have rate 5 throughout, the largest of the published 5, 2 and 1, and the Add task 0.001; none was
searched for each rule. Fully connected ones have one rate for every rule, at all widths: of those that do not diverge
the one with the best validation accuracy after 50 epochs, averaged over two widths (one seed; % at each width)."""

# What is known of why a claim does not hold here. No numbers: those are in the tables, which follow from results/.
THEORY_NOTE = (
    "Where, in convolutional networks, angles of Align-ada and Align-zero do not fall: these rules read ReLU's "
    "derivative in the initial network, which falls more slowly than changes of activities do "
    "(wide/reports/distance_report.py), and the first blocks' errors go through the normalisation of pixels that "
    "hardly vary over a batch, such as those at the edge of an image. It divides by their standard deviation, so few "
    "pixels make up much of the gradient, and with them the angle. With a larger epsilon in the normalisation the "
    "first block's angle falls with width where it rose ([docs/results.md](results.md)). It is no matter of "
    "rounding: in double precision the angles are the same. Align-prop reads everything but the weights in the "
    "current network, and its angle falls in every block."
)
WIDE_NOTE = (
    "The width of each figure is the widest at which enough seeds are trained so far. The claim is about wide "
    "networks, and says nothing of widths at the narrow end of the paper's: a verdict there stands for that width. "
    "From width 512 on, fully connected networks of every rule do worse the wider they are, and centred ones better: "
    "outputs of the initial network are of order 1 at any width, and a wide network does not lose them in 50 epochs. "
    "Align-zero's one rate for all widths is a compromise: at the rate of the others it is far behind in narrow "
    "networks and ahead of backprop in wide ones."
)
APPROACH_NOTE = (
    "The rules take errors from the initial network, so their gap grows as training leads away from it (a claim of "
    "its own below), and a wide network stays near for longer: widths compare at equal numbers of updates, and "
    "fewer updates stand for a wider network. The figures of few updates (KMNIST's first 20 epochs, 600 updates of "
    "CIFAR-10) were added when the curves of KMNIST at widths 8 to 32 had been seen; the other runs were trained "
    "after that. After all epochs of convolutional networks nothing has converged, and Align-zero's accuracy peaks "
    "and falls again, later and higher in wider networks ([docs/results.md](results.md))."
)
LITTLE_NOTE = (
    "![Test accuracy against the number of training images](little_data.png)\n\n"
    "A gap says something only where backprop is above chance. Fully connected networks take 900 updates whatever "
    "the number of images; with CIFAR-10 more images are more updates, as published (the number of epochs is "
    "fixed), so that networks move further from where they began."
)
ROBUST_NOTE = (
    "On CIFAR-10 Align-zero's runs that failed did not diverge: their training loss falls in the first epochs or "
    "not at all, and then rises. Align-zero forms its updates from the initial network alone, so nothing corrects "
    "them once the current one is elsewhere, which happens sooner in narrow networks "
    "([docs/results.md](results.md))."
)
OUTPUTS_NOTE = (
    "![Distance of outputs from backprop's against width](../results/reports/mlp_outputs.png)\n\n"
    "Theory says how fast they fall, too (wide/reports/distance_report.py): for smooth activations like 1/width^2, of "
    "the mean square; where ReLU's derivative is read in the initial network (Align-ada, Align-zero), perhaps like "
    "width^(-3/2). The latter is an estimate that was made when these runs were there."
)
NOTES: Mapping[str, str] = {
    "The Align rules' networks compute what backprop's does, the more so the wider": OUTPUTS_NOTE,
    "The Align rules are robust over seeds": ROBUST_NOTE,
    "Weights and activities change less, and angles to backprop fall, with width": THEORY_NOTE,
    "In wide networks Align-ada and Align-zero are comparable to backprop": WIDE_NOTE,
    "The wider the network, the closer they are to backprop": APPROACH_NOTE,
    "With little data Align-ada is comparable to backprop": LITTLE_NOTE,
}
