"""align_rules.verify: it passes where a rule is right, names what is wrong, and changes nothing."""

import warnings

import pytest
import torch
from rules_helpers import (
    IMAGES,
    RECURRENT_OPTIONS,
    LeavesTraces,
    each_kind,
    gradients,
    loss,
    make,
    mlp,
    move,
    residual,
    traces,
)  # fmt: skip
from torch import Tensor, nn
from torchvision.models import resnet18

import align_rules
from wide.models import networks

pytestmark = pytest.mark.usefixtures("seeded")
NOWHERE = ("dfa", "last_layer")  # backprop at no parameters
SOMEWHERE = [name for name in align_rules.RULES if name not in NOWHERE]
each_right = pytest.mark.parametrize("name", SOMEWHERE)


@each_kind
@each_right
def test_passes_on_the_networks_of_these_tests(name, kind):
    rule, inputs = make(name, kind)
    move(rule.network)
    for double, bound in ((False, 1e-3), (True, 1e-8)):
        shares = align_rules.verify(rule, loss, inputs, double=double)
        assert list(shares) == [key for key, _ in rule.network.named_parameters()]
        assert max(shares.values()) < bound


@pytest.mark.parametrize("name", ["fa", "align_ada"])
def test_passes_on_resnet18(name):
    rule = align_rules.RULES[name](resnet18(num_classes=3))
    align_rules.verify(rule, loss, torch.randn(2, 3, 32, 32), double=True)


@pytest.mark.parametrize("variant", align_rules.SignSymmetry.VARIANTS)
@pytest.mark.parametrize("exact", [(), ("6",)], ids=str)
def test_passes_for_every_sign_symmetry(variant, exact):
    rule = align_rules.SignSymmetry(residual(), variant, exact=exact)
    rule(torch.randn(IMAGES))
    if variant == "brSF":  # what it draws now is not what it draws at the next call
        with pytest.raises(ValueError, match="at every call: it is backprop nowhere"):
            align_rules.verify(rule, loss, torch.randn(IMAGES), double=True)
    else:
        align_rules.verify(rule, loss, torch.randn(IMAGES), double=True)


@pytest.mark.parametrize("name", NOWHERE)
def test_rules_that_are_backprop_nowhere(name):
    kind = type(align_rules.RULES[name](mlp())).__name__
    with pytest.raises(ValueError, match=f"{kind} is backprop at no parameters"):
        align_rules.verify(align_rules.RULES[name](mlp()), loss, torch.randn(5, 6))


# ---------------------------------------------------------------------------------------------- what is wrong is told


def too_large(monkeypatch, what: str) -> None:
    """An error that is sent back through the layer in the middle is one hundredth too large; or is, through all."""
    right = align_rules._transposed

    def transposed(gradient, activity, weight, *through):
        share = 1.01 if what == "all" or weight.shape == (7, 7) else 1.0
        return share * right(gradient, activity, weight, *through)

    monkeypatch.setattr(align_rules, "_transposed", transposed)


@pytest.mark.parametrize("name", ["fa", "align_prop", "sign_symmetry", "kolen_pollack", "weight_mirror"])
def test_a_wrong_transpose_is_told_by_the_layers_below_it(name, monkeypatch):
    too_large(monkeypatch, "the middle")
    with pytest.raises(RuntimeError, match=r"differ .*: 0\.weight by 0\.01, 0\.bias by 0\.01, input 0 by 0\.01$"):
        align_rules.verify(align_rules.RULES[name](mlp()), loss, torch.randn(5, 6))


def test_a_wrong_error_of_align_ada_is_told(monkeypatch):
    right = align_rules._Route.backward

    def backward(ctx, e):
        value, route, kept, *paths = right(ctx, e)
        return value, route, kept, *(1.01 * path for path in paths)

    monkeypatch.setattr(align_rules._Route, "backward", staticmethod(backward))
    with pytest.raises(RuntimeError, match=r": 0\.weight by 0\.0[12], 0\.bias by 0\.0[12], 2\.weight by 0\.0[12]"):
        align_rules.verify(align_rules.AlignAda(mlp()), loss, torch.randn(5, 6))


class Actor(nn.Module):
    """Its input, and a tensor from outside, have gradients of their own."""

    scale = torch.ones(7, requires_grad=True)

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(inputs)) * self.scale)))


