"""The rules on networks that were not written for them: plain torch modules, torchvision's, and what is refused."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from running import ROOT
from test_align_rules import RECURRENT_OPTIONS, assert_close, copy_parameters, gradients, move
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

import align_rules
from align_rules import couple
from benchmarks import other_networks
from wide import networks

each_rule = pytest.mark.parametrize("name", align_rules.RULES)
LAYERWISE = ("fa", "dfa", "align_prop", "align_ada")
each_layerwise = pytest.mark.parametrize("name", LAYERWISE)
LIGHT = [title for title in other_networks.CASES if "vgg" not in title]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def e_of(output: Tensor) -> Tensor:
    """The gradient of `gradients`'s loss at the output."""
    wanted = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return 2 * (output - wanted) / output.numel()


def residual(width: int = 6, inplace: bool = False) -> nn.Sequential:
    """(batch, 2, 8, 8) -> (batch, 3), with learned normalisation and a skip."""
    stem = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU(inplace=inplace))
    return nn.Sequential(
        stem, Skip(width, inplace), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 5), nn.Tanh(), nn.Linear(5, 3)
    )


class Skip(nn.Module):
    def __init__(self, width: int, inplace: bool):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace)

    def forward(self, images: Tensor) -> Tensor:
        branch = self.second(self.relu(self.norm(self.first(images))))
        return self.relu(images + branch)


IMAGES = (4, 2, 8, 8)


def test_the_readmes_example(kmnist):
    section = (ROOT / "README.md").read_text().partition("## On your own network")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert 'KMNIST("data")' in code
    names = {}
    exec(code.replace('KMNIST("data")', f"KMNIST({str(kmnist)!r})"), names)
    rule = names["rule"]
    assert isinstance(rule, align_rules.AlignAda)
    assert names["loss"] < 5
    for key, weight in align_rules.layer_weights(rule.network).items():
        assert not torch.equal(weight, rule.initial.get_parameter(key)), key


@pytest.mark.parametrize("title", LIGHT)
@each_rule
def test_one_step_changes_what_it_should(name, title):
    assert other_networks.problems(name, other_networks.CASES[title]) == []


# --------------------------------------------------------------------------------- the paper's networks, in plain torch


class Scaled(nn.Module):
    """What follows a linear map in NTK parameterisation: its scaling, and the bias."""

    def __init__(self, fan_in: int, channels: int):
        super().__init__()
        self.fan_in, self.bias = fan_in, nn.Parameter(torch.zeros(channels))

    def forward(self, z: Tensor) -> Tensor:
        return z / math.sqrt(self.fan_in) + self.bias.view(-1, *[1] * (z.dim() - 2))


def normalised(channels: int, *size: int) -> list[nn.Module]:
    """Normalisation over the batch axis alone, by torch's own module."""
    entries = channels * math.prod(size)
    norm = nn.BatchNorm1d(entries, eps=1e-6, affine=False, track_running_stats=False)
    return [nn.Flatten(), norm, nn.Unflatten(1, (channels, *size))] if size else [norm]


