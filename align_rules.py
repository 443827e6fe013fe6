"""Learning rules for wide networks, as drop-in forward passes with another backward pass.

    rule = align_rules.AlignAda(network)          # snapshots the initial parameters
    loss = loss_function(rule(inputs), targets)   # rule(inputs) equals network(inputs) to the last bit
    loss.backward()                               # fills .grad by the rule; any torch optimiser steps

The rules are those of Boopathy & Fiete, "How to Train Your Wide Neural Network Without Backprop: An Input-Weight
Alignment Perspective" (ICML 2022, arXiv 2106.08453), and the ones it compares with. This file imports torch only and
can be copied alone into another project.

Principle. A *layer* is a call of a linear map with a learned weight (torch.nn.Linear, torch.nn.Conv1d, 2d, 3d and their
subclasses). Everything else a network is made of (biases, normalisation, activations, pooling, additions, reshaping) is
differentiated as it stands. Backprop sends the error delta that arrives at a layer's output on to the layer's input
through the transpose of its current weight; a rule sends something else there. That, and which activity the layer's
own weight gradient is formed with, is all that distinguishes the rules. With e the gradient of the loss at the output
of the network, W the current weight, W0 the initial one, B a fixed random one, a the input activity of the layer, and
an index 0 for what the same network computes and sends back with all of its initial parameters (section 4 of the
paper):

    rule                     error sent to the layer's input          weight gradient        memory beside the network
    Backprop                 W^T delta                                delta a^T              -
    LastLayer                none                                     e a^T, readout only    -
    FeedbackAlignment        B^T delta                                delta a^T              B, like the weights
    AlignProp                W0^T delta                               delta a^T              W0
    DirectFeedbackAlignment  B^T e, at the block's activity           delta a^T              B, outputs x activities
    AlignAda                 W0^T delta0 (delta0: initial network)    delta a^T              the initial network
    AlignZero                W0^T delta0                              delta0 a0^T            the initial network

In every rule e is computed at the current network's output, and the layers above the last learn by their own gradient.

Where the AlignAda error enters the current network: at the argument of the activation function in front of the layer if
there is one (so that the initial network's derivative of the activation is used, as published), else at the layer's
input; at the readout, which is the layer called last, always at its input. `coupling="activity"` puts it at the layer's
input everywhere, which is how the paper defines the rule for recurrent networks.

Where the DirectFeedbackAlignment error enters: at the output of the first activation function after a layer, or at the
input of the next layer if none comes before it. Nothing flows back past such a place.
"""

import copy
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

LINEAR_MAPS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
LINEAR_MAP_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

ACTIVATIONS = {
    F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus,
    F.softsign, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.threshold,
    F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.tanh, torch.tanh, Tensor.tanh,
}  # fmt: skip

