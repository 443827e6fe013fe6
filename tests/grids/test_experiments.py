"""Grids, and the estimate of how long the rest takes."""

import dataclasses

import pytest
import torch

import train_add
import train_cifar
import train_imagenet
import train_kmnist
from train_cifar import EXPERIMENTS, SUBJECT
from wide.command_line import as_options, build_parser, parse
from wide.grids.experiments import beside
from wide.grids.grid import volume
from wide.grids.pace import Pace, counted, duration
from wide.grids.study import Machine, Study
from wide.runs.run import Run

pytestmark = pytest.mark.quick


def planned(*words):
    arguments = parse(build_parser("", SUBJECT, EXPERIMENTS), EXPERIMENTS, words)
    machine = Machine(torch.device("cpu"), "fp32")
    return Study.of(SUBJECT, EXPERIMENTS, as_options(arguments, SUBJECT), machine).runs


# Rules, widths, learning rates, seeds, numbers of images; epochs.
PAPERS = {
    train_add: {1: (4, 10, 1, 1, 1, 200)},
    train_kmnist: {1: (6, 7, 3, 1, 1, 100), 2: (6, 2, 9, 1, 1, 100)},
    train_cifar: {
        1: (6, 7, 3, 1, 1, 150),
        2: (6, 2, 9, 1, 1, 150),
        3: (3, 7, 10, 1, 1, 150),
        4: (5, 7, 3, 1, 7, 150),
        5: (1, 7, 3, 1, 1, 150),
        6: (5, 1, 3, 5, 1, 150),
        7: (3, 7, 3, 5, 1, 1),
    },
    train_imagenet: {1: (5, 1, 1, 1, 1, 300)},
}


def test_grids_are_the_papers():
    for module, sizes in PAPERS.items():
        for number, expected in sizes.items():
            e = module.EXPERIMENTS[number]
            axes = (e.rules, e.widths, e.learning_rates, e.seeds, e.data_limits)
            assert (*map(len, axes), e.epochs) == expected, (module.__name__, number)


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
    assert {run.batch_size for run in planned("1", "--quick", "--batch-size", "10")} == {10}


def test_weight_decay_is_the_rules_own_unless_all_are_given_one():
    words = ("1", "--rules", "backprop", "kolen_pollack", "--widths", "8", "--learning-rates", "5")
    for given, decays in (
        ((), [0, 1e-4]),
        (("--weight-decay", "0.01"), [0.01, 0.01]),
        (("--weight-decay", "0"), [0, 0]),
    ):
        runs = planned(*words, *given)
        assert [run.decay for run in runs] == decays
        assert [run.name.endswith(f"-decay{run.decay:g}") for run in runs] == [decay > 0 for decay in decays]


def test_the_number_may_follow_options_of_one_value():
    assert planned("--quick", "--epochs", "2", "6") == planned("6", "--quick")
    assert planned("--quick") == planned("1", "--quick")


@pytest.mark.parametrize("words", [("--widths", "8", "2"), ("--quick", "--seeds", "99", "1", "--epochs", "3")])
def test_a_number_that_may_be_a_value_is_asked_for(words, capsys):
    with pytest.raises(SystemExit) as error:
        planned(*words)
    assert error.value.code == 2
    assert "Put its NUMBER before the options" in capsys.readouterr().err
    assert planned("1", *words)


def test_batch_sizes():
    """The published one unless asked for otherwise, by the experiment or --quick; runs shown beside have the same."""
    assert {run.batch_size for run in planned("1")} == {100}
    assert {run.batch_size for run in planned("1", "--quick")} == {EXPERIMENTS[1].quick["batch_size"]}
    assert beside(EXPERIMENTS, dataclasses.replace(EXPERIMENTS[5], batch_size=20)).batch_size == 20


def test_timed_runs_belong_to_a_device(monkeypatch):
    monkeypatch.setattr("wide.grids.study.device_name", str)
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
    def run(width, limit=None, rule="fa"):
        return Run("cifar", "cnn", rule, width, 5.0, 99, 100, data_limit=limit)

    now = [0.0]
    monkeypatch.setattr("wide.grids.pace.time.monotonic", lambda: now[0])
    # A pass takes 1 s, and 0.1 s for each product; fa has three.
    pace = Pace(examples=1000, epochs=10, products={8: 5, 16: 20, 32: 80, 512: 20000})
    pace.start()
    for width, seconds in ((8, 50.0), (8, 3 * 1.5)):  # the very first epoch does not count
        now[0] += seconds
        pace.epoch(run(width))
    assert pace.left([Folder(run(8), 4)]) == pytest.approx(6 * 4.5)
    assert pace.left([Folder(run(8, limit=500), 0)]) == pytest.approx(10 * 2.25)
    assert pace.left([Folder(run(8, rule="last_layer"), 0)]) == pytest.approx(10 * 1.5)  # one pass
    assert pace.left([Folder(run(32), 0)]) == pytest.approx(10 * 4.5)
    assert pace.text(100, [Folder(run(8), 0)]) == "about 100 s left"
    assert pace.text(100, [Folder(run(32), 0)]) == "at least 100 s left"

    pace.saw(run(16), 3 * 3.0)
    assert pace.left([Folder(run(32), 0)]) == pytest.approx(10 * 3 * 9.0)
    assert pace.text(100, [Folder(run(32), 0)]) == "about 100 s left"
    assert pace.text(100, [Folder(run(512), 0)]) == "at least 100 s left"
    pace.saw(run(16, rule="last_layer"), 9.0)  # as long as fa there, and so elsewhere
    assert pace.left([Folder(run(8, rule="last_layer"), 0)]) == pytest.approx(pace.left([Folder(run(8), 0)]))


def test_numbers_for_people():
    assert [counted(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert [volume(n) for n in (0, 64_000, 3.2e9)] == ["0 MB", "1 MB", "4 GB"]


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (700, "12 min"), (18000, "5 h"), (260000, "3 days")])
def test_durations(seconds, text):
    assert duration(seconds) == text
