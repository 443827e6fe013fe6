"""The learning rules: their updates by hand, what they leave alone, and other people's networks."""

import ast
import copy
import io
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import align_rules
from wide import networks

INITIALLY_BACKPROP = ("align_prop", "align_zero", "align_ada")


class Residual(nn.Module):
    """What the paper's networks do not have: a skip, learned norms, groups, max pooling, other activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ELU(inplace=True))
        self.branch = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.GELU(), nn.Conv2d(6, 6, 1, groups=2)
        )
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        return self.head(F.relu(stem + self.branch(stem)))


class LastState(nn.Module):
    """A fused recurrent module, whose single layers no rule can reach."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.readout = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.readout(self.recurrent(sequences)[0][:, -1])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))


# kind: a network, and the shape of a batch for it
KINDS = {
    "convolutional": (lambda: networks.ConvolutionalNetwork(2, 6, (1, 2), 3), (5, 2, 6, 6)),
    "fully connected": (lambda: networks.FullyConnectedNetwork(6, 7, 3), (5, 6)),
    "recurrent": (lambda: networks.RecurrentNetwork(6, 5), (5, 4)),
    "residual": (Residual, (5, 2, 6, 6)),
}
RECURRENT_OPTIONS = {
    "fa": {"added": ("initial_state",)},
    "dfa": {"added": ("initial_state",)},
    "align_prop": {"added": ("initial_state",)},
    "last_layer": {"learns": ("readout", "initial_state")},
    "align_zero": {"live": ("initial_state",)},
    "align_ada": {"coupling": "activity", "live": ("initial_state",)},
}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_rule = pytest.mark.parametrize("name", align_rules.RULES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[align_rules.Rule, Tensor]:
    """A rule on a fresh network of this kind, and a batch."""
    build, shape = KINDS[kind]
    options = RECURRENT_OPTIONS.get(name, {}) if kind == "recurrent" else {}
    return align_rules.RULES[name](build().to(dtype), **options), torch.randn(shape, dtype=dtype)


def move(network: nn.Module, spread: float = 0.5) -> None:
    """Take the parameters away from where the rule saw them."""
    for parameter in network.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))


def target(output: Tensor) -> Tensor:
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)


def loss(output: Tensor) -> Tensor:
    return ((output - target(output)) ** 2).mean()


def gradients(function, network: nn.Module, inputs: Tensor) -> list[Tensor | None]:
    """Of the loss of `function(inputs)`, for every parameter of the network."""
    network.zero_grad()
    loss(function(inputs)).backward()
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def assert_close(computed: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-10) -> None:
    """Relative to a gradient's largest entry; absolute where that is rounding, as for a bias before a normalisation."""
    assert [g is None for g in computed] == [g is None for g in expected]
    for gradient, other in zip(computed, expected, strict=True):
        if gradient is not None:
            largest = other.abs().max().item()
            scale = largest if largest > 1e-12 else 1
            torch.testing.assert_close(gradient, other, rtol=0, atol=tolerance * scale)


# ------------------------------------------------------------------------------------------------- updates by hand


class Step(NamedTuple):
    """A hidden layer's forward pass: input activity, argument of the relu, spread it was divided by (None: was not)."""

    activity: Tensor
    x: Tensor
    spread: Tensor | None


def run(parameters: list[Tensor], inputs: Tensor, normalised: bool) -> list[Step]:
    """The forward pass of both hidden layers."""
    activity, steps = inputs, []
    for weight, bias in (parameters[:2], parameters[2:4]):
        x, spread = activity @ weight.T + bias, None
        if normalised:
            spread = (x.var(0, correction=0) + 1e-6).sqrt()
            x = (x - x.mean(0)) / spread
        steps.append(Step(activity, x, spread))
        activity = x.clamp(min=0)
    return steps


def readout_input(steps: list[Step]) -> Tensor:
    return steps[-1].x.clamp(min=0)


def through(step: Step, error: Tensor, relu: Step | None = None) -> Tensor:
    """An error at the layer's activity, sent to the output of its matrix product; with the relu' of another step."""
    error = error * ((relu or step).x > 0)
    if step.spread is None:
        return error
    return (error - error.mean(0) - step.x * (error * step.x).mean(0)) / step.spread


