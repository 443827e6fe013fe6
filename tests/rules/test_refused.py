"""What a rule refuses, in words that name the cause, the line and the remedy; and leaves as it was."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from rules_helpers import each_rule, mean_square, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")
TRANSPORTING = ("fa", "align_prop", "align_ada", "dfa", "sign_symmetry", "kolen_pollack", "weight_mirror")


class Net(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.w, self.use = nn.Linear(6, 7), nn.Linear(7, 3), nn.Parameter(torch.randn(7, 7)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(torch.tanh(self.a(x)), self.w))


class WithWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, w):
        ctx.save_for_backward(a, w)
        return a @ w

    @staticmethod
    def backward(ctx, g):
        a, w = ctx.saved_tensors
        return g @ w.T, a.T @ g


def distances(h, w):
    return torch.cdist(h, w)


def attended(h, w):
    return F.scaled_dot_product_attention(w[None], h[None], h[None])[0][: len(h)]


def function(h, w):
    return WithWeight.apply(h, w)


@pytest.mark.parametrize(("use", "told"), [
    (distances, r"_cdist_forward at .*test_refused.py:\d+ return torch.cdist\(h, w\)"),
    (function, r"autograd_function at .*added=\("),
])  # fmt: skip
@pytest.mark.parametrize("name", TRANSPORTING)
def test_learned_tensors_that_meet_activities_in_other_ways(name, use, told):
    rule = align_rules.RULES[name](Net(use))
    with pytest.raises(TypeError, match=told):
        rule(torch.randn(7, 6))
    for other in ("align_zero", "last_layer", "backprop"):
        align_rules.RULES[other](Net(use), **({"learns": ["b"]} if other == "last_layer" else {}))(torch.randn(7, 6))


def test_a_learned_query_is_an_activity_if_it_is_named():
    rule = align_rules.FeedbackAlignment(Net(attended), added=["w"])
    rule(torch.randn(7, 6)).sum().backward()
    assert rule.network.w.grad.any()
    assert "w" not in rule.feedback_weights()


def test_a_vector_has_no_feedback_by_default():
    class Vector(Net):
        def forward(self, x):
            return torch.tanh(self.a(x)) @ self.w[0] + self.b.weight.sum()

    network = Vector(None)
    network.w = nn.Parameter(torch.randn(1, 7)[0][None])
    network.v = nn.Parameter(torch.randn(7))
    network.forward = lambda x: torch.tanh(network.a(x)) @ network.v
    with pytest.raises(ValueError, match=r"the weight \('v',\) has no feedback; give it two dimensions"):
        align_rules.FeedbackAlignment(network)(torch.randn(5, 6))


@each_rule
def test_transforms_leave_all_as_it_was(name):
    if name == "backprop":
        return
    network, x = mlp(), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    parameters = list(network.parameters())
    values = {key: p.detach() for key, p in rule.named_parameters()}
    tries = {
        r"torch\.func": lambda: torch.func.jacrev(rule)(x),
        "torch.vmap": lambda: torch.vmap(rule)(x),
        "put other tensors": lambda: torch.func.functional_call(rule, values, (x,)),
        "forward-mode": lambda: dual(rule, x),
    }
    for told, attempt in tries.items():
        with pytest.raises(RuntimeError, match=told):
            attempt()
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    rule(x).sum().backward()


def dual(rule, x):
    with torch.autograd.forward_ad.dual_level():
        return rule(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@each_rule
def test_a_gradient_is_not_differentiated_again(name):
    x = torch.randn(5, 6, requires_grad=True)
    output = align_rules.RULES[name](mlp())(x)
    if name in ("backprop", "last_layer"):
        torch.autograd.grad(output.sum(), x, create_graph=True)
    else:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            output.sum().backward(create_graph=True)


@pytest.mark.parametrize("change", ["head", "pruned", "deeper", "replica"])
@pytest.mark.parametrize("name", ["fa", "dfa", "last_layer", "align_zero", "align_ada"])
def test_another_network_than_the_rules(name, change):
    network = mlp()
    rule = align_rules.RULES[name](network)
    rule(torch.randn(5, 6))
    if change == "head":
        network[4] = nn.Linear(7, 3)
    elif change == "deeper":
        network[4] = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 3))
    elif change == "pruned":
        torch.nn.utils.prune.l1_unstructured(network[2], "weight", 0.5)
    else:
        rule._is_replica = True
    with pytest.raises(RuntimeError, match="DistributedDataParallel" if change == "replica" else "make the rule anew"):
        rule(torch.randn(5, 6))


def test_other_values_of_the_same_parameters_are_fine():
    network = mlp()
    rule = align_rules.AlignAda(network)
    rule(torch.randn(5, 6))
    network.load_state_dict(mlp().state_dict(), assign=True)
    rule(torch.randn(5, 6)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_modules_that_no_rule_can_be_made_on():
    for network, told in (
        (torch.jit.script(mlp()), "is scripted"), (torch.compile(mlp()), "is compiled"),
        (nn.Sequential(align_rules.Backprop(mlp())), "is a rule itself"), (nn.LazyLinear(3), "has no shapes yet"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=told):
            align_rules.AlignAda(network)
    with pytest.raises(TypeError, match="no product of an activity"):
        align_rules.AlignAda(nn.LayerNorm(6))(torch.randn(5, 6))


class Keeps(nn.Module):
    """A penalty that the network keeps beside its output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.penalty = h.square().mean()
        return self.b(h)


