"""docs/claims.md follows from results/: nothing in it is typed, and other numbers give other verdicts."""

import dataclasses
import json
import math
import re
import shutil
import statistics

import numpy as np
import pytest
from running import ROOT, script

from wide import UserError
from wide.results import claims, claims_page, headline, judging, keeping, rates, results_page, settings, studies
from wide.results.collecting import texts
from wide.results.judging import DOES_NOT, HOLDS, UNTOLD
from wide.runs.folder import RunFolder
from wide.runs.run import Run

KMNIST = {"dataset": "kmnist", "network": "cnn", "learning_rate": 5.0, "batch_size": 100}


@pytest.fixture(scope="module")
def kept():
    return keeping.read(ROOT / "results")


def finish(folder, run, accuracies, data="some"):
    """A finished run of 100 epochs with these test accuracies in the end; others are 0.1."""
    path = RunFolder(folder, run).path
    path.mkdir(parents=True)
    session = {"started": "2026-01-01T00:00:00+00:00", "device": "a machine"}
    (path / "config.json").write_text(json.dumps({"run": {**run.settings(), "data": data}, "sessions": [session]}))
    ends = [0.1] * (100 - len(accuracies)) + accuracies
    rows = [f"{k},0.1,0.5,0.5,{value!r},1.5" for k, value in enumerate(ends, start=1)]
    header = "epoch,train_loss,train_accuracy,validation_accuracy,test_accuracy,seconds"
    (path / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    return path


def grid(folder, accuracy, rules=("backprop", "align_ada"), seeds=(1, 2, 3)):
    """Runs at widths 8, 16 and 32 whose accuracy is that of (rule, width, seed)."""
    for rule in rules:
        for width in (8, 16, 32):
            for seed in seeds:
                run = Run(rule=rule, width=width, seed=seed, **KMNIST)
                finish(folder, run, [accuracy(rule, width, seed)])


def approaching(rule, width, seed):
    """Align-ada is 16/width * 10 points behind, give or take half a point."""
    return 0.8 - (1.6 / width + 0.005 * (seed - 2)) * (rule == "align_ada")


def verdicts(folder, figures):
    return [
        (part.verdict, part)
        for part in figures(keeping.read(folder))
        if part.what.startswith("KMNIST, convolutional: Align-ada")
    ]


def test_the_pages_are_what_the_command_makes(kept):
    assert len(kept) > 100
    for path, text in texts(ROOT, kept).items():
        assert path.read_text(encoding="utf-8") == text, path


def test_a_number_of_the_page_by_hand():
    """An interval of the page, recomputed from the files alone."""
    what = r"Add, published: Align-zero behind backprop, change in log\(loss\), per doubling of the width "
    what += r"\((\d+) to (\d+)\)"
    page = (ROOT / "docs" / "claims_in_detail.md").read_text(encoding="utf-8")
    narrowest, widest, *numbers = re.search(what + r" \| (\S+) \[(\S+), (\S+)\] \(n = 5\)", page).groups()

    def losses(rule, width, seed):
        name = f"rnn-{rule}-width{width}-lr0.001-seed{seed}-batch50-published"
        return np.genfromtxt(ROOT / "results" / "add" / name / "metrics.csv", delimiter=",", names=True)["test_loss"]

    def diverged(width):
        rules = ("backprop", "align_zero")
        return any(not np.isfinite(losses(rule, width, s)).all() for rule in rules for s in range(99, 104))

    widths = [2**k for k in range(3, 13) if 2**k <= int(widest) and not diverged(2**k)]
    assert widths[0] == int(narrowest)

    def loss(rule, width, seed):
        return min(losses(rule, width, seed))

    slopes = [
        np.polyfit(np.log2(widths), [np.log(loss("align_zero", w, s) / loss("backprop", w, s)) for w in widths], 1)[0]
        for s in range(99, 104)
    ]
    half = 2.776 * np.std(slopes, ddof=1) / np.sqrt(5)
    mean = np.mean(slopes)
    assert [float(number) for number in numbers] == pytest.approx([mean, mean - half, mean + half], rel=0.006)


def test_verdicts(tmp_path):
    grid(tmp_path, approaching)
    ((verdict, figure),) = verdicts(tmp_path, claims.approach)
    # Gaps of 20, 10, 5 points and a seed's own half point: -7.5 points per doubling for every seed.
    assert verdict == HOLDS
    assert figure.values == pytest.approx((-7.5, -7.5, -7.5))
    ((verdict, figure),) = verdicts(tmp_path, claims.comparable)
    assert verdict == DOES_NOT
    half_width = 4.302653 * statistics.stdev([4.5, 5, 5.5]) / math.sqrt(3)
    assert figure.estimate(figure.values) == pytest.approx((5, 5 - half_width, 5 + half_width))


@pytest.mark.parametrize(("harm", "verdict"), [(0.5, HOLDS), (5, DOES_NOT)])
def test_bf16_is_compared_run_by_run(tmp_path, harm, verdict):
    """After 10 epochs, whatever follows; bf16 takes `harm` points, give or take a tenth."""
    for seed in (1, 2, 3):
        for precision, lost in (("fp32", 0), ("bf16", harm + 0.1 * (seed - 2))):
            run = Run(rule="fa", width=8, seed=seed, precision=precision, **KMNIST)
            path = finish(tmp_path, run, [0.3 + 0.1 * seed - lost / 100] + [0.1] * 90)
            angles = [f"{epoch},blocks.0.layer,{60 + seed + lost},50" for epoch in (9, 10, 11)]
            header = "epoch,layer,degrees_to_backprop,degrees_feedback_to_weight"
            (path / "angles.csv").write_text("\n".join([header, *angles, ""]))
    figures = {part.what.partition(":")[2]: part for part in claims.in_bf16(keeping.read(tmp_path)) if part.values}
    accuracy, angle = figures.values()
    assert next(iter(figures)) == " FA, 10 epochs, test accuracy, points: bf16 less fp32, at width 8"
    assert accuracy.values == pytest.approx((0.1 - harm, -harm, -harm - 0.1))
    assert angle.values == pytest.approx((harm - 0.1, harm, harm + 0.1))
    assert accuracy.verdict == angle.verdict == verdict


def test_other_numbers_give_other_verdicts(tmp_path):
    grid(tmp_path, approaching)
    for path in tmp_path.glob("kmnist/*align_ada*width32*/metrics.csv"):
        path.write_text(re.sub(r"^(100,.*),0\.7\d*,1\.5$", r"\1,0.3,1.5", path.read_text(), flags=re.MULTILINE))
    ((verdict, _),) = verdicts(tmp_path, claims.approach)
    assert verdict == DOES_NOT
    _, details = claims_page.pages(keeping.read(tmp_path))
    assert f"| {DOES_NOT} |" in details


def test_a_noisy_figure_cannot_be_told(tmp_path):
    grid(tmp_path, lambda rule, width, seed: 0.8 - 0.05 * (rule == "align_ada") * (seed - 1.5))
    ((verdict, figure),) = verdicts(tmp_path, claims.comparable)
    assert verdict == UNTOLD
    assert figure.why == "the interval is only partly below 2"


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_too_few_seeds_cannot_be_told(tmp_path, seeds):
    grid(tmp_path, approaching, seeds=seeds)
    for figures in (claims.approach, claims.comparable):
        ((verdict, figure),) = verdicts(tmp_path, figures)
        assert verdict == UNTOLD
        assert "three seeds" in figure.why


def test_diverged_runs_are_guessing_and_their_widths_are_in_no_slope(tmp_path):
    grid(tmp_path, approaching)
    for path in tmp_path.glob("kmnist/*align_ada-width8-*seed1*/metrics.csv"):
        path.write_text(re.sub(r"^(\d+),[\d.]+,", r"\1,nan,", path.read_text(), flags=re.MULTILINE))
    kept = keeping.read(tmp_path)
    (value,) = [value for place, value in settings.KMNIST.values(kept).items() if place == ("align_ada", 8, 1)]
    assert value == settings.KMNIST.chance == 10
    ((_, slope),) = verdicts(tmp_path, claims.approach)
    assert "(16 to 32)" in slope.what
    (failed,) = [part for _, part in verdicts(tmp_path, claims.robust) if "share of runs that failed" in part.what]
    assert sum(failed.values) == 1
    assert failed.verdict == UNTOLD


def test_two_runs_of_one_rule_width_and_seed_are_refused(tmp_path):
    grid(tmp_path, approaching)
    setting = dataclasses.replace(
        settings.KMNIST, fields={k: v for k, v in settings.KMNIST.fields.items() if k != "precision"}
    )
    finish(tmp_path, Run(rule="backprop", width=8, seed=1, precision="bf16", **KMNIST), [0.5])
    with pytest.raises(UserError, match="keep one of each"):
        setting.values(keeping.read(tmp_path))


def test_a_gap_says_nothing_where_backprop_is_no_better_than_guessing():
    gap = judging.Figure("Wide: a gap", (0.0, 0.1, -0.1), upper=2)
    above, at = (judging.Figure("backprop less guessing", values, lower=0) for values in ((9, 10, 11), (-1, 0, 1)))
    assert dataclasses.replace(gap, premise=above).verdict == HOLDS
    assert dataclasses.replace(gap, premise=at).verdict == UNTOLD
    assert "says nothing: backprop less guessing" in dataclasses.replace(gap, premise=at).why


def test_unfinished_runs_do_not_count(tmp_path):
    grid(tmp_path, approaching)
    for path in tmp_path.glob("kmnist/*align_ada*seed3*/metrics.csv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert [verdict for verdict, _ in verdicts(tmp_path, claims.approach)] == [UNTOLD]


def test_runs_on_different_data_are_not_compared(tmp_path):
    grid(tmp_path, approaching)
    finish(tmp_path, Run(rule="fa", width=8, seed=1, **KMNIST), [0.5], data="other")
    with pytest.raises(UserError, match="different data"):
        claims_page.pages(keeping.read(tmp_path))


def test_without_runs_nothing_can_be_told():
    assert {part.verdict for claim in claims.CLAIMS for part in claim.figures([])} == {UNTOLD}


def test_collecting_keeps_what_is_finished(tmp_path):
    outputs, kept = tmp_path / "outputs", tmp_path / "results"
    run = Run(rule="backprop", width=16, seed=99, **KMNIST)
    path = finish(outputs, run, [0.5])
    (path / "checkpoint.pt").write_bytes(b"1")
    (path / ".lock").touch()
    other = finish(outputs, dataclasses.replace(run, width=32), [0.5])
    (other / "checkpoint.pt").write_bytes(b"1")
    unfinished = finish(outputs, dataclasses.replace(run, width=64), [0.5])
    metrics = unfinished / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:10]))
    assert keeping.copy_finished(outputs, kept) == 2
    files = {str(file.relative_to(kept / "kmnist")) for file in kept.rglob("*.*")}
    assert files == {
        *(f"{run.name}/{file}" for file in ("config.json", "metrics.csv", "checkpoint.pt")),
        *(f"{other.name}/{file}" for file in ("config.json", "metrics.csv")),
    }
    assert keeping.copy_finished(outputs, kept) == 0