def errors(name: str, now: list[Step], start: list[Step], W, W0, B, e: Tensor) -> list[Tensor]:
    """What arrives at the matrix products of both hidden layers, by the rule's definition."""
    if name == "dfa":
        return [through(step, e @ feedback) for step, feedback in zip(now, B, strict=True)]
    if name.startswith("align_ada"):
        arriving = e @ W0[2]
        below = through(start[1], arriving) @ W0[1]
        relu = now[0] if name.endswith("activity") else start[0]
        return [through(now[0], below, relu), through(now[1], arriving)]
    sent = {"backprop": W, "fa": B, "align_prop": W0, "align_zero": W0}[name]
    last = through(now[1], e @ sent[2])
    return [through(now[0], last @ sent[1]), last]


def by_hand(name: str, theta, theta0, B, inputs: Tensor, normalised: bool) -> list[Tensor | None]:
    """The gradients for (weight, bias) of two hidden layers and a readout, by matrix products alone."""
    now, start = (run(parameters, inputs, normalised) for parameters in (theta, theta0))
    output = readout_input(now) @ theta[4].T + theta[5]
    e = 2 * (output - target(output)) / output.numel()
    steps = start if name == "align_zero" else now
    activities = [steps[0].activity, steps[1].activity, readout_input(steps)]
    deltas = [None, None] if name == "last_layer" else errors(name, steps, start, theta[::2], theta0[::2], B, e)
    found = []
    for delta, activity in zip([*deltas, e], activities, strict=True):
        found += [None, None] if delta is None else [delta.T @ activity, delta.sum(0)]
    return found


@pytest.mark.parametrize("ours", [False, True], ids=["plain", "ours"])
@pytest.mark.parametrize("name", [*align_rules.RULES, "align_ada activity"])
def test_update_by_hand(name, ours):
    # Two hidden layers: with one, AlignAda and AlignProp are the same rule.
    network = (networks.FullyConnectedNetwork(6, 7, 3, hidden=2) if ours else mlp()).double()
    move(network)
    weights = align_rules.layer_weights(network)
    feedback = {
        "fa": {key: torch.randn_like(weight) for key, weight in weights.items()},
        "dfa": [torch.randn(3, 7, dtype=torch.float64) for _ in range(2)],
    }.get(name)
    options = {"feedback": feedback} if feedback else {}
    if name == "align_ada activity":
        options = {"coupling": "activity"}
    theta0 = [p.detach().clone() for p in network.parameters()]
    rule = align_rules.RULES[name.split()[0]](network, **options)
    move(network)
    inputs = torch.randn(8, 6, dtype=torch.float64)

    computed = gradients(rule, network, inputs)

    # Ours divides a weight by sqrt(fan_in) before it is used, and its feedback with it.
    scales = [1 / math.sqrt(p.shape[1]) if ours and p.dim() == 2 else 1.0 for p in theta0]
    used, used0 = ([p.detach() * s for p, s in zip(ps, scales, strict=True)] for ps in (network.parameters(), theta0))
    B = feedback if name == "dfa" else [b * s for b, s in zip((feedback or {}).values(), scales[::2], strict=False)]
    expected = by_hand(name, used, used0, B, inputs, normalised=ours)
    assert_close(computed, [None if g is None else g * s for g, s in zip(expected, scales, strict=True)])


# -------------------------------------------------------------------------------------------- relations between rules


@each_kind
def test_feedback_alignment_through_the_weights_is_backprop(kind):
    rule, inputs = make("backprop", kind, torch.float64)
    move(rule.network)
    weights = align_rules.layer_weights(rule.network)
    added = ("initial_state",) if kind == "recurrent" else ()
    through_weights = align_rules.FeedbackAlignment(rule.network, weights, added=added)
    assert_close(gradients(through_weights, rule.network, inputs), gradients(rule, rule.network, inputs))


@each_kind
@pytest.mark.parametrize("name", INITIALLY_BACKPROP)
def test_initially_backprop(name, kind):
    rule, inputs = make(name, kind, torch.float64)
    assert_close(gradients(rule, rule.network, inputs), gradients(rule.network, rule.network, inputs))


