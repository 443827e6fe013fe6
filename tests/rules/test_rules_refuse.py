"""What the rules refuse, when they are made and at a call, and what they say."""

import pytest
import torch
import torch.nn.functional as F
from rules_helpers import LAYERWISE, TRANSPORTING, Holding, LastState, each_layerwise, gradients, mlp
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


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


@each_layerwise
def test_an_unknown_name_in_added(name):
    with pytest.raises(ValueError, match=r"no parameter 'state'; it has 0\.weight"):
        align_rules.RULES[name](nn.Sequential(nn.Linear(6, 3)), added=["state"])


@pytest.mark.parametrize("name", ["last_layer", *LAYERWISE])
@pytest.mark.parametrize(
    ("network", "message"),
    [(LastState, "recurrent is a LSTM.*torch.nn.Linear"), (nn.Flatten, "no torch.nn.Linear or torch.nn.Conv")],
)
def test_networks_without_reachable_layers(name, network, message):
    with pytest.raises(TypeError, match=message):
        align_rules.RULES[name](network())


@pytest.mark.parametrize("name", ["last_layer", *LAYERWISE])
def test_weights_made_from_others_are_refused(name):
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    with pytest.raises(TypeError, match="weight norm"):
        align_rules.RULES[name](network)


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


@pytest.mark.parametrize("name", [*TRANSPORTING, "align_ada"])
def test_weights_made_from_activities_are_refused_at_the_call(name):
    with pytest.raises(TypeError, match="makes the weight of a linear map from activities"):
        align_rules.RULES[name](Using(lambda x, net: F.linear(x, x.T @ x)))(torch.randn(6, 6))


@pytest.mark.parametrize("name", ["dfa", "align_ada", "align_zero"])
def test_several_outputs_are_refused(name):
    class Named(nn.Linear):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(inputs)}

    with pytest.raises(TypeError, match="returns a dict, but this rule needs one tensor"):
        align_rules.RULES[name](Named(6, 3))(torch.randn(5, 6))


def test_direct_feedback_needs_a_layer_last():
    with pytest.raises(ValueError, match="ends in an activation function"):
        align_rules.DirectFeedbackAlignment(nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()))(torch.randn(5, 6))


def test_direct_feedback_needs_the_batch_in_front():
    class Transposed(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs.transpose(0, 1)).transpose(0, 1)

    rule = align_rules.DirectFeedbackAlignment(Transposed(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    with pytest.raises(ValueError, match="first dimension is the output's, the batch"):
        rule(torch.randn(5, 4, 6))


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


@pytest.mark.parametrize(("initial", "current"), [(0, 2), (2, 0), (0, 1)])  # one call more, one less, another
def test_align_ada_needs_the_same_calls(initial, current):
    network = Branching(initial)
    rule = align_rules.AlignAda(network)
    network.path.data.fill_(current)
    with pytest.raises(RuntimeError, match="order of calls"):
        rule(torch.randn(5, 6))


@pytest.mark.parametrize("name", ["align_ada", "align_zero"])
def test_a_copy_that_runs_the_original_is_told(name):
    """A closure is not copied: without a check AlignZero would be backprop."""
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    forward = network.forward
    network.forward = lambda inputs: forward(inputs)
    with pytest.raises(TypeError, match="uses the original's parameters"):
        align_rules.RULES[name](network)(torch.randn(5, 6))