class Plain(nn.Module):
    """Blocks, then a readout in NTK parameterisation."""

    def __init__(self, width: int, classes: int, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.readout = nn.Sequential(nn.Linear(width, classes, bias=False), Scaled(width, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.readout(self.blocks(inputs))


def plain_convolutional() -> Plain:
    """ConvolutionalNetwork(2, 5, (1, 2, 2), 3), for images of 7 x 8 pixels."""
    modules = []
    # Padding left, right, top, bottom, as TensorFlow's SAME has it on 7 x 8, 7 x 8 and 4 x 4 pixels.
    for inputs, stride, padding, size in (
        (2, 1, (1, 1, 1, 1), (7, 8)),
        (5, 2, (0, 1, 1, 1), (4, 4)),
        (5, 2, (0, 1, 0, 1), (2, 2)),
    ):
        convolution = nn.Conv2d(inputs, 5, 3, stride, bias=False)
        modules += [nn.ZeroPad2d(padding), convolution, Scaled(9 * inputs, 5), *normalised(5, *size), nn.ReLU()]
    return Plain(5, 3, *modules, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def plain_fully_connected() -> Plain:
    """FullyConnectedNetwork(6, 7, 3)."""
    modules = []
    for inputs in (6, 7, 7):
        modules += [nn.Linear(inputs, 7, bias=False), Scaled(inputs, 7), *normalised(7), nn.ReLU(inplace=True)]
    return Plain(7, 3, *modules)


class PlainRecurrent(Plain):
    """RecurrentNetwork(6, 5)."""

    def __init__(self):
        super().__init__(6, 1, nn.Linear(1, 6, bias=False), nn.Linear(6, 6, bias=False), Scaled(6, 6))
        self.initial_state = nn.Parameter(torch.zeros(5, 6))

    def forward(self, sequences: Tensor) -> Tensor:
        drive, hidden, scaled = self.blocks
        state, states = self.initial_state, []
        for step in sequences.split(1, dim=1):
            state = torch.relu(drive(step) + scaled(hidden(state)))
            states.append(state)
        return self.readout(torch.cat(states)).view(len(states), -1).T


# kind: ours, the same from plain modules, the shape of a batch, and those of the blocks' activities
PAPER = {
    "convolutional": (
        lambda: networks.ConvolutionalNetwork(2, 5, (1, 2, 2), 3), plain_convolutional, (6, 2, 7, 8),
        ((5, 7, 8), (5, 4, 4), (5, 2, 2)),
    ),
    "fully connected": (
        lambda: networks.FullyConnectedNetwork(6, 7, 3), plain_fully_connected, (6, 6), ((7,), (7,), (7,)),
    ),
    "recurrent": (lambda: networks.RecurrentNetwork(6, 5), PlainRecurrent, (5, 4), ()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in align_rules.RULES for k in PAPER if (n, k) != ("dfa", "recurrent")]
)
def test_the_papers_networks_from_plain_modules(name, kind):
    build, rebuild, shape, activities = PAPER[kind]
    pair = build().double(), rebuild().double()
    copy_parameters(*pair)
    settings = dict(RECURRENT_OPTIONS.get(name, {})) if kind == "recurrent" else {}
    if name == "last_layer":
        settings.setdefault("learns", ("readout",))
    elif name == "dfa":
        settings["feedback"] = [torch.randn(3, *activity, dtype=torch.float64) for activity in activities]
    drawn = [torch.randn_like(weight) for weight in align_rules.layer_weights(pair[0]).values()]
    rules = []
    for network in pair:
        if name == "fa":
            settings["feedback"] = dict(zip(align_rules.layer_weights(network), drawn, strict=True))
        rules.append(align_rules.RULES[name](network, **settings))
    move(pair[0], 0.1)
    copy_parameters(*pair)
    inputs = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(rules[0](inputs), rules[1](inputs), rtol=0, atol=1e-10)
    assert_close(gradients(rules[0], pair[0], inputs), gradients(rules[1], pair[1], inputs), 1e-9)


# -------------------------------------------------------------------------------------------- branches, written by hand


class ConvolutionalSkip(nn.Module):
    """relu(conv), relu(conv), conv beside a skip, relu, mean, readout. (batch, 2, 5, 6) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(inputs, 4, 3, padding=1) for inputs in (2, 4, 4))
        self.readout = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        stem = F.relu(self.one(images))
        branch = self.three(F.relu(self.two(stem)))
        return self.readout(F.relu(stem + branch).mean((2, 3)))


def patches(activity: Tensor) -> Tensor:
    """(batch, channels, h, w) -> (batch, channels * 9, h * w), what a 3x3 convolution multiplies."""
    return F.unfold(activity, 3, padding=1)


def send(error: Tensor, weight: Tensor) -> Tensor:
    """An error at a 3x3 convolution's output, (batch, out, h, w), back to its input through this weight."""
    return F.fold(weight.flatten(1).T @ error.flatten(2), error.shape[2:], 3, padding=1)


def learned(error: Tensor, activity: Tensor) -> list[Tensor]:
    """Gradients of a 3x3 convolution's weight and bias."""
    weight = torch.einsum("bop,bkp->ok", error.flatten(2), patches(activity))
    return [weight.unflatten(1, (-1, 3, 3)), error.sum((0, 2, 3))]


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_feedback_on_a_residual_convolutional_network_by_hand(name):
    network, images = ConvolutionalSkip().double(), torch.randn(4, 2, 5, 6).double()
    if name == "fa":
        B = [torch.randn_like(weight) for weight in align_rules.layer_weights(network).values()]
        feedback = dict(zip(align_rules.layer_weights(network), B, strict=True))
    else:
        B = feedback = [torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in range(3)]
    rule = align_rules.RULES[name](network, feedback=feedback)

    with torch.no_grad():
        z1 = network.one(images)
        a1 = z1.clamp(min=0)
        z2 = network.two(a1)
        a2 = z2.clamp(min=0)
        s = a1 + network.three(a2)
        pooled = s.clamp(min=0).mean((2, 3))
        e = e_of(network.readout(pooled))
        if name == "fa":
            d3 = (e @ B[3])[:, :, None, None] / 30 * (s > 0)
            d2 = send(d3, B[2]) * (z2 > 0)
            d1 = (d3 + send(d2, B[1])) * (z1 > 0)  # the skip carries the error as it is
        else:
            d1, d2, d3 = (torch.einsum("bk,kchw->bchw", e, b) * (z > 0) for b, z in zip(B, (z1, z2, s), strict=True))
        expected = [*learned(d1, images), *learned(d2, a1), *learned(d3, a2), e.T @ pooled, e.sum(0)]

    assert_close(gradients(rule, network, images), expected, 1e-10)


class DenseSkip(nn.Module):
    """Normalisation and a skip between dense layers, (batch, 6) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.readout = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, inputs: Tensor) -> Tensor:
        stem = torch.tanh(self.norm(self.one(inputs)))
        return self.readout(torch.tanh(stem + self.two(stem)))


@pytest.mark.parametrize("coupling", ["preactivation", "activity"])
def test_align_ada_at_a_branch_by_hand(coupling):
    """Every layer's input gets the initial network's error; the skip between them is the current network's own."""
    network, inputs = DenseSkip().double(), torch.randn(8, 6).double()
    rule = align_rules.AlignAda(network, coupling)
    start = copy.deepcopy(network)
    move(network)

    def by_hand(inputs: Tensor) -> Tensor:
        u, u0 = network.norm(network.one(inputs)), start.norm(start.one(inputs))
        h, h0 = torch.tanh(u), torch.tanh(u0)
        arriving = torch.tanh(couple(u0, u)) if coupling == "preactivation" else couple(h0, h)
        g = torch.tanh(h + network.two(h.detach()))
        g0 = torch.tanh(h0 + start.two(arriving))
        return couple(network.readout(g.detach()), start.readout(couple(g0, g)))

    expected = gradients(by_hand, network, inputs)
    assert_close(gradients(rule, network, inputs), expected)
    assert max((a - b).abs().max() for a, b in zip(expected, gradients(network, network, inputs), strict=True)) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_align_zero_is_the_initial_networks_vjp_on_resnet18(training):
    """J(theta0)^T e, with e at the current network's output, by torch.func."""
    # With running statistics torch.func could not run the network in training mode, where they change in place.
    norm = functools.partial(nn.BatchNorm2d, track_running_stats=not training)
    network = resnet18(num_classes=3, norm_layer=norm).double().train(training)
    theta0 = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    rule, images = align_rules.AlignZero(network), torch.randn(4, 3, 32, 32).double()
    move(network, 0.01)

    e = e_of(network(images).detach())
    _, vjp = torch.func.vjp(lambda theta: torch.func.functional_call(network, theta, (images,)), theta0)
    computed = gradients(rule, network, images)
    assert_close(computed, list(vjp(e)[0].values()), 1e-9)
    assert (computed[0] - gradients(network, network, images)[0]).norm() > 0.01 * computed[0].norm()


# ------------------------------------------------------------------------------------------- modules of other networks

VARIANTS = {
    "groups and dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
    "padding same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "padding same, even kernel": lambda: nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)),
    "padding valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2),
    "circular padding": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflected padding, same": lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 5, 2, 1), nn.Conv1d(6, 6, 2, padding="same")),
    "three dimensions": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, (2, 3, 3), padding="same", groups=1)
    ),
    "other norms": lambda: nn.Sequential(
        nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm((6, 6, 6))
    ),
    "concatenation": lambda: Concatenated(),
    "activations": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.LeakyReLU(0.1), nn.Conv2d(6, 6, 1), nn.PReLU(6), nn.Conv2d(6, 6, 1), nn.Hardtanh(-2, 2)
    ),
    "a layer twice": lambda: nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()] * 2),
    "one weight, two layers": lambda: tied(),
    "split weight": lambda: Split(4, 6),
}  # fmt: skip


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, F.silu(self.left(images)), self.right(images)], 1)