@pytest.mark.parametrize("name", ["fa", "align_prop", "align_ada", "align_zero", "kolen_pollack"])
def test_a_loss_on_what_the_network_keeps(name):
    network, x, found = Keeps(), torch.randn(5, 6), []
    weights = {"feedback": align_rules.layer_weights(network)} if name in ("fa", "kolen_pollack") else {}
    rule = align_rules.RULES[name](network, **weights)
    for call in (rule, network):
        loss = call(x).square().mean() + network.penalty
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(TypeError, match="detach the others"):
        align_rules.DirectFeedbackAlignment(Keeps())(x)


@pytest.mark.parametrize("readout", ["drawn", "zeros"])
def test_hooks_that_change_gradients(readout):
    """Also where a readout of zeros sends no error below it."""
    network, x = mlp(), torch.randn(5, 6)
    if readout == "zeros":
        nn.init.zeros_(network[-1].weight)
    rule = align_rules.AlignAda(network)
    rule(x)
    network[2].register_full_backward_hook(lambda module, into, out: None)
    rule(x)
    network[2].register_full_backward_hook(lambda module, into, out: (2 * into[0],))
    with pytest.raises(TypeError, match=r"the gradient of 0\.weight is off by"):
        rule(x)


class Wrong(nn.Module):
    """Branches on a value, and has a torch.autograd.Function: recorded, its backward pass would be lost."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(WithWeight.apply(h, torch.eye(6)) if h.sum() < 1e9 else h)


def test_a_function_that_is_recorded():
    told = r"(?s)torch\.autograd\.Function, whose backward pass is lost.*cannot write it down: .*branch"
    with pytest.raises(TypeError, match=told):
        align_rules.AlignZero(Wrong())(torch.randn(5, 6))


def test_a_recorded_network_is_warned_of_once():
    class Branches(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    rule = align_rules.AlignAda(Branches(*mlp()))
    with pytest.warns(UserWarning, match=r"Branches is recorded anew at every call.*test_refused.py:\d+") as told:
        rule(torch.randn(5, 6))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(torch.randn(5, 6))


class Selects(nn.Sequential):
    def forward(self, x):
        h = torch.relu(self[0](x))
        return self[2](h[h[:, 0] > 0])


@pytest.mark.parametrize("name", ["align_ada", "align_zero", "fa"])
@pytest.mark.filterwarnings("ignore:.*recorded anew")
def test_entries_that_are_selected_by_values(name):
    """The initial network would select others."""
    rule = align_rules.RULES[name](Selects(*mlp()[:2], nn.Linear(7, 3)))
    if name == "fa":
        return rule(torch.randn(5, 6))
    with pytest.raises(TypeError, match=r"index at .*test_refused.py:\d+ .*selects entries by activities' values"):
        rule(torch.randn(5, 6))


def test_outputs_in_which_no_tensor_is_found():
    class Policy(nn.Sequential):
        def forward(self, x):
            return torch.distributions.Normal(super().forward(x), 1.0)

    with pytest.raises(TypeError, match="Policy returns something in which tensors cannot be found"):
        align_rules.AlignProp(Policy(*mlp()))(torch.randn(5, 6))


@pytest.mark.parametrize("name", ["align_prop", "align_ada", "align_zero"])
def test_a_rule_on_its_own_output(name):
    """The proof of a capture leaves the graph that an input comes from as it is."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.h = nn.Linear(3, 5), nn.Linear(5, 5)

        def forward(self, x, h):
            return torch.tanh(self.i(x) + self.h(h))

    network, xs, found = Cell(), torch.randn(4, 2, 3), []
    for call in (network, align_rules.RULES[name](network)):
        h = torch.zeros(2, 5)
        for x in xs:
            h = call(x, h)
        found.append(torch.autograd.grad(h.square().sum(), list(network.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["align_prop", "align_ada"])
def test_a_checkpoint_around_a_rule(name):
    """The first call is checked inside of it, and recomputed after that."""
    network, x = mlp(), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    found = [torch.autograd.grad(output.square().sum(), list(network.parameters()))
             for output in (checkpoint(rule, x, use_reentrant=False), network(x))]  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*recorded anew")
def test_a_learned_tensor_outside_of_a_recorded_network():
    """It is found behind the output, and checked and differentiated like an input."""
    gain = torch.ones(7, requires_grad=True)

    class Scales(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x) * gain) if x.sum() > -1e9 else x

    network, x = Scales(nn.Linear(6, 7), nn.Linear(7, 3)), torch.randn(5, 6)
    found = [torch.autograd.grad(call(x).square().sum(), gain) for call in (align_rules.AlignProp(network), network)]
    torch.testing.assert_close(*found)


class Fails(nn.Sequential):
    """Depends on values; keeps an activity, and then fails, if it is told to."""

    kept, fail = None, True

    def forward(self, x):
        self.kept = super().forward(x) if x.sum() > -1e9 else x
        if self.fail:
            raise OSError("the disk is full")
        return self.kept


@pytest.mark.filterwarnings("ignore:.*recorded anew")
def test_a_recording_that_fails_leaves_nothing_behind():
    rule = align_rules.AlignProp(network := Fails(*mlp()))
    network.fail = False
    rule(torch.randn(5, 6))
    before, network.fail = network.kept, True
    with pytest.raises(OSError, match="disk"):
        rule(torch.randn(5, 6))
    assert network.kept is before


def test_what_changes_at_every_call_is_recorded(monkeypatch):
    class Growing(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.steps = []

        def forward(self, x):
            self.steps.append(str(len(self.steps)))
            return super().forward(x + len("".join(self.steps)))

    monkeypatch.setattr(align_rules, "MANY", 3)
    network, inputs = Growing(*mlp()), torch.randn(5, 6)
    rule = align_rules.AlignAda(network)
    for _ in range(3):
        rule(inputs)
    with pytest.warns(UserWarning, match=r"recorded anew at every call.*is another at every call"):
        rule(inputs)
    output = rule(inputs)
    network.steps.pop()
    assert torch.equal(output, network(inputs))


def test_explained():
    rule = align_rules.AlignAda(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3)))
    rule.network[0].bias.requires_grad_(False)
    text = rule.explain(torch.randn(5, 6), code=True)
    rows = [line.split("  ") for line in text.splitlines() if ".weight" in line and "->" in line]
    assert [(row[0], row[-1]) for row in rows] == [
        ("0.weight", "its input"), ("2.weight", "the argument of relu"), ("4.weight", "its input")
    ]  # fmt: skip
    assert "do not learn: 0.bias" in text
    assert "initial_2_weight" in text


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_padding_is_rearranging(mode):
    conv = nn.Conv1d(3, 3, 3, padding=1, padding_mode=mode)
    rule = align_rules.AlignAda(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), conv, nn.Tanh(), nn.Conv1d(3, 2, 1)))
    assert re.search(r"2\.weight .*the argument of tanh", rule.explain(torch.randn(4, 2, 9)))


