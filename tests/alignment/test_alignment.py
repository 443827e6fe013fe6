"""Pairs of networks and their scores, through the training loop and the scripts."""

import csv
import math
import shutil
from collections import namedtuple

import pytest
import torch
from golden_runs import image_task, load
from running import script

from wide.alignment.pairs import PairParameters, layer_scores
from wide.alignment.parameters import load as load_parameters
from wide.alignment.scores import exact_score, shuffled
from wide.models.networks import ConvolutionalNetwork, RecurrentNetwork, draw
from wide.models.pair import Pair
from wide.reports.alignment_report import read_scores
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.loop import Training
from wide.training.recorders import AlignmentScores, KeptParameters
from wide.training.session import train
from wide.training.tasks import AddTask

PAIR = Run("add", "rnn", "pair", width=8, learning_rate=0.001, seed=99, batch_size=50, variant="published")


def test_golden_weight_changes():
    """The published "normal" and "align" networks, trained here in one run."""
    golden = load("alignment_kmnist")["training"]
    training = Training(image_task("kmnist", torch.float32, seed=2), Run("kmnist", "cnn", "pair", 8, 5.0, 99, 50))
    rows = [training.train_epoch() for _ in range(4)]
    for name, network in (("normal", training.rule.network), ("align", training.rule.align)):
        initial = training.rule.initial.named()
        changes = {n: float((p - initial[n]).detach().norm()) for n, p in network.named_parameters()}
        weights = [change for n, change in changes.items() if n.endswith("weight")]
        assert weights == pytest.approx(golden[name]["delta_norm"], rel=0.01)
        assert changes["readout.bias"] == pytest.approx(golden[name]["bias_delta_norm"][-1], rel=0.01)
    accuracies = [row["validation_accuracy"] for row in rows]
    assert accuracies == pytest.approx(golden["normal"]["validation"], abs=1 / 50 + 1e-6)


def test_scores_are_those_of_the_changes():
    network = ConvolutionalNetwork(1, 4, (1, 2), 3)
    draw(network, 1)
    pair = Pair(network)
    for one in (pair.network, pair.align):
        for parameter in one.parameters():
            parameter.data += torch.randn_like(parameter)
    metrics = AlignmentScores((8, 8))(pair, 1)
    assert list(metrics) == ["score_1", "control_1", "score_2", "control_2"]
    mixed = shuffled([block.layer.weight for block in pair.network.blocks], seed=99)  # the published one
    for number, size in ((1, (8, 8)), (2, (8, 8))):
        initial = pair.initial.named()[f"blocks.{number - 1}.layer.weight"]
        normal, align = (network.blocks[number - 1].layer for network in (pair.network, pair.align))
        of_a = (align.weight - initial).detach()
        for kind, weight in (("score", normal.weight), ("control", mixed[number - 1])):
            assert metrics[f"{kind}_{number}"] == exact_score(normal, (weight - initial).detach(), of_a, size)
    assert AlignmentScores((8, 8), epochs=[2])(pair, 1) == dict.fromkeys(metrics)


def test_scores_before_any_change_are_undefined():
    network = RecurrentNetwork(4, 2)
    draw(network, 1)
    assert AlignmentScores()(Pair(network), 0)["score_1"] is None


def test_the_normal_network_is_the_one_that_backprop_trains():
    pair = Training(AddTask("published", torch.device("cpu")), PAIR)
    alone = Training(AddTask("published", torch.device("cpu")), Run(**{**vars(PAIR), "rule": "backprop"}))
    for _ in range(2):
        assert pair.train_epoch()["test_loss"] == alone.train_epoch()["test_loss"]


def test_pairs_resume_to_the_same_scores(tmp_path):
    task = AddTask("corrected", torch.device("cpu"))
    recorders = [AlignmentScores(), KeptParameters((0, 2))]
    whole, parts = RunFolder(tmp_path / "whole", PAIR), RunFolder(tmp_path / "parts", PAIR)
    train(task, whole, 3, recorders)
    train(task, parts, 1, recorders)
    train(task, parts, 3, recorders)
    assert read_scores(whole, 3) == read_scores(parts, 3)
    assert len(read_scores(whole, 3)) == 3
    kept = [load_parameters(f.parameters_path(2)).tensors for f in (whole, parts)]
    assert {name.split(".")[0] for name in kept[0]} == {"network", "align"}
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert (whole.path / "parameters" / "epoch_0.pt").exists()
    assert not (whole.path / "parameters" / "epoch_1.pt").exists()