class Split(nn.Linear):
    """Uses a scaled and cast weight in two parts, on the channels of images."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("scale", torch.rand(outputs, 1))

    def forward(self, images: Tensor) -> Tensor:
        one, two = (self.weight * self.scale).to(images.dtype).chunk(2)
        images = images.movedim(1, -1)
        return torch.cat([F.linear(images, one), F.linear(images.tanh(), weight=two)], -1).movedim(-1, 1)


def tied() -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    network[2].weight = network[0].weight
    return network


def around(build) -> tuple[nn.Sequential, Tensor]:
    """A module between others, so that its input has an error, and a batch for it."""
    middle = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), build(), nn.Tanh(), nn.Flatten()).double()
    images = torch.randn(5, 2, 8, 8).double()
    return nn.Sequential(middle, nn.Linear(middle(images).shape[1], 3).double()), images


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["fa", "align_prop", "align_ada", "align_zero"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_initially_backprop_through_any_module(name, variant):
    network, images = around(VARIANTS[variant])
    options = {"feedback": align_rules.layer_weights(network)} if name == "fa" else {}
    rule = align_rules.RULES[name](network, **options)
    expected = gradients(network, network, images)
    assert all(gradient is not None for gradient in expected)
    assert_close(gradients(rule, network, images), expected)
    move(network, 0.1)  # the weights that errors go back through are now others
    assert torch.equal(rule(images), network(images))
    here = gradients(network, network, images)
    assert (gradients(rule, network, images)[0] - here[0]).norm() > 1e-3 * here[0].norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_direct_feedback_reaches_any_module(variant):
    network, images = around(VARIANTS[variant])
    rule = align_rules.DirectFeedbackAlignment(network)
    assert torch.equal(rule(images), network(images))
    assert all(gradient.any() for gradient in gradients(rule, network, images))


class InPlace(nn.Module):
    """Activations in place, by every way of calling them; or the same ones out of place."""

    def __init__(self, changes: bool):
        super().__init__()
        self.changes = changes
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.elu = nn.ELU(inplace=changes)

    def forward(self, inputs: Tensor) -> Tensor:
        first, second, third, fourth, last = self.layers
        activity = self.elu(first(inputs))
        activity = F.leaky_relu(second(activity), 0.1, self.changes)
        activity = F.silu(third(activity), inplace=self.changes)
        z = fourth(activity)
        activity = torch.tanh_(z) if self.changes else torch.tanh(z)
        return last(z if self.changes else activity)  # changed in place, whatever name it goes by


@each_rule
def test_activations_in_place(name):
    rules = []
    for changes in (False, True):
        torch.manual_seed(0)
        network = InPlace(changes).double()
        rules.append(align_rules.RULES[name](network))
        move(network)
    inputs = torch.randn(5, 6).double()
    torch.manual_seed(1)  # direct feedback is drawn at the first call
    expected = gradients(rules[0], rules[0].network, inputs)
    torch.manual_seed(1)
    assert torch.equal(rules[1](inputs), rules[1].network(inputs))
    assert_close(gradients(rules[1], rules[1].network, inputs), expected)


@each_rule
def test_in_place_changes_reach_the_skip(name):
    """A ReLU in place in a branch rectifies what the skip adds, in the network and so in the rule."""

    class Rectified(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            z = self.one(inputs)
            return self.three(z + self.two(F.relu(z, inplace=True)))

    network, inputs = Rectified().double(), torch.randn(5, 6).double()
    rule = align_rules.RULES[name](network)
    move(network)
    assert torch.equal(rule(inputs), network(inputs))
    gradients(rule, network, inputs)


def add_in_place(tensor: Tensor, other, changes: bool) -> Tensor:
    return tensor.add_(other) if changes else tensor + other


def activated_then_dropped(net, inputs, changes):
    torch.manual_seed(3)
    return net.two(F.dropout(F.silu(net.one(inputs), inplace=changes), 0.5, inplace=changes))


def rectified_then_added(net, inputs, changes):
    x = net.one(inputs)
    return add_in_place(x, net.two(F.relu(x)), changes)


def argument_changed_afterwards(net, inputs, changes):
    x = net.one(inputs)
    activity = F.relu(x)
    y = net.two(activity)
    return y * add_in_place(x, 1, changes).mean()


def changed_through_a_view(net, inputs, changes):
    activity = F.gelu(net.one(inputs))
    if changes:
        activity.view(5, 2, 3).mul_(2)
        return net.two(activity)
    return net.two((activity.view(5, 2, 3) * 2).view(5, 6))


class Changing(nn.Module):
    def __init__(self, body, changes: bool):
        super().__init__()
        self.body, self.changes = body, changes
        self.one, self.two, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(F.elu(self.body(self, inputs, self.changes)))


@each_rule
@pytest.mark.parametrize(
    "body", [activated_then_dropped, rectified_then_added, argument_changed_afterwards, changed_through_a_view]
)
def test_changes_in_place_change_no_gradient(name, body):
    made = []
    for changes in (False, True):
        torch.manual_seed(0)
        network = Changing(body, changes).double()
        rule = align_rules.RULES[name](network)
        move(network)
        inputs = torch.randn(5, 6).double()
        torch.manual_seed(1)  # direct feedback is drawn at the first call
        made.append(gradients(rule, network, inputs))
    assert_close(made[1], made[0])


def test_an_argument_changed_too_early_is_told():
    def body(net, inputs, changes):
        x = net.one(inputs)
        activity = F.relu(x)
        x.add_(1)
        return net.two(activity)

    rule = align_rules.AlignAda(Changing(body, True))
    with pytest.raises(RuntimeError, match=r"in front of two.weight is changed in place .*x = x \+ y"):
        rule(torch.randn(5, 6))


# ------------------------------------------------------------------------------------------------ what users do to them


@pytest.mark.parametrize("name", ["align_ada", "align_zero"])
def test_a_copy_that_runs_the_original_is_told(name):
    """A closure is not copied: without a check AlignZero would be backprop."""
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    forward = network.forward
    network.forward = lambda inputs: forward(inputs)
    with pytest.raises(TypeError, match="uses the original's parameters"):
        align_rules.RULES[name](network)(torch.randn(5, 6))


@each_layerwise
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_activations_are_told(name):
    class Checkpointed(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            first, *rest = self
            return rest[-1](checkpoint(nn.Sequential(*rest[:-1]), first(inputs), use_reentrant=True))

    network = Checkpointed(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(TypeError, match="checkpoints activations"):
        align_rules.RULES[name](network)(torch.randn(5, 6))


@pytest.mark.parametrize("name", ["align_ada", "align_zero"])
def test_the_initial_network_never_learns(name):
    network, inputs = residual(), torch.randn(IMAGES)
    rule = align_rules.RULES[name](network)
    before = copy.deepcopy(rule.initial.state_dict())
    rule.requires_grad_(True)  # as gradual unfreezing does
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    rule(inputs).square().mean().backward()
    optimizer.step()
    for key, parameter in rule.initial.named_parameters():
        assert torch.equal(parameter, before[key]), key
    assert all(parameter.requires_grad for parameter in network.parameters())


class Gated(nn.Module):
    """A learned gate behind an activation function of a parameter, and a gated head, called last."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.gate = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, inputs: Tensor) -> Tensor:
        activity = F.relu(self.one(inputs)) * torch.sigmoid(self.scale)
        return self.two(activity) * torch.sigmoid(self.gate(activity))


