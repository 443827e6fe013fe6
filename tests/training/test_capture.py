"""Steps captured as a CUDA graph. What needs no GPU: all but the capture, in whose place a function is called again."""

import pytest
import torch

from wide.runs.run import Run
from wide.training.capture import WARM_UP, Captured
from wide.training.loop import Training
from wide.training.tasks import AddTask

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


def training(rule: str, **settings) -> Training:
    run = Run("add", "rnn", rule, 6, 1e-3, 99, 50, variant="published", **settings)
    return Training(AddTask("published", CPU), run)


class Tape:
    """Records a function as a graph would: not run when it is recorded, and run on the same memory at every replay."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function, device):
        self.recorded += 1
        memory: list[torch.Tensor] = []

        def replay():
            self.replayed += 1
            results = function()
            if not memory:
                memory.extend(result.clone() for result in results)
            for kept, result in zip(memory, results, strict=True):
                kept.copy_(result)
            return tuple(memory)

        return replay


@pytest.mark.parametrize("rule", ["backprop", "last_layer", "fa", "align_prop", "align_zero", "align_ada"])
def test_captured_steps_give_the_numbers_of_plain_ones(rule):
    plain, captured, tape = training(rule), training(rule), Tape()
    captured.captured = Captured(lambda *batch: captured.update([batch]), CPU, tape)
    for _ in range(2):
        one, other = plain.train_epoch(), captured.train_epoch()
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert (tape.recorded, tape.replayed) == (1, 2 * 6 - WARM_UP)
    for name, parameter in plain.parameters().items():
        assert torch.equal(parameter, captured.parameters()[name])


def test_a_capture_that_fails_is_a_note(capsys):
    def record(function, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain, captured = training("align_ada"), training("align_ada")
    captured.captured = Captured(lambda *batch: captured.update([batch]), CPU, record)
    assert plain.train_epoch()["train_loss"] == captured.train_epoch()["train_loss"]
    note = capsys.readouterr().err
    assert note.count("note: steps are not captured") == 1
    assert "not permitted" in note


def test_batches_of_another_shape_run_plainly():
    seen, tape = [], Tape()

    def update(inputs, targets):
        seen.append(len(inputs))
        return (inputs * 2,)

    captured = Captured(update, CPU, tape)
    for size in (4, 4, 4, 4, 2, 4):
        inputs = torch.rand(size, 3)
        assert torch.equal(captured(inputs, torch.zeros(size))[0], inputs * 2)
    assert seen == [4, 4, 4, 4, 2, 4]
    assert tape.replayed == 2


@pytest.mark.parametrize(
    ("settings", "captured"),
    [
        ({"rule": "align_ada"}, True),
        ({"rule": "kolen_pollack", "decay": 1e-4}, True),
        ({"rule": "weight_mirror"}, False),
        ({"rule": "backprop", "optimizer": "adam"}, False),
        ({"rule": "backprop", "batches": 2}, False),
    ],
)
def test_which_runs_can_be_captured(settings, captured):
    made = training(**settings)
    assert made.captured is None  # on a CPU
    made.task.device = torch.device("cuda")
    assert made.can_be_captured() is captured
