"""Getting, checking, reading and splitting the data; the setup scripts; the sequences of the Add task."""

import gzip
import hashlib
import importlib.util
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import small_data
import torch
from running import ROOT, script

from setup_cifar import CIFAR
from setup_kmnist import KMNIST, split_test_images
from wide import UserError
from wide.command_line import setup
from wide.data import datasets
from wide.runs import files

REAL = ROOT.parent / "shared" / "data"
WRITERS = {KMNIST: small_data.write_kmnist, CIFAR: small_data.write_cifar}
TRAIN, TEST = 30, 7  # images
both = pytest.mark.parametrize("dataset", [KMNIST, CIFAR])


def arrays(dataset):
    """Training images, labels, test images, labels, with the sizes of this dataset's images."""
    return *small_data.made_up(TRAIN, dataset.image_shape, 1), *small_data.made_up(TEST, dataset.image_shape, 2)


def written(dataset, data_dir):
    """Write the small dataset; return the folder with its files."""
    images, labels, test_images, test_labels = arrays(dataset)
    if dataset is KMNIST:
        images, test_images = images[:, 0], test_images[:, 0]
    return WRITERS[dataset](data_dir, images, labels, test_images, test_labels)


def archived(folder, extra=()):
    """A .tar.gz of a folder of CIFAR-10 files, preceded by made-up (name, bytes) members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in extra:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.add(folder, "cifar-10-batches-bin")
    return buffer.getvalue()


def leftovers(folder):
    return [path for path in Path(folder).rglob("*") if not path.is_dir() or path.name.startswith(".")]


def one_line(error):
    message = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert message
    assert "\n" not in message.strip()
    return message


class Mirror:
    """A loopback server: `files` by name; each name in `cut` is broken off in the middle, once."""

    def __init__(self):
        self.files, self.cut, self.requests = {}, set(), []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/base/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        name = request.path.removeprefix("/base/")
        self.requests.append(name)
        if name not in self.files:
            request.send_error(404)
            return
        content = self.files[name]
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if name in self.cut else content)
        self.cut.discard(name)

    def serve(self, dataset, monkeypatch, source):
        """Offer the small dataset, with MD5s to match."""
        folder = written(dataset, source)
        if dataset.archive:
            self.files[dataset.archive] = archived(folder)
        else:
            self.files.update({path.name: path.read_bytes() for path in folder.iterdir()})
        self.sign(dataset, monkeypatch)

    def sign(self, dataset, monkeypatch):
        md5 = {name: hashlib.md5(self.files[name]).hexdigest() for name in dataset.md5}
        monkeypatch.setattr(dataset, "md5", md5)


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirror = Mirror()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


def assert_holds_small(data, dataset):
    images, labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays(dataset))
    assert torch.equal(torch.cat([data.validation.inputs, data.train.inputs]), images)
    assert torch.equal(torch.cat([data.validation.targets, data.train.targets]), labels.long())
    assert torch.equal(data.test.inputs, test_images)
    assert torch.equal(data.test.targets, test_labels.long())


@both
def test_reads_every_pixel_and_label(dataset, tmp_path):
    written(dataset, tmp_path)
    data = dataset(tmp_path)
    assert_holds_small(data, dataset)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 10, 7)
    for split in (data.train, data.validation, data.test):
        assert (split.inputs.dtype, split.targets.dtype) == (torch.uint8, torch.int64)
        assert split.inputs.shape == (len(split), *data.image_shape)
        assert split.targets.shape == (len(split),)
    assert data.classes == 10


def test_cifar_pixels_run_channel_by_channel_then_row_by_row(tmp_path):
    folder = written(CIFAR, tmp_path)
    record = (folder / "test_batch.bin").read_bytes()[2 * 3073 : 3 * 3073]
    data = CIFAR(tmp_path)
    assert data.test.targets[2] == record[0]
    assert data.test.inputs[2, 1, 4, 9] == record[1 + 1024 + 4 * 32 + 9]


def test_validation_is_the_first_5000_of_many(tmp_path):
    count = 15003
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
    small_data.write_kmnist(tmp_path, images, np.arange(count) % 10, images[:3], [1, 2, 3])
    data = KMNIST(tmp_path)
    assert (len(data.train), len(data.validation)) == (10003, 5000)
    numbers = [
        split.inputs[:, 0, 0, 0].int() * 256 + split.inputs[:, 0, 0, 1] for split in (data.validation, data.train)
    ]
    assert torch.equal(torch.cat(numbers), torch.arange(count).int())
    assert torch.equal(data.train.targets[:3], torch.tensor([0, 1, 2]))


@both
def test_fingerprint_follows_sizes_pixels_and_labels(dataset, tmp_path):
    folder = written(dataset, tmp_path)
    before = dataset(tmp_path).fingerprint
    assert before.startswith("20-10-7-")
    assert len(before) == len("20-10-7-1a2b3c4d")
    assert dataset(tmp_path).fingerprint == before
    path = folder / dataset.test_files[-1]  # labels, or whole records
    if dataset is KMNIST:
        small_data.write_idx(path, (arrays(dataset)[3] + 1) % 10)
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert dataset(tmp_path).fingerprint != before


def test_real_kmnist():
    folder = REAL / "kmnist"
    if not folder.is_dir():
        pytest.skip(f"no real KMNIST files in {folder}")
    for file in KMNIST.test_files:
        assert hashlib.md5((folder / file).read_bytes()).hexdigest() == KMNIST.md5[file]


def test_real_kmnist_is_read_exactly(tmp_path):
    source = REAL / "kmnist"
    if not source.is_dir():
        pytest.skip(f"no real KMNIST files in {source}")
    (tmp_path / "kmnist").mkdir()
    for train, test in zip(KMNIST.train_files, KMNIST.test_files, strict=True):
        (tmp_path / "kmnist" / train).symlink_to(source / test)
        (tmp_path / "kmnist" / test).symlink_to(source / test)
    data = KMNIST(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (6667, 3333, 10000)
    pixels, labels = (gzip.decompress((source / file).read_bytes()) for file in KMNIST.test_files)
    assert data.test.inputs.numpy().tobytes() == pixels[16:]
    assert bytes(data.test.targets.tolist()) == labels[8:]
    assert torch.bincount(data.test.targets).tolist() == [1000] * 10


def test_real_cifar_is_read_exactly(tmp_path):
    if not (REAL / "cifar10_jpeg.npz").is_file():
        pytest.skip(f"no real CIFAR-10 images in {REAL}")
    pytest.importorskip("PIL", reason="the real images are JPEGs, which Pillow unpacks")
    spec = importlib.util.spec_from_file_location("make_data", REAL / "make_data.py")
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    make_data.write_cifar(tmp_path / CIFAR.directory, 50)
    data = CIFAR(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (34, 16, 10)
    record = (tmp_path / CIFAR.directory / "data_batch_3.bin").read_bytes()[4 * 3073 : 5 * 3073]
    assert data.train.targets[24 - 16] == record[0]
    assert data.train.inputs[24 - 16].numpy().tobytes() == record[1:]


@both
def test_downloads_what_is_missing(dataset, tmp_path, mirror, monkeypatch, capsys):
    mirror.serve(dataset, monkeypatch, tmp_path / "source")
    data = dataset(tmp_path / "data", mirror.url)
    assert_holds_small(data, dataset)
    assert sorted(mirror.requests) == sorted(dataset.md5)
    assert {path.name for path in leftovers(tmp_path / "data")} == {*dataset.train_files, *dataset.test_files}
    assert capsys.readouterr().err == ""  # no progress bar where nobody looks
    dataset(tmp_path / "data", mirror.url)
    assert len(mirror.requests) == len(dataset.md5)


@both
def test_downloads_a_single_missing_file_and_keeps_the_others(dataset, tmp_path, mirror, monkeypatch):
    mirror.serve(dataset, monkeypatch, tmp_path / "source")
    folder = written(dataset, tmp_path)
    lost, kept = folder / dataset.train_files[1], folder / dataset.train_files[0]
    lost.unlink()
    age = kept.stat().st_mtime_ns
    assert_holds_small(dataset(tmp_path, mirror.url.rstrip("/")), dataset)
    assert mirror.requests == [dataset.archive or lost.name]
    assert kept.stat().st_mtime_ns == age


@both
def test_a_download_cut_in_the_middle_leaves_nothing_and_can_be_repeated(dataset, tmp_path, mirror, monkeypatch):
    mirror.serve(dataset, monkeypatch, tmp_path / "source")
    mirror.cut = {list(dataset.md5)[-1]}
    with pytest.raises(UserError, match=r"the connection ended after \d+ of \d+ bytes") as error:
        dataset(tmp_path / "data", mirror.url)
    one_line(error)
    assert leftovers(tmp_path / "data") == []
    assert_holds_small(dataset(tmp_path / "data", mirror.url), dataset)


@both
def test_what_a_killed_download_left_is_never_taken_for_data(dataset, tmp_path, mirror, monkeypatch):
    mirror.serve(dataset, monkeypatch, tmp_path / "source")
    stale = tmp_path / "data" / dataset.directory / ".download-killed"
    stale.mkdir(parents=True)
    for file in (*dataset.md5, *dataset.train_files):
        (stale / file).write_bytes(b"half")
    os.utime(stale, (1, 1))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    newer = stale.with_name(f".download.{files.HOST}.{ended.pid}.part")
    newer.mkdir()
    running = stale.with_name(f".download.elsewhere.{ended.pid}.part")
    running.mkdir()
    assert_holds_small(dataset(tmp_path / "data", mirror.url), dataset)
    assert [path for path in stale.parent.iterdir() if path.is_dir()] == [running]


@both
def test_a_wrong_md5_leaves_nothing(dataset, tmp_path, mirror, monkeypatch):
    mirror.serve(dataset, monkeypatch, tmp_path / "source")
    mirror.files[list(dataset.md5)[-1]] += b"x"
    with pytest.raises(UserError, match="MD5") as error:
        dataset(tmp_path / "data", mirror.url)
    assert "--url" in one_line(error)
    assert leftovers(tmp_path / "data") == []


@both
@pytest.mark.parametrize("url", ["{mirror}elsewhere/", "no address", "http://127.0.0.1:{closed}/"])
def test_says_what_to_do_when_nothing_can_be_downloaded(dataset, url, tmp_path, mirror):
    address = url.format(mirror=mirror.url, closed=9)
    with pytest.raises(UserError) as error:
        dataset(tmp_path / "data", address)
    message = one_line(error)
    for part in (dataset.title, *dataset.test_files, str(tmp_path / "data" / dataset.directory), "--data-dir", "--url"):
        assert part in message
    assert leftovers(tmp_path) == []


def test_only_expected_members_of_an_archive_are_unpacked(tmp_path, mirror, monkeypatch):
    mirror.serve(CIFAR, monkeypatch, tmp_path / "source")
    evil = [
        ("../../evil.bin", b"x"),
        (str(tmp_path / "absolute.bin"), b"x"),
        ("cifar-10-batches-bin/readme.html", b"x"),
    ]
    mirror.files[CIFAR.archive] = archived(tmp_path / "source" / CIFAR.directory, evil)
    mirror.sign(CIFAR, monkeypatch)
    assert_holds_small(CIFAR(tmp_path / "data", mirror.url), CIFAR)
    assert {path.name for path in leftovers(tmp_path / "data")} == {*CIFAR.train_files, *CIFAR.test_files}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "data"}


@pytest.mark.parametrize(("spoil", "complaint"), [("lacks", "lacks test_batch.bin"), ("damaged", "archive is damaged")])
def test_a_bad_archive_leaves_nothing(spoil, complaint, tmp_path, mirror, monkeypatch):
    folder = written(CIFAR, tmp_path / "source")
    (folder / "test_batch.bin").unlink()
    content = archived(folder)
    mirror.files[CIFAR.archive] = content if spoil == "lacks" else content[: len(content) // 2]
    mirror.sign(CIFAR, monkeypatch)
    with pytest.raises(UserError, match=complaint) as error:
        CIFAR(tmp_path / "data", mirror.url)
    one_line(error)
    assert leftovers(tmp_path / "data") == []


@both
def test_a_data_folder_that_cannot_be_made(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*--data-dir") as error:
        dataset(tmp_path / "file")
    one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        KMNIST(tmp_path)


def test_a_full_disk_is_not_blamed_on_the_connection(tmp_path, mirror, monkeypatch):
    mirror.serve(KMNIST, monkeypatch, tmp_path / "source")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.os, "replace", full)
    with pytest.raises(UserError, match=r"cannot be written to .*No space left"):
        KMNIST(tmp_path / "data", mirror.url)
    assert leftovers(tmp_path / "data") == []


IDX_IMAGES, IDX_LABELS = KMNIST.train_files
HEADER = b"\x00\x00\x08\x03"
WHOLE = gzip.compress(HEADER + struct.pack(">3I", 30, 28, 28) + np.random.RandomState(0).bytes(30 * 28 * 28))
DAMAGED_KMNIST = {
    "no gzip": (IDX_IMAGES, b"<html>not found</html>", "cannot be read"),
    "empty": (IDX_IMAGES, b"", "no IDX file"),
    "cut gzip": (IDX_IMAGES, WHOLE[:-20], "cannot be read"),
    "changed gzip": (IDX_IMAGES, WHOLE[:500] + bytes([WHOLE[500] ^ 1]) + WHOLE[501:], "cannot be read"),
    "short header": (IDX_IMAGES, gzip.compress(HEADER + b"\x00\x00"), "no IDX file"),
    "labels for images": (IDX_IMAGES, gzip.compress(b"\x00\x00\x08\x01" + bytes(99)), "no IDX file"),
    "images for labels": (IDX_LABELS, gzip.compress(HEADER + bytes(99)), "no IDX file"),
    "floats": (IDX_IMAGES, gzip.compress(b"\x00\x00\x0d\x03" + bytes(99)), "no IDX file"),
    "other size": (IDX_IMAGES, gzip.compress(HEADER + b"\x00\x00\x00\x01" * 3 + b"x"), "(1, 1) pixels"),
    "too little data": (IDX_LABELS, gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x1e" + bytes(29)), "29 bytes"),
    "too much data": (
        IDX_LABELS,
        gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x1e" + bytes(31)),
        "more bytes of data, not 30",
    ),
    "label 10": (IDX_LABELS, gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x1e" + b"\n" * 30), "label 10"),
    "other count": (IDX_LABELS, gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x1d" + bytes(29)), "30 images, 29 labels"),
}
DAMAGED_CIFAR = {
    "empty": ("data_batch_2.bin", b"", "whole records"),
    "cut": ("test_batch.bin", bytes(3073 * 2 - 1), "whole records"),
    "label 10": ("data_batch_5.bin", b"\n" * 3073, "label 10"),
}
DAMAGED = [
    pytest.param(dataset, *case, id=f"{dataset.name}, {name}")
    for dataset, cases in ((KMNIST, DAMAGED_KMNIST), (CIFAR, DAMAGED_CIFAR))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("dataset", "file", "content", "complaint"), DAMAGED)
def test_damaged_files_are_named_with_the_remedy(dataset, file, content, complaint, tmp_path):
    path = written(dataset, tmp_path) / file
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        dataset(tmp_path)
    message = one_line(error)
    assert str(path) in message
    assert complaint in message
    assert f"python3 setup_{dataset.name}.py --data-dir {tmp_path}" in message


def test_no_more_is_unpacked_than_the_header_announces(tmp_path):
    """A file of half a MB that holds 512 MB."""
    path = written(KMNIST, tmp_path) / IDX_LABELS
    header = b"\x00\x00\x08\x01" + (30).to_bytes(4, "big")
    path.write_bytes(gzip.compress(header + bytes(2**16), compresslevel=1) + gzip.compress(bytes(2**20)) * 512)
    tracemalloc.start()
    with pytest.raises(UserError, match="holds more bytes of data, not 30"):
        KMNIST(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_more_is_announced_than_a_file_can_hold(tmp_path):
    path = written(KMNIST, tmp_path) / IDX_IMAGES
    path.write_bytes(gzip.compress(HEADER + b"\xff" * 4 + (28).to_bytes(4, "big") * 2))
    with pytest.raises(UserError, match="is too small for the 3367254359280 bytes"):
        KMNIST(tmp_path)


@both
def test_a_folder_in_place_of_a_file(dataset, tmp_path):
    path = written(dataset, tmp_path) / dataset.test_files[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=path.name) as error:
        dataset(tmp_path)
    one_line(error)


@pytest.mark.parametrize(("train", "test", "part"), [(5, 2, "5 training"), (6, 1, "1 test")])
@both
def test_too_few_images(dataset, train, test, part, tmp_path):
    image_shape = dataset.image_shape[dataset is KMNIST :]
    WRITERS[dataset](tmp_path, *small_data.made_up(train, image_shape), *small_data.made_up(test, image_shape))
    with pytest.raises(UserError, match=f"{part} images") as error:
        dataset(tmp_path)
    one_line(error)


@both
def test_six_training_images_are_enough(dataset, tmp_path):
    image_shape = dataset.image_shape[dataset is KMNIST :]
    WRITERS[dataset](tmp_path, *small_data.made_up(6, image_shape), *small_data.made_up(2, image_shape))
    data = dataset(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 2, 2)


@both
def test_script_sums_up_what_is_there(dataset, tmp_path, monkeypatch, capsys):
    written(dataset, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert setup(dataset, []) == 0
    shape = "x".join(map(str, dataset.image_shape))
    sizes = "20 training, 10 validation and 7 test images"
    fingerprint = f"fingerprint {dataset('data').fingerprint}"
    captured = capsys.readouterr()
    assert captured.out == f"{dataset.title} in data/{dataset.directory}: {sizes} of shape {shape}\n{fingerprint}\n"
    assert captured.err == ""


def run_script(dataset, folder, *arguments):
    """Run the setup script itself, from another folder than its own, without a network."""
    return script(f"setup_{dataset.name}.py", *arguments, cwd=folder)


def test_script_succeeds(tmp_path):
    written(KMNIST, tmp_path / "here")
    done = run_script(KMNIST, tmp_path, "--data-dir", "here")
    assert done.stdout.startswith("KMNIST in here/kmnist: 20 training")
    assert (done.returncode, done.stderr) == (0, "")


@both
def test_script_fails_in_one_line(dataset, tmp_path):
    done = run_script(dataset, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    message = one_line(done.stderr)
    assert "Traceback" not in message
    assert f"python3 setup_{dataset.name}.py --url" in message
    assert dataset.url in message
    assert leftovers(tmp_path) == []


@both
def test_command_line_options(dataset, tmp_path, mirror, monkeypatch, capsys):
    mirror.serve(dataset, monkeypatch, tmp_path / "source")
    options = ["--data-dir", str(tmp_path / "elsewhere"), "--url", mirror.url]
    assert setup(dataset, options) == 0
    assert str(tmp_path / "elsewhere" / dataset.directory) in capsys.readouterr().out
    (tmp_path / "elsewhere" / dataset.directory / dataset.test_files[0]).write_bytes(b"x")
    assert setup(dataset, options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert dataset.test_files[0] in one_line(captured.err)


def guessing(split):
    """The loss of guessing 0.5: the sum over time of the mean squared error."""
    return (split.targets.double() - 0.5).square().mean(0).sum().item()


def test_add_sequences_are_the_published_ones():
    data = datasets.add_sequences("published")
    for part, count in (("train", 300), ("test", 100)):
        split = data[part]
        assert split.inputs.shape == split.targets.shape == (count, 100)
        assert (split.inputs.dtype, split.targets.dtype) == (torch.float32, torch.float32)
        assert split.inputs.unique().tolist() == [0, 1]
    assert guessing(data["test"]) == pytest.approx(9.311875, abs=1e-9)
    assert guessing(data["train"]) == pytest.approx(9.3585417, abs=1e-7)
    assert data["train"].inputs[0, :12].tolist() == np.random.RandomState(99).binomial(1, 0.5, 12).tolist()


def test_corrected_add_sequences_start_from_zeros():
    for split in datasets.add_sequences("corrected").values():
        inputs, targets = split.inputs.tolist(), split.targets.tolist()
        for x, y in zip(inputs, targets, strict=True):
            assert y[:2] == [0.5, 0.5]
            assert y[2:5] == [0.5 + 0.5 * x[t - 2] for t in range(2, 5)]
            assert y[5:] == [0.5 + 0.5 * x[t - 2] - 0.25 * x[t - 5] for t in range(5, 100)]


def test_published_add_sequences_wrap_around_and_lose_the_first_sequences():
    published, corrected = datasets.add_sequences("published"), datasets.add_sequences("corrected")
    train, test = published["train"], published["test"]
    for part in ("train", "test"):
        assert torch.equal(published[part].inputs, corrected[part].inputs)
    assert torch.equal(train.targets[:2], torch.full((2, 100), 0.5))
    for n, t in ((2, 7), (4, 50)):  # the copy delayed by 2 is back, the one delayed by 5 is not
        assert train.targets[n, t] == 0.5 + 0.5 * train.inputs[n, t - 2]
    assert torch.equal(train.targets[5:, 5:], corrected["train"].targets[5:, 5:])
    assert torch.equal(test.targets[:, 5:], corrected["test"].targets[:, 5:])
    for t in range(5):  # a negative time is one before the end
        assert torch.equal(test.targets[:, t], 0.5 + 0.5 * test.inputs[:, t - 2] - 0.25 * test.inputs[:, t - 5])


def test_unknown_add_variant():
    with pytest.raises(ValueError, match="published, corrected"):
        datasets.add_sequences("fixed")


def test_the_test_images_split(tmp_path, capsys):
    """As 80 % and 20 %, in the order of RandomState(0); the official files stay, and no file is written over."""
    images, labels = small_data.made_up(50, (28, 28))
    folder = small_data.write_kmnist(tmp_path / "official", images[:0], labels[:0], images, labels)
    for file in KMNIST.train_files:
        (folder / file).unlink()  # they are not needed
    command = ["--data-dir", str(tmp_path / "official"), "--split-test-images", str(tmp_path / "split")]
    assert setup(KMNIST, command, split_test_images) == 0
    assert "27 training, 13 validation and 10 test images" in capsys.readouterr().out
    data, order = KMNIST(tmp_path / "split"), np.random.RandomState(0).permutation(50)
    parts = [data.validation, data.train, data.test]  # validation images are the first training images
    assert (np.concatenate([part.inputs.numpy() for part in parts])[:, 0] == images[order]).all()
    assert (np.concatenate([part.targets.numpy() for part in parts]) == labels[order]).all()
    assert sorted(path.name for path in folder.iterdir()) == sorted(KMNIST.test_files)
    assert setup(KMNIST, command, split_test_images) == 2
    assert "choose another folder" in capsys.readouterr().err