@each_rule
def test_gates(name):
    rule, inputs = align_rules.RULES[name](Gated()), torch.randn(5, 6)
    assert torch.equal(rule(inputs), rule.network(inputs))
    made = gradients(rule, rule.network, inputs)
    if name != "last_layer":
        assert all(gradient.any() for gradient in made)


@each_rule
def test_one_number_per_example(name):
    network, inputs = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    assert rule(inputs).shape == (5,)
    assert gradients(rule, network, inputs)[2].any()


@pytest.mark.parametrize("name", ["dfa", "align_ada", "align_zero"])
def test_several_outputs_are_refused(name):
    class Named(nn.Linear):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(inputs)}

    with pytest.raises(TypeError, match="returns a dict, but this rule needs one tensor"):
        align_rules.RULES[name](Named(6, 3))(torch.randn(5, 6))


@pytest.mark.parametrize("name", ["fa", "align_prop"])
def test_one_image_without_a_batch(name):
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding="same")).double()
    rule, image = align_rules.RULES[name](network), torch.randn(2, 5, 5).double()
    for alone, batched in zip(gradients(rule, network, image), gradients(rule, network, image[None]), strict=True):
        torch.testing.assert_close(alone, batched)


class Words(nn.Module):
    """The readout shares the embedding's weight; with `start`, a word that the network looks up itself is added."""

    def __init__(self, start: bool):
        super().__init__()
        self.start = start
        self.words, self.hidden, self.readout = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.readout.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        activity = self.words(words)
        if self.start:
            activity = activity + self.words(torch.zeros(len(words), dtype=torch.int64))
        return self.readout(F.gelu(self.hidden(activity)))