@pytest.mark.parametrize("dim", [0, 1])
def test_direct_feedback_asks_which_dimension_is_the_batch(dim):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.h, self.o = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, u: Tensor) -> Tensor:  # (time, batch, 3)
            h, outputs = torch.zeros(u.shape[1], 6), []
            for step in u:
                h = torch.tanh(self.i(step) + self.h(h))
                outputs.append(self.o(h))
            return torch.stack(outputs, 1 - dim)

    network, u, found = Tagger(), torch.randn(5, 5, 3), []
    with pytest.raises(ValueError, match=r"which dimension of the output .* counts the examples"):
        align_rules.DirectFeedbackAlignment(network)(u)
    for time in (u, torch.cat([u, torch.zeros(1, 5, 3)])):  # a sixth step, whose error is zero, changes nothing
        rule = align_rules.DirectFeedbackAlignment(network, batch_dim=dim)
        rule(time)
        for k, B in enumerate(rule.feedback):  # the same B for every step, and for each of its outputs
            B.copy_(torch.linspace(-1, 1, B.shape[1]).expand_as(B) * (k < 5))
        output = rule(time).movedim(dim, 0)[:, :5]
        found.append(torch.autograd.grad(output.square().sum(), list(network.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Resets(nn.Module):
    """Of which torch's gradient is not that of what it computes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 7, bias=False), nn.Linear(7, 3, bias=False)

    def forward(self, x):
        h = self.a(x)
        with torch.no_grad():
            h[:, :3] = 0
        return self.b(h)


def test_a_batch_of_zeros_proves_nothing():
    rule = align_rules.FeedbackAlignment(Resets())
    for _ in range(2):
        assert not rule(torch.zeros(5, 6)).any()
    with pytest.raises(TypeError, match=r"writes under torch\.no_grad or by \.data into activities"):
        rule(torch.randn(5, 6))


class Writes(nn.Module):
    """Into a parameter: a Hebbian layer, the signs of Dale's law, decay."""

    def __init__(self, write):
        super().__init__()
        self.a, self.b, self.write = nn.Linear(6, 7), nn.Linear(7, 3), write

    def forward(self, x):
        with torch.no_grad():
            self.write(self.a.weight)
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("write", [lambda W: W.add_(1), lambda W: W.clamp_(min=0), lambda W: W.data.mul_(0.9)])
def test_a_refused_network_is_left_as_it_was(write, learns):
    network = Writes(write)
    network.a.weight.requires_grad_(learns)
    before = network.a.weight.detach().clone()
    with pytest.raises(TypeError, match="network writes into its parameters"):
        align_rules.AlignAda(network)(torch.randn(5, 6))
    assert torch.equal(network.a.weight, before)


class Auxiliary(nn.Sequential):
    def forward(self, x):
        h = F.dropout(torch.relu(self[0](x)))
        F.dropout(h)  # for an output that is not asked for
        return self[2](h)


def test_a_draw_that_is_not_used_is_drawn():
    rule, network, inputs, found = align_rules.AlignAda(Auxiliary(*mlp())), Auxiliary(*mlp()), torch.randn(5, 6), []
    network.load_state_dict(rule.network.state_dict())
    for called in (rule, network):
        torch.manual_seed(0)
        found.append([called(inputs) for _ in range(3)])
    torch.testing.assert_close(*found)


def test_the_last_layer_is_a_module_whatever_its_weight_is_made_of():
    network = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(7, 3)))
    assert {name.partition(".")[0] for name in align_rules.LastLayer(network).learns} == {"2"}


class SelectsByInputs(nn.Module):
    """Entries that the inputs select, which are the same in an initial network."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))[x[:, 0] > 0])


@pytest.mark.filterwarnings("ignore:.*recorded anew")
@pytest.mark.parametrize("name", ["align_ada", "align_zero"])
def test_entries_that_inputs_select(name):
    align_rules.verify(align_rules.RULES[name](SelectsByInputs()), mean_square, torch.randn(9, 6), double=True)


class Pools(nn.Module):
    """By the attention of a learned query."""

    def __init__(self):
        super().__init__()
        self.k, self.q, self.o, self.query = (*(nn.Linear(6, 6) for _ in "kqo"), nn.Parameter(torch.randn(1, 2, 6)))

    def forward(self, x):
        query = self.q(self.query.expand(len(x), -1, -1))
        return self.o((query @ self.k(x).mT).softmax(-1) @ x)


def test_a_learned_query_in_batches_of_several_sizes():
    rule = align_rules.AlignAda(Pools(), added=("query",))
    for size in (5, 4, 3):
        align_rules.verify(rule, mean_square, torch.randn(size, 7, 6), double=True)
    assert not rule.recorded