def distance_from_backprop(width: int, seed: int, steps: int = 10) -> float:
    """|align_zero - backprop| / |backprop| of the whole gradient, after some steps of backprop on random images."""
    stream = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(16, 36, generator=stream), torch.randint(4, (16,), generator=stream)
    network = networks.FullyConnectedNetwork(36, width, 4)
    networks.draw(network, seed)
    rule, optimiser = align_rules.AlignZero(network), torch.optim.SGD(network.parameters(), lr=1.0)

    def gradient(function) -> Tensor:
        network.zero_grad()
        F.mse_loss(function(images), F.one_hot(labels, 4) - 0.1).backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    for _ in range(steps):
        gradient(network)
        optimiser.step()
    expected = gradient(network)
    return ((gradient(rule) - expected).norm() / expected.norm()).item()


def test_align_zero_approaches_backprop_with_width():
    # The mean over eight seeds shrinks by 0.64 to 0.75 whenever the width is quadrupled, in five such groups of seeds.
    distances = [statistics.mean(distance_from_backprop(width, seed) for seed in range(8)) for width in (16, 64, 256)]
    assert distances[1] < 0.85 * distances[0]
    assert distances[2] < 0.85 * distances[1]


# --------------------------------------------------------------------------------------------- what a rule leaves alone


@each_kind
@each_rule
def test_value_is_the_networks_own(name, kind):
    rule, inputs = make(name, kind)
    optimiser = torch.optim.SGD(rule.parameters(), lr=0.05)
    for _ in range(4):  # before training, and after each step
        assert torch.equal(rule(inputs), rule.network(inputs))
        gradients(rule, rule.network, inputs)
        optimiser.step()
    rule.eval()
    output = rule(inputs)
    assert output.requires_grad
    assert torch.equal(output, rule.network(inputs))
    with torch.no_grad():
        assert torch.equal(rule(inputs), output)