@each_rule
def test_a_shared_weight_has_each_of_its_names(name):
    network, words = Words(start=True), torch.randint(7, (5,))
    rule = align_rules.RULES[name](network)
    learned = gradients(rule, network, words)
    assert learned[0].any()
    assert (learned[1] is None) == (name == "last_layer")


@each_rule
def test_the_mode_of_the_bare_network_is_followed(name):
    network, images = residual().double(), torch.randn(IMAGES).double()
    rule, other = (align_rules.RULES[name](copy.deepcopy(network)) for _ in range(2))
    for _ in range(2):  # running statistics leave their start; direct feedback is drawn
        torch.manual_seed(1)
        rule(images)
    other = copy.deepcopy(rule)
    rule.network.eval()  # as users do who keep their network at hand
    other.eval()
    statistics = {key: value.clone() for key, value in rule.state_dict().items() if "running" in key}
    assert_close(gradients(rule, rule.network, images), gradients(other, other.network, images), 0)
    assert all(torch.equal(rule.state_dict()[key], value) for key, value in statistics.items())
    rule.network.train()
    gradients(rule, rule.network, images)
    assert not any(torch.equal(rule.state_dict()[key], value) for key, value in statistics.items())


@each_rule
def test_a_deep_copy_learns_its_own_network(name):
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    copied = copy.deepcopy(rule)
    before = {key: value.clone() for key, value in rule.state_dict().items()}
    copied(images).square().sum().backward()
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    assert not torch.equal(copied.network[4].weight, rule.network[4].weight) or name == "last_layer"
    assert not torch.equal(copied.network[6].weight, rule.network[6].weight)
    assert all(torch.equal(rule.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in rule.parameters())


@each_layerwise
def test_nothing_is_left_on_the_networks_tensors(name):
    network = residual()
    gradients(align_rules.RULES[name](network), network, torch.randn(IMAGES))
    assert all(not vars(tensor) for tensor in (*network.parameters(), *network.buffers()))


@each_rule
def test_a_state_dict_carries_a_rule_to_another_network(name):
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    move(rule.network)
    gradients(rule, rule.network, images)
    other = align_rules.RULES[name](residual())
    other.load_state_dict(rule.state_dict())
    assert_close(gradients(other, other.network, images), gradients(rule, rule.network, images), 0)


@each_rule
def test_parameter_groups(name):
    """Groups, weight decay and momentum see the gradients that autograd left, and nothing of what the rule keeps."""
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    kept = {key: value.clone() for key, value in rule.named_parameters() if not key.startswith("network.")}
    network = rule.network
    groups = [{"params": network[:4].parameters(), "lr": 0.0}, {"params": network[4:].parameters()}]
    optimiser = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    stem, readout = network[0][0].weight.clone(), network[6].weight.clone()
    for _ in range(2):
        gradients(rule, network, images)
        optimiser.step()
    assert torch.equal(network[0][0].weight, stem)
    assert not torch.equal(network[6].weight, readout)
    assert all(torch.equal(dict(rule.named_parameters())[key], value) for key, value in kept.items())


@each_rule
def test_autocast(name):
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    move(rule.network, 0.05)
    expected = gradients(rule, rule.network, images)
    with torch.autocast("cpu", torch.bfloat16):
        output, own = rule(images), rule.network(images)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, own)
    rule.network.zero_grad()
    e = e_of(output.detach().float())
    (output * e).sum().backward()
    for parameter, full in zip(rule.network.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (full is None)
        if full is not None and full.norm() > 1e-6:  # a bias in front of a normalisation has rounding alone
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - full).norm() < 0.25 * full.norm()


