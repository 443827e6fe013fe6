"""Tables: which learning rate is chosen, what is averaged, what diverged and missing runs look like."""

import csv
import dataclasses
import io
import statistics

import pytest

from wide.models.rules import RULES
from wide.reports.drawing import DIVERGED
from wide.reports.figures import KINDS, draw_figure
from wide.reports.report import as_csv, markdown
from wide.reports.tables import ACCURACY, BEST_LOSS, EPOCH_TIME, Summary, View, make_table
from wide.runs.folder import RunFolder
from wide.runs.run import Run


def summary(
    rule="backprop", width=8, rate=1.0, seed=99, validation=0.5, test=0.4, status="done", limit=None, seconds=1.0
):
    run = Run("kmnist", "cnn", rule, width, rate, seed, 100, data_limit=limit)
    metrics = {"validation_accuracy": validation, "test_accuracy": test, "seconds": seconds}
    final = metrics if status == "done" else {}
    history = {"epoch": (5, 10), **{name: (0.5 * value, value) for name, value in final.items()}}
    return Summary(run, status, 10, final, final, history, 12.5, "data", "cpu")


def rows_of(text):
    return {cells[0]: cells[1:] for line in text.splitlines() if (cells := [c.strip() for c in line.split("|")[1:-1]])}


def text_of(summaries, view=None, metrics=ACCURACY, references=None):
    return markdown("title", make_table(view or View(), summaries, metrics), summaries, references or {})


def test_the_learning_rate_is_chosen_on_validation_not_on_test():
    summaries = [summary(rate=1, validation=0.6, test=0.3), summary(rate=2, validation=0.5, test=0.9)]
    assert rows_of(text_of(summaries))["Backprop"] == ["60.0 / 30.0 (lr 1 at the edge)"]


def test_one_learning_rate_is_not_repeated_in_every_cell():
    assert rows_of(text_of([summary(), summary(width=16)]))["Backprop"] == ["50.0 / 40.0", "50.0 / 40.0"]


def test_seeds_are_averaged_with_their_spread():
    accuracies = [0.5, 0.6, 0.64]
    summaries = [summary(seed=s, validation=a, test=a) for s, a in enumerate(accuracies)]
    mean, deviation = 100 * statistics.mean(accuracies), 100 * statistics.stdev(accuracies)
    once = f"{mean:.1f} ± {deviation:.1f}"
    assert rows_of(text_of(summaries))["Backprop"] == [f"{once} / {once} (n=3)"]


def test_a_learning_rate_that_diverged_for_one_seed_is_not_chosen():
    summaries = [
        summary(rate=5, seed=1, validation=0.9),
        summary(rate=5, seed=2, status="diverged"),
        summary(rate=1, seed=1, validation=0.5),
        summary(rate=1, seed=2, validation=0.5),
    ]
    assert "lr 1" in rows_of(text_of(summaries))["Backprop"][0]


@pytest.mark.parametrize(("tried", "edge"), [((1, 2, 5), False), ((2, 5), True), ((1, 2), True)])
def test_a_choice_at_the_edge_of_what_was_tried_is_said_to_be_one(tried, edge):
    """Between others it is not, also where the larger one diverged."""
    summaries = [
        summary(rate=r, validation=0.3 + 0.1 * (r == 2), status="diverged" if r == 5 else "done") for r in tried
    ]
    text = text_of(summaries)
    assert ("lr 2 at the edge" in text) == edge
    assert ("at the edge: the largest or smallest that was tried" in text) == edge


def test_cells_without_a_finished_run_say_why():
    summaries = [summary(status="diverged"), summary(width=16, status="failed at epoch 2"), summary(rule="fa")]
    cells = rows_of(text_of(summaries))
    assert cells["Backprop"] == ["diverged", "failed at epoch 2"]
    assert cells["FA"] == ["50.0 / 40.0", "-"]
    several = [summary(seed=seed, status="diverged" if seed == 3 else "done") for seed in (1, 2, 3)]
    assert rows_of(text_of(several))["Backprop"] == ["diverged (1 of 3)"]


def test_other_axes_become_sections():
    summaries = [summary(width=w, rate=r) for w in (8, 256) for r in (0.5, 5)]
    text = text_of(summaries, View(against="learning_rate", best_over=()))
    assert "## width 8" in text
    assert "## width 256" in text
    assert "| rule | lr 0.5 | lr 5 |" in text