def test_alignment_kmnist_end_to_end(kmnist, tmp_path):
    options = ["--batch-size", 50, "--data-dir", kmnist, "--outputs", tmp_path]
    first = script("alignment_kmnist.py", 2, *options, "--widths", 4, 8, "--epochs", 2)
    assert first.returncode == 0, first.stderr
    assert "2 of 2 runs to train" in first.stdout  # what part 2 needs is trained first
    assert "MB of disk" in first.stdout
    assert "| layer | width 4 | width 8 |" in first.stdout

    third = script("alignment_kmnist.py", 3, *options, "--widths", 8, "--epochs", 3)
    assert third.returncode == 0, third.stderr
    assert "| layer | epoch 1 | epoch 2 | epoch 3 |" in third.stdout
    with open(tmp_path / "kmnist" / "alignment_3.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3
    assert all(0 < float(row["score"]) <= 1 + 1e-9 and math.isfinite(float(row["control"])) for row in rows)
    assert (tmp_path / "kmnist" / "alignment_3.png").stat().st_size > 5000

    again = script("alignment_kmnist.py", 3, *options, "--widths", 8, "--epochs", 3, "--score-epochs", 1, 3)
    assert again.returncode == 0
    assert again.stdout.startswith("# KMNIST")
    assert "| layer | epoch 1 | epoch 3 |" in again.stdout

    trained = script("alignment_kmnist.py", 1, *options, "--widths", 4, 8, "--epochs", 3)
    assert trained.returncode == 0
    assert "1 of 2 runs to train" in trained.stdout


@pytest.mark.parametrize("variant", ["published", "corrected"])
def test_alignment_add_end_to_end(tmp_path, variant):
    options = ["--widths", 8, "--epochs", 2, "--variant", variant, "--outputs", tmp_path, "--seeds", 1, 2]
    done = script("alignment_add.py", 3, *options, "--keep-parameters")
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
    assert "| W_hh, weights shuffled |" in done.stdout
    assert not list(tmp_path.rglob("epoch_*.pt"))


def test_epochs_that_were_not_scored(tmp_path):
    options = ["--widths", 8, "--epochs", 2, "--outputs", tmp_path]
    refused = script("alignment_add.py", 2, *options, "--score-epochs", 1)
    assert refused.returncode == 2
    assert "add 2 to --score-epochs" in refused.stderr
    assert not list(tmp_path.iterdir())  # before any training
    assert script("alignment_add.py", 1, *options, "--score-epochs", 1).returncode == 0
    done = script("alignment_add.py", 2, *options)
    assert done.returncode == 2
    assert "no scores after epoch 2" in done.stderr
    both = script("alignment_add.py", 2, *options, "--widths", 4, 8)
    assert both.returncode == 0
    assert "Without scores (diverged, not trained or not scored): rnn-pair-width8" in both.stdout


def test_parameters_cannot_be_kept_after_the_end(tmp_path):
    done = script("alignment_add.py", 1, "--epochs", 2, "--keep-parameters", 3, "--outputs", tmp_path)
    assert done.returncode == 2
    assert "training ends at epoch 2" in done.stderr


def test_one_data_limit_at_a_time(kmnist, tmp_path):
    options = ["--data-dir", kmnist, "--outputs", tmp_path, "--data-limits", 20, 50]
    done = script("alignment_kmnist.py", 2, *options)
    assert done.returncode == 2
    assert "one value" in done.stderr


def test_a_full_disk_is_refused_before_training(tmp_path, monkeypatch, capsys):
    import alignment_add
    from wide.command_line import main
    from wide.grids.alignment_experiments import scored

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 1000))
    options = ["1", "--widths", "8", "--epochs", "1", "--outputs", str(tmp_path)]
    assert main("", scored(alignment_add.SUBJECT), alignment_add.EXPERIMENTS, options) == 2
    assert "another --outputs" in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.csv"))


