"""What the tests of the learning rules share: networks, rules on them, their gradients, and how these are compared."""

import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import align_rules
from wide.models import networks

INITIALLY_BACKPROP = ("align_prop", "align_zero", "align_ada")
# Rules that follow layer by layer, and refuse what they cannot follow. Of them: those with a weight to send errors back
# through; and those whose weight is B, drawn by default and given as `feedback`.
LAYERWISE = ("fa", "dfa", "align_prop", "align_ada", "sign_symmetry", "kolen_pollack", "weight_mirror")
TRANSPORTING = ("fa", "align_prop", "sign_symmetry", "kolen_pollack", "weight_mirror")
WITH_FEEDBACK = ("fa", "kolen_pollack", "weight_mirror")


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


class Stepwise(networks.RecurrentNetwork):
    """The same network, its steps written one by one."""

    @staticmethod
    def recurrence(state: Tensor, weight: Tensor, drive: Tensor) -> Tensor:
        states = []
        for row in drive.unbind():
            state = F.relu(F.linear(state, weight) + row)
            states.append(state)
        return torch.stack(states)

    def forward(self, sequences: Tensor) -> Tensor:
        drive = self.input(sequences.T.unsqueeze(-1)) + self.hidden.bias
        return self.readout(self.recurrence(self.initial_state, self.hidden.used_weight(), drive)).squeeze(-1).T


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
    "dfa": {"added": ("initial_state",)},
    **{name: {"added": ("initial_state",)} for name in TRANSPORTING},
    "last_layer": {"learns": ("readout", "initial_state")},
    "align_zero": {"live": ("initial_state",)},
    "align_ada": {"coupling": "activity", "live": ("initial_state",)},
}
IMAGES = (4, 2, 8, 8)  # a batch for `residual`


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


class Holding(nn.Module):
    """A parameter of its own, (4, 6) by default, that `use` combines with activities (batch, 6) to (batch, 6)."""

    def __init__(self, use, *shape: int):
        super().__init__()
        self.use, self.first, self.last = use, nn.Linear(6, 6), nn.Linear(6, 3)
        self.own = nn.Parameter(torch.randn(shape or (6, 6)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.use(torch.relu(self.first(inputs)), self.own)))


class LeavesTraces(nn.Module):
    """What a pass would leave a trace of: statistics, states, random numbers of four kinds."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(6))
        self.calls, self.last, self.generator = 0, None, torch.Generator().manual_seed(1)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        activity = self.dropout(torch.tanh(self.norm(self.one(inputs))))
        self.seen = self.seen + activity.detach().mean(0)
        self.last = activity.detach()
        noise = torch.rand(6, generator=self.generator) + random.random() + float(numpy.random.rand())
        return self.two(activity + noise)


each_kind = pytest.mark.parametrize("kind", KINDS)
each_rule = pytest.mark.parametrize("name", align_rules.RULES)
each_layerwise = pytest.mark.parametrize("name", LAYERWISE)


def make(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[align_rules.Rule, Tensor]:
    """A rule on a fresh network of this kind, and a batch."""
    build, shape = KINDS[kind]
    if (name, kind) == ("dfa", "recurrent"):  # which has no blocks within a recurrence
        build = lambda: Stepwise(6, 5)  # noqa: E731
    options = RECURRENT_OPTIONS.get(name, {}) if kind == "recurrent" else {}
    return align_rules.RULES[name](build().to(dtype), **options), torch.randn(shape, dtype=dtype)


def traces(rule: align_rules.Rule) -> dict[str, Tensor]:
    """All that a call of a rule on `LeavesTraces` can leave behind, by name."""
    network = rule.network
    found = {key: value.clone() for key, value in rule.state_dict().items()}
    found |= {f"{key}.grad": p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
    found |= {"last": network.last.clone(), "calls": torch.tensor(network.calls)}
    found |= {"own": network.generator.get_state(), "torch": torch.get_rng_state()}
    found["python"] = torch.tensor(random.getstate()[1])
    found["numpy"] = torch.from_numpy(numpy.random.get_state()[1].astype("int64"))
    found["training"] = torch.tensor([module.training for module in rule.modules()])
    return found


def through_the_weights(name: str, network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Options with which a rule sends errors back through the weights that its network has now: it is backprop."""
    weights = align_rules.layer_weights(network)
    if name == "sign_symmetry":
        return {"magnitudes": {key: weight.detach().abs() for key, weight in weights.items()}}
    return {"feedback": weights} if name in WITH_FEEDBACK else {}


def move(network: nn.Module, spread: float = 0.5) -> None:
    """Take the parameters away from where the rule saw them."""
    for parameter in network.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    for parameter, value in zip(target.parameters(), source.parameters(), strict=True):
        parameter.data.copy_(value)


def target(output: Tensor) -> Tensor:
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)


def loss(output: Tensor) -> Tensor:
    return ((output - target(output)) ** 2).mean()


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def e_of(output: Tensor) -> Tensor:
    """The gradient of `gradients`'s loss at the output."""
    return 2 * (output - target(output)) / output.numel()


def gradients(function, network: nn.Module, inputs: Tensor) -> list[Tensor | None]:
    """Of the loss of `function(inputs)`, for every parameter of the network."""
    network.zero_grad()
    loss(function(inputs)).backward()
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def gradients_of(rule: nn.Module, network: nn.Module, *inputs, **keywords) -> list[Tensor]:
    network.zero_grad()
    rule(*inputs, **keywords).square().sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def assert_close(computed: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-10) -> None:
    """Relative to a gradient's largest entry; absolute where that is rounding, as for a bias before a normalisation."""
    assert [g is None for g in computed] == [g is None for g in expected]
    for gradient, other in zip(computed, expected, strict=True):
        if gradient is not None:
            largest = other.abs().max().item()
            scale = largest if largest > 1e-12 else 1
            torch.testing.assert_close(gradient, other, rtol=0, atol=tolerance * scale)