@pytest.mark.parametrize("name", ["dfa", "align_ada"])
def test_compiled_residual_network(name):
    torch._dynamo.reset()
    rule, images = align_rules.RULES[name](residual(inplace=True)), torch.randn(IMAGES)
    move(rule.network, 0.1)
    rule(images)  # draws the feedback weights that wait for the first call
    compiled = torch.compile(rule, backend="aot_eager")
    for _ in range(2):
        assert_close(gradients(compiled, rule.network, images), gradients(rule, rule.network, images), 1e-4)
        rule.network.eval()


@each_rule
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (4,)], ids=str)
def test_freezing_stops_learning_and_nothing_else(name, frozen):
    """Whether some parts are frozen when the rule is made, or later, what learns gets the gradient that it got."""
    network, images = residual().double(), torch.randn(IMAGES).double()
    rule = align_rules.RULES[name](network)
    move(network)
    torch.manual_seed(1)  # direct feedback is drawn at the first call
    expected = gradients(rule, network, images)
    early = copy.deepcopy(network)
    for part in frozen:
        network[part].requires_grad_(False)
        early[part].requires_grad_(False)
    fresh = align_rules.RULES[name](early)
    torch.manual_seed(1)
    fresh(images)
    fresh.load_state_dict(rule.state_dict())
    names = [key for key, _ in network.named_parameters()]
    still = [None if int(key[0]) in frozen else g for key, g in zip(names, expected, strict=True)]
    assert_close(gradients(rule, network, images), still)
    assert_close(gradients(fresh, early, images), still)


@each_layerwise
def test_a_fixed_matrix_is_no_layer(name):
    class Projected(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
            self.fixed = nn.Parameter(torch.randn(6, 6), requires_grad=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs @ self.fixed)

    rule, inputs = align_rules.RULES[name](Projected()), torch.randn(5, 6)
    gradients(rule, rule.network, inputs)
    rule.network.fixed.requires_grad_()
    with pytest.raises(TypeError, match=r"its parameter 'fixed' in torch\.matmul"):
        rule(inputs)


# --------------------------------------------------------------------------------------------------- what is refused


class Holding(nn.Module):
    """A parameter of its own, (4, 6) by default, that `use` combines with activities (batch, 6) to (batch, 6)."""

    def __init__(self, use, *shape: int):
        super().__init__()
        self.use, self.first, self.last = use, nn.Linear(6, 6), nn.Linear(6, 3)
        self.own = nn.Parameter(torch.randn(shape or (6, 6)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.use(torch.relu(self.first(inputs)), self.own)))


@each_layerwise
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.LSTM(6, 6), "1 is a LSTM, whose weights are used inside one fused call; write"),
        (lambda: nn.GRUCell(6, 6), "1 is a GRUCell, whose weights are used inside one fused call"),
        (lambda: nn.MultiheadAttention(6, 2), "1 is a MultiheadAttention, whose weights are used"),
        (lambda: nn.TransformerEncoderLayer(6, 2), "1 is a TransformerEncoderLayer, whose weights"),
        (lambda: nn.ConvTranspose2d(3, 3, 3), "1 is a ConvTranspose2d, whose weight this rule .*nn.Upsample"),
        (lambda: nn.Bilinear(6, 6, 6), "1 is a Bilinear, whose weight this rule does not follow"),
        (lambda: nn.LazyLinear(6), "1.weight has no shape yet; call the network on a batch before making the rule"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), "1 makes its weight from other parameters"),
        (lambda: torch.jit.script(nn.Linear(6, 6)), "1 is scripted"),
        (lambda: Holding(torch.matmul), r"1 holds the parameter own of shape \(6, 6\) itself.*added=\('1.own',\)"),
        (lambda: nn.ParameterList([torch.ones(6, 6)]), r"1 holds the parameter 0 of shape \(6, 6\) itself"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_refused_at_wrapping(name, module, message):
    network = nn.Sequential(nn.Linear(6, 6), module(), nn.Linear(6, 3))
    with pytest.raises(TypeError, match=message):
        align_rules.RULES[name](network)


@pytest.mark.parametrize("name", ["backprop", "align_zero"])
@pytest.mark.parametrize(
    "module", [nn.LSTM(6, 6), nn.Bilinear(6, 6, 6), Holding(torch.matmul)], ids=lambda module: type(module).__name__
)
def test_backprop_and_align_zero_take_any_network(name, module):
    align_rules.RULES[name](nn.Sequential(nn.Linear(6, 6), module))


def test_last_layer_takes_any_network_that_says_what_learns():
    network = nn.Sequential(Holding(torch.matmul), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="name what learns"):
        align_rules.LastLayer(network)
    gradients(align_rules.LastLayer(network, ["1"]), network, torch.randn(5, 6))
    assert network[0].own.grad is None
    assert network[1].weight.grad.any()


def test_align_zero_needs_shapes():
    with pytest.raises(TypeError, match="has no shape yet"):
        align_rules.AlignZero(nn.LazyLinear(6))


PRODUCTS = {
    "matmul": lambda x, w: torch.matmul(x, w),
    "@": lambda x, w: x @ w,
    "@, from the right": lambda x, w: (w @ x.T).T,
    "mm": lambda x, w: x.mm(w.T),
    "bmm": lambda x, w: torch.bmm(x[None], (2 * w)[None])[0],
    "addmm": lambda x, w: torch.addmm(x, mat1=x, mat2=w),
    "baddbmm": lambda x, w: torch.baddbmm(x[None], x[None], w[None])[0],
    "einsum": lambda x, w: torch.einsum("bi,ij->bj", x, w),
    "einsum, a list": lambda x, w: torch.einsum("bi,ij->bj", [x, w]),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=1),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, w]),
    "linalg.matmul": lambda x, w: torch.linalg.matmul(x, w),
    "F.linear": lambda x, w: F.linear(x, weight=w.T),
    "F.bilinear": lambda x, w: F.bilinear(x, x, w[None].expand(6, -1, -1)),
    "conv1d": lambda x, w: F.conv1d(x[..., None], w[..., None]).squeeze(-1),
    "conv_transpose1d": lambda x, w: F.conv_transpose1d(x[..., None], w[..., None]).squeeze(-1),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None])[0],
    "vector": lambda x, w: x * torch.mv(x, w[0])[:, None],
}  # fmt: skip


