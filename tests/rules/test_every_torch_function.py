"""AlignAda behind every function of torch's: where an activity came from is never lost without a word.

Which functions there are is asked of torch, and which of them rearrange the entries of an activity is found by trying
them, with whatever arguments fit. The expected gradient is written out, with the rearrangement as plain indexing.
"""

import collections
import copy
import inspect
import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import gradients, move
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, get_testing_overrides, resolve_name

import align_rules
from align_rules import couple

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.filterwarnings("ignore")]
SHAPE = (4, 7, 8)
ENTRIES = math.prod(SHAPE)


class Trial(NamedTuple):
    """A call of a function with an activity, (4, 7, 8), at its place among the arguments."""

    function: object
    place: str  # "first", "second", "in a list", "by name"
    extras: tuple

    def __call__(self, activity: Tensor) -> Tensor:
        extras = copied(self.extras)
        if self.place == "by name":
            names = list(inspect.signature(get_testing_overrides()[self.function]).parameters)
            result = self.function(**dict(zip(names, (activity, *extras), strict=False)))
        elif self.place == "second":
            result = self.function(extras[0], activity, *extras[1:])
        else:
            first = activity if self.place == "first" else [activity, activity]
            result = self.function(first, *extras)
        if isinstance(result, tuple | list) and result and all(isinstance(part, Tensor) for part in result):
            return result[-1] if result[-1].is_floating_point() else result[0]
        if not isinstance(result, Tensor):
            raise TypeError("no tensor")
        return result

    def __deepcopy__(self, memo) -> "Trial":
        return self  # some of these functions cannot be copied

    def __str__(self) -> str:
        given = ", ".join(str(e.shape) if isinstance(e, Tensor) else str(e) for e in self.extras)
        return f"{resolve_name(self.function) or self.function}({given}), activity {self.place}"


def copied(extras):
    return tuple(e.clone() if isinstance(e, Tensor) else e for e in extras)


def functions() -> list:
    """Every one of torch's functions and methods that can be overridden, and so be seen by a rule."""
    found = dict.fromkeys(itertools.chain(*get_overridable_functions().values()))
    found |= dict.fromkeys(get_testing_overrides())
    # What ends the process, talks to others, or only makes random numbers.
    return [f for f in found if callable(f) and not (getattr(f, "__module__", None) or "").startswith("torch.distrib")]


def arguments() -> list[tuple[str, tuple]]:
    """Simple arguments beside an activity of this shape: dimensions, shapes, indices, masks, tensors of a shape."""
    stream = torch.Generator().manual_seed(1)
    mask = torch.rand(SHAPE, generator=stream) > 0.5
    index, along = torch.tensor([2, 0, 1, 1]), torch.randint(4, SHAPE, generator=stream)
    other = 0.5 + torch.rand(SHAPE, generator=stream, dtype=torch.float64)
    lone = [
        (0, 2, 1), (4, 56), (224,), (4, 8, 7), (1, 2), (2, 1), (1, 2, 1), (4, 7, 2, 4), (3, 4, 7, 8), (1, 0, 0, 2),
        [2, 1], [0, 2, 1], [2, 4], -1, 0, 1, 2, 7, None, ..., index, along, mask, other, slice(1, 3), (..., 3),
        (index, index),
        (slice(None), slice(1, 5)), (..., slice(None, None, 2)), (slice(None), None), torch.float64, "cpu",
        torch.contiguous_format,
    ]  # fmt: skip
    several = [
        (), (1, 2), (-1, -2), (1, 1), (2, 2), (1, -1), (0, 2, 1), (1, 0, 3), (1, 2, 3), (2, 1, 2), (4, 8, 7), (4, 56),
        (1, 2, 1), (3, 4, 7, 8), (1, 1, 5), (1, 0, 7, 2), (0, (2, 2)), (1, (1, 6)), (2, [3, 5]), (2, (2, 2, 2)),
        (1, (7, 1)),
        ((1, 2), (2, 1)), ((0, 1), (1, 0)), ((2, 2), (1, 1)), ((7, 8), (56, 8)), ((4, 8, 7), (56, 1, 8)), ((2, 1), 0),
        ((2, 1), "reflect"), ((1, 2), "circular"), ((1, 2), "replicate"), ((1, 0, 0, 2), "constant", 0.5), (2, 2, 0),
        (0, index), (2, along), (1, along), (mask, 0.5), (0, index, 0.5), (1, along, 0.5), (None, 2),
        (None, 2, "nearest"), (torch.device("cpu"), torch.float64),
    ]  # fmt: skip
    second = [(equation,) for equation in ("bij->bji", "bij->ijb", "...i->...i", "bij->ibj")] + [(mask, 0.5)]
    in_list = [(), (0,), (1,), (-1,), ("ij",)]
    return [
        *(("first", (extra,)) for extra in lone),
        *(("first", extras) for extras in several),
        *(("second", extras) for extras in second),
        *(("in a list", extras) for extras in in_list),
    ]


