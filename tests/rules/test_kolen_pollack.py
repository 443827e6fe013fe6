"""KolenPollack by hand: weights and feedback weights over many steps, and everything that B must learn through."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from by_hand import Momentum, assert_same, each_perceptron, flipped, perceptron
from rules_helpers import IMAGES, assert_close, gradients, loss, mlp, residual
from torch import Tensor, nn

import align_rules
from align_rules import KolenPollack

pytestmark = pytest.mark.usefixtures("seeded")


def differences(rule: KolenPollack) -> list[Tensor]:
    """W - B of every layer."""
    weights = align_rules.layer_weights(rule.network).values()
    return [(weight - B).detach().clone() for weight, B in zip(weights, rule.feedback, strict=True)]


def assert_learns_as_the_weights(rule: KolenPollack) -> None:
    for (name, weight), B in zip(align_rules.layer_weights(rule.network).items(), rule.feedback, strict=True):
        assert weight.grad.any(), name
        torch.testing.assert_close(B.grad, weight.grad, rtol=0, atol=1e-14, msg=name)


@each_perceptron
def test_forty_steps_by_hand(kind):
    settings = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.02}
    hand = perceptron(kind)
    network, inputs = hand.network, torch.randn(8, 6, dtype=torch.float64)
    rule = KolenPollack(network)
    B = [tensor.detach().clone() for tensor in rule.feedback]
    optimiser = torch.optim.SGD(rule.parameters(), **settings)
    reference = Momentum([*network.parameters(), *B], *settings.values())
    for _ in range(40):
        optimiser.zero_grad()
        loss(rule(inputs)).backward()
        parameters, sent = reference.parameters[:6], reference.parameters[6:]
        found = hand.gradients(parameters, sent, inputs)
        reference.step([*found, *found[::2]])  # dB = dW
        optimiser.step()
        assert_same(network.parameters(), reference.parameters[:6])
        assert_same(rule.feedback, reference.parameters[6:])
    assert flipped(B, list(rule.feedback)) > 10


@each_perceptron
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_and_feedback_meet_at_the_rate_of_the_decay(kind, decay):
    network, inputs = perceptron(kind).network, torch.randn(8, 6, dtype=torch.float64)
    rule, rate = KolenPollack(network), 0.2
    optimiser, expected = torch.optim.SGD(rule.parameters(), lr=rate, weight_decay=decay), differences(rule)
    for _ in range(50):
        optimiser.zero_grad()
        loss(rule(inputs)).backward()
        optimiser.step()
        expected = [difference * (1 - rate * decay) for difference in expected]
        assert_same(differences(rule), expected, 1e-12)


def test_feedback_that_has_met_the_weights_is_backprop():
    network, inputs = mlp().double(), torch.randn(5, 6).double()
    rule = KolenPollack(network)
    optimiser = torch.optim.SGD(rule.parameters(), lr=0.5, weight_decay=0.05)
    for _ in range(900):  # (1 - 0.025)^900 = 1e-10
        optimiser.zero_grad()
        loss(rule(inputs)).backward()
        optimiser.step()
    assert all(degrees < 1e-6 for degrees in align_rules.feedback_angles(rule).values())
    assert_close(gradients(rule, network, inputs), gradients(network, network, inputs), 1e-7)


@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimisers_move_both_alike(optimiser):
    rule, inputs = KolenPollack(mlp().double()), torch.randn(8, 6).double()
    before, optimiser = differences(rule), optimiser(rule.parameters(), lr=0.01)
    for _ in range(10):
        optimiser.zero_grad()
        loss(rule(inputs)).backward()
        optimiser.step()
    assert_same(differences(rule), before, 1e-12)


# ------------------------------------------------------------------------------ what a network makes of its weights


def scaled(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight / 3, layer.bias)


def with_a_gain(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight * layer.gain[:, None], layer.bias)


def normalised(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    return F.linear(x, (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True))


def cast(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.float(), layer.weight.to(torch.float32), layer.bias.float()).double()


def split(layer: nn.Linear, x: Tensor) -> Tensor:
    one, two = layer.weight.chunk(2)
    return torch.cat([F.linear(x, one), F.linear(x.tanh(), weight=two)], -1)


def unbound(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.cat([F.linear(x, row[None]) for row in layer.weight.unbind()], -1)


def reshaped(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight.t().contiguous().reshape(2, 3, 6).flatten(0, 1)
    return F.linear(x, weight.T, layer.bias)


def as_a_convolution(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.conv1d(x[..., None], layer.weight[..., None], layer.bias).squeeze(-1)


def twice(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(layer(x).tanh())


def masked(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight * layer.mask)


def written_into(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight.clone()
    weight.mul_(2)
    return F.linear(x, weight)


USES = (scaled, with_a_gain, normalised, cast, split, unbound, reshaped, as_a_convolution, twice, masked, written_into)


class Using(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use, self.first, self.second, self.last = use, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.second.register_buffer("mask", (torch.rand(6, 6) > 0.3).to(torch.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.use(self.second, torch.tanh(self.first(inputs)))))


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_feedback_learns_through_what_is_made_of_the_weight(use):
    """dB = dW through any chain, and nothing else in that chain gets a second gradient."""
    network, inputs = Using(use).double(), torch.randn(5, 6).double()
    rule = KolenPollack(network)
    fixed = align_rules.FeedbackAlignment(network, rule.feedback_weights())
    expected = gradients(fixed, network, inputs)
    assert_close(gradients(rule, network, inputs), expected, 1e-6 if use is cast else 1e-12)
    if use is normalised:  # its derivative in B is taken at B, and in W at W
        assert all(B.grad.any() for B in rule.feedback)
    else:
        assert_learns_as_the_weights(rule)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_feedback_learns_in_convolutions():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, (2, 3), padding="same", groups=2),
        nn.Tanh(), nn.Conv2d(4, 3, 3, dilation=2, padding=2, padding_mode="circular"), nn.Flatten(), nn.Linear(48, 3),
    ).double()  # fmt: skip
    rule = KolenPollack(network)
    gradients(rule, network, torch.randn(IMAGES).double())
    assert_learns_as_the_weights(rule)


def test_feedback_of_a_shared_weight_gets_the_sum():
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    network[2].weight = network[0].weight
    rule = KolenPollack(network)
    assert len(rule.feedback) == 2
    gradients(rule, network, torch.randn(5, 6).double())
    assert_learns_as_the_weights(rule)


def test_feedback_under_autocast():
    rule, inputs = KolenPollack(residual()), torch.randn(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        output = rule(inputs)
    loss(output.float()).backward()
    assert_learns_as_the_weights(rule)


# ------------------------------------------------------------------------------------ who gets B's gradient, and when


def test_a_frozen_layers_feedback_does_not_move():
    network, inputs = mlp(), torch.randn(5, 6)
    network[2].requires_grad_(False)
    rule = KolenPollack(network)
    before = [B.detach().clone() for B in rule.feedback]
    optimiser = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        loss(rule(inputs)).backward()
        optimiser.step()
    assert [torch.equal(B, old) for B, old in zip(rule.feedback, before, strict=True)] == [False, True, False]
    assert rule.feedback[1].grad is None


def test_gradients_by_torch_autograd_grad():
    rule, inputs = KolenPollack(residual().double()), torch.randn(IMAGES).double()
    weights = list(align_rules.layer_weights(rule.network).values())
    found = torch.autograd.grad(loss(rule(inputs)), [*weights, *rule.feedback])
    for of_weight, of_feedback in zip(found[: len(weights)], found[len(weights) :], strict=True):
        assert of_weight.any()
        assert torch.equal(of_weight, of_feedback)
    (alone,) = torch.autograd.grad(loss(rule(inputs)), [rule.feedback[0]])
    torch.testing.assert_close(alone, found[0])
    assert all(parameter.grad is None for parameter in rule.parameters())


def test_gradients_add_up_over_backward_passes():
    rule, inputs = KolenPollack(mlp().double()), torch.randn(5, 6).double()
    loss(rule(inputs)).backward()
    once = [B.grad.clone() for B in rule.feedback]
    loss(rule(inputs)).backward()
    assert_same([B.grad for B in rule.feedback], [2 * gradient for gradient in once], 1e-14)


def steps(rule: KolenPollack, parameters, count: int = 2) -> None:
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(count):
        optimiser.zero_grad()
        loss(rule(torch.randn(5, 6))).backward()
        optimiser.step()


def test_an_optimiser_that_lacks_the_feedback_is_told():
    rule = KolenPollack(mlp())
    with pytest.warns(UserWarning, match="have changed and their feedback weights have not.*rule.parameters()"):
        steps(rule, rule.network.parameters())


def test_an_optimiser_that_has_it_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule = KolenPollack(mlp())
        rule(torch.randn(5, 6))
        steps(rule, rule.parameters(), 3)
        rule(torch.randn(5, 6)), rule(torch.randn(5, 6))  # and without a step between
        frozen = KolenPollack(mlp().requires_grad_(False))
        frozen.network[4].bias.requires_grad_()
        steps(frozen, [frozen.network[4].bias], 3)  # no weight learns
        # A rule that was loaded or given others' weights has missed no step.
        rule.load_state_dict(KolenPollack(mlp()).state_dict())
        rule(torch.randn(5, 6))


def test_the_warning_points_at_the_call():
    rule = KolenPollack(mlp())
    rule(torch.randn(5, 6))
    with torch.no_grad():
        rule.network[0].weight.mul_(2)
    with pytest.warns(UserWarning, match="have changed") as told:
        rule(torch.randn(5, 6))
    assert told[0].filename == __file__


def test_feedback_of_a_weight_that_the_network_stops_does_not_move():
    """A weight that is detached before it is used gets no gradient from there, and its B none either."""

    class Stopped(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return F.linear(inputs, self.weight.detach(), self.bias)

    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Stopped(6, 6), nn.Tanh(), nn.Linear(6, 3))
    rule = KolenPollack(network)
    gradients(rule, network, torch.randn(5, 6))
    assert network[2].weight.grad is None
    assert rule.feedback[1].grad is None or not rule.feedback[1].grad.any()
    assert rule.feedback[0].grad.any()
