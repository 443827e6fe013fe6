"""Learning rules for wide networks, as drop-in forward passes with another backward pass.

    rule = align_rules.AlignAda(network)          # snapshots the initial parameters
    loss = loss_function(rule(inputs), targets)   # rule(inputs) equals network(inputs) to the last bit
    loss.backward()                               # fills .grad by the rule; any torch optimiser steps

The rules are those of Boopathy & Fiete, "How to Train Your Wide Neural Network Without Backprop: An Input-Weight
Alignment Perspective" (ICML 2022, arXiv 2106.08453), and the ones it compares with. This file imports torch only and
can be copied alone into another project.

Principle. A *layer* is a call of a linear map with a weight of torch.nn.Linear, torch.nn.Conv1d, 2d, 3d or a subclass.
Everything else a network is made of (biases, normalisation, activations, pooling, additions, products of activities,
reshaping) is differentiated as it stands. Backprop sends the error delta that arrives at a layer's output on to the
layer's input through the transpose of its current weight; a rule sends something else there. That, and which activity
the layer's own weight gradient is formed with, is all that distinguishes the rules. With e the gradient of the loss at
the output of the network, W the current weight, W0 the initial one, B a fixed random one, a the input activity of the
layer, and an index 0 for what the same network computes and sends back with all of its initial parameters (section 4
of the paper):

    rule                     error sent to the layer's input          weight gradient        memory beside the network
    Backprop                 W^T delta                                delta a^T              -
    LastLayer                none                                     e a^T, readout only    -
    FeedbackAlignment        B^T delta                                delta a^T              B, like the weights
    AlignProp                W0^T delta                               delta a^T              W0
    DirectFeedbackAlignment  B^T e, at the block's activity           delta a^T              B, outputs x activities
    AlignAda                 W0^T delta0 (delta0: initial network)    delta a^T              the initial network
    AlignZero                W0^T delta0                              delta0 a0^T            the initial network

In every rule e is computed at the current network's output, and the layers above the last learn by their own gradient.

Blocks. A block is a layer with all that follows it up to the next layers, on every path: the error that enters at their
inputs goes back through the block's own derivatives, to its bias and normalisation, and becomes the layer's delta.

- AlignAda: the error enters at the argument of the activation function directly in front of the next layer if there is
  one, with nothing but reshaping and padding between (so that the initial network's derivative of the activation is
  used, as published), else at the layer's input; at the readout, which is the layer called last, always at its input.
  `coupling="activity"` puts it at the layer's input everywhere, which is how the paper defines the rule for recurrent
  networks. Activation functions with parameters (PReLU) count as part of the block, and learn.
- DirectFeedbackAlignment: a block ends at the output of the first activation function after the layer, or at the input
  of the next layer if none comes before it. e enters there, and nothing flows back past such a place.

Branches. Errors add up wherever an activity is used more than once, as in backprop: a residual addition hands the error
to both of its sides as it is, a concatenation to each its part, and a layer that is called several times (or two that
share one weight) gets the sum over its calls, all with the same B or W0. A skip connection is cut by no layer, so an
error that enters behind it goes back along it, through the current network's derivatives, to all the blocks that it
passes (in AlignZero: the initial network's; in DirectFeedbackAlignment: as far as the next end of a block).

Normalisation. Running statistics are updated once per step, by the current network. The initial network of AlignAda and
AlignZero has running statistics of its own, updated by its own activities in the same steps. Every module of it is in
the mode, train or eval, of the same module in the current network, and draws the same dropout masks.

Frozen parameters (requires_grad False) do not learn; errors go through their layers as through the others. Learned
weights that a rule cannot follow raise TypeError: when the rule is made, for fused modules (LSTM, MultiheadAttention),
transposed convolutions, Bilinear, weights made from other parameters, and matrices that a module of your own holds; at
the call, for learned tensors in matrix products outside a layer (products entry by entry, such as gains, are
differentiated as they stand). What a torch.autograd.Function of your own does inside is not seen. Backprop and
AlignZero take any network as it is; LastLayer does if it is told what learns.

"Activation function" means one of ACTIVATIONS below; others are differentiated as they stand and end no block. Forward
hooks of the network run in the initial network of AlignAda and AlignZero too.

`gradient_angles` and `feedback_angles` measure how far a rule is from backprop, layer by layer.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Modules that use weights inside one fused call, where a rule cannot reach the single layers.
FUSED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

# Modules whose `weight` and `bias` are no linear map of an activity: they look up, scale and shift.
OTHERS = (
    nn.Embedding, nn.EmbeddingBag, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip

LINEAR_MAPS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
LINEAR_MAP_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

ANYTHING = "Backprop and AlignZero take any network as it is"  # what errors end with

# Functions that multiply activities by each other or by a weight, by name, and which of their arguments multiply.
PRODUCTS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "conv_tbc"), slice(0, 2)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), slice(0, 2)),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm"), slice(1, 3)),
    **dict.fromkeys(("bilinear", "scaled_dot_product_attention"), slice(0, 3)),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "__matmul__", "__rmatmul__"), slice(None)),
    **dict.fromkeys(("einsum", "tensordot", "chain_matmul", "linalg_multi_dot", "linalg_matmul"), slice(None)),
    **dict.fromkeys(("linalg_vecdot", "cdist", "multi_head_attention_forward"), slice(None)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), slice(None)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), slice(None)),
}
NOT_MULTIPLIED = ("bias", "attn_mask")  # named arguments of these that are added

# Functions that may take a layer's weight beside an activity: they look up rows of it (and those are activities), or
# read its type or shape.
LOOKUPS = {"embedding", "embedding_bag"}
HARMLESS = LOOKUPS | {"to", "type_as", "expand_as", "view_as", "reshape_as"}

ACTIVATIONS = {
    F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus,
    F.softsign, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.threshold, torch.selu, torch.celu,
    F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit, F.tanh, torch.tanh, Tensor.tanh,
}  # fmt: skip

# The same functions where they change their argument, and where the others take `inplace`: torch hands it on by name,
# but torch.compile as it was given.
IN_PLACE = {
    torch.relu_: torch.relu, Tensor.relu_: torch.relu, torch.sigmoid_: torch.sigmoid, Tensor.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh, Tensor.tanh_: torch.tanh, F.leaky_relu_: F.leaky_relu, F.elu_: F.elu, F.celu_: F.celu,
    F.selu_: F.selu, F.hardtanh_: F.hardtanh, F.threshold_: F.threshold,
}  # fmt: skip
INPLACE_POSITION = {
    F.relu: 1, F.relu6: 1, F.selu: 1, F.silu: 1, F.mish: 1, F.hardswish: 1, F.hardsigmoid: 1,
    F.leaky_relu: 2, F.elu: 2, F.celu: 2, F.hardtanh: 3, F.threshold: 3,
}  # fmt: skip

# Between an activation function and a layer these change nothing but shape and borders.
RESHAPES = {
    F.pad, torch.flatten, Tensor.flatten, torch.unflatten, Tensor.unflatten, torch.reshape, Tensor.reshape, Tensor.view,
    torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, torch.movedim, Tensor.movedim,
    torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.contiguous,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ gradient primitives


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, path: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, gradient


class _Transport(torch.autograd.Function):
    """The value `output`, with gradient to it and, through `transpose`, to the layer's input."""

    @staticmethod
    def forward(ctx, output: Tensor, layer_input: Tensor, transpose: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.transpose, ctx.dtype = transpose, layer_input.dtype
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, ctx.transpose(gradient).to(ctx.dtype), None


class _Broadcast(torch.autograd.Function):
    """The network's output, with its gradient e sent straight to `activities`, through one feedback weight each."""

    @staticmethod
    def forward(ctx, output: Tensor, feedback: list[Tensor], *activities: Tensor) -> Tensor:
        ctx.feedback, ctx.like = feedback, [(activity.shape, activity.dtype) for activity in activities]
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        error = gradient.reshape(len(gradient), -1)  # (batch, outputs)
        sent = [_project(error, B, shape).to(dtype) for B, (shape, dtype) in zip(ctx.feedback, ctx.like, strict=True)]
        return gradient, None, *sent


def couple(value: Tensor, path: Tensor) -> Tensor:
    """`value + path - sg(path)`, sg the stop-gradient: the value of `value`, bit for bit; its gradient goes to both.

    Both tensors have the same shape.
    """
    return _Couple.apply(value, path)


def swap_grad(value: Tensor, path: Tensor) -> Tensor:
    """`sg(value) + path - sg(path)`: the value of `value`, bit for bit; its gradient goes to `path` alone."""
    return _Couple.apply(value.detach(), path)


def _project(error: Tensor, feedback: Tensor, shape: torch.Size) -> Tensor:
    """e B for one block: (batch, outputs) onto `shape`; feedback is (outputs, *shape[1:]), or (outputs, channels)."""
    sent = (error @ feedback.flatten(1).to(error.dtype)).unflatten(1, feedback.shape[1:])
    if feedback.dim() < len(shape):  # feedback onto activities that are averaged over all positions
        positions = shape[2:].numel()
        sent = (sent / positions).reshape(*sent.shape, *[1] * len(shape[2:])).expand(shape)
    return sent


def _transpose(linear_map: Callable, options: Mapping[str, Any], weight: Tensor, shape: torch.Size):
    """The function that sends an error at the output of `linear_map` to its input of `shape`, through `weight`."""
    gradients = {F.conv1d: nn.grad.conv1d_input, F.conv2d: nn.grad.conv2d_input, F.conv3d: nn.grad.conv3d_input}
    if linear_map is F.linear:
        return lambda error: error @ weight.to(error.dtype)
    if len(shape) < weight.dim():  # one example, without a batch
        batched = _transpose(linear_map, options, weight, torch.Size((1, *shape)))
        return lambda error: batched(error.unsqueeze(0)).squeeze(0)
    if isinstance(options.get("padding"), str):
        return _transpose_padded(linear_map, options, weight, shape)
    return lambda error: gradients[linear_map](shape, weight.to(error.dtype), error.contiguous(), **options)


def _transpose_padded(linear_map: Callable, options: Mapping[str, Any], weight: Tensor, shape: torch.Size):
    """`_transpose` for padding "same", whose odd pixel comes last (torch.nn.Conv2d), and "valid"."""
    sizes, kernel, dilation = shape[-weight.dim() + 2 :], weight.shape[2:], options.get("dilation", 1)
    dilation = (dilation,) * len(sizes) if isinstance(dilation, int) else dilation
    same = options["padding"] == "same"
    totals = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=True)]
    padded = (*shape[: -len(sizes)], *(size + total for size, total in zip(sizes, totals, strict=True)))
    transpose = _transpose(linear_map, {**options, "padding": 0}, weight, torch.Size(padded))
    window = (..., *(slice(total // 2, total // 2 + size) for size, total in zip(sizes, totals, strict=True)))
    return lambda error: transpose(error)[window]


# ------------------------------------------------------------------------------------- following a network's own calls


def _in_place(function: Callable) -> bool:
    name = function.__name__
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return name.endswith("_")


def _out_of_place(function: Callable, arguments: tuple, keywords: Mapping) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """An activation function with its settings, changing nothing, and its argument: a copy if the call would change it.

    The rules still need the argument afterwards.
    """
    rest, keywords = list(arguments[1:]), dict(keywords)
    position = INPLACE_POSITION.get(function, 0) - 1
    changes = function in IN_PLACE or bool(keywords.pop("inplace", False))
    if 0 <= position < len(rest):
        changes = bool(rest[position])
        rest[position] = False
    activate = IN_PLACE.get(function, function)
    return (lambda tensor: activate(tensor, *rest, **keywords)), arguments[0].clone() if changes else arguments[0]


class _Source(NamedTuple):
    """Where a tensor comes from that is made of the network's own tensors alone, and of no activity.

    `parameter` is the name of the parameter that learns in it; None for fixed tensors, such as buffers. `layer`: it is
    a layer's weight, and `stand_in` is what takes its place in the backward pass, where a rule wants that.
    """

    parameter: str | None = None
    layer: bool = False
    stand_in: Tensor | None = None


class _Pass(TorchFunctionMode):
    """One run of a network during which `layer` and `activation` stand in for its calls of linear maps and activations.

    A layer's weight that the network scales, casts, reshapes or splits before use is followed, and so is its stand-in.

    Args:
        network: the network that will run.
        stand_ins: by the name of a layer's weight, the tensor that takes its place in the backward pass.

    Raises:
        TypeError: on the way, the network multiplies activities by a learned tensor that is no layer's weight, or uses
            a layer's weight in another way than a linear map.
    """

    def __init__(self, network: nn.Module, stand_ins: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.buffers = list(network.buffers())
        self.sources = {id(buffer): _Source() for buffer in self.buffers}
        for name, parameter in network.named_parameters():
            self.sources[id(parameter)] = _Source(name if parameter.requires_grad else None)
        for name, weight in layer_weights(network).items():
            self.sources[id(weight)] = _Source(name, True, (stand_ins or {}).get(name))
        self.refusal: str | None = None

    def __exit__(self, kind, error, traceback):
        super().__exit__(kind, error, traceback)
        if self.refusal is not None and str(error) != self.refusal:
            # Raised in an operator such as @, a TypeError loses its message to "unsupported operand types".
            raise TypeError(self.refusal) from error

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if not arguments and "input" in keywords:
            arguments = (keywords.pop("input"),)
        if function in LINEAR_MAPS:
            options = dict(zip(LINEAR_MAP_ARGUMENTS, arguments, strict=False)) | keywords
            if (source := self.source_of_weight(options["weight"])).layer:
                self.refuse([source] if self.is_layer_weight(options["input"]) else [], function)
                return self.layer(function, options, source)
        activation = function in ACTIVATIONS or function in IN_PLACE
        result = (self.activation if activation else self.other)(function, arguments, keywords)
        results = _tensors_in(arguments[:1] if function is Tensor.__setitem__ else (result,))
        if results:
            self.follow(function, arguments, keywords, results)
        return result

    def layer(self, linear_map, options, source):
        return linear_map(**options)

    def activation(self, function, arguments, keywords):
        return function(*arguments, **keywords)

    def other(self, function, arguments, keywords):
        return function(*arguments, **keywords)

    def find(self, tensor: Tensor) -> _Source | None:
        source = self.own(tensor) or getattr(tensor, "_source", None)
        fixed = source is None and tensor.dim() == 0 and not tensor.requires_grad
        return _Source() if fixed else source

    def own(self, tensor: Tensor) -> _Source | None:
        """Of a parameter or buffer of the network; None for other tensors."""
        if torch.compiler.is_compiling() and not isinstance(tensor, nn.Parameter):  # has an id only outside graphs
            return _Source() if any(tensor is buffer for buffer in self.buffers) else None
        return self.sources.get(id(tensor))

    def is_layer_weight(self, tensor: Tensor) -> bool:
        return (source := self.find(tensor)) is not None and source.layer

    def source_of_weight(self, weight: Tensor) -> _Source:
        source = self.find(weight)
        if source is None and weight.requires_grad:
            raise TypeError(
                "the network makes the weight of a linear map from activities or in a torch.autograd.Function, where "
                f"this rule cannot follow it; multiply activities with torch.matmul ({ANYTHING})"
            )
        return source or _Source()

    def follow(self, function, arguments, keywords, results: list[Tensor]) -> None:
        """Note where the results come from; refuse a use of learned tensors that the rule cannot follow."""
        sources = [self.find(tensor) for tensor in _tensors_in((arguments, keywords))]
        multiplied = [source for source in self.multiplied(function, arguments, keywords) if source is not None]
        learned = [source for source in multiplied if source.parameter is not None]
        if None not in sources and function.__name__ not in LOOKUPS:
            self.refuse(learned[1:], function)
            self.derive(function, arguments, keywords, sources, results)
        elif any(tensor.requires_grad for tensor in results):
            layers = [source for source in sources if source is not None and source.layer]
            found = learned or (layers if function.__name__ not in HARMLESS else [])
            self.refuse(found, function)
        if None in sources and _in_place(function) and getattr(results[0], "_source", None) is not None:
            results[0]._source = None  # an activity has come in

    def multiplied(self, function, arguments, keywords) -> list[_Source | None]:
        """Where the tensors come from that the function multiplies, if it is a product."""
        name = function.__name__ if function.__name__.startswith("_") else function.__name__.rstrip("_")
        if name not in PRODUCTS:
            return []
        named = {key: value for key, value in keywords.items() if key not in NOT_MULTIPLIED}
        return [self.find(tensor) for tensor in _tensors_in((arguments[PRODUCTS[name]], named))]

    def refuse(self, misused: list[_Source], function) -> None:
        if misused:
            used = f"{misused[0].parameter!r} in torch.{function.__name__.strip('_')}"
            # An operator that is refused is tried once more with its sides exchanged: the first says more.
            self.refusal = self.refusal or (
                f"the network uses its parameter {used}, outside a torch.nn.Linear or Conv layer, where this rule "
                f"cannot follow it; make it the weight of such a layer ({ANYTHING})"
            )
            raise TypeError(self.refusal)

    def derive(self, function, arguments, keywords, sources: list[_Source], results: list[Tensor]) -> None:
        learned = [source for source in sources if source.parameter is not None]
        source = max(learned, key=lambda source: source.layer, default=_Source())
        stand_ins = [None] * len(results)
        if any(source.stand_in is not None for source in sources):
            # In place this would write into the network's own tensor.
            self.refuse([source] if _in_place(function) and sources[0].stand_in is None else [], function)
            replaced = self.replaced(arguments)
            with torch.no_grad():
                returned = function(*replaced, **self.replaced(keywords))
            stand_ins = _tensors_in((returned,)) or _tensors_in(replaced[:1])
        for result, stand_in in zip(results, stand_ins, strict=True):
            if self.own(result) is None:  # not a buffer that was changed in place
                result._source = source._replace(stand_in=stand_in)

    def replaced(self, value):
        """The value, with its stand-in in the place of every layer's weight in it."""

        def replace(tensor: Tensor) -> Tensor:
            stand_in = self.find(tensor).stand_in
            return tensor if stand_in is None else stand_in

        return _map_tensors(replace, value)


def layer_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that a rule treats as layers', by name, in order of registration; a shared one once."""
    weights, seen = {}, set()
    for name, module in network.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, LAYERS) else None
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            weights[f"{name}.weight".lstrip(".")] = weight
    return weights


def _require_layers(network: nn.Module, added: Iterable[str] = (), remedy: str = ANYTHING) -> None:
    """Raise TypeError where a network keeps weights in a form that the layer-wise rules cannot follow.

    Args:
        added: names of parameters that are added to activities; others that look like a matrix must be a layer's.
        remedy: what else the user can do.
    """
    _require_parameters(network, added)
    _require_plain(network)
    for name, module in network.named_modules():
        if (problem := _unreachable(module, name, added)) is not None:
            raise TypeError(f"{name or 'the network'} {problem} ({remedy})")
    if not layer_weights(network):
        raise TypeError("the network has no torch.nn.Linear or torch.nn.Conv layer that a rule could teach")


def _unreachable(module: nn.Module, name: str, added: Iterable[str]) -> str | None:
    """What keeps the layer-wise rules from following a module itself, without its children; None if nothing does."""
    kind = type(module).__name__
    if isinstance(module, FUSED) and any(parameter.requires_grad for parameter in module.parameters()):
        return (
            f"is a {kind}, whose weights are used inside one fused call; write it with torch.nn.Linear layers to use "
            "this rule"
        )
    if isinstance(module, LAYERS) and "weight" not in module._parameters:
        return (
            "makes its weight from other parameters (weight norm, for example), which this rule cannot follow; remove "
            "the parametrisation"
        )
    for own in _matrices(module):
        full = f"{name}.{own}".lstrip(".")
        if full not in added:
            return _misplaced(module, own, full)
    return None


def _matrices(module: nn.Module) -> list[str]:
    """Names of the learned parameters of a module itself that may be matrices and are no layer's weight."""
    known = ("weight", "bias") if isinstance(module, LAYERS + OTHERS) else ()
    own = module.named_parameters(recurse=False)
    suspect = _is_matrix if not _of_torch(module) else lambda p: p.dim() > 1
    return [name for name, p in own if name not in known and p.requires_grad and suspect(p)]


def _of_torch(module: nn.Module) -> bool:
    lists = isinstance(module, nn.ParameterList | nn.ParameterDict)
    return type(module).__module__.startswith("torch.nn.") and not lists


def _misplaced(module: nn.Module, own: str, full: str) -> str:
    if _of_torch(module):
        return (
            f"is a {type(module).__name__}, whose {own} this rule does not follow; use torch.nn.Linear or Conv layers "
            "(for a transposed convolution, torch.nn.Upsample and a Conv layer)"
        )
    return (
        f"holds the parameter {own} of shape {tuple(module.get_parameter(own).shape)} itself; if it multiplies "
        "activities, make it the weight of a torch.nn.Linear or Conv layer; if it is added to them (a position "
        f"embedding, an initial state), name it: added=({full!r},)"
    )


def _is_matrix(parameter: Tensor) -> bool:
    """Whether it may be the matrix of a linear map; with a first dimension of 1 it is taken as added to activities."""
    return parameter.dim() > 1 and parameter.shape[0] > 1 and sum(size > 1 for size in parameter.shape) > 1


def _require_plain(network: nn.Module) -> None:
    """Raise TypeError for what cannot be copied: scripted modules, and lazy ones that have not seen their input."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the network'} is scripted; make the rule on the module before torch.jit.script")
    for name, parameter in network.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise TypeError(f"{name} has no shape yet; call the network on a batch before making the rule")


def _require_parameters(network: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a name that no parameter has."""
    known = dict(network.named_parameters())
    for name in names:
        if name not in known:
            raise ValueError(f"the network has no parameter {name!r}; it has {', '.join(known)}")


# ------------------------------------------------------------------------------------------------------------ the rules


class Rule(nn.Module):
    """A network with a learning rule: called, it gives the network's own output; differentiated, the rule's gradient.

    Args:
        network: any torch.nn.Module that returns one tensor. It is not changed; its parameters are the ones that learn.

    Where gradients are disabled (torch.no_grad) a rule just calls the network. `state_dict` holds what the rule keeps.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.examined = False  # by the first call

    def forward(self, *inputs, **keywords) -> Tensor:
        if not torch.is_grad_enabled():
            return self.network(*inputs, **keywords)
        output = self.attached(*inputs, **keywords)
        if not self.examined and not torch.compiler.is_compiling():
            self.examine(output)
            self.examined = True
        return output

    def examine(self, output) -> None:
        """Raise TypeError for what shows only in the graph behind the first output."""
        nodes, seen = [tensor.grad_fn for tensor in _tensors_in((output,))], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == "CheckpointFunctionBackward":
                raise TypeError(
                    "the network checkpoints activations (torch.utils.checkpoint): it runs again in the backward pass, "
                    f"where this rule cannot follow it; switch that off ({ANYTHING})"
                )
            nodes.extend(following for following, _ in node.next_functions)

    def attached(self, *inputs, **keywords) -> Tensor:
        """The network's output with the rule's gradient."""
        raise NotImplementedError

    def feedback_weights(self) -> dict[str, Tensor]:
        """What stands in for the layers' weights when errors go back, by the weights' names; empty if nothing does."""
        return {}


class Backprop(Rule):
    """Gradient descent as it is, for comparison."""

    def attached(self, *inputs, **keywords) -> Tensor:
        return self.network(*inputs, **keywords)

    def examine(self, output) -> None:
        pass  # whatever it is


class LastLayer(Rule):
    """Only the readout learns; no graph is kept below it.

    Args:
        learns: names of the parameters, or of modules that hold them, that learn. Default: the last layer registered.
            A network whose layers cannot be followed needs them named.

    Raises:
        TypeError: as for FeedbackAlignment, where `learns` is not given.
        ValueError: a name in `learns` is no parameter or module with parameters of the network.
    """

    def __init__(self, network: nn.Module, learns: Iterable[str] | None = None):
        super().__init__(network)
        if learns is None:
            _require_layers(network, remedy="or name what learns: learns=(...)")
            learns = [list(layer_weights(network))[-1].removesuffix("weight").removesuffix(".")]
        names = dict(network.named_parameters(remove_duplicate=False))  # a shared one by each of its names
        for place in learns:
            if not any(_within(name, place) for name in names):
                raise ValueError(f"the network has no parameter {place!r}; it has {', '.join(names)}")
        learning = {id(p) for name, p in names.items() if any(_within(name, place) for place in learns)}
        self.learns = tuple(name for name, p in network.named_parameters() if id(p) in learning)

    def attached(self, *inputs, **keywords) -> Tensor:
        frozen = {name: p.detach() for name, p in self.network.named_parameters() if name not in self.learns}
        return functional_call(self.network, frozen, inputs, keywords)

    def examine(self, output) -> None:
        pass  # nothing below the readout learns


class FeedbackAlignment(Rule):
    """The error goes back through fixed random weights in place of the transposed ones (Lillicrap et al., 2016).

    Args:
        feedback: one tensor per layer weight, by the weight's name and of its shape. Default: drawn from a normal
            distribution with the standard deviation that the weight has now.
        generator: for that draw.
        added: names of parameters with two or more dimensions, held by modules of your own, that are added to
            activities and do not multiply them: position embeddings, initial states. (Those whose first dimension is 1
            need not be named.)

    Raises:
        TypeError: the network has no layers, or keeps weights where the rule cannot follow them (module docstring); at
            a call, it multiplies activities by a learned tensor outside its layers.
        ValueError: `feedback` does not fit the weights of the network; an unknown name in `added`.
    """

    def __init__(
        self,
        network: nn.Module,
        feedback: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        added: Iterable[str] = (),
    ):
        super().__init__(network)
        _require_layers(network, tuple(added))
        weights = layer_weights(network)
        if feedback is None:
            feedback = {name: _normal_like(w, w.detach().std(), generator) for name, w in weights.items()}
        expected = {name: tuple(weight.shape) for name, weight in weights.items()}
        if (given := {name: tuple(B.shape) for name, B in feedback.items()}) != expected:
            raise ValueError(f"feedback weights must have the names and shapes {expected}, not {given}")
        self.feedback = _Buffers([feedback[name].detach().clone() for name in weights])

    def attached(self, *inputs, **keywords) -> Tensor:
        with _FeedbackPass(self.network, self.feedback_weights()):
            return self.network(*inputs, **keywords)

    def feedback_weights(self) -> dict[str, Tensor]:
        return dict(zip(layer_weights(self.network), self.feedback, strict=True))


class _FeedbackPass(_Pass):
    def layer(self, linear_map, options, source):
        layer_input = options.pop("input")
        output = linear_map(input=layer_input.detach(), **options)
        if not layer_input.requires_grad:
            return output
        options = {name: value for name, value in options.items() if name not in ("weight", "bias")}
        return _Transport.apply(
            output, layer_input, _transpose(linear_map, options, source.stand_in, layer_input.shape)
        )


class AlignProp(FeedbackAlignment):
    """Feedback alignment with the initial weights as feedback weights. `added` and errors as for FeedbackAlignment."""

    def __init__(self, network: nn.Module, added: Iterable[str] = ()):
        _require_plain(network)
        super().__init__(network, layer_weights(network), added=added)


class DirectFeedbackAlignment(Rule):
    """The error e at the output goes straight to every block through a fixed random weight (Nokland, 2016).

    A block is a layer with what follows it, up to and including the first activation function; without one, up to the
    next layer. e lands on the block's activity and goes back to its parameters through the block's current derivatives.

    Args:
        feedback: one tensor per block, in the order of the forward pass: (outputs, *activity shape without batch), or
            (outputs, channels) to project activities averaged over their positions. Default: drawn at the first call,
            normal with standard deviation 1/sqrt(entries of an activity).
        pooled: draw the default feedback for activities averaged over their positions.
        generator: for that draw.
        added: as for FeedbackAlignment.

    Raises:
        TypeError: as for FeedbackAlignment.
        ValueError: at a call, `feedback` does not fit the network's blocks, the network ends in an activation, or an
            activity's first dimension is not the output's (the batch); an unknown name in `added`.
    """

    def __init__(
        self,
        network: nn.Module,
        feedback: Iterable[Tensor] | None = None,
        pooled: bool = False,
        generator: torch.Generator | None = None,
        added: Iterable[str] = (),
    ):
        super().__init__(network)
        _require_layers(network, tuple(added))
        self.pooled, self.generator = pooled, generator
        self.feedback = _Buffers([] if feedback is None else [B.detach().clone() for B in feedback])
        self.drawn = feedback is not None

    def attached(self, *inputs, **keywords) -> Tensor:
        # e does not go back to the inputs either; a gradient there would make them a block.
        inputs, keywords = _detached(inputs), _detached(keywords)
        with (blocks := _DirectPass(self.network)):
            output = _one_tensor(self.network(*inputs, **keywords))
        if not output.dim():
            raise ValueError("the network returns a single number; DirectFeedbackAlignment needs outputs per example")
        if not output.requires_grad:
            raise ValueError(
                "the network ends in an activation function, behind which its last layer would not see its own error; "
                "apply that function outside the network"
            )
        if not self.drawn:
            self._draw(output, blocks.activities)
        self._check(output, blocks.activities)
        return _Broadcast.apply(output, list(self.feedback), *blocks.activities)

    def _draw(self, output: Tensor, activities: list[Tensor]) -> None:
        outputs = output[0].numel()
        for activity in activities:
            shape = activity.shape[1:2] if self.pooled else activity.shape[1:]
            empty = torch.empty(outputs, *shape, dtype=activity.dtype, device=activity.device)
            self.feedback.append(_normal_like(empty, shape.numel() ** -0.5, self.generator))
        self.drawn = True

    def _check(self, output: Tensor, activities: list[Tensor]) -> None:
        outputs = output[0].numel()
        if any(activity.shape[0] != output.shape[0] for activity in activities):
            raise ValueError(
                "DirectFeedbackAlignment needs activities whose first dimension is the output's, the batch"
            )
        shapes = [(outputs, *activity.shape[1:]) for activity in activities]
        given = [tuple(B.shape) for B in self.feedback]
        fits = [B in (shape, shape[:2]) for B, shape in zip(given, shapes, strict=False)]
        if len(given) != len(shapes) or not all(fits):
            raise ValueError(f"feedback weights must have the shapes {shapes} (or their first two), not {given}")

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        # Weights drawn at the first call are not there yet when a checkpoint is loaded into a fresh rule.
        stored = [name for name in state_dict if name.startswith(f"{prefix}feedback.")]
        if not self.drawn and stored:
            like = next(iter(layer_weights(self.network).values()))
            for k in range(len(stored)):
                self.feedback.append(like.new_empty(state_dict[f"{prefix}feedback.{k}"].shape))
            self.drawn = True
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class _DirectPass(_Pass):
    """Cuts the network behind every block; what still has a gradient in front of a cut belongs to the block."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.activities: list[Tensor] = []

    def activation(self, function, arguments, keywords):
        # Behind no layer: an activation function of a parameter is part of the block that uses it.
        if not arguments[0].requires_grad or self.find(arguments[0]) is not None:
            return function(*arguments, **keywords)
        activate, argument = _out_of_place(function, arguments, keywords)
        landed = self.land(activate(argument))
        return landed if argument is arguments[0] else arguments[0].detach_().copy_(landed)

    def layer(self, linear_map, options, source):
        if options["input"].requires_grad:
            options["input"] = self.land(options["input"])
        output = linear_map(**options)
        # Behind a frozen layer too, so that freezing changes what learns and not where the blocks are.
        return output if output.requires_grad else output.detach().requires_grad_()

    def land(self, activity: Tensor) -> Tensor:
        self.activities.append(activity)
        return activity.detach()


class _FromInitial(Rule):
    """A rule that keeps the network as it was when the rule was made, in `initial`.

    Args:
        live: names of parameters that the initial network reads at their current value, because they are activities
            and not weights: the learned initial state of a recurrent network.
    """

    def __init__(self, network: nn.Module, live: Iterable[str] = ()):
        super().__init__(network)
        _require_plain(network)
        self.initial = copy.deepcopy(network).requires_grad_(False)
        self.initial.zero_grad()
        self.live = tuple(live)
        _require_parameters(network, self.live)

    def prepare_initial(self) -> None:
        """Put every module of the initial network into the mode, train or eval, of the same one in the network.

        And freeze it again, where `rule.requires_grad_()` was meant for the network.
        """
        for parameter in self.initial.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                parameter.requires_grad_(False)
        for module, current in zip(self.initial.modules(), self.network.modules(), strict=True):
            if module.training != current.training:
                module.training = current.training

    def feedback_weights(self) -> dict[str, Tensor]:
        return layer_weights(self.initial)


class _CopiedPass(TorchFunctionMode):
    """A run of the initial network that must not use the current one's parameters, but for live ones."""

    def __init__(self, network: nn.Module, live: Iterable[str]):
        super().__init__()
        self.foreign = {id(parameter) for name, parameter in network.named_parameters() if name not in live}

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        _require_copied((arguments, keywords or {}), self.foreign)
        return function(*arguments, **(keywords or {}))


def _require_copied(values, foreign: set[int]) -> None:
    if any(isinstance(tensor, nn.Parameter) and id(tensor) in foreign for tensor in _tensors_in(values)):
        raise TypeError(
            "the copy of the network uses the original's parameters, because a function that it holds refers to the "
            "original (a lambda or a replaced `forward`); refer to modules through self"
        )


class AlignZero(_FromInitial):
    """The gradient of the initial network at the current error: J(theta0)^T e, applied to the current parameters.

    output = sg(f) + f0 - sg(f0), and d(output)/d(theta0) is what theta gets. Takes any network, fused modules included.
    """

    def attached(self, *inputs, **keywords) -> Tensor:
        repeat = _Repeat(self.network)
        with torch.no_grad():
            output = _one_tensor(self.network(*inputs, **keywords))
        with repeat:
            return swap_grad(output, self.from_initial(self.network, *inputs, **keywords))

    def from_initial(self, target: nn.Module, *inputs, **keywords) -> Tensor:
        """f0, the initial network's output, with d(f0)/d(theta0) going to the namesakes of theta0 in `target`."""
        self.prepare_initial()
        initial = dict(self.initial.named_parameters())
        routed = {
            name: parameter if name in self.live else swap_grad(initial[name], parameter)
            for name, parameter in target.named_parameters()
            if parameter.requires_grad
        }
        with contextlib.nullcontext() if self.examined else _CopiedPass(target, self.live):
            return functional_call(self.initial, routed, inputs, keywords)


class AlignAda(_FromInitial):
    """The initial network's error, paired with the current network's activities.

    Args:
        coupling: "preactivation" or "activity", where the error enters the current network (module docstring).
        live: as for AlignZero.
        uncoupled: names of layers whose input gets no error (the published recurrent rule leaves out its readout).
        added: as for FeedbackAlignment; the names in `live` count as well.

    Raises:
        TypeError: as for FeedbackAlignment.
        ValueError: an unknown coupling or name.
        RuntimeError: at a call, the initial network called other layers than the current one.
    """

    def __init__(
        self,
        network: nn.Module,
        coupling: str = "preactivation",
        live: Iterable[str] = (),
        uncoupled: Iterable[str] = (),
        added: Iterable[str] = (),
    ):
        live = tuple(live)
        _require_layers(network, (*added, *live))
        super().__init__(network, live)
        if coupling not in ("preactivation", "activity"):
            raise ValueError(f"coupling must be 'preactivation' or 'activity', not {coupling!r}")
        self.coupling = coupling
        self.uncoupled = tuple(f"{name}.weight" for name in uncoupled)
        if unknown := set(self.uncoupled) - set(layer_weights(network)):
            raise ValueError(f"the network has no layer with the weight {', '.join(sorted(unknown))}")

    def attached(self, *inputs, **keywords) -> Tensor:
        self.prepare_initial()
        repeat = _Repeat(self.network)
        with (current := _CurrentPass(self.network)):
            output = _one_tensor(self.network(*inputs, **keywords))
        # Live values reach the current network with their gradient; a second way to them would count it twice.
        live = {name: self.network.get_parameter(name).detach() for name in self.live}
        with repeat, (initial := _InitialPass(self, current.calls)):
            copied = functional_call(self.initial, live, _detached(inputs), _detached(keywords))
        initial.finish()
        return couple(output, copied)


class _Activity(NamedTuple):
    """What a tensor remembers if it came out of an activation function: tensor = function(argument).

    `argument` shares its content with the tensor that the network has, but not what becomes of that one's gradient if
    the network changes it in place afterwards. `versions` are those of argument and tensor when they were made, by
    which such changes show.
    """

    argument: Tensor
    function: Callable[[Tensor], Tensor]
    versions: tuple[int, int]


def _activity(tensor: Tensor) -> _Activity | None:
    """Where the tensor came from; None if it has been changed since."""
    activity = getattr(tensor, "_activity", None)
    return activity if activity is not None and activity.versions[1] == _version(tensor) else None


def _version(tensor: Tensor) -> int:
    """Counts changes of a tensor's content in place; a compiled graph has no such count, and sees them by name."""
    return 0 if torch.compiler.is_compiling() else tensor._version


class _ActivityPass(_Pass):
    """Remembers of every activity the activation function that it came out of, and that function's argument."""

    def activation(self, function, arguments, keywords):
        activate, argument = _out_of_place(function, arguments, keywords)
        result = activate(argument)
        if argument is not arguments[0]:
            result = arguments[0].copy_(result)
        argument = swap_grad(argument, argument)
        result._activity = _Activity(argument, activate, (_version(argument), _version(result)))
        return result

    def other(self, function, arguments, keywords):
        result = function(*arguments, **keywords)
        if function in RESHAPES and result is not arguments[0] and (activity := _activity(arguments[0])):
            inner, versions = activity.function, (activity.versions[0], _version(result))
            reshaped = lambda tensor: function(inner(tensor), *arguments[1:], **keywords)  # noqa: E731
            result._activity = _Activity(activity.argument, reshaped, versions)
        elif (_in_place(function) or keywords.get("inplace")) and _activity(arguments[0]):
            arguments[0]._activity = None  # it is no longer what came out of the activation function
        return result


class _Call(NamedTuple):
    """A call of a layer in the current network."""

    name: str
    layer_input: Tensor
    activity: _Activity | None


class _CurrentPass(_ActivityPass):
    """Cuts the current network at the input of every layer, and remembers what was there."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.calls: list[_Call] = []

    def layer(self, linear_map, options, source):
        layer_input = options["input"]
        self.calls.append(_Call(source.parameter, layer_input, _activity(layer_input)))
        options["input"] = layer_input.detach()
        return linear_map(**options)


class _InitialPass(_ActivityPass):
    """Couples the input of every layer of the initial network with that of the same call in the current network."""

    remedy = "AlignAda needs a network whose order of calls does not depend on its parameters"

    def __init__(self, rule: AlignAda, calls: list[_Call]):
        super().__init__(rule.initial)
        self.rule, self.calls, self.made = rule, calls, 0
        self.foreign = {id(parameter) for parameter in rule.network.parameters()}

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        _require_copied((arguments, keywords or {}), self.foreign)
        return super().__torch_function__(function, types, arguments, keywords)

    def layer(self, linear_map, options, source):
        call, name = self.calls[self.made] if self.made < len(self.calls) else None, source.parameter
        self.made += 1
        if call is None or call.name != name:
            raise RuntimeError(f"the initial network calls {name} where the current one does not: {self.remedy}")
        if name not in self.rule.uncoupled:
            options["input"] = self.coupled(options["input"], call)
        return linear_map(**options)

    def coupled(self, layer_input: Tensor, call: _Call) -> Tensor:
        readout = call.name == self.calls[-1].name
        if self.rule.coupling == "activity" or readout or call.activity is None:
            return couple(layer_input, call.layer_input)
        activity = _activity(layer_input)
        if activity is None or activity.versions[0] != _version(activity.argument):
            raise RuntimeError(
                f"the argument of the activation function in front of {call.name} is changed in place before that "
                "layer is called, but AlignAda still needs it; write the change out of place (x = x + y for x += y)"
            )
        return activity.function(couple(activity.argument, call.activity.argument))

    def finish(self) -> None:
        if self.made != len(self.calls):
            missed = self.calls[self.made].name
            raise RuntimeError(f"the current network calls {missed} where the initial one does not: {self.remedy}")


RULES: dict[str, type[Rule]] = {
    "backprop": Backprop,
    "last_layer": LastLayer,
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "align_prop": AlignProp,
    "align_ada": AlignAda,
    "align_zero": AlignZero,
}


# --------------------------------------------------------------------------------------------------------- alignment


def gradient_angles(
    rule: Rule, loss_function: Callable[[Tensor], Tensor], *inputs, **keywords
) -> dict[str, float | None]:
    """Angles between the gradients that a rule has left in .grad and those of backprop, at one forward and backward.

    To be called between `loss.backward()` and the optimiser's step, with the inputs that were given to the rule; under
    autocast where the rule was. It changes neither .grad, parameters, buffers (running statistics) nor the state of the
    generators of random numbers. Dropout draws masks other than the step's, unless that state is first put back to
    what it was before the step.

    Args:
        loss_function: from the network's output to the loss, a scalar.

    Returns:
        Degrees, 0 to 180, for every layer's weight by its name; None where one of the two gradients is missing or zero.
    """
    network, weights = rule.network, layer_weights(rule.network)
    learning = {name: weight for name, weight in weights.items() if weight.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.enable_grad(), _Repeat(network):
        loss = loss_function(functional_call(network, buffers, inputs, keywords))
        with torch.autocast(loss.device.type, enabled=False):  # which is for forward passes
            exact = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    exact = dict(zip(learning, exact, strict=True))
    return {name: _angle(weight.grad, exact.get(name)) for name, weight in weights.items()}


def feedback_angles(rule: Rule) -> dict[str, float | None]:
    """Angles between the weights that errors go back through and the current ones, as they stand.

    Errors go back through B in FeedbackAlignment and through the initial weights in AlignProp, AlignAda and AlignZero.

    Returns:
        Degrees, 0 to 180, for every layer's weight by its name; None where one of the two is zero. Empty for rules
        without weights to compare (Backprop, LastLayer, DirectFeedbackAlignment).
    """
    weights = layer_weights(rule.network)
    return {name: _angle(feedback, weights[name]) for name, feedback in rule.feedback_weights().items()}


def _angle(one: Tensor | None, other: Tensor | None) -> float | None:
    """Between two tensors as vectors, in degrees; None where it is undefined."""
    if one is None or other is None:
        return None
    one, other = one.detach().double().flatten(), other.detach().double().flatten()
    if not one.any() or not other.any():
        return None
    one, other = one / one.norm(), other / other.norm()
    # Exact for small angles too, unlike the arc cosine (Kahan, 2006, "How futile are mindless assessments").
    return math.degrees(2 * math.atan2((one - other).norm().item(), (one + other).norm().item()))


class _Buffers(nn.Module):
    """A list of tensors that move and are saved with the module that holds them."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        self.register_buffer(str(len(self)), tensor)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self):
        return iter(self._buffers.values())


class _Repeat:
    """Made before a pass and entered for the next, it makes both draw the same random numbers, for dropout."""

    def __init__(self, network: nn.Module):
        # Reading the state breaks a compiled graph; outside one it costs microseconds, and any function may draw.
        dropout = any(isinstance(module, _DropoutNd) and module.training for module in network.modules())
        self.needed = dropout or not torch.compiler.is_compiling()
        if self.needed:
            self.devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
            self.state = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self.devices]

    def __enter__(self):
        if self.needed:
            self.fork = torch.random.fork_rng(self.devices)
            self.fork.__enter__()
            torch.set_rng_state(self.state[0])
            for device, state in zip(self.devices, self.state[1], strict=True):
                torch.cuda.set_rng_state(state, device)

    def __exit__(self, *error):
        if self.needed:
            self.fork.__exit__(*error)


def _map_tensors(function: Callable[[Tensor], Any], values):
    """The same values, with the function applied to every tensor in them, in tuples, lists and dictionaries too."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: _map_tensors(function, value) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_map_tensors(function, value) for value in values)
    return values


def _tensors_in(values) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)) or isinstance(values, torch.Size):
        return []
    return [tensor for value in values for tensor in _tensors_in(value)]


def _detached(values):
    """The same values, with every tensor in them cut from its graph."""
    return _map_tensors(Tensor.detach, values)


def _one_tensor(output) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"the network returns a {type(output).__name__}, but this rule needs one tensor")
    return output


def _within(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")  # "" is the network itself


def _normal_like(tensor: Tensor, std: float | Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return (drawn * float(std)).to(tensor.device)
