"""`recurrence` against the same steps written one by one, in every rule."""

import pytest
import torch
from rules_helpers import RECURRENT_OPTIONS, Stepwise, assert_close, gradients, move
from torch import Tensor, nn

import align_rules
from wide.models.networks import RecurrentNetwork

pytestmark = pytest.mark.usefixtures("seeded")

BATCH, TIME, WIDTH = 4, 5, 8  # so that torch draws the noise of all steps at once as it does step by step


class Encoded(nn.Module):
    """Two recurrences that share a weight; the first starts at zero, the second at an activity."""

    def __init__(self, recurrence):
        super().__init__()
        self.recurrence = recurrence
        self.input, self.between, self.readout = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.own = nn.Parameter(0.5 * torch.randn(WIDTH, WIDTH))

    def forward(self, sequences: Tensor) -> Tensor:  # (time, batch, 3)
        drive = self.input(sequences)
        states = self.recurrence(torch.zeros_like(drive[0]), self.own, drive)
        start = torch.tanh(self.between(states[-1]))
        return self.readout(self.recurrence(start, 0.7 * self.own.T, drive.flip(0)))


NETWORKS = {
    "the paper's": ((RecurrentNetwork, Stepwise), (WIDTH, BATCH), (BATCH, TIME), RECURRENT_OPTIONS),
    "encoded": (
        (lambda: Encoded(align_rules.recurrence), lambda: Encoded(Stepwise.recurrence)), (), (TIME, BATCH, 3),
        {"align_ada": {"coupling": "activity"}, "last_layer": {"learns": ("readout", "own")}},
    ),
}  # fmt: skip
RULES = [*(name for name in align_rules.RULES if name != "dfa"), "align_ada uncoupled", "sign_symmetry brSF"]


def pair(name: str, kind: str) -> list[tuple[align_rules.Rule, nn.Module, Tensor]]:
    """A rule on a network of recurrences, and on the same with its steps one by one, far from where it began."""
    builds, sizes, shape, options = NETWORKS[kind]
    name, _, more = name.partition(" ")
    options = dict(options.get(name, {})) | {
        "uncoupled": {"uncoupled": ("readout",)}, "brSF": {"variant": more}, "": {}
    }[more]  # fmt: skip
    found = []
    for build in builds:
        torch.manual_seed(1)
        network = build(*sizes).double()
        move(network, 0.1)
        rule = align_rules.RULES[name](network, **options)
        move(network, 0.3)
        found.append((rule, network, torch.randn(shape, dtype=torch.float64).requires_grad_()))
    return found


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_recurrence_is_its_steps(name, kind):
    outputs, found = [], []
    for rule, network, inputs in pair(name, kind):
        if name == "weight_mirror" and kind != "encoded":  # whose first step is a layer only in `recurrence`
            rule.mirror(inputs)
            found.append(list(rule.feedback))
        outputs.append(rule(inputs))
        found.append([*gradients(rule, network, inputs), inputs.grad])
        found[-1] += [p.grad for p in getattr(rule, "feedback", ())]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    for computed, expected in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        assert_close(computed, expected)


@pytest.mark.parametrize("name", ["backprop", "fa", "align_ada", "align_zero"])
def test_autocast(name):
    (rule, network, inputs), _ = pair(name, "the paper's")
    rule, inputs = rule.float(), inputs.detach().float()
    expected = gradients(rule, network, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = rule(inputs)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, network(inputs))
        computed = gradients(lambda x: rule(x).float(), network, inputs)
    for gradient, full in zip(computed, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - full).norm() < 0.1 * full.norm()


def test_several_batches_are_computed_as_if_each_were_alone():
    network = RecurrentNetwork(WIDTH, BATCH)
    move(network)
    sequences = torch.randn(3 * BATCH, TIME)
    apart = torch.cat([network(part) for part in sequences.split(BATCH)])
    torch.testing.assert_close(network(sequences), apart)


def test_torch_finds_the_operator_in_order():
    shapes = (2, 3), (3, 3), (4, 2, 3)
    s0, W, drive = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    for more in ((), (torch.randn(3, 3, dtype=torch.float64),)):
        torch.library.opcheck(align_rules.RECURRENCE, (s0, W, drive, *more))
    assert torch.autograd.gradcheck(align_rules.recurrence, (s0, W, drive))


def test_what_is_refused():
    (rule, network, inputs), _ = pair("align_ada", "the paper's")
    with pytest.raises(TypeError, match="a block for every step of a recurrence; write its steps as a loop"):
        align_rules.DirectFeedbackAlignment(network, added=("initial_state",))(inputs)
    with pytest.raises(TypeError, match=r"recurrence at .*networks.py.* added="):  # the state is taken for a weight
        align_rules.FeedbackAlignment(network)(inputs)
    for function in (rule, network):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(function(inputs).sum(), [inputs], create_graph=True)
    for shapes in (((2, 3), (3, 3), (0, 2, 3)), ((2, 3), (3, 4), (4, 2, 3)), ((1, 3), (3, 3), (4, 2, 3))):
        with pytest.raises(ValueError, match=r"must be .batch, width., .width, width., .time, batch, width., not"):
            align_rules.recurrence(*(torch.zeros(shape) for shape in shapes))
