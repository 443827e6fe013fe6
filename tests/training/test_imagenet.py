"""ImageNet: images in folders, what is done with bad ones, and one run in several processes."""

import csv
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import command, script

import train_imagenet
from align_rules import DirectFeedbackAlignment
from train_imagenet import EXPERIMENTS, STRIDES
from wide import UserError
from wide.command_line import main
from wide.data.image_folders import UNREADABLE, Images, read_image
from wide.data.shapes import COLOURS, FORMS, IMAGES, draw_shape, shapes
from wide.runs.run import Run
from wide.training import throughput
from wide.training.folder_task import FolderTask
from wide.training.loop import Training

CPU = torch.device("cpu")
RUN = Run("imagenet", "cnn", "backprop", 2, 1.0, 99, 10)
COUNTS = {"train": 40, "val": 20}  # of each class


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Red and blue discs, as JPEG files."""
    data_dir, stream = tmp_path_factory.mktemp("images"), np.random.RandomState(1)
    for part, count in COUNTS.items():
        for colour in ("red", "blue"):
            place = data_dir / part / colour
            place.mkdir(parents=True)
            for number in range(count):
                draw_shape(stream, COLOURS[colour], "disc").resize((48, 48)).save(place / f"{number}.jpg")
    return data_dir


def options(folders, outputs, *more):
    return ["--widths", 4, "--learning-rates", 0.5, "--batch-size", 10, "--epochs", 1, "--workers", 0,
            "--data-dir", folders, "--outputs", outputs, *more]  # fmt: skip


def rows(outputs, rule):
    (path,) = outputs.glob(f"imagenet/cnn-{rule}-*/metrics.csv")
    with open(path) as file:
        return list(csv.DictReader(file))


def final_parameters(outputs, rule):
    (path,) = outputs.glob(f"imagenet/cnn-{rule}-*/checkpoint.pt")
    return torch.load(path, weights_only=True)["rule"]


# ------------------------------------------------------------------------------------------------------------- images


def test_images_depend_on_the_seed_of_their_key_alone(folders):
    images = Images(folders / "train", "train")
    state = torch.get_rng_state()
    (first, label), (again, _), (other, _) = images[3, 5], images[3, 5], images[3, 6]
    assert first.shape == (3, 224, 224)
    assert first.dtype == torch.uint8
    assert label == 0
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    validation = Images(folders / "val", "validation")
    assert torch.equal(validation[3, 5][0], validation[3, 6][0])


def test_validation_images_are_the_centre_of_what_is_256_wide(tmp_path):
    """A white square of 224/256 of the side fills the crop; beyond it the image is black."""
    picture = np.zeros((512, 512, 3), np.uint8)
    picture[32:-32, 32:-32] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    image, _ = Images(tmp_path, "validation")[0, 0]
    assert image.shape == (3, 224, 224)
    assert image[:, 1:-1, 1:-1].min() == 255


def test_network_inputs_have_imagenet_s_mean_and_deviation(folders):
    task = FolderTask(folders, STRIDES, CPU, 0)
    levels = torch.tensor([0.485, 0.456, 0.406]) * 255
    at_mean, brighter = levels.view(1, 3, 1, 1), levels.view(1, 3, 1, 1) + 255 * torch.tensor(0.224)
    assert task.prepared(at_mean).abs().max() < 1e-6
    assert task.prepared(brighter)[0, 1].item() == pytest.approx(1)


def test_workers_change_nothing(folders):
    alone, helped = (FolderTask(folders, STRIDES, CPU, workers) for workers in (0, 2))
    indices = [np.array([5, 60, 7]), np.array([70, 1])]
    pairs = zip(*(task.batches(RUN, "train", indices, 4) for task in (alone, helped)), strict=True)
    for (images, labels), (same_images, same_labels) in pairs:
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.jpg"), ("L", "a.jpg"), ("CMYK", "a.jpg"), ("P", "a.png"), ("RGBA", "a.png"), ("RGB", "a.bmp"),
     ("RGB", "png.JPEG")],
)  # fmt: skip
def test_all_kinds_of_images_are_read_as_rgb(tmp_path, mode, name):
    across = np.mgrid[:40, :60]
    colours = np.stack([across[0] * 5, across[1] * 4, across.sum(0) * 2], -1).astype(np.uint8)
    path = tmp_path / name
    Image.fromarray(colours).convert(mode).save(path, "PNG" if name == "png.JPEG" else None)
    expected = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)
    image = read_image(str(path))
    assert image.shape == (3, 40, 60)
    assert (image.int() - expected.int()).abs().max() <= 2


RAMP = np.linspace(0, 65535, 40 * 60).round().reshape(40, 60).astype(np.uint16)
DEEP = {"a.png": RAMP, "a.tif": RAMP, "b.tif": RAMP.astype(">u2"), "a.pgm": RAMP}


@pytest.mark.parametrize("name", DEEP)
def test_images_of_16_bits_are_scaled_to_8(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    expected = torch.from_numpy((RAMP / 257).round().astype(np.uint8))
    assert torch.equal(read_image(str(tmp_path / name)), expected.expand(3, 40, 60))


@pytest.mark.parametrize("numbers", [RAMP.astype(np.float32) / 65535, RAMP.astype(np.int32)], ids=["float", "32 bits"])
def test_images_without_a_range_are_unreadable(tmp_path, numbers):
    Image.fromarray(numbers).save(tmp_path / "a.tif")
    with pytest.raises(UNREADABLE, match="no defined range"):
        read_image(str(tmp_path / "a.tif"))


def test_of_an_animation_the_first_image_is_read(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(str(tmp_path / "a.webp"))[:, 0, 0].tolist() == [255, 0, 0]


def test_images_are_not_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(str(tmp_path / "a.jpg")).shape == (3, 20, 30)


def test_images_reach_workers_that_are_spawned(folders):
    """As on macOS and Windows: what a worker is given is pickled."""
    images = pickle.loads(pickle.dumps(Images(folders / "train", "train")))
    assert images[3, 5][0].shape == (3, 224, 224)


def spoil(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def thousand(folders, tmp_path):
    """The folders, with copies that make 1000 images."""
    data_dir = shutil.copytree(folders, tmp_path / "thousand")
    missing = 1000 - sum(2 * count for count in COUNTS.values())
    for number in range(missing):
        os.link(data_dir / "val" / "red" / "0.jpg", data_dir / "val" / "red" / f"more{number}.jpg")
    return data_dir


def test_an_unreadable_image_is_named_left_out_and_counted(thousand, capsys):
    spoiled = thousand / "train" / "blue" / "0.jpg"
    spoil(spoiled)
    with pytest.raises(UNREADABLE):
        read_image(str(spoiled))
    task = FolderTask(thousand, STRIDES, CPU, 0)
    training = Training(task, RUN)
    sizes = [len(targets) for _, targets, _ in training.steps()]
    assert sorted(sizes) == [9, *[10] * 7]
    assert training.epoch == 1
    assert capsys.readouterr().err == f"{spoiled} cannot be read; it is left out\n"
    assert task.noticed(training.processes) == {"unreadable": 1}
    assert task.noticed(training.processes) == {"unreadable": 0}  # counts are an epoch's
    list(training.steps())
    assert capsys.readouterr().err == ""  # named once
    assert task.noticed(training.processes) == {"unreadable": 1}


def test_an_unreadable_image_changes_nothing_for_the_others(thousand):
    """The update is that of the batch without it."""
    task = FolderTask(thousand, STRIDES, CPU, 0)
    whole, without = Training(task, RUN), Training(task, RUN)
    spoiled = os.fsdecode(task.splits["train"].paths[7])
    without.step(task.batches(RUN, "train", [np.array([3, 44, 5])], 0))
    spoil(Path(spoiled))
    whole.step(task.batches(RUN, "train", [np.array([3, 44, 7, 5])], 0))
    for ours, theirs in zip(whole.parameters().values(), without.parameters().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_more_than_one_unreadable_image_in_a_thousand_is_an_error(thousand):
    for name in ("0.jpg", "1.jpg"):
        spoil(thousand / "train" / "blue" / name)
    with pytest.raises(UserError, match=r"2 of 1000 images cannot be read .*blue.*mend or delete"):
        list(Training(FolderTask(thousand, STRIDES, CPU, 0), RUN).steps())


def test_batches_that_cannot_be_read_are_left_out(thousand):
    """Of a batch of two without one, nothing is left that could be normalised."""
    task = FolderTask(thousand, STRIDES, CPU, 0)
    spoil(Path(os.fsdecode(task.splits["train"].paths[7])))
    training = Training(task, RUN)
    before = {name: parameter.clone() for name, parameter in training.parameters().items()}
    outputs, targets, _ = training.step(task.batches(RUN, "train", [np.array([7, 3])], 0))
    assert len(targets) == len(outputs) == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in training.parameters().items())


def test_top_5_accuracy(folders):
    task = FolderTask(folders, STRIDES, CPU, 0)
    task.classes = 7
    outputs = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)
    measures = task.measures(outputs, torch.tensor([0, 4, 5, 6]))
    assert measures["accuracy"] == 0.25
    assert measures["top_5_accuracy"] == 0.5
    # The mean over batch and classes of the squared distance from the plain one-hot vector.
    wanted = torch.nn.functional.one_hot(torch.tensor([0, 4, 5, 6]), 7)
    assert measures["loss"] == pytest.approx((outputs - wanted).square().mean().item())


def test_direct_feedback_reaches_pooled_activities(folders):
    rule = FolderTask(folders, STRIDES, CPU, 0).rule(Run("imagenet", "cnn", "dfa", 50, 1.0, 99, 10))
    assert isinstance(rule, DirectFeedbackAlignment)
    feedback = list(rule.feedback)
    assert [tuple(B.shape) for B in feedback] == [(2, 50)] * 7  # (classes, channels)
    assert torch.cat(feedback).std().item() == pytest.approx(50**-0.5, rel=0.1)
    # Drawn right after the block's weight, from the published stream.
    stream = np.random.RandomState(99)
    stream.normal(size=(50, 27))
    expected = stream.normal(0, 1 / np.sqrt(50), (2, 50))
    assert feedback[0].numpy() == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------- folders as they come


def without_val(data_dir):
    shutil.rmtree(data_dir / "val")


def without_classes(data_dir):
    shutil.rmtree(data_dir / "train")
    (data_dir / "train").mkdir()


def with_an_empty_class(data_dir):
    (data_dir / "train" / "green").mkdir()
    (data_dir / "val" / "green").mkdir()


def with_another_class(data_dir):
    shutil.copytree(data_dir / "val" / "red", data_dir / "val" / "crimson")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_val, "there is no folder {0}/val; put the images there, a folder per class"),
        (without_classes, "{0}/train holds no folders; put the images there"),
        (with_an_empty_class, "{0}/train/green holds no images"),
        (with_another_class, "only one of them has crimson"),
    ],
)
def test_folders_that_cannot_be_used(folders, tmp_path, change, message):
    data_dir = shutil.copytree(folders, tmp_path / "images")
    change(data_dir)
    done = script("train_imagenet.py", 1, *options(data_dir, tmp_path / "outputs"))
    assert done.returncode == 2
    assert message.format(data_dir) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_shapes_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setitem(IMAGES, "train", 3)
    monkeypatch.setitem(IMAGES, "val", 2)
    folder = shapes(tmp_path)
    files = {path: path.read_bytes() for path in folder.glob("*/*/*.jpg")}
    assert len(files) == 5 * len(COLOURS) * len(FORMS)
    assert len(set(files.values())) == len(files)
    assert shapes(tmp_path) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert all(path.read_bytes() == content for path, content in files.items())
    assert FolderTask(folder, STRIDES, CPU).classes == 6


# --------------------------------------------------------------------------------------------------------- the script


def test_it_learns_through_the_script(folders, tmp_path):
    done = script(
        "train_imagenet.py", 1, *options(folders, tmp_path, "--widths", 16, "--epochs", 6, "--rules", "align_ada")
    )
    assert done.returncode == 0, done.stderr
    assert "# ImageNet: accuracy, top-1 and top-5" in done.stdout
    assert (tmp_path / "imagenet" / "experiment_1.png").stat().st_size > 5000
    first, *_, last = found = rows(tmp_path, "align_ada")
    assert list(first) == [
        "epoch", "train_loss", "train_accuracy", "train_top_5_accuracy",
        "validation_accuracy", "validation_top_5_accuracy", "unreadable", "seconds",
    ]  # fmt: skip
    assert float(last["train_loss"]) < 0.9 * float(first["train_loss"])
    assert float(last["validation_top_5_accuracy"]) == 1  # there are two classes
    assert max(float(row["validation_accuracy"]) for row in found) > 0.75


def test_alignment_is_scored_in_two_processes_as_in_one(folders, tmp_path):
    # With two classes, the experiment's learning rate of 5 would be so high that rounding shows.
    images = sorted((folders / "train").glob("*/*.jpg"))
    for number, image in enumerate(images):
        for part in ("train", "val"):
            place = tmp_path / "images" / part / f"class{number % 16}"
            place.mkdir(parents=True, exist_ok=True)
            os.link(image, place / f"{number}.jpg")
    outputs = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, place in outputs.items():
        share = ["--sync-normalisation", "--batch-size", 10 // processes]
        arguments = options(tmp_path / "images", place, "--precision", "fp64", *share)
        arguments = [word for word in arguments if word not in ("--learning-rates", 0.5)]
        done = script("alignment_imagenet.py", 2, *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
        assert "# ImageNet: alignment score against width, after epoch 1" in done.stdout
    one, two = (rows(place, "pair")[0] for place in outputs.values())
    for k in range(1, 8):
        assert 0 < float(one[f"score_{k}"]) <= 1
        assert float(two[f"score_{k}"]) == pytest.approx(float(one[f"score_{k}"]), rel=1e-6)


def test_quick_needs_no_imagenet(tmp_path, monkeypatch, capsys):
    for part, images in (("train", 4), ("val", 4)):
        monkeypatch.setitem(IMAGES, part, images)
    arguments = ["1", "--quick", "--epochs", "1", "--rules", "last_layer", "--workers", "0"]
    arguments += ["--data-dir", str(tmp_path / "data"), "--outputs", str(tmp_path)]
    assert main(train_imagenet.__doc__, train_imagenet.SUBJECT, EXPERIMENTS, arguments) == 0
    assert "Coloured shapes (not ImageNet)" in capsys.readouterr().out
    assert list(tmp_path.glob("shapes/cnn-last_layer-*/metrics.csv"))
    assert not (tmp_path / "imagenet").exists()


def test_profile_prints_images_per_second_and_trains_nothing(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "SECONDS", 0.2)
    arguments = [str(word) for word in ["1", *options(folders, tmp_path / "outputs", "--profile")]]
    assert main(train_imagenet.__doc__, train_imagenet.SUBJECT, EXPERIMENTS, arguments) == 0
    printed = capsys.readouterr().out
    for name in ("loading alone", "training alone", "training from files"):
        (line,) = (line for line in printed.splitlines() if line.startswith(name))
        assert int(line.split()[-2]) > 0
    assert "waiting for data" in printed
    assert not (tmp_path / "outputs").exists()


# -------------------------------------------------------------------------------------------------- several processes

# Feedback for layers, for blocks, from an initial network, that learns, and from noise.
KINDS = ("backprop", "dfa", "align_ada", "kolen_pollack", "weight_mirror")
EVERY_KIND = ["--rules", *KINDS, "--precision", "fp64"]
SOME_RULES = ["--rules", "backprop", "fa", "align_ada", "--precision", "fp64"]


@pytest.fixture(scope="module")
def one_process(folders, tmp_path_factory):
    """Outputs of two epochs, in one process with batches of 10."""
    outputs = tmp_path_factory.mktemp("one")
    done = script("train_imagenet.py", 1, *options(folders, outputs, *EVERY_KIND, "--epochs", 2))
    assert done.returncode == 0, done.stderr
    return outputs


def assert_same_training(outputs, expected, rules):
    for rule in rules:
        ours, theirs = final_parameters(outputs, rule), final_parameters(expected, rule)
        assert ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            assert ours[name].dtype == parameter.dtype
            assert parameter.dtype == torch.float64 or not parameter.is_floating_point()  # seeds and counts
            assert (ours[name] - parameter).abs().max() < 1e-6, (rule, name)
        for our_row, their_row in zip(rows(outputs, rule), rows(expected, rule), strict=True):
            for name in their_row.keys() - {"seconds"}:
                assert float(our_row[name]) == pytest.approx(float(their_row[name]), rel=1e-6), (rule, name)


def test_two_processes_equal_one_with_the_double_batch(folders, one_process, tmp_path):
    arguments = options(folders, tmp_path, *EVERY_KIND, "--epochs", 2, "--batch-size", 5, "--sync-normalisation")
    done = script("train_imagenet.py", 1, *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path, one_process, KINDS)
    assert done.stdout.count("# ImageNet") == 1  # only the first process speaks


def descendants(pid):
    """torchrun's processes, and those that load their images, which would hold on to a run for seconds."""
    listed = [(task / "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    children = [int(child) for part in listed for child in part]
    return children + [other for child in children for other in descendants(child)]


def test_batches_of_a_step_may_lie_in_any_process_and_a_killed_run_goes_on_in_another_number_of_them(folders, tmp_path):
    """Two processes with a batch each, killed after an epoch, and then one process with both."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    done = script(
        "train_imagenet.py", 1, *options(folders, together, *SOME_RULES, "--batches-per-step", 2, "--epochs", 3)
    )
    assert done.returncode == 0, done.stderr

    arguments = options(folders, apart, *SOME_RULES, "--epochs", 3)
    process = subprocess.Popen(
        command("train_imagenet.py", 1, *arguments, processes=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(list(apart.glob("imagenet/*/metrics.csv"))) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    for pid in (process.pid, *descendants(process.pid)):  # torchrun's processes do not end with it
        os.kill(pid, signal.SIGKILL)
    process.wait()
    for path in apart.glob("imagenet/*/.lock"):
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # as soon as all of them have ended

    listed = script("train_imagenet.py", 1, *arguments, "--list")
    assert "note: cnn-backprop-width4-lr0.5-seed99-batch10x2-fp64 was begun" in listed.stdout
    refused = script("train_imagenet.py", 1, *arguments)  # it would start anew, with one batch per step
    assert refused.returncode == 2
    assert "go on with --batches-per-step 2" in refused.stderr
    done = script("train_imagenet.py", 1, *arguments, "--batches-per-step", 2)
    assert done.returncode == 0, done.stderr
    assert_same_training(apart, together, ("backprop", "fa", "align_ada"))
    sessions = [json.loads(path.read_text())["sessions"] for path in apart.glob("imagenet/*/config.json")]
    (first, second) = max(sessions, key=len)  # of the run that was killed
    assert "2 processes" in first["device"]
    assert "processes" not in second["device"]


def test_a_process_without_readable_images_takes_part_in_the_step(thousand, tmp_path):
    spoil(thousand / "train" / "blue" / "0.jpg")  # what is left of its batch of two cannot be normalised
    for processes, place in ((1, tmp_path / "1"), (2, tmp_path / "2")):
        rules = ["--rules", "backprop", "--precision", "fp64", "--batch-size", 2, "--batches-per-step", 2]
        done = script("train_imagenet.py", 1, *options(thousand, place, *rules), processes=processes)
        assert done.returncode == 0, done.stderr
        assert rows(place, "backprop")[0]["unreadable"] == "1"
    assert_same_training(tmp_path / "2", tmp_path / "1", ["backprop"])


def test_what_cannot_be_shared_out_is_said(folders, tmp_path, kmnist):
    both = script("train_imagenet.py", 1, *options(folders, tmp_path, "--batches-per-step", 2, "--sync-normalisation"))
    assert both.returncode == 2
    assert "leave out --batches-per-step" in both.stderr
    odd = script("train_imagenet.py", 1, *options(folders, tmp_path, "--batches-per-step", 3), processes=2)
    assert odd.returncode != 0
    assert "--batches-per-step 3 is no multiple of the 2 processes" in odd.stderr
    other = script("train_kmnist.py", 1, "--data-dir", kmnist, "--outputs", tmp_path, processes=2)
    assert other.returncode != 0
    assert "a run is trained by one process here" in other.stderr