def test_losses_choose_the_lowest_and_show_references():
    def lost(width, train, test):
        values = {"train_loss": train, "test_loss": test}
        run = Run("add", "rnn", "backprop", width, 0.001, 99, 50)
        return Summary(run, "done", 3, {}, values, {}, 1.0, "add", "cpu")

    references = {"guessing 0.5": {"train_loss": 9.36, "test_loss": 9.31}}
    cells = rows_of(text_of([lost(8, 2.5, 2.6), lost(16, 1.5, 1.6)], metrics=BEST_LOSS, references=references))
    assert cells["Backprop"] == ["2.5 / 2.6", "1.5 / 1.6"]
    assert cells["guessing 0.5"] == ["9.36 / 9.31"] * 2


@pytest.mark.parametrize(("metrics", "best"), [(ACCURACY, (0.7, 0.2)), (BEST_LOSS, (0.4, 0.1))])
def test_best_values(tmp_path, metrics, best):
    """Accuracies at the epoch of the best validation accuracy; losses each at its own lowest. The 4th is not asked."""
    folder = RunFolder(tmp_path, Run("kmnist", "cnn", "backprop", 8, 1.0, 99, 100))
    folder.path.mkdir(parents=True)
    names = metrics.shown
    for epoch, values in enumerate([(0.5, 0.3), (0.7, 0.2), (0.4, 0.1), (0.9, 0.05)], start=1):
        folder.append({"epoch": epoch, "train_loss": 1.0, **dict(zip(names, values, strict=True)), "seconds": 2.0})
    read = Summary.read(folder, 3, metrics)
    assert tuple(read.best[name] for name in names) == best
    assert tuple(read.final[name] for name in names) == (0.4, 0.1)
    assert (read.epochs, read.seconds, read.status) == (3, 6.0, "done")


def test_csv_has_every_setting_and_metric():
    (row,) = csv.DictReader(io.StringIO(as_csv([summary(rate=0.5)])))
    assert row["learning_rate"] == "0.5"
    assert row["final_test_accuracy"] == row["best_test_accuracy"] == "0.4"
    assert {"rule", "seed", "precision", "seconds", "status", "device"} <= row.keys()