# --------------------------------------------------------------------------------------- from parameters that were kept


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Outputs of a pair on the Add task: three epochs, scored after the first alone, parameters kept at 0, 2 and 3."""
    outputs = tmp_path_factory.mktemp("kept")
    options = ["--widths", 8, "--epochs", 3, "--outputs", outputs, "--score-epochs", 1, "--keep-parameters", 0, 2, 3]
    assert script("alignment_add.py", 1, *options).returncode == 0
    return outputs


@pytest.fixture
def kept(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "outputs")


def scores_in(outputs, part):
    return list(csv.DictReader((outputs / "add" / f"alignment_{part}.csv").open()))


def test_what_is_kept_is_scored_and_nothing_is_trained(kept):
    before = {path: path.read_bytes() for path in kept.glob("add/*/*.csv")}
    options = ["--widths", 8, "--epochs", 3, "--outputs", kept]
    second = script("alignment_add.py", 2, *options)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("# Add task: alignment score against width, after epoch 3")  # nothing was trained
    assert script("alignment_add.py", 3, *options).returncode == 0
    assert [row["epoch"] for row in scores_in(kept, 3)] == ["1", "2", "3"]  # the first from metrics.csv
    assert before == {path: path.read_bytes() for path in kept.glob("add/*/*.csv")}

    whole = AlignmentScores()
    train(AddTask("published", torch.device("cpu")), folder := RunFolder(kept / "whole", PAIR), 3, [whole])
    expected = [(score.score, score.control) for score in read_scores(folder, 3)]
    found = [(float(row["score"]), float(row["control"])) for row in scores_in(kept, 3)]
    # Of another process, whose memory may lie otherwise: equal to rounding.
    assert [pytest.approx(pair, rel=1e-6) for pair in expected] == found


def test_another_shuffle_of_the_control(kept):
    options = ["--widths", 8, "--epochs", 3, "--outputs", kept]
    for seed in (99, 5):
        done = script("alignment_add.py", 3, *options, "--score-epochs", 2, 3, "--shuffle-seed", seed)
        assert done.returncode == 0, done.stderr
        rows = {row["epoch"]: row for row in scores_in(kept, 3)}
        assert rows.keys() == {"2", "3"}
        assert ("shuffled with seed 5" in done.stdout) == (seed == 5)
        if seed == 99:
            published = rows
    assert all(rows[epoch]["score"] == published[epoch]["score"] for epoch in rows)
    assert all(rows[epoch]["control"] != published[epoch]["control"] for epoch in rows)

    never = script("alignment_add.py", 3, *options, "--score-epochs", 1, "--shuffle-seed", 5)
    assert never.returncode == 2
    assert "no parameters are kept" in never.stderr


def test_what_another_shuffle_needs_is_kept_by_what_is_trained_for_it(tmp_path):
    options = ["--widths", 8, "--epochs", 2, "--outputs", tmp_path, "--shuffle-seed", 5]
    done = script("alignment_add.py", 2, *options, "--keep-parameters")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 run to train" in done.stdout
    assert {path.name for path in tmp_path.rglob("epoch_*.pt")} == {"epoch_0.pt", "epoch_2.pt"}
    (row,) = RunFolder(tmp_path, PAIR).rows()[1:]
    assert float(scores_in(tmp_path, 2)[0]["control"]) != row["control_1"]  # which is of the published seed


def test_parameters_alone_are_scored(kept):
    """Copied from elsewhere, without the rest of the run."""
    folder = RunFolder(kept, PAIR)
    for path in (folder.metrics_path, folder.config_path, folder.checkpoint_path):
        path.unlink()
    done = script("alignment_add.py", 2, "--widths", 8, "--epochs", 3, "--outputs", kept)
    assert done.returncode == 0, done.stderr
    assert "to train" not in done.stdout
    assert len(scores_in(kept, 2)) == 1


def test_scores_of_three_files(tmp_path):
    network = ConvolutionalNetwork(1, 4, (1, 2, 2), 10)
    draw(network, 1)
    states = [{k: v.clone() for k, v in network.state_dict().items()}]
    states += [{k: v + torch.randn(v.shape) for k, v in states[0].items()} for _ in range(2)]
    files = [tmp_path / name for name in ("initial.pt", "trained.pt", "align.pt")]
    for path, state in zip(files, states, strict=True):
        torch.save(state, path)
    done = script("alignment_kmnist.py", "--files", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = layer_scores(network, PairParameters(*states), (28, 28))
    for number in (1, 2, 3):
        cells = f"{expected[f'score_{number}']:.4f} | {expected[f'control_{number}']:.4f}"
        assert f"| layer {number} | {cells} |" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)


class Code:
    def __reduce__(self):
        return (print, ("code was run",))


def test_files_that_cannot_be_scored(kept, tmp_path, capsys):
    import alignment_add
    from wide.command_line import main
    from wide.grids.alignment_experiments import scored

    def refused(*files):
        words = ["--files", *map(str, files)]
        assert main("", scored(alignment_add.SUBJECT), alignment_add.EXPERIMENTS, words) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        return printed.err

    folder = RunFolder(kept, PAIR)
    first, last = folder.parameters_path(0), folder.parameters_path(3)
    convolutional, code, wide = tmp_path / "cnn.pt", tmp_path / "code.pt", tmp_path / "wide.pt"
    torch.save(ConvolutionalNetwork(1, 4, (1, 2, 2), 10).state_dict(), convolutional)
    torch.save({"hidden.weight": Code()}, code)
    torch.save(RecurrentNetwork(9, 50).state_dict(), wide)
    assert "No such file" in refused(first, last, tmp_path / "absent.pt")
    assert "weights_only=True" in refused(first, code, last)
    assert "holds no state_dict" in refused(folder.checkpoint_path, last, last)
    assert "holds no network of the paper's" in refused(convolutional, last, last)
    assert "is expected there" in refused(first, wide, last)
    assert "is expected there" in refused(first, last, convolutional)