# Between an activation function and a layer these change nothing but shape and borders.
RESHAPES = {
    F.pad, torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.permute, Tensor.transpose,
    Tensor.squeeze, Tensor.unsqueeze, Tensor.contiguous,
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
        error = gradient.flatten(1)  # (batch, outputs)
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
    if isinstance(options.get("padding"), str):
        raise NotImplementedError(f"padding={options['padding']!r} is not supported; give the padding as numbers")
    return lambda error: gradients[linear_map](shape, weight.to(error.dtype), error.contiguous(), **options)


# ------------------------------------------------------------------------------------- following a network's own calls


class _Activity(NamedTuple):
    """What a tensor remembers if it came out of an activation function: tensor = function(argument)."""

    argument: Tensor
    function: Callable[[Tensor], Tensor]


def _activity(tensor: Tensor) -> _Activity | None:
    return getattr(tensor, "_activity", None)


def _in_place(function: Callable) -> bool:
    name = function.__name__
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return name.endswith("_")


class _Pass(TorchFunctionMode):
    """One run of a network during which `layer` and `activation` stand in for its calls of linear maps and activations.

    `weights` maps each layer's weight to its name and, where a rule wants one, the weight that stands in for it in the
    backward pass. A weight that the network scales, casts or reshapes before use is followed, and so is its stand-in.
    """

    def __init__(self, weights: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.weights = {id(weight): (name, (stand_ins or {}).get(name)) for name, weight in weights.items()}

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if not arguments and "input" in keywords:
            arguments = (keywords.pop("input"),)
        if function in LINEAR_MAPS:
            options = dict(zip(LINEAR_MAP_ARGUMENTS, arguments, strict=False)) | keywords
            found = self.find(options["weight"])
            if found is not None:
                return self.layer(function, options, *found)
        elif function in ACTIVATIONS:
            return self.activation(function, arguments, keywords)
        elif self.derives(arguments, keywords):
            return self.derive(function, arguments, keywords)
        result = function(*arguments, **keywords)
        if function in RESHAPES and result is not arguments[0] and (activity := _activity(arguments[0])):
            inner = activity.function
            result._activity = _Activity(activity.argument, lambda t: function(inner(t), *arguments[1:], **keywords))
        elif _in_place(function) and _activity(arguments[0]):
            arguments[0]._activity = None  # it is no longer what came out of the activation function
        return result

    def find(self, tensor: Tensor) -> tuple[str, Tensor | None] | None:
        return self.weights.get(id(tensor)) or getattr(tensor, "_weight", None)

    def derives(self, arguments, keywords) -> bool:
        """Whether a call takes weights and no other tensor."""
        tensors = [a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)]
        return bool(tensors) and all(self.find(tensor) is not None for tensor in tensors)

    def derive(self, function, arguments, keywords):
        result = function(*arguments, **keywords)
        if isinstance(result, Tensor):
            name, stand_in = next(found for a in arguments if isinstance(a, Tensor) and (found := self.find(a)))
            if stand_in is not None:
                with torch.no_grad():
                    replaced = [self.find(a)[1] if isinstance(a, Tensor) else a for a in arguments]
                    stand_in = function(*replaced, **keywords)
            result._weight = (name, stand_in)
        return result

    def activation(self, function, arguments, keywords):
        if keywords.get("inplace"):  # the argument is still needed; in place saves memory and changes no value
            keywords = keywords | {"inplace": False}
        result = function(*arguments, **keywords)
        result._activity = _Activity(arguments[0], lambda t: function(t, *arguments[1:], **keywords))
        return result

    def layer(self, linear_map, options, name, stand_in):
        return linear_map(**options)


def layer_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that a rule treats as layers', by name, in order of registration."""
    return {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in network.named_modules()
        if isinstance(module, LAYERS)
    }


def _require_layers(network: nn.Module) -> None:
    """Raise TypeError where a network keeps weights in a form that the layer-wise rules cannot follow."""
    for name, module in network.named_modules():
        if isinstance(module, FUSED):
            raise TypeError(
                f"{name or 'the network'} is a {type(module).__name__}, whose weights are used inside one fused call; "
                "write it with torch.nn.Linear layers to use this rule (Backprop and AlignZero take it as it is)"
            )
        if isinstance(module, LAYERS) and "weight" not in module._parameters:
            raise TypeError(
                f"{name or 'the network'} makes its weight from other parameters (weight norm, for example), which "
                "this rule cannot follow; remove the parametrisation (Backprop and AlignZero take it as it is)"
            )
    if not layer_weights(network):
        raise TypeError("the network has no torch.nn.Linear or torch.nn.Conv layer that a rule could teach")


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

    def forward(self, *inputs, **keywords) -> Tensor:
        if not torch.is_grad_enabled():
            return self.network(*inputs, **keywords)
        return self.attached(*inputs, **keywords)

    def attached(self, *inputs, **keywords) -> Tensor:
        """The network's output with the rule's gradient."""
        raise NotImplementedError


class Backprop(Rule):
    """Gradient descent as it is, for comparison."""

    def attached(self, *inputs, **keywords) -> Tensor:
        return self.network(*inputs, **keywords)


class LastLayer(Rule):
    """Only the readout learns; no graph is kept below it.

    Args:
        learns: names of the parameters, or of modules that hold them, that learn. Default: the last layer registered.

    Raises:
        ValueError: a name in `learns` is no parameter or module with parameters of the network.
    """

    def __init__(self, network: nn.Module, learns: Iterable[str] | None = None):
        super().__init__(network)
        if learns is None:
            _require_layers(network)
            learns = [list(layer_weights(network))[-1].removesuffix("weight").removesuffix(".")]
        names = [name for name, _ in network.named_parameters()]
        self.learns = tuple(name for name in names if any(_within(name, place) for place in learns))
        for place in learns:
            if not any(_within(name, place) for name in names):
                raise ValueError(f"the network has no parameter {place!r}; it has {', '.join(names)}")

    def attached(self, *inputs, **keywords) -> Tensor:
        frozen = {name: p.detach() for name, p in self.network.named_parameters() if name not in self.learns}
        return functional_call(self.network, frozen, inputs, keywords)


class FeedbackAlignment(Rule):
    """The error goes back through fixed random weights in place of the transposed ones (Lillicrap et al., 2016).

    Args:
        feedback: one tensor per layer weight, by the weight's name and of its shape. Default: drawn from a normal
            distribution with the standard deviation that the weight has now.
        generator: for that draw.

    Raises:
        TypeError: the network has fused modules, or no layers.
        ValueError: `feedback` does not fit the weights of the network.
    """

    def __init__(
        self,
        network: nn.Module,
        feedback: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(network)
        _require_layers(network)
        weights = layer_weights(network)
        if feedback is None:
            feedback = {name: _normal_like(w, w.detach().std(), generator) for name, w in weights.items()}
        expected = {name: tuple(weight.shape) for name, weight in weights.items()}
        if (given := {name: tuple(B.shape) for name, B in feedback.items()}) != expected:
            raise ValueError(f"feedback weights must have the names and shapes {expected}, not {given}")
        self.feedback = _Buffers([feedback[name].detach().clone() for name in weights])

    def attached(self, *inputs, **keywords) -> Tensor:
        weights = layer_weights(self.network)
        with _FeedbackPass(weights, dict(zip(weights, self.feedback, strict=True))):
            return self.network(*inputs, **keywords)


class _FeedbackPass(_Pass):
    def layer(self, linear_map, options, name, stand_in):
        layer_input = options.pop("input")
        output = linear_map(input=layer_input.detach(), **options)
        if not layer_input.requires_grad:
            return output
        options = {name: value for name, value in options.items() if name not in ("weight", "bias")}
        return _Transport.apply(output, layer_input, _transpose(linear_map, options, stand_in, layer_input.shape))


class AlignProp(FeedbackAlignment):
    """Feedback alignment with the initial weights as feedback weights."""

    def __init__(self, network: nn.Module):
        super().__init__(network, layer_weights(network))


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

    Raises:
        TypeError: the network has fused modules, or no layers.
        ValueError: at a call, `feedback` does not fit the network's blocks, or the network ends in an activation.
    """

    def __init__(
        self,
        network: nn.Module,
        feedback: Iterable[Tensor] | None = None,
        pooled: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(network)
        _require_layers(network)
        self.pooled, self.generator = pooled, generator
        self.feedback = _Buffers([] if feedback is None else [B.detach().clone() for B in feedback])
        self.drawn = feedback is not None

    def attached(self, *inputs, **keywords) -> Tensor:
        # e does not go back to the inputs either; a gradient there would make them a block.
        inputs, keywords = _detached(inputs), _detached(keywords)
        with (blocks := _DirectPass(layer_weights(self.network))):
            output = self.network(*inputs, **keywords)
        if blocks.landed_last:
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

    def __init__(self, weights):
        super().__init__(weights)
        self.activities: list[Tensor] = []
        self.landed_last = False

    def activation(self, function, arguments, keywords):
        result = super().activation(function, arguments, keywords)
        return self.land(result) if arguments[0].requires_grad else result

    def layer(self, linear_map, options, name, stand_in):
        if options["input"].requires_grad:
            options["input"] = self.land(options["input"])
        self.landed_last = False
        return linear_map(**options)

    def land(self, activity: Tensor) -> Tensor:
        self.activities.append(activity)
        self.landed_last = True
        return activity.detach()


class _FromInitial(Rule):
    """A rule that keeps the network as it was when the rule was made, in `initial`.

    Args:
        live: names of parameters that the initial network reads at their current value, because they are activities
            and not weights: the learned initial state of a recurrent network.
    """

    def __init__(self, network: nn.Module, live: Iterable[str] = ()):
        super().__init__(network)
        self.initial = copy.deepcopy(network).requires_grad_(False)
        self.initial.zero_grad()
        self.live = tuple(live)
        names = dict(network.named_parameters())
        for name in self.live:
            if name not in names:
                raise ValueError(f"the network has no parameter {name!r}; it has {', '.join(names)}")


class AlignZero(_FromInitial):
    """The gradient of the initial network at the current error: J(theta0)^T e, applied to the current parameters.

    output = sg(f) + f0 - sg(f0), and d(output)/d(theta0) is what theta gets. Takes any network, fused modules included.
    """

    def attached(self, *inputs, **keywords) -> Tensor:
        repeat = _Repeat(self.network)
        with torch.no_grad():
            output = self.network(*inputs, **keywords)
        with repeat:
            return swap_grad(output, self.from_initial(self.network, *inputs, **keywords))

    def from_initial(self, target: nn.Module, *inputs, **keywords) -> Tensor:
        """f0, the initial network's output, with d(f0)/d(theta0) going to the namesakes of theta0 in `target`."""
        initial = dict(self.initial.named_parameters())
        routed = {
            name: parameter if name in self.live else swap_grad(initial[name], parameter)
            for name, parameter in target.named_parameters()
            if parameter.requires_grad
        }
        return functional_call(self.initial, routed, inputs, keywords)


class AlignAda(_FromInitial):
    """The initial network's error, paired with the current network's activities.

    Args:
        coupling: "preactivation" or "activity", where the error enters the current network (module docstring).
        live: as for AlignZero.
        uncoupled: names of layers whose input gets no error (the published recurrent rule leaves out its readout).

    Raises:
        TypeError: the network has fused modules, or no layers.
        ValueError: an unknown coupling or name.
        RuntimeError: at a call, the initial network called other layers than the current one.
    """

    def __init__(
        self,
        network: nn.Module,
        coupling: str = "preactivation",
        live: Iterable[str] = (),
        uncoupled: Iterable[str] = (),
    ):
        super().__init__(network, live)
        _require_layers(network)
        if coupling not in ("preactivation", "activity"):
            raise ValueError(f"coupling must be 'preactivation' or 'activity', not {coupling!r}")
        self.coupling = coupling
        self.uncoupled = tuple(f"{name}.weight" for name in uncoupled)
        if unknown := set(self.uncoupled) - set(layer_weights(network)):
            raise ValueError(f"the network has no layer with the weight {', '.join(sorted(unknown))}")

    def attached(self, *inputs, **keywords) -> Tensor:
        repeat = _Repeat(self.network)
        with (current := _CurrentPass(layer_weights(self.network))):
            output = self.network(*inputs, **keywords)
        # Live values reach the current network with their gradient; a second way to them would count it twice.
        live = {name: self.network.get_parameter(name).detach() for name in self.live}
        with repeat, (initial := _InitialPass(self, current.calls)):
            copied = functional_call(self.initial, live, _detached(inputs), _detached(keywords))
        initial.finish()
        return couple(output, copied)


class _Call(NamedTuple):
    """A call of a layer in the current network."""

    name: str
    layer_input: Tensor
    activity: _Activity | None


class _CurrentPass(_Pass):
    """Cuts the current network at the input of every layer, and remembers what was there."""

    def __init__(self, weights):
        super().__init__(weights)
        self.calls: list[_Call] = []

    def layer(self, linear_map, options, name, stand_in):
        layer_input = options["input"]
        self.calls.append(_Call(name, layer_input, _activity(layer_input)))
        options["input"] = layer_input.detach()
        return linear_map(**options)


class _InitialPass(_Pass):
    """Couples the input of every layer of the initial network with that of the same call in the current network."""

    def __init__(self, rule: AlignAda, calls: list[_Call]):
        super().__init__(layer_weights(rule.initial))
        self.rule, self.calls, self.made = rule, calls, 0

    def layer(self, linear_map, options, name, stand_in):
        call = self.calls[self.made] if self.made < len(self.calls) else None
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
        return activity.function(couple(activity.argument, call.activity.argument))

    def finish(self) -> None:
        if self.made != len(self.calls):
            missed = self.calls[self.made].name
            raise RuntimeError(f"the current network calls {missed} where the initial one does not: {self.remedy}")

    remedy = "AlignAda needs a network whose order of calls does not depend on its parameters"


RULES: dict[str, type[Rule]] = {
    "backprop": Backprop,
    "last_layer": LastLayer,
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "align_prop": AlignProp,
    "align_ada": AlignAda,
    "align_zero": AlignZero,
}


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
        self.needed = any(isinstance(module, _DropoutNd) and module.training for module in network.modules())
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


def _detached(values):
    """The same values, with every tensor in them, in tuples, lists and dictionaries too, cut from its graph."""
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, dict):
        return {name: _detached(value) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_detached(value) for value in values)
    return values


def _within(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")  # "" is the network itself


def _normal_like(tensor: Tensor, std: float | Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return (drawn * float(std)).to(tensor.device)