VIEWS = {
    "lines": (View(), ACCURACY),
    "gap": (View("data_limit", ("learning_rate", "width"), figure="gap"), ACCURACY),
    "seeds": (View(figure="seeds"), ACCURACY),
    "timing": (View(best_over=(), averaged=("seed", "learning_rate"), figure="timing"), EPOCH_TIME),
    "curves": (View(figure="curves"), ACCURACY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_drawn(kind):
    view, metrics = VIEWS.get(kind, (View(figure=kind), ACCURACY))
    grid = [
        summary(rule, width, seed=s, limit=n) for rule in RULES for width in (8, 16) for s in (1, 2) for n in (45, None)
    ]
    grid += [summary("fa", 32, status="diverged")]
    table = make_table(view, grid, metrics)
    file = io.BytesIO()
    draw_figure(file, "title", table, {}, 45000)
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_diverged_runs_are_marked(kind):
    view, metrics = VIEWS.get(kind, (View(figure=kind), ACCURACY))
    grid = [summary(rule, limit=n, seed=s) for rule in ("backprop", "fa") for n in (45, None) for s in (1, 2)]

    def marked(summaries):
        figure = KINDS[kind](make_table(view, summaries, metrics), {}, 45000)
        lines = [line for panel in figure.axes for line in panel.lines if line.get_gid() == DIVERGED]
        texts = [text.get_text() for panel in figure.axes for text in panel.texts]
        labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        return {line.get_marker() for line in lines}, {text for text in texts if "of" in text}, labels.count(DIVERGED)

    assert marked(grid) == (set(), set(), 0)
    grid[-1] = dataclasses.replace(grid[-1], status="diverged")
    assert marked(grid) == ({"^"}, {"1 of 2"}, 1)


@pytest.mark.parametrize(("metrics", "bad"), [(ACCURACY, 0), (BEST_LOSS, 1)])
def test_they_stand_at_the_bad_end_beyond_all_values(metrics, bad):
    runs = [summary(width=w, test=0.5 + w / 100) for w in (8, 16, 32)]
    runs = [dataclasses.replace(r, best={"train_loss": 1.0, "test_loss": r.run.width / 8}) for r in runs]
    runs += [summary(rule, width=16, status="diverged") for rule in ("fa", "dfa")]
    (panel,) = KINDS["lines"](make_table(View(), runs, metrics), {}, 45000).axes
    marks = [line for line in panel.lines if line.get_gid() == DIVERGED]
    first, second = (abs(bad - line.get_ydata()[0]) for line in marks)
    assert 0 < first < second  # one above the other, in shares of the panel
    low, high = panel.get_ylim()
    values = [y for line in panel.lines if line.get_label() == "Backprop" for y in line.get_ydata()]
    shares = [abs(bad - (y - low) / (high - low)) for y in values]
    assert min(shares) > second


def test_one_run_is_hollow_and_a_mean_of_several_is_not():
    runs = [summary(width=8, seed=1), summary(width=8, seed=2), summary("fa", width=8), summary("fa", width=16)]
    (panel,) = KINDS["lines"](make_table(View(), runs, ACCURACY), {}, 45000).axes
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [line.get_marker() for line in hollow] == ["^"]
    assert len(hollow[0].get_xdata()) == 2


@pytest.mark.parametrize(("better", "labels"), [((1, 1), []), ((1, 5), ["lr 1", "lr 5"])])
def test_points_are_labelled_where_a_line_mixes_learning_rates(better, labels):
    runs = [
        summary(width=width, rate=rate, validation=0.5 + 0.1 * (rate == best))
        for width, best in zip((8, 16), better, strict=True)
        for rate in (1, 5)
    ]
    (panel,) = KINDS["lines"](make_table(View(), runs, ACCURACY), {}, 45000).axes
    assert [text.get_text() for text in panel.texts] == labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_figures_of_diverged_runs_alone(kind):
    view, metrics = VIEWS.get(kind, (View(figure=kind), ACCURACY))
    grid = [summary(rule, limit=n, status="diverged") for rule in ("backprop", "fa") for n in (45, None)]
    file = io.BytesIO()
    draw_figure(file, "title", make_table(view, grid, metrics), {}, 45000)
    assert file.getvalue().startswith(b"\x89PNG")


def test_curves_show_every_metric_at_every_epoch_averaged_over_seeds():
    grid = [summary(seed=1, validation=0.4), summary(seed=2, validation=0.8)]
    figure = KINDS["curves"](make_table(View(), grid, ACCURACY), {}, 45000)
    (validation,), (test,) = (panel.lines for panel in figure.axes)
    assert list(validation.get_xdata()) == [5, 10]
    assert list(validation.get_ydata()) == pytest.approx([30, 60])
    assert list(test.get_ydata()) == pytest.approx([20, 40])


def test_times_are_averaged_over_seeds_and_rates_and_compared_with_backprop():
    view, metrics = VIEWS["timing"]
    grid = [summary(rule, rate=r, seconds=s) for rule, s in (("backprop", 2.0), ("fa", 3.0)) for r in (1, 5)]
    cells = rows_of(text_of(grid, view, metrics))
    assert cells["Backprop"] == ["2 ± 0 (1.00x, n=2)"]
    assert cells["FA"] == ["3 ± 0 (1.50x, n=2)"]


def test_the_best_width_is_chosen_where_the_layout_says_so():
    view = View("data_limit", ("learning_rate", "width"), figure="gap")
    grid = [summary(width=8, limit=45, validation=0.3), summary(width=64, limit=45, validation=0.4)]
    assert rows_of(text_of(grid, view))["Backprop"] == ["40.0 / 40.0 (width 64 at the edge)"]


def test_curves_over_seeds_that_were_evaluated_at_other_epochs(tmp_path):
    one, other = summary(seed=1), summary(seed=2, validation=0.7)
    view, metrics = VIEWS["curves"]
    for epochs, common in ((5, 10), [5, 10]), ((2, 10), [10]), ((3, 4), []):
        rarely = dataclasses.replace(other, history=other.history | {"epoch": epochs})
        figure = KINDS["curves"](make_table(view, [one, rarely], metrics), {}, 45000)
        assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [common]


def test_bars_of_a_gap_are_the_spread_of_each_seeds_own_gap():
    view, metrics = VIEWS["gap"]
    values = {"backprop": (0.5, 0.7), "fa": (0.3, 0.6)}  # 20 and 10 points apart
    grid = [
        summary(rule, seed=seed, limit=n, test=value)
        for rule, both in values.items()
        for seed, value in enumerate(both)
        for n in (45, 450)
    ]
    lines, gaps = KINDS["gap"](make_table(view, grid, metrics), {}, 45000).axes

    def bars(panel):
        return [segment[1, 1] - segment[0, 1] for bars in panel.collections for segment in bars.get_segments()]

    deviations = [statistics.stdev(both) for both in values.values()]
    assert bars(lines) == pytest.approx([2 * 100 * deviation for deviation in deviations for _ in (45, 450)])
    assert bars(gaps) == pytest.approx([2 * statistics.stdev((20, 10))] * 2)
    shown = [line for line in gaps.lines if line.get_label() == RULES["fa"].title]
    assert [list(line.get_ydata()) for line in shown] == [pytest.approx([15, 15])]