def test_a_finished_study_prints_its_table_and_trains_nothing(tmp_path):
    for path in (ROOT / "results" / "kmnist").glob("cnn-backprop-width8-lr5-seed*-batch100"):
        shutil.copytree(path, tmp_path / "kmnist" / path.name)
    before = {path for path in tmp_path.rglob("*") if path.is_dir()}
    line = ["--rules", "backprop", "--widths", 8, "--learning-rates", 5, "--device", "cpu", "--data-dir", "/nowhere"]
    done = script("train_kmnist.py", 1, *line, "--outputs", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| Backprop |" in done.stdout
    more = script("train_kmnist.py", 1, *line, "--widths", 8, 9, "--report", "--outputs", tmp_path)
    assert more.returncode == 0, more.stderr
    assert "missing" in more.stdout
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == before


def test_a_slope_that_the_narrowest_width_decides_cannot_be_told():
    """Gaps of 10, 1 and 1 points fall by 4.5 per doubling over all widths, and do not from the second on."""
    table = {width: {seed: gap + 0.1 * seed for seed in (1, 2, 3)} for width, gap in ((8, 10.0), (16, 1.0), (32, 1.0))}
    figure = judging.over_widths(table, "a gap", upper=0)
    assert figure.values == pytest.approx([-4.5] * 3)
    assert figure.verdict == UNTOLD
    assert figure.why == "the interval is below 0; not so without the narrowest width"
    table[32] = {seed: value - 0.5 for seed, value in table[32].items()}
    assert judging.over_widths(table, "a gap", upper=0).verdict == HOLDS


def test_losses_are_compared_as_ratios(tmp_path):
    setting = dataclasses.replace(settings.ADDS[0], epochs=2)
    for rule, factor in (("backprop", 1.0), ("align_ada", 1.5)):
        for seed in (1, 2, 3):
            run = Run("add", "rnn", rule, 128, 0.001, seed, 50, variant="published")
            path = finish(tmp_path, run, [0.1])
            lowest = factor * (1 + 0.01 * (seed - 2) * (rule == "align_ada"))
            rows = ["epoch,train_loss,test_loss,seconds", f"1,1,{lowest!r},1", f"2,1,{2 * lowest!r},1"]
            (path / "metrics.csv").write_text("\n".join([*rows, ""]))
    figure = judging.behind(setting, keeping.read(tmp_path), ("align_ada", "backprop"))
    assert figure.verdict == DOES_NOT
    assert figure.text.startswith("1.5 [1.4")
    assert figure.why == "the interval is not below 1.1"
    last = judging.behind(dataclasses.replace(setting, last=True), keeping.read(tmp_path), ("align_ada", "backprop"))
    assert last.values == pytest.approx(figure.values)  # twice as large, both of them
    for path in tmp_path.glob("add/*backprop*/metrics.csv"):
        path.write_text(path.read_text().replace("2,1,2.0,1", "2,1,1.0,1"))
    last = judging.behind(dataclasses.replace(setting, last=True), keeping.read(tmp_path), ("align_ada", "backprop"))
    assert last.text.startswith("3 [2.9")


def test_a_row_for_every_setting_that_decides():
    claim = judging.Claim("a claim", "abstract", "any", ("Wide", "Add"), "runs", lambda kept: [])
    holds = judging.Figure("Wide: a", (1.0, 1.1, 1.2), lower=0)
    fails, other = (dataclasses.replace(holds, what=what, lower=9) for what in ("Wide: b", "Narrow: b"))
    missing = dataclasses.replace(holds, what="Add: a", values=())
    (row,) = claims_page.rows(claim, [holds, other, missing])
    assert row.endswith(f"| abstract | any | Wide | a: {holds.text} | {HOLDS} |")
    (row,) = claims_page.rows(claim, [holds, fails])
    assert row.endswith(f"| Wide | a: {holds.text}<br>b: {fails.text} | 1 of 2 hold, 1 do not |")
    assert len(claims_page.rows(claim, [holds, dataclasses.replace(holds, what="Add: a")])) == 2
    assert UNTOLD in claims_page.rows(claim, [missing])[0]


RATE_STUDY = studies.Study(
    "rates", "", "train_kmnist.py 1 --rules backprop fa --widths 8 32 --learning-rates 1 2 5 --seeds 1"
)


def tried(folder, accuracies):
    """Runs of FA at widths 8 and 32: {rate: validation accuracies}; None for one that diverges."""
    for rate, both in accuracies.items():
        for width, accuracy in zip((8, 32), both, strict=True):
            path = finish(folder, Run(rule="fa", width=width, seed=1, **KMNIST | {"learning_rate": rate}), [0.3])
            text = (path / "metrics.csv").read_text()
            loss = "nan" if accuracy is None else "0.1"
            end = f"\n100,{loss},0.5,{accuracy or 0.1},0.3,1.5\n"
            (path / "metrics.csv").write_text(re.sub(r"\n100,.*\n", end, text))
    return rates.tried(RATE_STUDY, keeping.read(folder))["fa"]


@pytest.mark.parametrize(
    ("accuracies", "best", "why"),
    [
        ({1.0: (0.2, 0.2), 2.0: (0.5, 0.4), 5.0: (0.6, 0.2)}, 2, "between others"),
        ({1.0: (0.2, 0.2), 2.0: (0.5, 0.4), 5.0: (0.6, 0.4)}, 5, "at the edge: no larger one was tried"),
        ({1.0: (0.2, 0.2), 2.0: (0.5, 0.4), 5.0: (0.9, None)}, 2, "the largest that does not diverge at every width"),
        ({2.0: (0.5, 0.4), 5.0: (0.6, 0.2)}, 2, "at the edge: no smaller one was tried"),
    ],
)
def test_the_rate_is_chosen_by_validation_accuracy_at_both_widths(tmp_path, accuracies, best, why):
    found = tried(tmp_path, accuracies)
    assert rates.chosen(found, (8, 32)) == best
    assert rates.why(found, best) == why


def test_no_rate_is_chosen_before_all_are_tried(tmp_path):
    tried(tmp_path, {2.0: (0.5, 0.4), 5.0: (0.6, 0.2)})
    path = next(tmp_path.glob("kmnist/*width8-lr2-*"))
    shutil.rmtree(path)
    assert rates.chosen(rates.tried(RATE_STUDY, keeping.read(tmp_path))["fa"], (8, 32)) is None


def test_the_rates_in_use_are_those_that_the_rule_chooses(kept):
    """As far as results/ has what is needed to choose."""
    named = {study.name: study for study in studies.STUDIES}
    for name, used in (("mlp_rates", studies.RATES), ("mlp_centred_rates", studies.CENTRED_RATES)):
        widths = named[name].grid.experiment.widths
        for rule, row in rates.tried(named[name], kept).items():
            if len(row) == len(named[name].grid.experiment.learning_rates):
                assert rates.chosen(row, widths) in (used[rule], None), rule


def test_the_script_of_studies_trains_what_is_here_and_nothing_else(kept):
    """Its commands, read as the scripts themselves do."""
    commands = [line for line in results_page.script(kept).splitlines() if line.startswith("python3 ")]
    trained = {keeping.anywhere(run) for line in commands for run in grid_of(line).runs}
    planned = {keeping.anywhere(run) for study in studies.STUDIES for run in study.grid.runs}
    assert trained == {keeping.anywhere(one.run) for one in kept}
    assert trained < planned


def grid_of(line):
    command = line.removeprefix("python3 ").replace('"$DATA"', "DATA").removesuffix(' --outputs "$OUTPUTS"')
    return studies.Study("", "", command).grid


def test_few_whole_grids():
    """Three seeds at one width and two at another are two grids, though they were one at first."""
    places = [(8, 1), (8, 2), (8, 3), (16, 1), (16, 2)]
    runs = {Run(rule=rule, width=w, seed=s, **KMNIST) for w, s in places for rule in ("backprop", "fa")}
    commands = studies.commands(
        studies.Study("", "", "train_kmnist.py 1 --rules backprop fa --widths 8 16 --seeds 1 2 3 --learning-rates 5"),
        runs,
    )
    assert commands == [
        "train_kmnist.py 1 --rules backprop fa --widths 16 --seeds 1 2 --learning-rates 5",
        "train_kmnist.py 1 --rules backprop fa --widths 8 --seeds 1 2 3 --learning-rates 5",
    ]


def test_the_page_names_every_study(kept):
    page = results_page.page(ROOT / "results", kept)
    for study in studies.STUDIES:
        assert (f"### {study.name}\n" in page) == bool(keeping.done(study, kept))
    assert "| cifar_images_16 | 45 |" in page


def test_a_figure_has_three_points_at_least():
    drawn = {path.stem for path in (ROOT / "results" / "reports").glob("*.png")}
    assert {"kmnist_seeds", "add_published", "cifar_seeds", "cifar_alignment"} <= drawn
    # At two widths; at three rates of which two diverged; of one rule.
    assert not {"cifar_width", "kmnist_fp32", "kmnist_diverging", "mlp_width_lr2"} & drawn


def test_gaps_of_the_headline_are_those_of_each_seed():
    values = {"Backprop": {8: {1: 50.0, 2: 60.0}}, "FA": {8: {2: 40.0, 3: 10.0}, 16: {1: 30.0}}}
    assert headline.gaps(values) == {"FA": {8: {2: 20.0}}}


def test_results_are_small():
    keeping.require_small(ROOT / "results")
    assert not list((ROOT / "results").rglob("*.gz"))
