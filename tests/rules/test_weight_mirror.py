"""WeightMirror: a mirror step by hand, what it brings B to, and what it leaves alone."""

import io

import pytest
import torch
import torch.nn.functional as F
from by_hand import Momentum, assert_same, each_perceptron, flipped, perceptron
from rules_helpers import IMAGES, LeavesTraces, assert_close, gradients, loss, mlp, residual, traces
from torch import Tensor, nn

import align_rules
from align_rules import WeightMirror
from wide.models import networks

pytestmark = pytest.mark.usefixtures("seeded")


class Padded(nn.Module):
    """Convolutions with stride and padding, one scaled by 1/sqrt(fan_in) and one in groups, and a dense readout."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.two = networks.Convolution(4, 4, 1)
        self.three = nn.Conv2d(4, 4, (3, 2), padding="same", groups=2)
        self.readout = networks.Dense(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        activity = torch.tanh(self.three(torch.tanh(self.two(torch.tanh(self.one(images))))))
        return self.readout(activity.flatten(1))


@each_perceptron
def test_steps_and_mirror_steps_by_hand(kind):
    """Three mirror steps before every one of twenty steps of SGD; y = W x for noise x, W as it is used."""
    settings, rate = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.02}, 0.1
    hand = perceptron(kind)
    network, inputs = hand.network, torch.randn(8, 6, dtype=torch.float64)
    rule = WeightMirror(network, rate)
    B = [tensor.clone() for tensor in rule.feedback]
    optimiser = torch.optim.SGD(rule.parameters(), **settings)
    reference = Momentum(network.parameters(), *settings.values())
    start = [parameter.clone() for parameter in reference.parameters]
    mirrored = 0
    for _ in range(20):
        for _ in range(3):
            rule.mirror(inputs)
            stream = torch.Generator().manual_seed(int(rule.seed) + mirrored)
            mirrored += 1
            for feedback, weight in zip(B, reference.parameters[::2], strict=True):
                x = torch.randn(8, weight.shape[1], generator=stream, dtype=torch.float64)
                y = x @ weight.T  # scaled as y and its product are, W's scaling cancels out of the estimate of W
                feedback += max(rate, 1 / mirrored) * (y.T @ x / 8 - feedback)
            assert_same(rule.feedback, B)
        optimiser.zero_grad()
        loss(rule(inputs)).backward()
        reference.step(hand.gradients(reference.parameters, B, inputs))
        optimiser.step()
        assert_same(network.parameters(), reference.parameters)
    assert flipped(start[::2], reference.parameters[::2]) > 5


def test_a_mirror_step_of_a_convolution_by_hand():
    """Every tap is divided by the number of positions at which it lies inside of the image."""
    network, images = nn.Conv2d(2, 3, 3, stride=2, padding=1).double(), torch.randn(4, 2, 5, 6).double()
    rule = WeightMirror(network)
    rule.mirror(images)
    x = torch.randn(4, 2, 5, 6, generator=torch.Generator().manual_seed(int(rule.seed)), dtype=torch.float64)
    y = F.conv2d(x, network.weight.detach(), stride=2, padding=1)
    expected = torch.zeros(3, 2, 3, 3, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            met = [
                (i, j, 2 * i + row - 1, 2 * j + column - 1)
                for i in range(y.shape[2])
                for j in range(y.shape[3])
                if 0 <= 2 * i + row - 1 < 5 and 0 <= 2 * j + column - 1 < 6
            ]
            products = sum(y[:, :, i, j].T @ x[:, :, p, q] for i, j, p, q in met)
            expected[:, :, row, column] = products / (4 * len(met))
    torch.testing.assert_close(rule.feedback_weights()["weight"], expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_angles_fall():
    network, images = Padded(), torch.randn(96, 2, 8, 8)
    rule = WeightMirror(network, rate=1e-3)
    assert all(degrees > 45 for degrees in align_rules.feedback_angles(rule).values())
    for _ in range(100):
        rule.mirror(images)
    angles = align_rules.feedback_angles(rule)
    assert all(degrees < 12 for degrees in angles.values()), angles
    for name, B in rule.feedback_weights().items():  # in size, too: the estimate is of W, and not of a multiple
        weight = network.get_parameter(name)
        assert (B.norm() / weight.norm()).item() == pytest.approx(1, abs=0.05), name


def test_forgetting_lets_feedback_follow_weights_that_move():
    network, inputs = mlp(), torch.randn(64, 6)
    rule = WeightMirror(network, rate=0.05)
    for _ in range(100):
        rule.mirror(inputs)
    for weight in align_rules.layer_weights(network).values():
        weight.data.neg_()
    assert all(degrees > 150 for degrees in align_rules.feedback_angles(rule).values())
    for _ in range(200):
        rule.mirror(inputs)
    assert all(degrees < 12 for degrees in align_rules.feedback_angles(rule).values())


def test_a_mirror_step_changes_the_feedback_alone():
    network, inputs = LeavesTraces(), torch.randn(5, 6)
    rule = WeightMirror(network)
    gradients(rule, network, inputs)

    before = traces(rule)
    for _ in range(2):
        rule.mirror(inputs)
    after = traces(rule)
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {"feedback.0", "feedback.1", "mirrored"}
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_mirroring_needs_no_gradients_and_keeps_none():
    rule, images = WeightMirror(residual()), torch.randn(IMAGES)
    with torch.no_grad():
        rule.mirror(images)
    assert not any(B.requires_grad for B in rule.feedback)
    assert all(parameter.grad is None for parameter in rule.parameters())


def test_a_saved_rule_goes_on_with_the_same_noise():
    images = torch.randn(IMAGES)
    rule = WeightMirror(residual())
    for _ in range(5):
        rule.mirror(images)
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other = WeightMirror(residual())
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        torch.randn(3)  # nothing of torch's own generator comes in
        rule.mirror(images), other.mirror(images)
    assert all(torch.equal(a, b) for a, b in zip(rule.feedback, other.feedback, strict=True))
    assert int(rule.mirrored) == int(other.mirrored) == 10


def test_noise_follows_the_generator():
    inputs, drawn = torch.randn(5, 6), []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        rule = WeightMirror(mlp(), generator=torch.Generator().manual_seed(seed))
        rule.mirror(inputs)
        drawn.append(rule.feedback_weights()["0.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor, first: bool = True) -> Tensor:
        return self.last(torch.tanh((self.one if first else self.other)(inputs)))


def test_a_layer_that_is_not_called_keeps_its_feedback():
    rule = WeightMirror(Choosing())
    before = [B.clone() for B in rule.feedback]
    rule.mirror(torch.randn(5, 6), first=False)
    assert [torch.equal(B, old) for B, old in zip(rule.feedback, before, strict=True)] == [True, False, False]


def test_a_shared_weight_is_estimated_from_all_of_its_calls():
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    network[2].weight = network[0].weight
    rule, inputs = WeightMirror(network), torch.randn(5, 6).double()
    rule.mirror(inputs)
    stream = torch.Generator().manual_seed(int(rule.seed))
    x = torch.cat([torch.randn(5, 6, generator=stream, dtype=torch.float64) for _ in range(2)])
    torch.testing.assert_close(next(iter(rule.feedback)), (x @ network[0].weight.detach().T).T @ x / 10)


def test_perfect_feedback_is_backprop():
    network, images = residual().double(), torch.randn(IMAGES).double()
    rule = WeightMirror(network, feedback=align_rules.layer_weights(network))
    assert_close(gradients(rule, network, images), gradients(network, network, images))


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan")])
def test_wrong_rates(rate):
    with pytest.raises(ValueError, match="rate must be above 0 and at most 1, not"):
        WeightMirror(mlp(), rate)


class Masked(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.rand(outputs, inputs) > 0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight * self.mask, self.bias)


@pytest.mark.parametrize("network", [Masked(6, 3), nn.Conv2d(6, 3, 3, padding=1)], ids=["masked", "outside"])
def test_entries_that_meet_nothing_stay_as_they_are(network):
    """Of masked weights, and of taps that are never inside of an image of one pixel, as at the end of a ResNet."""
    inputs = torch.randn(5, 6) if isinstance(network, Masked) else torch.randn(5, 6, 1, 1)
    rule = WeightMirror(network)
    (before,) = (B.clone() for B in rule.feedback)
    rule.mirror(inputs)
    (B,) = rule.feedback
    met = network.mask if isinstance(network, Masked) else F.pad(torch.ones(3, 6, 1, 1), (1, 1, 1, 1)).bool()
    assert B.isfinite().all()
    assert torch.equal(B[~met], before[~met])
    assert not torch.isclose(B[met], before[met]).any()


def test_a_weight_whose_use_has_no_slope_is_refused_or_estimated():
    """Weight standardisation: what the network makes of the weight is not proportional to it."""

    class Standardised(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean(1, keepdim=True)
            return F.linear(inputs, weight / weight.std(1, keepdim=True), self.bias)

    rule, inputs = WeightMirror(nn.Sequential(Standardised(6, 6), nn.Tanh(), nn.Linear(6, 3))), torch.randn(200, 6)
    try:
        for _ in range(20):
            rule.mirror(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        assert "0.weight" in str(error)  # noqa: PT017 - either of the two will do
    else:
        assert all(degrees < 12 for degrees in align_rules.feedback_angles(rule).values())
