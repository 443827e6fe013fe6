"""Grids, and the estimate of how long the rest takes."""

import pytest

from train_cifar import EXPERIMENTS, SUBJECT
from wide.command_line import build_parser, chosen
from wide.experiments import Pace, duration, plan
from wide.runs import Run


def planned(*words):
    arguments = build_parser("", SUBJECT, EXPERIMENTS).parse_args(words)
    experiment = chosen(EXPERIMENTS[arguments.experiment], arguments)
    return plan(SUBJECT, experiment, arguments, "fp32", "cpu")


def test_all_rules_at_a_small_width_come_first():
    runs = planned("1")
    assert {run.width for run in runs[:18]} == {8}
    assert len({run.rule for run in runs[:6]}) == 6


def test_values_given_twice_are_trained_once():
    assert len(planned("1", "--widths", "8", "8", "--rules", "fa", "fa", "--learning-rates", "5", "5.0")) == 1


def test_experiments_share_runs():
    assert set(planned("2", "--widths", "8", "--learning-rates", "5", "2")) <= set(planned("1"))
    assert set(planned("4", "--data-limits", "45000", "--rules", "fa")) <= set(planned("1"))


def test_options_override_quick():
    assert {run.width for run in planned("1", "--quick", "--widths", "64")} == {64}


def test_timed_runs_belong_to_a_device():
    timed, plain = planned("7", "--seeds", "100")[0], planned("6")[0]
    assert timed.timed_on == "cpu"
    assert timed.name.endswith("timed-on-cpu")
    assert plain.timed_on is None


class Folder:
    def __init__(self, run, epochs_done):
        self.run, self.epochs_done = run, epochs_done

    def progress(self):
        return self.epochs_done, True


def test_the_estimate_follows_width_and_what_is_left(monkeypatch):
    def run(width, limit=None):
        return Run("cifar", "cnn", "fa", width, 5.0, 99, 100, data_limit=limit)

    now = [0.0]
    monkeypatch.setattr("wide.experiments.time.monotonic", lambda: now[0])
    pace = Pace(examples=1000, epochs=10)
    pace.start()
    for width, seconds in ((8, 50.0), (8, 1.0), (16, 4.0)):  # the very first epoch does not count
        now[0] += seconds
        pace.epoch(run(width))
    assert pace.left([Folder(run(8), 4)]) == pytest.approx(6 * 1.0)
    assert pace.left([Folder(run(8, limit=500), 0)]) == pytest.approx(10 * 0.5)
    assert pace.left([Folder(run(32), 0)]) == pytest.approx(10 * 16.0)  # four times as long for twice the width


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (700, "12 min"), (18000, "5 h"), (260000, "3 days")])
def test_durations(seconds, text):
    assert duration(seconds) == text