def usable(trial: Trial, activity: Tensor, seed: int = 0) -> Tensor | None:
    """What the call gives for an activity; None where it cannot be what a layer is given."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than the rest
    try:
        result = trial(activity)
    except Exception:  # it takes other arguments
        return None
    dense = result.layout == torch.strided and not result.is_quantized and type(result) in (Tensor, nn.Parameter)
    if not dense or result.dtype != torch.float64 or not 1 <= result.dim() <= 5 or not 1 <= result.numel() <= 4000:
        return None
    return result.detach().clone()


def places(trial: Trial, spelled: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of the entries of the result: where each stands in the activity (-1: nowhere) and the constants among them.

    None if the function computes with entries, or if what it does depends on them.
    """
    # Entries of another tensor are no constants.
    others = tuple(-e if isinstance(e, Tensor) and e.is_floating_point() else e for e in trial.extras)
    opposite = usable(trial._replace(extras=others), -SPELLED)
    if opposite is None or opposite.shape != spelled.shape:
        return None
    constant = spelled == opposite
    place = torch.where(constant, 1, spelled).nan_to_num(0.5, 0.5, 0.5) - 1
    if constant.all() or not ((place == place.round()) & (place >= 0) & (place < ENTRIES)).all():
        return None
    place = place.long()
    for seed, probe in enumerate(PROBES):
        found = usable(trial, probe.clone(), seed)
        expected = torch.where(constant, spelled, probe.flatten()[place])
        if found is None or found.shape != expected.shape or not torch.allclose(found, expected, 0, 0, equal_nan=True):
            return None
    return torch.where(constant, -1, place), spelled


SPELLED = torch.arange(1, ENTRIES + 1, dtype=torch.float64).view(SHAPE)
PROBES = [
    torch.sin(SPELLED * 10.0 ** (SPELLED * k % 5)) * 10.0 ** (SPELLED % k) for k in (7, 9)
]  # large and small, of both signs
PROBES[1][0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=torch.float64)


def computes_with_entries(function) -> bool:
    """Whether numbers beside the activity are more than places and sizes: x * 1 gives x back, but x * 0.5 does not."""
    for extras in ((0.5,), (2,), (3,), (0.5, 0.5), (0.25, 0.5), (0.5, None), (2, 2), (2, 3)):
        trial = Trial(function, "first", extras)
        spelled = usable(trial, SPELLED.clone())
        if spelled is not None and spelled.numel() > 1 and places(trial, spelled) is None:
            return True
    return False


class Mixer(nn.Module):
    """Layer, gelu (its result may be changed in place), the function, layer, tanh, readout. (4, 7, 5) -> (..., 3)."""

    def __init__(self, function: Trial, inputs: int):
        super().__init__()
        self.function = function
        self.one, self.two, self.three = nn.Linear(5, 8), nn.Linear(inputs, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(self.function(F.gelu(self.one(tokens))))))


def by_hand(network: Mixer, start: Mixer, tokens: Tensor, rearranged, coupled_at_argument: bool) -> Tensor:
    """AlignAda's output and gradient: errors of the initial network, entering in front of the activation function."""
    u, u0 = network.one(tokens), start.one(tokens)
    if coupled_at_argument:
        h, h0 = F.gelu(u), F.gelu(couple(u0, u))
        arriving, arriving0 = rearranged(h), rearranged(h0)
    else:
        arriving, arriving0 = rearranged(F.gelu(u)), rearranged(F.gelu(u0))
        arriving0 = couple(arriving0, arriving)
    g, g0 = torch.tanh(network.two(arriving.detach())), torch.tanh(start.two(arriving0))
    return couple(network.three(g.detach()), start.three(couple(g0, g)))


def found_gradients(function, network: nn.Module, tokens: Tensor) -> list[Tensor]:
    made = gradients(function, network, tokens)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(network.parameters(), made, strict=True)]


def rearrangements():
    """(trial, places, constants, whether errors go back through it) of every call that rearranges or copies entries."""
    for function in functions():
        trials = [Trial(function, place, extras) for place, extras in arguments()]
        computing, taken = None, 0
        for trial in trials:
            spelled = usable(trial, SPELLED.clone())
            placed = None if spelled is None else places(trial, spelled)
            if placed is None:
                continue
            computing = computes_with_entries(function) if computing is None else computing
            if computing or taken == 4:
                break
            taken += 1
            yield trial, *placed
            if trial.place == "first" and function in get_testing_overrides():
                named = trial._replace(place="by name")
                result = usable(named, SPELLED.clone())
                if result is not None and torch.equal(result, spelled):
                    yield named, *placed