@each_kind
@each_rule
def test_who_learns(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    gradients(rule, rule.network, inputs)
    last = {"residual": ("head.4.",), "recurrent": ("readout.", "initial_state")}.get(kind, ("readout.",))
    for key, parameter in rule.network.named_parameters():
        assert (parameter.grad is not None) == (name != "last_layer" or key.startswith(last)), key
    kept = [parameter for key, parameter in rule.named_parameters() if not key.startswith("network.")]
    assert all(parameter.grad is None for parameter in kept)


@each_rule
def test_running_statistics_are_updated_once_from_the_current_network(name):
    rule, images = make(name, "residual")
    move(rule.network)
    once = copy.deepcopy(rule.network)
    once(images)
    for expected in (1, 2):
        gradients(rule, rule.network, images)
        assert rule.network.stem[1].num_batches_tracked == expected
        torch.testing.assert_close(rule.network.stem[1].running_mean, once.stem[1].running_mean, rtol=0, atol=0)
        once(images)


@each_rule
def test_frozen_parameters_stay_frozen(name):
    network = mlp()
    network[2].requires_grad_(False)
    rule = align_rules.RULES[name](network)
    gradients(rule, network, torch.randn(5, 6))
    assert network[2].weight.grad is None
    assert network[4].weight.grad is not None


@pytest.mark.parametrize("function", [align_rules.couple, align_rules.swap_grad])
def test_primitives_keep_the_value_to_the_last_bit(function):
    # Here value + path - path rounds the value away.
    value, path = torch.full((3,), 0.1, requires_grad=True), torch.full((3,), 1e9, requires_grad=True)
    output = function(value, path)
    output.sum().backward()
    assert torch.equal(output, value)
    assert torch.equal(path.grad, torch.ones(3))
    assert (value.grad is None) == (function is align_rules.swap_grad)


# ------------------------------------------------------------------------------------------------- saving and copying


@each_kind
@each_rule
def test_state_dict(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    expected = gradients(rule, rule.network, inputs)  # draws the feedback weights that wait for the first call
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)

    fresh, _ = make(name, kind)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_close(gradients(fresh, fresh.network, inputs), expected, 0)


@each_kind
@each_rule
def test_deepcopy(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    expected = gradients(rule, rule.network, inputs)
    copied = copy.deepcopy(rule)
    assert_close(gradients(copied, copied.network, inputs), expected, 0)
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert_close(gradients(rule, rule.network, inputs), expected, 0)


@each_kind
@each_rule
def test_double(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    single = gradients(rule, rule.network, inputs)
    rule.double()
    assert all(tensor.dtype == torch.float64 for tensor in rule.state_dict().values() if tensor.is_floating_point())
    double = gradients(rule, rule.network, inputs.double())
    assert_close([None if g is None else g.double() for g in single], double, 1e-3)


def test_direct_feedback_is_drawn_once_and_in_the_networks_type():
    rule, images = make("dfa", "convolutional", torch.float64)
    first = gradients(rule, rule.network, images)
    assert [tuple(B.shape) for B in rule.feedback] == [(3, 6, 6, 6), (3, 6, 3, 3)]
    assert all(B.dtype == torch.float64 for B in rule.feedback)
    assert_close(gradients(rule, rule.network, images), first, 0)


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_feedback_follows_the_generator(name):
    network, inputs = nn.Sequential(nn.Linear(100, 400), nn.ReLU(), nn.Linear(400, 10)), torch.randn(2, 100)
    drawn = []
    for seed in (1, 1, 2):
        rule = align_rules.RULES[name](network, generator=torch.Generator().manual_seed(seed))
        rule(inputs)
        drawn.append(next(iter(rule.feedback)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    expected = network[0].weight.std().item() if name == "fa" else 400**-0.5
    assert drawn[0].std().item() == pytest.approx(expected, rel=0.05)


# --------------------------------------------------------------------------------------------- other people's networks


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    for parameter, value in zip(target.parameters(), source.parameters(), strict=True):
        parameter.data.copy_(value)


def test_align_zero_takes_fused_modules():
    network, sequences = LastState().double(), torch.randn(4, 6, 3, dtype=torch.float64)
    rule = align_rules.AlignZero(network)
    initially = gradients(network, network, sequences)
    assert_close(gradients(rule, network, sequences), initially)
    move(network)
    assert torch.equal(rule(sequences), network(sequences))


@each_rule
def test_compiled(name):
    torch._dynamo.reset()
    network, inputs = mlp(), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    move(network)
    rule(inputs)  # draws the feedback weights that wait for the first call
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close(gradients(compiled, network, inputs), gradients(rule, network, inputs), 1e-5)
        move(network)


def test_imports_torch_and_the_standard_library_only(tmp_path):
    source = pathlib.Path(align_rules.__file__)
    nodes = list(ast.walk(ast.parse(source.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}

    shutil.copy(source, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", "import align_rules; print(align_rules.__file__)"]
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert pathlib.Path(alone.stdout.strip()) == tmp_path / source.name, alone.stderr


# ----------------------------------------------------------------------------------------------------------- errors


class Branching(nn.Module):
    """Calls the layers of the path that a parameter selects."""

    paths = ("first",), ("second",), ("first", "second")

    def __init__(self, path: int):
        super().__init__()
        self.path = nn.Parameter(torch.tensor(float(path)))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, activity: Tensor) -> Tensor:
        for layer in self.paths[int(self.path)]:
            activity = getattr(self, layer)(activity)
        return activity


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("last_layer", {"learns": ["head"]}, "no parameter 'head'; it has 0.weight"),
        ("align_zero", {"live": ["state"]}, "no parameter 'state'; it has 0.weight"),
        ("align_ada", {"live": ["state"]}, "no parameter 'state'; it has 0.weight"),
        ("align_ada", {"uncoupled": ["1"]}, "no layer with the weight 1.weight"),
        ("align_ada", {"coupling": "input"}, "'preactivation' or 'activity', not 'input'"),
        ("fa", {"feedback": {"0.weight": torch.ones(7, 6)}}, "must have the names and shapes"),
        ("fa", {"feedback": {f"{k}.weight": torch.ones(7, 7) for k in (0, 2, 4)}}, "must have the names and shapes"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        align_rules.RULES[name](mlp(), **options)


@pytest.mark.parametrize("shapes", [[(3, 7)], [(3, 7), (3, 6)], [(2, 7), (2, 7)], [(3, 7)] * 3])
def test_wrong_direct_feedback(shapes):
    rule = align_rules.DirectFeedbackAlignment(mlp(), [torch.ones(shape) for shape in shapes])
    with pytest.raises(ValueError, match="must have the shapes"):
        rule(torch.randn(5, 6))


@pytest.mark.parametrize("name", ["last_layer", "fa", "align_prop", "dfa", "align_ada"])
@pytest.mark.parametrize(
    ("network", "message"),
    [(LastState, "recurrent is a LSTM.*torch.nn.Linear"), (nn.Flatten, "no torch.nn.Linear or torch.nn.Conv")],
)
def test_networks_without_reachable_layers(name, network, message):
    with pytest.raises(TypeError, match=message):
        align_rules.RULES[name](network())


@pytest.mark.parametrize(("initial", "current"), [(0, 2), (2, 0), (0, 1)])  # one call more, one less, another
def test_align_ada_needs_the_same_calls(initial, current):
    network = Branching(initial)
    rule = align_rules.AlignAda(network)
    network.path.data.fill_(current)
    with pytest.raises(RuntimeError, match="order of calls"):
        rule(torch.randn(5, 6))


class ChangedInPlace(nn.Module):
    """An activity that is changed in place before a layer takes it in."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        activity = F.gelu(self.first(inputs))
        activity += inputs
        return self.third(torch.tanh(self.second(activity)))


def gradients_of(rule: nn.Module, network: nn.Module, *inputs, **keywords) -> list[Tensor]:
    network.zero_grad()
    rule(*inputs, **keywords).square().sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def test_align_ada_sees_changes_in_place():
    network, inputs = ChangedInPlace().double(), torch.randn(5, 6).double()
    expected = gradients_of(network, network, inputs)
    for mine, theirs in zip(gradients_of(align_rules.AlignAda(network), network, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["align_zero", "align_ada"])
def test_dropout_draws_one_mask_for_both_networks(name):
    network = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3)).double()
    rule, inputs = align_rules.RULES[name](network), torch.randn(5, 6).double()
    torch.manual_seed(1)
    expected, state = gradients_of(network, network, inputs), torch.get_rng_state()
    torch.manual_seed(1)
    for mine, theirs in zip(gradients_of(rule, network, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(torch.get_rng_state(), state)  # the copy's draws are not the user's


@pytest.mark.parametrize("name", ["last_layer", "fa", "align_prop", "dfa", "align_ada"])
def test_weights_made_from_others_are_refused(name):
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    with pytest.raises(TypeError, match="weight norm"):
        align_rules.RULES[name](network)


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        return self.second(torch.relu(input=self.first(inputs + state)))


def test_inputs_get_their_gradient_once_however_they_are_given():
    rule, inputs = align_rules.AlignAda(Stateful()), torch.randn(5, 6)
    gradients = []
    for by_name in (False, True):
        state = torch.zeros(5, 6, requires_grad=True)
        (rule(inputs, state=state) if by_name else rule(inputs, state)).sum().backward()
        gradients.append(state.grad)
    torch.testing.assert_close(*gradients)


def test_direct_feedback_needs_a_layer_last():
    with pytest.raises(ValueError, match="ends in an activation function"):
        align_rules.DirectFeedbackAlignment(nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()))(torch.randn(5, 6))


def test_direct_feedback_takes_inputs_with_a_gradient_as_data():
    rule, inputs = align_rules.DirectFeedbackAlignment(mlp()), torch.randn(5, 6, requires_grad=True)
    rule(inputs).sum().backward()
    assert inputs.grad is None
    assert len(rule.feedback) == 2


def test_a_network_that_is_one_layer():
    network, inputs = nn.Linear(6, 3), torch.randn(5, 6)
    expected = gradients_of(network, network, inputs)
    for name, kind in align_rules.RULES.items():
        for mine, theirs in zip(gradients_of(kind(network), network, inputs), expected, strict=True):
            assert torch.equal(mine, theirs), name


def test_direct_feedback_from_a_checkpoint_takes_the_networks_type():
    saved = align_rules.DirectFeedbackAlignment(mlp())
    saved(torch.randn(5, 6))
    fresh = align_rules.DirectFeedbackAlignment(mlp().double())
    fresh.load_state_dict(saved.state_dict())
    assert {B.dtype for B in fresh.feedback} == {torch.float64}