@each_layerwise
@pytest.mark.parametrize("use", PRODUCTS)
def test_products_with_learned_tensors_are_refused_at_the_call(name, use):
    rule = align_rules.RULES[name](Holding(PRODUCTS[use]), added=("own",))
    with pytest.raises(TypeError, match=r"its parameter 'own' in torch\..* outside a torch.nn.Linear or Conv layer"):
        rule(torch.randn(5, 6))


@each_layerwise
@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x + w,
        lambda x, w: x * w[0] + F.softmax(x @ x.T, -1) @ x,
        lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=w[:, :6])[0],
        lambda x, w: torch.addmm(w, x, x.T)[:, :6],
        lambda x, w: torch.where(x > 0, x, w),
    ],
)
def test_what_is_added_is_taken(name, use):
    rule, inputs = align_rules.RULES[name](Holding(use), added=("own",)), torch.randn(6, 6)
    assert torch.equal(rule(inputs), rule.network(inputs))
    gradients(rule, rule.network, inputs)
    assert rule.network.own.grad.any()


@each_layerwise
@pytest.mark.parametrize("shape", [(1, 6), (6,), (6, 1)], ids=str)
def test_parameters_that_are_no_matrix_need_no_name(name, shape):
    rule = align_rules.RULES[name](Holding(lambda x, own: x[:, :6] + own.expand(6, 6)[:5], *shape))
    gradients(rule, rule.network, torch.randn(5, 6))


class Using(nn.Module):
    """Layers of its own, whose weights `use` takes as (activity, network)."""

    def __init__(self, use):
        super().__init__()
        self.use, self.first, self.second, self.last = use, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.words = nn.Embedding(6, 6)
        self.register_buffer("table", torch.zeros(6, 6))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.use(torch.relu(self.first(inputs)), self)))


@each_layerwise
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda x, net: x @ net.second.weight.T, "'second.weight' in torch.matmul"),
        (lambda x, net: (x[:, None] * net.second.weight).sum(-1), "'second.weight' in torch.mul"),
        (lambda x, net: x @ net.words.weight.T, "'words.weight' in torch.matmul"),
        (lambda x, net: F.linear(x, net.second.weight @ net.first.weight), "'first.weight' in torch.matmul"),
        (lambda x, net: F.linear(F.linear(net.first.weight, net.second.weight), x), "'second.weight' in torch.linear"),
        (lambda x, net: F.linear(x, net.second.weight + x.T @ x), "'second.weight' in torch.add"),
    ],
)
def test_a_layers_weight_in_other_uses_is_refused_at_the_call(name, use, message):
    with pytest.raises(TypeError, match=message):
        align_rules.RULES[name](Using(use))(torch.randn(6, 6))