def outcome(trial: Trial, place: Tensor, constants: Tensor, tokens: Tensor) -> str:
    """What AlignAda makes of a network with this call: "right", "refused", "wrong", or "unusable" without a rule."""
    torch.manual_seed(1)
    network = Mixer(trial, place.shape[-1]).double()
    start = copy.deepcopy(network)
    try:
        plain = found_gradients(network, network, tokens)
    except Exception:  # the network cannot be trained
        return "unusable"
    goes_back = plain[0].any()

    def rearranged(activity: Tensor) -> Tensor:
        entries = activity if goes_back else activity.detach()
        return torch.where(place < 0, constants, entries.flatten()[place.clamp(min=0)])

    indexed = Mixer(rearranged, place.shape[-1]).double()
    indexed.load_state_dict(start.state_dict())
    if not close(found_gradients(indexed, indexed, tokens), plain):
        return "unusable"  # torch's own derivative is another
    rule = align_rules.AlignAda(network)
    move(network)
    expected = found_gradients(lambda x: by_hand(network, start, x, rearranged, True), network, tokens)
    try:
        made = found_gradients(rule, network, tokens)
    except (TypeError, RuntimeError, ValueError):
        return "refused"
    return "right" if close(made, expected) else "wrong"


def close(made: list[Tensor], expected: list[Tensor]) -> bool:
    return all((a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-9) for a, b in zip(made, expected, strict=True))


def test_every_function_that_rearranges():
    tokens = torch.randn(4, 7, 5, dtype=torch.float64)
    outcomes = [(str(found[0]), outcome(*found, tokens)) for found in rearrangements()]
    assert [trial for trial, how in outcomes if how == "wrong"] == []
    right = {trial.partition("(")[0] for trial, how in outcomes if how == "right"}
    refused = {trial.partition("(")[0] for trial, how in outcomes if how == "refused"}
    assert len(right) > 150, right  # the trials do find them
    assert len(refused - right) < 0.1 * len(right), refused


def computations():
    """Calls, a few for each function, that make something else of an activity's entries."""
    known = {*align_rules.ACTIVATIONS, *align_rules.IN_PLACE}  # behind these it is their argument that counts
    for function in functions():
        taken = 0
        for place, extras in () if function in known else arguments():
            trial = Trial(function, place, extras)
            spelled, activity = usable(trial, SPELLED.clone()), torch.rand(SHAPE, dtype=torch.float64)
            if spelled is None or places(trial, spelled) is not None:
                continue
            results = [usable(trial, activity.clone(), seed) for seed in range(3)]
            if any(r is None or r.shape != spelled.shape or not torch.equal(r, results[0]) for r in results):
                continue  # it draws random numbers, or none that fit
            if torch.isin(results[0], activity).all() or not results[0].isfinite().all():
                continue  # entries chosen by what they are, such as the largest ones
            taken += 1
            yield trial, results[0].shape[-1]
            if taken == 2:
                break


def computed(trial: Trial, inputs: int, tokens: Tensor) -> str:
    """`outcome`, where the error must enter behind the function."""
    activity = F.gelu(torch.rand(SHAPE, dtype=torch.float64, requires_grad=True))
    before = activity.grad_fn
    try:
        known = trial(activity).grad_fn is not before
    except Exception:  # not with a gradient
        return "unusable"
    if not known:
        return "unusable"  # changed in place without autograd knowing it, as by logical_not_
    torch.manual_seed(1)
    network = Mixer(trial, inputs).double()
    start = copy.deepcopy(network)
    try:
        plain = found_gradients(network, network, tokens)
    except Exception:  # the network cannot be trained
        return "unusable"
    if not plain[0].any() or not all(gradient.isfinite().all() for gradient in plain):
        return "unusable"
    rule = align_rules.AlignAda(network)
    move(network, 0.1)
    expected = found_gradients(lambda x: by_hand(network, start, x, trial, False), network, tokens)
    if not all(gradient.isfinite().all() for gradient in expected):
        return "unusable"
    try:
        made = found_gradients(rule, network, tokens)
    except (TypeError, RuntimeError, ValueError):
        return "refused"
    return "right" if close(made, expected) else "wrong"


def test_every_function_that_computes():
    tokens = torch.randn(4, 7, 5, dtype=torch.float64)
    outcomes = [(str(found[0]), computed(*found, tokens)) for found in computations()]
    assert [trial for trial, how in outcomes if how == "wrong"] == []
    counts = collections.Counter(how for _, how in outcomes)
    assert counts["right"] > 300
    assert counts["refused"] < 0.01 * counts["right"]


def test_the_two_places_differ():
    """Coupled at the layer's input the gradient is another, so that the test above can tell."""
    tokens = torch.randn(4, 7, 5, dtype=torch.float64)
    network = Mixer(Trial(torch.transpose, "first", (1, 2)), 7).double()
    start = copy.deepcopy(network)
    move(network)
    here, there = (
        gradients(lambda x, at=at: by_hand(network, start, x, lambda h: h.transpose(1, 2), at), network, tokens)
        for at in (True, False)
    )
    assert (here[0] - there[0]).norm() > 0.01 * here[0].norm()