@pytest.mark.parametrize(("place", "told"), [(0, "input 0"), (2, "a tensor (7,) outside of the network")])
def test_a_missing_gradient_outside_of_the_network_is_told(place, told, monkeypatch):
    right = align_rules.AlignAda.derive

    def derive(rule, draft):
        inputs = [p for p, name in draft.graph.names.items() if name is None and draft.places[p] is not None]
        lost = next(p for p in inputs if tuple(p.meta["val"].shape) == ((5, 6) if place == 0 else (7,)))
        draft.places[lost] = draft.call(align_rules.sg, draft.places[lost])
        return right(rule, draft)

    rule = align_rules.AlignAda(Actor())
    align_rules.verify(rule, loss, torch.randn(5, 6), double=False)
    monkeypatch.setattr(align_rules.AlignAda, "derive", derive)
    rule.lost = place  # a setting, so that it is derived anew
    with pytest.raises(RuntimeError) as error:
        align_rules.verify(rule, loss, torch.randn(5, 6))
    assert told in str(error.value)


def test_a_wrong_gradient_of_align_zero_is_told(monkeypatch):
    right = align_rules.swap_grad
    monkeypatch.setattr(align_rules, "swap_grad", lambda value, path: right(value, 1.01 * path))
    with pytest.raises(RuntimeError, match=r"differ .*: 0\.weight by 0\.02"):  # once on the way in, once out
        align_rules.verify(align_rules.AlignZero(mlp()), loss, torch.randn(5, 6))


def test_a_missing_gradient_is_told(monkeypatch):
    monkeypatch.setattr(align_rules, "_transposed", lambda gradient, activity, *_: torch.zeros_like(activity))
    with pytest.raises(RuntimeError, match=r"0\.weight by 1, 0\.bias by 1, 2\.weight by 1"):
        align_rules.verify(align_rules.AlignProp(mlp()), loss, torch.randn(5, 6))


def test_another_output_is_told():
    class Wrong(align_rules.Backprop):
        def forward(self, *inputs, **keywords):
            return 1.01 * self.network(*inputs, **keywords)

    with pytest.raises(RuntimeError, match="output is not the network's own"):
        align_rules.verify(Wrong(mlp()), loss, torch.randn(5, 6))


def test_other_state_is_told():
    class Forgets(align_rules.Backprop):
        def forward(self, x):
            y = self.network[0](x)
            return y - y.mean(0)

    network = nn.Sequential(nn.Linear(6, 3), Centres())
    with pytest.raises(RuntimeError, match="other buffers, or other state, behind"):
        align_rules.verify(Forgets(network), loss, torch.randn(5, 6))


class Centres(nn.Module):
    """Takes the mean over the batch away, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x - x.mean(0)


@pytest.mark.parametrize("name", ["fa", "align_ada"])
def test_outputs_of_whole_numbers_and_masks(name):
    class Told(nn.Sequential):
        def forward(self, x):
            scores = super().forward(x)
            return scores.argmax(1), scores, scores > 0

    align_rules.verify(align_rules.RULES[name](Told(*mlp())), lambda outputs: loss(outputs[1]), torch.randn(5, 6))


@pytest.mark.parametrize(("tolerance", "passes"), [(0.1, True), (0.005, False)])
def test_the_tolerance_is_the_users(tolerance, passes, monkeypatch):
    too_large(monkeypatch, "all")
    rule, inputs = align_rules.AlignProp(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))), torch.randn(5, 6)
    if passes:
        assert align_rules.verify(rule, loss, inputs, tolerance=tolerance)["0.weight"] == pytest.approx(0.01, rel=0.1)
    else:
        with pytest.raises(RuntimeError, match=r"0\.weight by 0\.01"):
            align_rules.verify(rule, loss, inputs, tolerance=tolerance)


# -------------------------------------------------------------------------------------------------- nothing is changed


@pytest.mark.parametrize("name", ["backprop", "sign_symmetry", "kolen_pollack", "align_ada"])
def test_changes_nothing(name):
    network, inputs = LeavesTraces(), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    move(network, 0.1)
    gradients(rule, network, inputs)
    network.dropout.eval()
    before, given = traces(rule), inputs.clone()
    with torch.no_grad():
        align_rules.verify(rule, loss, inputs, double=name != "sign_symmetry")
    after = traces(rule)
    assert before.keys() == after.keys()
    assert {key for key, value in before.items() if not torch.equal(after[key], value)} == set()
    assert torch.equal(inputs, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor does Kolen-Pollack take the copy's steps for its own
        rule(inputs)


@each_right
def test_frozen_parameters_and_named_inputs(name):
    network = networks.RecurrentNetwork(6, 5)
    network.hidden.requires_grad_(False)
    rule = align_rules.RULES[name](network, **RECURRENT_OPTIONS.get(name, {}))
    shares = align_rules.verify(rule, loss, sequences=torch.randn(5, 4))
    assert list(shares) == [key for key, parameter in network.named_parameters() if parameter.requires_grad]


@each_right
def test_a_network_in_half_precision(name):
    rule = align_rules.RULES[name](mlp().bfloat16())
    align_rules.verify(rule, lambda output: output.float().square().mean(), torch.randn(5, 6).bfloat16())