@pytest.mark.parametrize("name", ["fa", "align_prop", "align_ada"])
def test_weights_made_from_activities_are_refused_at_the_call(name):
    with pytest.raises(TypeError, match="makes the weight of a linear map from activities"):
        align_rules.RULES[name](Using(lambda x, net: F.linear(x, x.T @ x)))(torch.randn(6, 6))


@each_layerwise
def test_an_embedding_tied_to_the_readout(name):
    rule = align_rules.RULES[name](Words(start=False))
    assert all(gradient.any() for gradient in gradients(rule, rule.network, torch.randint(7, (5, 4))))


def test_direct_feedback_needs_the_batch_in_front():
    class Transposed(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs.transpose(0, 1)).transpose(0, 1)

    rule = align_rules.DirectFeedbackAlignment(Transposed(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    with pytest.raises(ValueError, match="first dimension is the output's, the batch"):
        rule(torch.randn(5, 4, 6))


@pytest.mark.parametrize("name", ["fa", "dfa", "align_prop", "align_ada"])
def test_an_unknown_name_in_added(name):
    with pytest.raises(ValueError, match=r"no parameter 'state'; it has 0\.weight"):
        align_rules.RULES[name](nn.Sequential(nn.Linear(6, 3)), added=["state"])


# ----------------------------------------------------------------------------------------------------------- angles


def stepped(name: str) -> tuple[align_rules.Rule, Tensor]:
    """A rule on a residual network away from its start, with the gradients of a step, and the images of that step."""
    rule, images = align_rules.RULES[name](residual()), torch.randn(IMAGES)
    move(rule.network, 0.1)
    rule(images).square().mean().backward()
    return rule, images


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


@each_rule
def test_gradient_angles(name):
    rule, images = stepped(name)
    left = {key: p.grad for key, p in rule.network.named_parameters()}
    angles = align_rules.gradient_angles(rule, mean_square, images)
    rule.network.zero_grad()
    mean_square(rule.network(images)).backward()
    assert list(angles) == list(align_rules.layer_weights(rule.network))
    for key, degrees in angles.items():
        if name == "last_layer" and key != "6.weight":
            assert degrees is None
            continue
        one, other = left[key].flatten().double(), rule.network.get_parameter(key).grad.flatten().double()
        cosine = one @ other / one.norm() / other.norm()
        assert degrees == pytest.approx(math.degrees(torch.arccos(cosine.clamp(-1, 1))), abs=0.02)
        if name == "backprop" or (key == "6.weight" and name != "align_zero"):
            assert degrees < 0.01
        else:
            assert degrees > 1


@each_rule
def test_gradient_angles_disturb_nothing(name):
    rule, images = stepped(name)
    rule.network.insert(5, nn.Dropout(0.5))
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    left = {key: None if p.grad is None else p.grad.clone() for key, p in rule.network.named_parameters()}
    random = torch.get_rng_state()
    with torch.no_grad():
        align_rules.gradient_angles(rule, mean_square, images)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(rule.state_dict()[key], value) for key, value in state.items())
    for key, parameter in rule.network.named_parameters():
        assert (parameter.grad is None) == (left[key] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, left[key])


def test_gradient_angles_repeat_a_steps_dropout():
    network = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 3))
    rule, inputs = align_rules.Backprop(network), torch.randn(5, 6)
    before = torch.get_rng_state()
    mean_square(rule(inputs)).backward()
    assert align_rules.gradient_angles(rule, mean_square, inputs)["0.weight"] > 1
    torch.set_rng_state(before)
    assert align_rules.gradient_angles(rule, mean_square, inputs)["0.weight"] < 0.01


@each_rule
def test_feedback_angles(name):
    rule, _ = stepped(name)
    angles = align_rules.feedback_angles(rule)
    if name in ("backprop", "last_layer", "dfa"):
        assert angles == {}
        return
    assert list(angles) == list(align_rules.layer_weights(rule.network))
    if name == "fa":  # random directions in 12 or more dimensions
        assert all(45 < degrees < 135 for degrees in angles.values())
    else:
        assert all(1 < degrees < 60 for degrees in angles.values())
    for weight, B in zip(
        align_rules.layer_weights(rule.network).values(), rule.feedback_weights().values(), strict=True
    ):
        weight.data.copy_(-2 * B)
    assert all(degrees == pytest.approx(180) for degrees in align_rules.feedback_angles(rule).values())


def test_angles_that_are_undefined():
    rule = align_rules.AlignProp(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    rule.network[0].weight.data.zero_()
    rule.network[0].bias.data.fill_(-1)  # no unit is active
    mean_square(rule(torch.randn(5, 6))).backward()
    angles = align_rules.gradient_angles(rule, mean_square, torch.randn(5, 6))
    assert angles == {"0.weight": None, "2.weight": None}
    assert align_rules.feedback_angles(rule) == {"0.weight": None, "2.weight": pytest.approx(0)}
