"""Learning rules for wide networks, as drop-in forward passes with another backward pass.

    rule = align_rules.AlignAda(network)          # keeps the initial parameters
    loss = loss_function(rule(inputs), targets)   # rule(inputs) has the value of network(inputs)
    loss.backward()                               # fills .grad by the rule; any torch optimiser steps

The rules are those of Boopathy & Fiete, "How to Train Your Wide Neural Network Without Backprop: An Input-Weight
Alignment Perspective" (ICML 2022, arXiv 2106.08453), the ones it compares with, and their nearest relatives. This file
imports torch only and can be copied alone into another project.

Principle. A *layer* is a product (matrix product or convolution) of an activity with something that is made of
parameters alone, its *weight*. Everything else a network is made of (biases, normalisation, activation functions,
pooling, additions, products of activities, look-up) is differentiated as it stands. Backprop sends the error delta that
arrives at a layer's output on to its input through the transpose of its current weight; a rule sends something else
there. That, and which activity the weight's gradient is formed with, is all that distinguishes the rules. With e the
gradient of the loss at the network's output, W the current weight, W0 the initial one, B a random one, a the layer's
input, and an index 0 for what the same network computes and sends back with all of its initial parameters (section 4):

    rule                     error sent to the layer's input          weight gradient        memory beside the network
    Backprop                 W^T delta                                delta a^T              -
    LastLayer                none                                     e a^T, readout only    -
    FeedbackAlignment        B^T delta                                delta a^T              B, like the weights
    AlignProp                W0^T delta                               delta a^T              W0
    SignSymmetry             (M o sign W)^T delta                     delta a^T              M, like the weights
    KolenPollack             B^T delta, and B learns: dB = delta a^T  delta a^T              B, like the weights
    WeightMirror             B^T delta, and B is estimated from noise delta a^T              B, like the weights
    DirectFeedbackAlignment  B^T e, at the block's activity           delta a^T              B, outputs x activities
    AlignAda                 W0^T delta0 (delta0: initial network)    delta a^T              the initial parameters
    AlignZero                W0^T delta0                              delta0 a0^T            the initial parameters

In every rule e is computed at the current network's output, and the layers above the last learn by their own gradient.

Weights. B, M and W0 stand in for parameters and go through all that the network makes of these before they meet an
activity: scaling, masks, casts, W + A C of an adapter (B for all three), slices of packed attention and of LSTM, GRU
and RNN. Tied weights share one B. In weight norm B stands in for v, and g, a gain, for itself; in spectral norm B is
divided by its own norm along the network's vectors u and v; standardised weights standardise B. Complex weights have
complex B, and errors go back through the conjugate transpose. nn.Bilinear's activity is the outer product of its
inputs. A product of two weights is no layer, nor is one of two activities (attention scores).
`recurrence` is a loop over such layers as one operator: a layer that reads its own states.

Blocks. A block is a layer with all that follows it up to the next layers, on every path: the error that enters at their
inputs goes back through the block's own derivatives, to its bias and normalisation, and becomes the layer's delta.

- AlignAda: the error enters at the argument of the activation function in front of the next layer if there is one, with
  nothing between but functions that rearrange, copy or pad its entries alone (so that the initial network's derivative
  of the activation is used, as published), else at the layer's input; at the readout, which is the layer called last,
  always at its input. `coupling="activity"` puts it at the layer's input everywhere, which is how the paper defines the
  rule for recurrent networks.
- DirectFeedbackAlignment: a block ends at the output of the first activation function after the layer, or at the input
  of the next layer if none comes before it. e enters there, and nothing flows back past such a place.

Activation functions are those in ACTIVATIONS; others, and those with parameters, count as part of the block.

Branches. Errors add up wherever an activity is used more than once, as in backprop: a residual addition hands the error
to both of its sides, a concatenation to each its part, and a layer that is called several times gets the sum over its
calls. A skip connection is cut by no layer, so an error that enters behind it goes back along it, through the current
network's derivatives (in AlignZero the initial network's), to all the blocks that it passes; in DirectFeedbackAlignment
as far as the next end of a block.

The initial network is its parameters and its own statistics (buffers named in STATISTICS), which its own activities
update in the same steps. All else it shares with the current one: modules, modes, random draws, which are made once,
and the state that the network keeps between calls, from which both start. Frozen parameters do not learn; errors go
through their layers as through the others. Weights of zeros get feedback of zeros, through which nothing goes back.

How it works. torch.compile's Dynamo writes a call down, and notices when anything that Python decided has changed; the
rest of torch makes that one graph of operators; a rule is a small change to the graph, and runs as generated code under
autograd. Each new graph is checked on the batch that caused it: as backprop it must give the network's output and
gradients. What Dynamo cannot write down (control flow on values) is recorded anew at every call, with one warning.
Backward hooks of modules are not called.

A rule is right or raises, with the network's line of code and a remedy: TypeError for a learned tensor that meets
activities in any other way than by a product, entry by entry or by look-up, for a torch.autograd.Function that uses
weights, and for what neither way can write down; RuntimeError for differentiating twice, forward-mode derivatives and
torch.func around a rule (a rule's gradient is the gradient of nothing), for DataParallel, and for modules or parameters
other than those that the rule was made with. Backprop takes all of it.
"""

import collections
import collections.abc
import contextlib
import copy
import functools
import itertools
import math
import operator
import random
import sys
import textwrap
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.fx.traceback
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Names = Iterable[str]  # of parameters, or of modules
Named = Mapping[str, Tensor]

# ------------------------------------------------------------------------------------------------ gradient primitives


def sg(value: Any) -> Any:
    """The stop-gradient."""
    return value.detach() if isinstance(value, Tensor) else value


class _Couple(Function):
    @staticmethod
    def forward(ctx, value: Tensor, path: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _require_once()
        return gradient, gradient


def couple(value: Tensor, path: Tensor) -> Tensor:
    """`value + path - sg(path)`, of one shape: the value of `value`, bit for bit; its gradient goes to both."""
    return _Couple.apply(value, path) if isinstance(path, Tensor) and path.requires_grad else value


def swap_grad(value: Tensor, path: Tensor) -> Tensor:
    """`sg(value) + path - sg(path)`: the value of `value`, bit for bit; its gradient goes to `path` alone."""
    return couple(sg(value), path)


class _Transport(Function):
    @staticmethod
    def forward(ctx, output: Tensor, activity: Tensor, weight: Tensor, product, side: int, options) -> Tensor:
        ctx.save_for_backward(activity, weight)
        ctx.through = product, side, options
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _require_once()
        return gradient, _transposed(gradient, *ctx.saved_tensors, *ctx.through), None, None, None, None


def transport(output: Tensor, activity: Tensor, weight: Tensor, product, side: int, options) -> Tensor:
    """The value `output`; its gradient goes to `output`, and through `weight` to the activity that a layer reads.

    `product` is the layer's operator, `side` tells which factor the activity is, `options` are the operator's others.
    """
    if not activity.requires_grad:
        return output
    return _Transport.apply(output, activity, weight, product, side, options)


def _transposed(gradient: Tensor, activity: Tensor, weight: Tensor, product, side: int, options) -> Tensor:
    """The gradient of a product for its factor `activity`, if the other one is `weight`."""
    if product is aten.convolution.default:
        wanted = (side == 0, side == 1, False)
        factors = (activity, weight) if side == 0 else (weight, activity)
        return aten.convolution_backward(gradient, *factors, None, *options, wanted)[side]
    if activity.dim() + weight.dim() == 2:  # of vectors
        sent = gradient * weight.conj()
    elif activity.dim() + weight.dim() == 3 and product in VECTORS:
        sent = gradient[:, None] * weight.conj() if side == 0 else weight.mH @ gradient
    else:
        sent = gradient @ weight.mH if side == 0 else weight.mH @ gradient
    return sent if options == 1 else options * sent


class _Direct(Function):
    @staticmethod
    def forward(ctx, output: Tensor, send: Callable, count: int, *places: Tensor) -> Tensor:
        ctx.send, ctx.count, ctx.asked = send, len(places) - count, any(place.is_leaf for place in places[count:])
        return output.detach()

    @staticmethod
    def backward(ctx, e: Tensor):
        _require_once()
        if ctx.asked:
            raise RuntimeError(
                "inputs get no error in direct feedback, and one has requires_grad; hand it over as data"
            )
        return e, None, None, *ctx.send(e), *[None] * ctx.count


def direct(output: Tensor, send: Callable[[Tensor], list], ends: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """The value `output`; its gradient e goes to `output` and, as `send(e)`, to the ends of blocks, one for each.

    It does not go to `inputs`: backward() raises RuntimeError where one of them is a leaf that is to have a gradient.
    """
    return _Direct.apply(output, send, len(ends), *ends, *(t for t in inputs if t.requires_grad))


@torch.library.custom_op("align_rules::recurrence", mutates_args=())
def _recurrence(
    s0: Tensor, W: Tensor, drive: Tensor, feedback: Tensor | None = None, path: Tensor | None = None
) -> Tensor:
    """`recurrence`. Errors go back in time through `feedback`; without one through W, and nowhere if it is empty. What
    is sent to states in this way also goes to `path`, a tensor of their shape."""
    states, state, weight = drive.clone(memory_format=torch.contiguous_format), s0, W.t()
    for row in states.unbind():
        state = row.addmm_(state, weight).relu_()
    return states


@_recurrence.register_fake
def _(s0: Tensor, W: Tensor, drive: Tensor, feedback: Tensor | None = None, path: Tensor | None = None) -> Tensor:
    return torch.empty_like(drive, memory_format=torch.contiguous_format)


def _back_in_time(ctx, gradient: Tensor):
    if torch.is_grad_enabled():
        raise RuntimeError("the gradient of a recurrence cannot be differentiated again; write its steps as a loop")
    s0, W, states, feedback = ctx.saved_tensors
    of_s0, of_W, _, _, of_path = (*ctx.needs_input_grad, False, False)[:5]  # arguments left out are left out there
    back = W if feedback is None else feedback
    slopes, sent = states.sign(), torch.zeros_like(states) if of_path else None
    deltas, to_s0, to_W = gradient.clone(memory_format=torch.contiguous_format), None, None
    if back.numel():
        delta = None
        for t, (row, slope) in enumerate(zip(deltas.unbind()[::-1], slopes.unbind()[::-1], strict=True), start=1):
            if delta is not None:
                row.add_(torch.mm(delta, back, out=sent[-t])) if of_path else row.addmm_(delta, back)
            delta = row.mul_(slope)
        to_s0 = delta @ back if of_s0 else None
    else:
        deltas *= slopes
    if of_W:  # the sum over all steps in one product
        to_W = torch.addmm(deltas[0].t() @ s0, deltas[1:].flatten(0, 1).t(), states[:-1].flatten(0, 1))
    return to_s0, to_W, deltas, None, sent


def _keep(ctx, inputs, output) -> None:
    s0, W, _, feedback, _ = inputs
    ctx.save_for_backward(s0, W, output, feedback)


_recurrence.register_autograd(_back_in_time, setup_context=_keep)
RECURRENCE = torch.ops.align_rules.recurrence.default


def recurrence(s0: Tensor, W: Tensor, drive: Tensor) -> Tensor:
    """The states s_t = relu(drive_t + s_{t-1} W^T), (time, batch, width), as one layer: a fast loop in its place.

    Rules do with it what they do with the same steps written one by one, except that AlignAda's errors enter at its
    states with either coupling, and that DirectFeedbackAlignment refuses it.

    Args:
        s0: (batch, width).
        W: (width, width).
        drive: (time, batch, width), in whose type all is computed; at least one time step.

    Raises:
        ValueError: other shapes.
    """
    if not len(drive) or (*s0.shape, *W.shape) != (*drive.shape[1:], *2 * drive.shape[2:]):
        shapes = [tuple(t.shape) for t in (s0, W, drive)]
        raise ValueError(f"s0, W, drive must be (batch, width), (width, width), (time, batch, width), not {shapes}")
    return _recurrence(s0.to(drive.dtype), W.to(drive.dtype), drive)


def _require_once() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a rule's gradient cannot be differentiated again (create_graph=True, as for gradient penalties): it is "
            "the gradient of nothing; only Backprop allows it"
        )


# ------------------------------------------------------------------------------------------------------------ the rules


class Rule(nn.Module):
    """A network with a learning rule: called, it gives the network's own output; differentiated, the rule's gradient.

    Args:
        network: any torch.nn.Module that returns tensors (in tuples, lists, dicts). It is not changed; its parameters
            are the ones that learn.
        activities: names of its parameters that are activities and not weights.

    Where gradients are disabled (torch.no_grad) a rule just calls the network. `state_dict` holds what the rule keeps.
    The first call with a new kind of input takes seconds: it is written down and checked.

    Raises:
        TypeError: the network is scripted, compiled, lazy without shapes, or holds a rule; at a call, see the module.
        ValueError: an unknown name.
    """

    compiler: str | None = None  # of torch.compile's, the backend that a rule's graph is handed to; None: it runs as is
    layerwise = True  # it looks at layers, and so must know what every learned tensor does
    back = "W"  # what carries errors back through a layer, in words

    def __init__(self, network: nn.Module, activities: Names = ()):
        super().__init__()
        _require_plain(network)
        self.network, self.activities = network, _parameters_within(network, activities)
        self.known = _modules_and_parameters(network)

    @torch.compiler.disable  # a torch.compile around a rule leaves it as one call
    def forward(self, *inputs, **keywords) -> Any:
        if not torch.is_grad_enabled():
            return self.network(*inputs, **keywords)
        return _Call(self, inputs, keywords).result()

    def derive(self, draft: "Draft") -> list:
        """Write the network's outputs, with the rule's gradient, into a draft."""
        raise NotImplementedError

    def settings(self) -> tuple:
        """What `derive` depends on beside the network."""
        return (self.activities,)

    def tensors(self) -> Mapping[str, Any]:
        """What `derive` asks for by `draft.own`, as it is at this call."""
        return {}

    def finish(self, outputs: list, extras: list, arguments: list) -> list:
        """After what was derived has run: the outputs that the caller gets."""
        return outputs

    def enters(self, graph: "Graph", layer: "Layer") -> str:
        """Where the error that is sent through a layer enters, in words."""
        return "its input"

    def feedback_weights(self) -> dict[str, Tensor]:
        """What stands in for parameters when errors go back, by their names; empty if nothing does."""
        return {}

    def become_backprop(self) -> None:
        """Change the network's parameters to those at which the rule is backprop.

        Raises:
            ValueError: there are none for this rule.
        """
        raise ValueError(f"{type(self).__name__} is backprop at no parameters; nothing can be compared")

    def explain(self, *inputs, code: bool = False, **keywords) -> str:
        """What the rule is on this network, for a batch: its layers in the order of their calls, what carries their
        errors back and where these enter, what is differentiated as it stands, and what does not learn. With `code`,
        the generated code as well, in which the rule's own tensors have the names of those that they stand in for.
        """
        return _explained(self, inputs, keywords, code)

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key not in ("known", "entry", "recorded")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # of a deep copy, or from a pickle
        self.known = _modules_and_parameters(self.network)


class Backprop(Rule):
    """Gradient descent as it is, for comparison: the error W^T delta. It takes any network, and torch.func."""

    layerwise = False

    def forward(self, *inputs, **keywords) -> Any:
        return super().forward(*inputs, **keywords) if self.compiler else self.network(*inputs, **keywords)

    def derive(self, draft: "Draft") -> list:
        return draft.outputs(draft.follow(draft.inputs()))

    def become_backprop(self) -> None:
        pass  # it is


class LastLayer(Rule):
    """Only the readout learns, by e a^T; no graph is kept below it.

    Args:
        learns: names of the parameters, or of modules that hold them, that learn. Default: the last layer registered.

    Raises:
        TypeError: no layer of torch.nn is registered, and `learns` is not given.
        ValueError: an unknown name in `learns`.
    """

    layerwise = False
    back = "nothing"

    def __init__(self, network: nn.Module, learns: Names | None = None):
        super().__init__(network)
        if learns is None:
            if not (weights := list(layer_weights(network))):
                raise TypeError("the network has no torch.nn.Linear or Conv layer; name what learns: learns=(...)")
            learns = [weights[-1].removesuffix("weight").removesuffix(".")]
        self.learns = _parameters_within(network, learns)

    def settings(self) -> tuple:
        return (self.learns,)

    def derive(self, draft: "Draft") -> list:
        now = draft.inputs()
        for place, name in draft.graph.parameters.items():
            if name not in self.learns:
                now[place] = draft.call(sg, now[place])
        return draft.outputs(draft.follow(now))


class FeedbackAlignment(Rule):
    """The error goes back through fixed random weights in place of the transposed ones (Lillicrap et al., 2016).

        sent to the layer's input: B^T delta        dW = delta a^T

    By hand: tests/rules/test_updates_by_hand.py. With B = W it is backprop.

    Args:
        feedback: tensors by the names of the parameters that they stand in for, and of their shapes; at least one for
            every weight of a torch.nn.Linear or Conv layer. Default, and for other parameters of two dimensions or
            more: drawn from a normal distribution with the standard deviation that the parameter has now (its size,
            for a single weight).
        generator: for that draw.
        added: names of parameters that are activities: learned initial states of recurrent networks, learned queries.
            (What is only added to activities, as position embeddings are, needs no name.)

    Raises:
        TypeError: as in the module's docstring.
        ValueError: `feedback` does not fit the network's parameters; an unknown name in `added`; at a call, a layer
            has a weight for which there is no feedback (a vector, for one).
    """

    back = "B"

    def __init__(
        self,
        network: nn.Module,
        feedback: Named | None = None,
        generator: torch.Generator | None = None,
        added: Names = (),
    ):
        super().__init__(network, added)
        given, parameters = feedback or {}, dict(network.named_parameters())
        self.names = _stood_in_for(network, self.activities, given)
        self.feedback = self.kept(
            _like(parameters[name], given[name]) if name in given else self.drawn(parameters[name], generator)
            for name in self.names
        )

    def kept(self, feedback: Iterable[Tensor]) -> nn.Module:
        """The feedback weights, in the order of `names`, as the rule holds them."""
        return _Tensors({str(k): B for k, B in enumerate(feedback)})

    def drawn(self, parameter: Tensor, generator: torch.Generator | None) -> Tensor:
        """The feedback for a parameter, where none is given."""
        parameter = parameter.detach()
        return _normal_like(parameter, parameter.std() if parameter.numel() > 1 else parameter.abs().sum(), generator)

    def settings(self) -> tuple:
        return self.activities, self.names

    def tensors(self) -> Mapping[str, Any]:
        return {f"feedback.{name}": B.data for name, B in self.feedback_weights().items()}

    def derive(self, draft: "Draft") -> list:
        for layer in draft.graph.layers.values():
            if not set(layer.names) & set(self.names):
                raise ValueError(f"the weight {layer.names} has no feedback; give feedback={{{layer.names[0]!r}: ...}}")
        B = draft.stand_ins("feedback", self.names)
        now = draft.follow(draft.inputs(), lambda layer, now: self.layer(draft, layer, now, B[layer.weight]), B)
        return [draft.call(swap_grad, f, f) for f in draft.outputs(now)]

    def layer(self, draft: "Draft", layer: "Layer", now: dict, B) -> Any:
        """y = a W, and the error at y goes to a through B."""
        if layer.recurrent:
            return draft.again(layer.node, now, feedback=B)
        a = now[layer.activity]
        y = draft.again(layer.node, now, {layer.position: draft.call(sg, a)})
        return draft.call(transport, y, a, B, *draft.product(layer, now))

    def feedback_weights(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.feedback, strict=True))

    @torch.no_grad()
    def become_backprop(self) -> None:
        for name, feedback in self.feedback_weights().items():
            self.network.get_parameter(name).data.copy_(feedback)


class AlignProp(FeedbackAlignment):
    """Feedback alignment with the initial weights as feedback weights (section 4 of the paper).

        sent to the layer's input: W0^T delta       dW = delta a^T

    `added` and errors as for FeedbackAlignment. At the initial weights it is backprop.
    """

    back = "W0"

    def __init__(self, network: nn.Module, added: Names = ()):
        super().__init__(network, added=added)

    def drawn(self, parameter: Tensor, generator: torch.Generator | None) -> Tensor:
        return parameter.detach().clone()


class SignSymmetry(FeedbackAlignment):
    """The error goes back through the signs of the current weights, with magnitudes M of their own.

        sent to the layer's input: (M o sign W)^T delta        dW = delta a^T

    (Liao, Leibo & Poggio, 2016; Moskovitz, Litwin-Kumar & Abbott, 2018.) Where |W| = M it is backprop.

    Args:
        variant: "uSF": M is one constant for each weight, sqrt(2/(fan_in + fan_out)), the fans as torch.nn.init counts
            them; "frSF": M = |N(0, 1)| times that constant, drawn once; "brSF": drawn anew at every call that is
            differentiated, from a seed and a count that are part of the state.
        magnitudes: M itself, tensors >= 0 as FeedbackAlignment takes its feedback; for uSF and frSF.
        exact: names of layers that send the exact error W^T delta (Xiao et al., 2019, let the readout).
        generator: for M, or brSF's seed.
        added: as for FeedbackAlignment.

    Raises:
        TypeError: as for FeedbackAlignment.
        ValueError: an unknown variant or name; magnitudes that do not fit, are negative, or are given to brSF.
    """

    VARIANTS = ("uSF", "frSF", "brSF")
    back = "M o sign W"

    def __init__(
        self,
        network: nn.Module,
        variant: str = "uSF",
        magnitudes: Named | None = None,
        exact: Names = (),
        generator: torch.Generator | None = None,
        added: Names = (),
    ):
        chosen = {name.lower(): name for name in self.VARIANTS}.get(str(variant).lower())
        if chosen is None:
            raise ValueError(f"variant must be one of {', '.join(self.VARIANTS)}, not {variant!r}")
        if magnitudes is not None and chosen == "brSF":
            raise ValueError("brSF draws its magnitudes at every call; give them to uSF or frSF")
        if any((M < 0).any() for M in (magnitudes or {}).values()):
            raise ValueError("magnitudes must not be negative")
        self.variant = chosen
        super().__init__(network, magnitudes, generator, added)
        self.exact = _parameters_within(network, exact)
        if chosen == "brSF":
            self.register_buffer("seed", _seed(generator))
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device="cpu"))

    def drawn(self, parameter: Tensor, generator: torch.Generator | None) -> Tensor:
        constant = math.sqrt(2 / sum(nn.init._calculate_fan_in_and_fan_out(parameter)))
        if self.variant == "uSF":
            return torch.full_like(parameter, constant, requires_grad=False)
        return _normal_like(parameter, constant, generator).abs()

    def become_backprop(self) -> None:
        if self.variant == "brSF":
            raise ValueError("brSF draws its magnitudes anew at every call: it is backprop nowhere")
        super().become_backprop()

    @torch.no_grad()
    def tensors(self) -> Mapping[str, Any]:
        if self.variant == "brSF":
            stream = torch.Generator("cpu").manual_seed(int(self.seed) + int(self.draws))
            self.draws += 1
            for name, M in zip(self.names, self.feedback, strict=True):
                M.copy_(self.drawn(self.network.get_parameter(name), stream))
        return super().tensors()

    def feedback_weights(self) -> dict[str, Tensor]:
        weights = {name: self.network.get_parameter(name).detach() for name in self.names}
        magnitudes = zip(weights.items(), self.feedback, strict=True)
        return {name: weight if name in self.exact else M * weight.sgn() for (name, weight), M in magnitudes}


class KolenPollack(FeedbackAlignment):
    """Feedback weights that learn from the same products as the weights (Kolen & Pollack, 1994; Akrout et al., 2019).

        sent to the layer's input: B^T delta        dW = delta a^T = dB     (equations 16 and 17 of Akrout et al.)

    B is a parameter of the rule, whose .grad backward() fills: give an optimiser `rule.parameters()`, not
    `network.parameters()`. With weight decay, W - B shrinks by (1 - learning rate x decay) a step of SGD, so that the
    rule becomes backprop; without weight decay W - B never shrinks. Momentum and Adam move both as they do W. A frozen
    layer's B does not learn. Arguments and errors as for FeedbackAlignment.

    Warns:
        UserWarning: at a call, weights have changed since the last one and no B has: the optimiser lacks B.
    """

    def kept(self, feedback: Iterable[Tensor]) -> nn.Module:
        self.versions: tuple[int, int] | None = None
        return nn.ParameterList(feedback)

    def tensors(self) -> Mapping[str, Any]:
        weights = [w for name in self.names if (w := self.network.get_parameter(name)).requires_grad]
        versions = sum(w._version for w in weights), sum(B._version for B in self.feedback)
        if self.versions is not None and versions[0] != self.versions[0] and versions[1] == self.versions[1]:
            warnings.warn(
                "the weights have changed and their feedback weights have not: give the optimiser rule.parameters(), "
                "not network.parameters(), or KolenPollack is feedback alignment",
                stacklevel=_depth(),
            )
        self.versions = versions
        return {f"feedback.{name}": B for name, B in self.feedback_weights().items()}

    def layer(self, draft: "Draft", layer: "Layer", now: dict, B) -> Any:
        # dB = dW, through whatever the network makes of the weight before it uses it.
        now = {**now, layer.weight: draft.call(_learn_alike, now[layer.weight], B)}
        return super().layer(draft, layer, now, draft.call(sg, B))


def _learn_alike(weight: Tensor, feedback: Tensor) -> Tensor:
    return couple(weight, feedback * 1) if weight.requires_grad else weight  # so that .grad has memory of its own


class WeightMirror(FeedbackAlignment):
    """Feedback weights that are estimated from noise, between the steps (Akrout et al., 2019, section 4.1).

        sent to the layer's input: B^T delta        dW = delta a^T

    `mirror(*inputs)`, between steps as often as you like, puts noise x ~ N(0, 1) into every layer by itself, in the
    shapes that it has in a pass of `inputs`, and lets y = W x (no bias) and x meet: the mean of y x^T is W, times the
    number of positions at which a convolution's tap lies inside of its input, by which it is divided.

        B <- B + r (y x^T / positions - B),     r = max(rate, 1/number of the mirror step)

    Args:
        rate: of forgetting, since W moves.
        feedback, generator, added: as for FeedbackAlignment. With feedback = the weights it is backprop.

    Raises:
        TypeError, ValueError: as for FeedbackAlignment; ValueError for a rate outside of 0 < rate <= 1; TypeError from
            `mirror`, for a weight that is not its parameter scaled, masked or rearranged.
    """

    def __init__(
        self,
        network: nn.Module,
        rate: float = 0.01,
        feedback: Named | None = None,
        generator: torch.Generator | None = None,
        added: Names = (),
    ):
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, not {rate}")
        super().__init__(network, feedback, generator, added)
        self.rate = rate
        self.register_buffer("seed", _seed(generator))
        self.register_buffer("mirrored", torch.zeros((), dtype=torch.int64, device="cpu"))

    def mirror(self, *inputs, **keywords) -> None:
        """A mirror step, for a batch as the network takes it, whose values matter only as far as they decide which
        layers are called. It changes B alone, and the count of mirror steps: its noise follows from that and a seed."""
        stream = torch.Generator("cpu").manual_seed(int(self.seed) + int(self.mirrored))
        self.mirrored += 1
        rate = max(self.rate, 1 / int(self.mirrored))
        # What the network makes of ones in a weight's place tells how often it is counted.
        ones = {name: torch.ones_like(self.network.get_parameter(name), requires_grad=True) for name in self.names}
        meeting = _Meeting(self, {"stream": stream, **{f"ones.{name}": one for name, one in ones.items()}})
        with torch.enable_grad(), _undisturbed(self.network, (inputs, keywords)):
            _Call(meeting, inputs, keywords).result()
        sums = [
            torch.autograd.grad(total, list(ones.values()), retain_graph=True, allow_unused=True)
            for total in meeting.totals
        ]
        with torch.no_grad():
            for B, product, positions in zip(self.feedback, *sums, strict=True):
                if product is not None:  # of a layer that was called
                    met = positions != 0  # not of a tap that lies outside, a masked weight
                    B.copy_(torch.where(met, B + rate * (product / positions - B), B))


class _Meeting(Rule):
    """What a mirror step computes, as two numbers whose gradients for ones in a weight's place are the sums, over its
    layers, of y x^T and of what its mean is the weight's multiple of."""

    compiler = None

    def __init__(self, rule: WeightMirror, tensors: Mapping[str, Any]):
        super().__init__(rule.network, rule.activities)
        self.names, self.given = rule.names, tensors

    def settings(self) -> tuple:
        return self.activities, self.names

    def tensors(self) -> Mapping[str, Any]:
        return self.given

    def derive(self, draft: "Draft") -> list:
        ones = draft.stand_ins("ones", self.names)
        now = draft.follow(draft.inputs(), None, ones)
        for layer in draft.graph.layers.values():
            draft.graph.require_proportional(layer)
            # A recurrence's states have the shape of what it reads.
            activity = layer.node if layer.recurrent else layer.activity
            factors = now[activity], now[layer.weight], ones[layer.weight]
            draft.extras.append(draft.call(_met, *factors, *draft.product(layer, now), draft.own("stream")))
        return draft.outputs(now)

    def finish(self, outputs: list, extras: list, arguments: list) -> list:
        self.totals = [sum(parts) for parts in zip(*extras, strict=True)]
        return outputs


def _met(activity: Tensor, weight: Tensor, ones: Tensor, product, side: int, options, stream) -> tuple[Tensor, Tensor]:
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        if product is RECURRENCE:
            return x @ weight.mT
        left, right = (x, weight) if side == 0 else (weight, x)
        if product is aten.convolution.default:
            return product(left, right, None, *options)
        return options * (left @ right)

    x = _normal_like(activity, 1, stream)
    y = linear(x, weight.detach())
    return (y * linear(x, ones)).sum(), linear(torch.ones_like(x), ones.square()).sum() / 2


class DirectFeedbackAlignment(Rule):
    """The error e at the output goes straight to every block through a fixed random weight (Nokland, 2016).

        sent to the block's activity: B^T e         dW = delta a^T

    A block is a layer with what follows it, up to and including the first activation function; without one, up to the
    next layer. e lands on the block's activity and goes back to its parameters through the block's current derivatives.
    It does not go back to the network's inputs.

    Args:
        feedback: one tensor per block, in the order of the forward pass: (outputs, *activity shape without batch), or
            (outputs, channels) to project activities averaged over their positions. Default: drawn at the first call,
            when their shapes are known, from a seed that is drawn when the rule is made and is part of its state;
            normal with standard deviation 1/sqrt(entries of an activity).
        pooled: draw the default feedback for activities averaged over their positions.
        generator: for that seed.
        added: as for FeedbackAlignment.
        batch_dim: which dimension of the output counts the examples. Default: the first, if no other can be meant.

    Raises:
        TypeError: as for FeedbackAlignment; at a call, complex activities, or outputs other than one tensor.
        ValueError: at a call, `feedback` does not fit the network's blocks, the network ends in an activation, an
            activity's first dimension is not the batch, or `batch_dim` is needed (as many time steps as examples).
    """

    back = "nothing; B^T e enters at the end of every block"

    def __init__(
        self,
        network: nn.Module,
        feedback: Iterable[Tensor] | None = None,
        pooled: bool = False,
        generator: torch.Generator | None = None,
        added: Names = (),
        batch_dim: int | None = None,
    ):
        super().__init__(network, added)
        self.pooled, self.batch_dim, self.given = pooled, batch_dim, feedback is not None
        self.feedback = _Tensors({str(k): B.detach().clone() for k, B in enumerate(feedback or ())})
        if not self.given:
            self.register_buffer("seed", _seed(generator))

    def derive(self, draft: "Draft") -> list:
        graph, now = draft.graph, draft.inputs()
        inside = set()  # of a block that has not ended

        def end(node: fx.Node) -> None:
            draft.extras.append(now[node])
            now[node] = draft.call(sg, now[node])
            inside.discard(node)

        for node in graph.nodes:
            layer = graph.layers.get(node)
            if layer and layer.recurrent:
                raise TypeError(
                    "DirectFeedbackAlignment needs a block for every step of a recurrence; write its steps as a loop"
                )
            place = layer.activity if layer else node
            while place in inside and _rearranges(place) and self._folded(place, graph):
                inside.discard(place)  # (batch x positions, ...), as products have it
                place = place.all_input_nodes[0]
            if layer and place in inside:
                end(place)
            cut = {layer.position: draft.call(sg, now[layer.activity])} if layer else {}
            now[node] = draft.again(node, now, cut)
            if layer or (graph.kinds[node] == ACTIVITY and not inside.isdisjoint(node.all_input_nodes)):
                inside.add(node)
                if _operator(node) in ACTIVATIONS:
                    end(node)
        draft.write_state(now)
        if len(graph.results) != 1:
            raise TypeError("DirectFeedbackAlignment needs one tensor that the network returns, and none that it keeps")
        if inside.isdisjoint(graph.results):
            raise ValueError(
                "the network ends in an activation function, behind which its last layer would not see its own error; "
                "apply that function outside the network"
            )
        return draft.outputs(now)

    def finish(self, outputs: list, ends: list[Tensor], arguments: list) -> list:
        inputs = [t for t in arguments if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
        k, output = next((k, f) for k, f in enumerate(outputs) if _differentiable(f))
        shape = self._by_example(output, ends, inputs)
        if not self.given and not len(self.feedback):
            stream = torch.Generator("cpu").manual_seed(int(self.seed))
            for end in ends:
                empty = end.new_empty(shape[1:].numel(), *(end.shape[1:2] if self.pooled else end.shape[1:]))
                self.feedback.append(_normal_like(empty, max(empty.shape[1:].numel(), 1) ** -0.5, stream))
        shapes = [(shape[1:].numel(), *end.shape[1:]) for end in ends]
        given = [tuple(B.shape) for B in self.feedback]
        if len(given) != len(shapes) or any(B not in (s, s[:2]) for B, s in zip(given, shapes, strict=True)):
            raise ValueError(f"feedback weights must have the shapes {shapes} (or their first two), not {given}")
        places = [(B.data, end.shape, end.dtype) for B, end in zip(self.feedback, ends, strict=True)]

        def send(e: Tensor) -> list[Tensor]:
            e = e.movedim(self.batch_dim or 0, 0).reshape(shape[0], shape[1:].numel())
            return [_projected(e, *place) for place in places]

        outputs[k] = direct(output, send, ends, inputs)
        return outputs

    def _folded(self, place: fx.Node, graph: "Graph") -> bool:
        """Whether the first dimension there is not the batch."""
        examples = [f.meta["val"].shape[self.batch_dim or 0] for f in graph.results if f.meta["val"].dim()]
        return bool(examples) and place.meta["val"].shape[:1] != (examples[0],)

    def _by_example(self, output: Tensor, ends: list[Tensor], inputs: list[Tensor]) -> torch.Size:
        """The output's shape, its batch first."""
        if any(t.is_complex() for t in (output, *ends)):
            raise TypeError("DirectFeedbackAlignment needs real activities; split complex ones into two")
        if not output.dim():
            raise ValueError("the network returns a single number; DirectFeedbackAlignment needs outputs per example")

        def square(t: Tensor) -> bool:
            return t.dim() > 1 and t.shape[0] == t.shape[1] > 1

        deep = [t for t in (output, *ends) if t.dim() > 2]
        doubtful = square(output) and (output.dim() > 2 or any(map(square, inputs)))
        if self.batch_dim is None and (doubtful or (any(map(square, inputs)) and any(map(square, deep)))):
            raise ValueError(
                f"which dimension of the output {tuple(output.shape)} counts the examples of the batch? Say so: "
                "DirectFeedbackAlignment(..., batch_dim=...)"
            )
        shape = output.movedim(self.batch_dim or 0, 0).shape
        if any(end.shape[:1] != shape[:1] for end in ends):
            raise ValueError(
                "DirectFeedbackAlignment needs activities whose first dimension is the batch, as is the output's "
                "(batch_dim=... names another of the output)"
            )
        return shape

    def enters(self, graph: "Graph", layer: "Layer") -> str:
        return "-"

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        if not self.given:  # drawn at the first call: there, or not yet, as in the state
            stored = {
                k: B
                for k in map(str, range(len(state_dict)))
                if (B := state_dict.get(f"{prefix}feedback.{k}")) is not None
            }
            like = next(self.network.parameters())
            self.feedback = _Tensors({k: like.new_empty(B.shape, requires_grad=False) for k, B in stored.items()})
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _projected(error: Tensor, feedback: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """B^T e for a block: (batch, outputs) onto its shape; feedback is (outputs, *shape[1:]), or (outputs, channels)."""
    # In the order of the feedback's memory, channels last for one, so that the error comes in that of the activity.
    turned = feedback.dim() > 2 and (last := feedback.movedim(1, -1)).is_contiguous()
    rows = last if turned else feedback
    sent = (error @ rows.flatten(1).to(error.dtype)).unflatten(1, rows.shape[1:])
    if turned:
        sent = sent.movedim(-1, 1)
    if feedback.dim() < len(shape):  # activities are averaged over all positions
        sent = (sent / shape[2:].numel()).reshape(*sent.shape, *[1] * len(shape[2:])).expand(shape)
    return sent.to(dtype)


class _FromInitial(Rule):
    """A rule that keeps the initial parameters, and statistics of its own, in `initial`.

    Args:
        live: names of parameters that the initial network reads at their current value, because they are activities
            and not weights: the learned initial state of a recurrent network.
        added: names of other parameters that are activities.
    """

    back = "W0, in the initial network"

    def __init__(self, network: nn.Module, live: Names = (), added: Names = ()):
        super().__init__(network, (*live, *added))
        self.live = _parameters_within(network, live)
        statistics = {name: t for name, t in network.named_buffers() if name.rpartition(".")[2] in STATISTICS}
        kept = {**dict(network.named_parameters()), **statistics}
        self.initial = _Tensors({name: t.detach().clone() for name, t in kept.items()})

    def settings(self) -> tuple:
        return self.activities, self.live, tuple(self.initial.named())

    def tensors(self) -> Mapping[str, Any]:
        return {f"initial.{name}": t.data for name, t in self.initial.named().items()}

    def initially(self, draft: "Draft", now: dict, of_input: Callable[[Any], Any]) -> dict:
        """The initial network's values before it runs: its parameters and statistics; what both networks share.

        Args:
            of_input: from an input's value, or that of a live parameter, to the initial network's.
        """
        graph, kept = draft.graph, self.initial.named()
        first = {node: now[node] for node, kind in graph.kinds.items() if kind == FIXED}
        for place, value in draft.places.items():
            own = (name := graph.names[place]) in kept and name not in self.live
            first[place] = draft.own(f"initial.{name}") if own else of_input(value)
        return first

    def feedback_weights(self) -> dict[str, Tensor]:
        kept = self.initial.named()
        return {name: kept[name] for name in _stood_in_for(self.network, self.activities, {})}

    @torch.no_grad()
    def become_backprop(self) -> None:
        kept = self.initial.named()
        for name, parameter in self.network.named_parameters():
            if name not in self.live:
                parameter.data.copy_(kept[name])


class AlignZero(_FromInitial):
    """The gradient of the initial network at the current error: J(theta0)^T e, applied to the current parameters.

        sent to the layer's input: W0^T delta0      dW = delta0 a0^T

    output = sg(f) + f0 - sg(f0), and d(output)/d(theta0) is what theta gets. At the initial parameters it is backprop.

    Raises:
        TypeError: at a call, as in the module's docstring (but any use of a learned tensor is right).
        ValueError: an unknown name in `live`.
    """

    layerwise = False

    def derive(self, draft: "Draft") -> list:
        inputs = draft.inputs()
        now = draft.follow({place: draft.call(sg, value) for place, value in inputs.items()})
        first = self.from_initial(draft, now, inputs)
        return [draft.call(swap_grad, f, f0) for f, f0 in zip(draft.outputs(now), draft.outputs(first), strict=True)]

    def from_initial(self, draft: "Draft", now: dict, receivers: Mapping) -> dict:
        """The initial network's values, with d(f0)/d(theta0) going to the receivers, by place."""
        first = self.initially(draft, now, lambda value: value)
        for place in draft.graph.parameters:
            live = draft.graph.names[place] in self.live
            first[place] = receivers[place] if live else draft.call(swap_grad, first[place], receivers[place])
        return draft.follow(first, own_state=True)


class AlignAda(_FromInitial):
    """The initial network's error, paired with the current network's activities.

        sent to the layer's input: W0^T delta0      dW = delta a^T

    The current network is cut in front of every layer; the initial network's error there is handed to it:
    delta0 = d(f0)/d(u) e, u the same place in the initial network. At the initial parameters it is backprop.

    Args:
        coupling: "preactivation" or "activity", where the error enters the current network (module docstring).
        live: as for AlignZero.
        uncoupled: names of layers whose input gets no error (the published recurrent rule leaves out its readout).
        added: as for FeedbackAlignment; the names in `live` count as well.

    Raises:
        TypeError: as for FeedbackAlignment.
        ValueError: an unknown coupling or name.
    """

    def __init__(
        self,
        network: nn.Module,
        coupling: str = "preactivation",
        live: Names = (),
        uncoupled: Names = (),
        added: Names = (),
    ):
        super().__init__(network, live, added)
        if coupling not in ("preactivation", "activity"):
            raise ValueError(f"coupling must be 'preactivation' or 'activity', not {coupling!r}")
        self.coupling, self.uncoupled = coupling, _parameters_within(network, uncoupled)

    def settings(self) -> tuple:
        return *super().settings(), self.coupling, self.uncoupled

    def derive(self, draft: "Draft") -> list:
        def cut(layer: Layer, now: dict) -> Any:
            """y = sg(a) W."""
            if layer.recurrent:
                return draft.again(layer.node, now, feedback=draft.call(aten.new_empty.default, now[layer.weight], [0]))
            return draft.again(layer.node, now, {layer.position: draft.call(sg, now[layer.activity])})

        now = draft.follow(draft.inputs(), cut)
        coupled = {}  # activation functions of the initial network, and what rearranges their outputs

        def coupling(layer: Layer, first: dict) -> Any:
            """y0 = a0 W0; the error at a0 also goes to the place in the current network where it enters."""
            a = layer.activity
            if set(layer.names) & set(self.uncoupled):
                return draft.again(layer.node, first)
            activation, path = self.entrance(draft.graph, layer)
            states = {"path": now[layer.node]} if layer.recurrent else {}
            if activation is None:
                a0 = draft.call(couple, first[a], now[a])
                return draft.again(layer.node, first, {layer.position: a0}, **states)
            for node in (activation, *path):
                if node not in coupled:
                    u = activation.args[0]
                    at_u = {0: draft.call(couple, first[u], now[u])} if node is activation else {}
                    coupled[node] = draft.again(node, collections.ChainMap(coupled, first), at_u)
            return draft.again(layer.node, first, {layer.position: coupled[a]}, **states)

        first = draft.follow(self.initially(draft, now, lambda value: draft.call(sg, value)), coupling, own_state=True)
        return [draft.call(couple, f, f0) for f, f0 in zip(draft.outputs(now), draft.outputs(first), strict=True)]

    def entrance(self, graph: "Graph", layer: "Layer") -> tuple[fx.Node | None, list[fx.Node]]:
        """The activation function at whose argument the error enters, and what rearranges its output; None: at a."""
        readout = layer.names == graph.last.names
        return (None, []) if readout or self.coupling == "activity" else graph.origin(layer.activity)

    def enters(self, graph: "Graph", layer: "Layer") -> str:
        if set(layer.names) & set(self.uncoupled):
            return "nowhere"
        activation, _ = self.entrance(graph, layer)
        return "its input" if activation is None else f"the argument of {_operator(activation)}"


RULES: dict[str, type[Rule]] = {
    "backprop": Backprop,
    "last_layer": LastLayer,
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "align_prop": AlignProp,
    "align_ada": AlignAda,
    "align_zero": AlignZero,
    "sign_symmetry": SignSymmetry,
    "kolen_pollack": KolenPollack,
    "weight_mirror": WeightMirror,
}


# ------------------------------------------------------------------------------------------ checks, angles, explanation


def verify(
    rule: Rule, loss_function: Callable[[Any], Tensor], *inputs, double: bool = False, tolerance: float | None = None,
    **keywords,
) -> dict[str, float]:  # fmt: skip
    """Check that the rule is backprop where it should be: at the initial parameters for AlignProp, AlignAda and
    AlignZero, at W = B for feedback alignment and its kin.

    Compared are the output and the gradients of every parameter that learns, of inputs (all floating-point ones get one
    for this) and of tensors outside of the network. Nothing that belongs to the rule, the network or the generators of
    random numbers is changed.

    Args:
        loss_function: from the network's output to the loss, a scalar.
        inputs, keywords: a batch, as for the rule.
        double: compare in float64; floating-point inputs are cast, and constants of `loss_function` are yours to cast.
        tolerance: of a gradient's difference, as a share of the largest entry of backprop's. Default: 1e-3 in single,
            1e-8 in double precision, 0.1 below.

    Returns:
        That share, for every parameter that learns, by name.

    Raises:
        RuntimeError: the output or some gradients differ; it names the parameters.
        ValueError: the rule is backprop nowhere (LastLayer, DirectFeedbackAlignment, SignSymmetry's brSF).
    """
    fed: list[Tensor] = []

    def feed(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(torch.float64 if double and tensor.is_floating_point() else tensor.dtype).clone()
        if _differentiable(tensor):
            fed.append(tensor.requires_grad_())
        return tensor.clone()  # which the network may write to

    inputs, keywords = _mapped(feed, (inputs, keywords))
    with _undisturbed(rule), torch.enable_grad():
        for parameter in rule.parameters():
            parameter.data = parameter.data.clone()
        if double:
            rule.double()
        rule.become_backprop()
        learning = {name: p for name, p in rule.network.named_parameters() if p.requires_grad}
        names = {**learning, **{f"input {k}": t for k, t in enumerate(fed)}}
        found = []
        for function in (rule.network, rule):
            with _undisturbed(rule):
                output = function(*inputs, **keywords)
                if function is rule.network:
                    outside = _leaves(output, names.values())
                    names |= {f"a tensor {tuple(t.shape)} outside of the network": t for t in outside}
                found.append(_tensors(output) + _gradients(loss_function(output), list(names.values())))
    expected, own = found
    outputs = len(expected) - len(names)
    limit = _tolerance(expected[0].dtype, 1e-3, 0.1) if tolerance is None else tolerance
    if not all(share <= limit for share in _shares(own[:outputs], expected[:outputs])):
        raise RuntimeError("the rule's output is not the network's own")
    shares = dict(zip(names, _shares(own[outputs:], expected[outputs:]), strict=True))
    if wrong := ", ".join(f"{name} by {share:.2g}" for name, share in shares.items() if not share <= limit):
        raise RuntimeError(f"where the rule should be backprop, gradients differ (as shares of backprop's): {wrong}")
    return {name: shares[name] for name in learning}


def gradient_angles(rule: Rule, loss_function: Callable[[Any], Tensor], *inputs, **keywords) -> dict[str, float | None]:
    """Angles between the gradients that a rule has left in .grad and those of backprop, at one forward and backward.

    To be called between `loss.backward()` and the optimiser's step, with the inputs that were given to the rule; under
    autocast where the rule was. It changes neither .grad, parameters, buffers nor the state of the generators of random
    numbers. Dropout draws masks other than the step's, unless that state is first put back to what it was before.

    Args:
        loss_function: from the network's output to the loss, a scalar.

    Returns:
        Degrees, 0 to 180, for every weight of `layer_weights` by its name; None where one of the two gradients is
        missing or zero.
    """
    weights = layer_weights(rule.network)
    learning = {name: weight for name, weight in weights.items() if weight.requires_grad}
    with torch.enable_grad(), _undisturbed(rule.network, (inputs, keywords)):
        exact = _gradients(loss_function(rule.network(*inputs, **keywords)), list(learning.values()))
    exact = dict(zip(learning, exact, strict=True))
    return {name: _angle(weight.grad, exact.get(name)) for name, weight in weights.items()}


def feedback_angles(rule: Rule) -> dict[str, float | None]:
    """Angles between what errors go back through and the current weights, as they stand: B in FeedbackAlignment and its
    kin, M o sign W in SignSymmetry, the initial weights in AlignProp, AlignAda and AlignZero.

    Returns:
        Degrees, 0 to 180, for every weight by its name; None where one of the two is zero. Empty for rules without
        weights to compare (Backprop, LastLayer, DirectFeedbackAlignment).
    """
    return {name: _angle(B, rule.network.get_parameter(name)) for name, B in rule.feedback_weights().items()}


def _angle(one: Tensor | None, other: Tensor | None) -> float | None:
    """Between two tensors as vectors, in degrees; None where it is undefined."""
    if one is None or other is None or not one.any() or not other.any():
        return None
    # Double precision, on the host where a device has none (mps).
    one, other = ((t.cpu() if t.device.type == "mps" else t).detach().flatten() for t in (one, other))
    one, other = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (one, other))
    one, other = one / one.norm(), other / other.norm()
    # Exact for small angles too, unlike the arc cosine (Kahan, 2006, "How futile are mindless assessments").
    return math.degrees(2 * math.atan2((one - other).norm().item(), (one + other).norm().item()))


def layer_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of torch.nn.Linear, Conv1d, 2d, 3d and their subclasses, by name, in order of registration; a shared
    one once. (Which other weights a network's layers have, only a call shows: `Rule.explain`.)"""
    modules = [(name, m._parameters.get("weight")) for name, m in network.named_modules() if isinstance(m, LAYERS)]
    once = {
        id(weight): (f"{name}.weight".lstrip("."), weight) for name, weight in reversed(modules) if weight is not None
    }
    return dict(reversed(once.values()))


def _explained(rule: Rule, inputs, keywords, code: bool) -> str:
    with torch.enable_grad(), _undisturbed(rule, (inputs, keywords)):
        call = _Call(rule, inputs, keywords)
        call.result()
    graph, program = call.read
    shape = {n: str(tuple(v.shape)) if isinstance(v := n.meta.get("val"), Tensor) else "-" for n in graph.kinds}
    rows = [("layer", "activity -> output", "error enters at")]
    for k in graph.layers.values():
        rows.append((", ".join(k.names), f"{shape[k.activity]} -> {shape[k.node]}", rule.enters(graph, k)))
    first, second = (min(max(len(row[k]) for row in rows), 48) for k in range(2))
    others = [
        n for n in graph.nodes if graph.kinds[n] == ACTIVITY and n not in graph.layers and n.op == "call_function"
    ]
    learns = rule.learns if isinstance(rule, LastLayer) else dict(rule.network.named_parameters())
    told = {
        "differentiated as they stand": [
            f"{name} {n}" for name, n in collections.Counter(map(_operator, others)).items()
        ],
        "drawn once": sorted({_operator(n) for n in graph.nodes if _draws(n)}),
        "do not learn": [n for n, p in rule.network.named_parameters() if n not in learns or not p.requires_grad],
    }
    return "\n".join(
        [f"{type(rule).__name__} on {type(rule.network).__name__}: errors go back through {rule.back}", ""]
        + [f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows]
        + [
            line
            for title, parts in told.items()
            if parts
            for line in ("", *textwrap.wrap(f"{title}: {', '.join(parts)}", 99))
        ]
        + ([program.code] if code and program else [])
    )


# -------------------------------------------------------------------------------------------------- the graph: reading


def _names(text: str) -> set[str]:
    return set(text.split())


FIXED, WEIGHT, ACTIVITY = range(3)  # made of neither of the following; of parameters and statistics; of activities

# Products, and the positions of their two factors.
PRODUCTS = {
    aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1), aten.addmv.default: (1, 2), aten.dot.default: (0, 1), aten.vdot.default: (0, 1),
    aten._sparse_addmm.default: (1, 2), aten.convolution.default: (0, 1),
}  # fmt: skip
VECTORS = {aten.mv.default, aten.addmv.default}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# By the names of ATen's operators:
ACTIVATIONS = _names(
    "relu leaky_relu elu gelu silu mish softplus hardtanh hardswish hardsigmoid log_sigmoid_forward threshold sigmoid "
    "tanh"
)
# What rearranges, copies or pads entries, beside views.
REARRANGING = _names(
    "clone _to_copy constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d index index_select gather flip roll repeat pixel_shuffle pixel_unshuffle "
    "channel_shuffle im2col stack cat reshape lift_fresh_copy getitem"
)
# How a learned tensor may meet activities beside products and entry by entry: it is looked up, put beside them or
# written into them; it is the gain or bias of a normalisation or of gates.
MEETING = REARRANGING | _names(
    "embedding _embedding_bag take index_put slice_scatter select_scatter scatter index_copy index_add scatter_add "
    "masked_scatter native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional "
    "_batch_norm_no_update cudnn_batch_norm native_layer_norm native_group_norm _fused_rms_norm _prelu_kernel "
    "_thnn_fused_lstm_cell _thnn_fused_gru_cell complex copied"
)
# What is made of the shape of its argument alone.
SHAPED = _names("empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full sym_size")
# Buffers of which the initial network has its own: of normalisation, and the vectors of spectral norm.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "_u", "_v", "weight_u", "weight_v")


class Layer(NamedTuple):
    """A product of an activity and a weight, by their positions among its node's arguments, and the names of the
    parameters that the weight is made of."""

    node: fx.Node
    position: int
    weight_position: int
    names: tuple[str, ...]

    activity = property(lambda self: self.node.args[self.position])
    weight = property(lambda self: self.node.args[self.weight_position])
    side = property(lambda self: int(self.position > self.weight_position))
    recurrent = property(lambda self: self.node.target is RECURRENCE)


class Graph:
    """A call of a network, read: what each of its nodes is made of (`kinds`), and which are `layers`, in order.

    `places` are its inputs, `names` those of parameters and buffers among them, `parameters` the former alone;
    `results` what it gives, and `state` what it writes back, by place.
    """

    def __init__(self, graph: fx.Graph, names: Iterable[str | None], parameters: Named, activities: Names):
        *nodes, output = graph.nodes
        self.places = [node for node in nodes if node.op == "placeholder"]
        self.names = dict(zip(self.places, names, strict=True))
        self.parameters = {place: name for place, name in self.names.items() if name in parameters}
        writes = {n: n.args[0] for n in nodes if n.target is aten.copy_.default and n.args[0] in self.names}
        self.state = {place: node.args[1] for node, place in writes.items()}
        self.nodes = [node for node in nodes if node.op != "placeholder" and node not in writes]
        self.output = output.args[0]
        self.results = [f for f in self.output if isinstance(f, fx.Node) and _flows(f)]
        kept: set[fx.Node] = set()
        self._read(activities, kept)
        while more := {p for p, n in self.state.items() if self.kinds[p] == FIXED and self.kinds[n] == ACTIVITY}:
            kept |= more  # buffers that hold activities from one call to the next
            self._read(activities, kept)
        self.last = next(reversed(self.layers.values()), None)

    def _read(self, activities: Names, kept: set[fx.Node]) -> None:
        self.kinds: dict[fx.Node, int] = {}
        self.layers: dict[fx.Node, Layer] = {}
        sources: dict[fx.Node, frozenset] = {}  # of weights, the parameters that they are made of
        for place, name in self.names.items():
            learned = place in self.parameters and name not in activities
            if learned or (name and name.rpartition(".")[2] in STATISTICS):
                self.kinds[place], sources[place] = WEIGHT, frozenset([name] if learned else [])
            else:
                held = name and place not in self.parameters and place not in kept
                self.kinds[place] = FIXED if held or not isinstance(place.meta.get("val"), Tensor) else ACTIVITY
        for node in self.nodes:
            kind = max((self.kinds[part] for part in node.all_input_nodes), default=FIXED)
            self.kinds[node] = kind = FIXED if _operator(node) in SHAPED or _draws(node) else kind
            if kind == WEIGHT:
                sources[node] = frozenset().union(*(sources.get(part, ()) for part in node.all_input_nodes))
            if node.target is RECURRENCE and kind == ACTIVITY and self.kinds[node.args[0]] != WEIGHT:
                self._add_layer(node, 0, 1, sources)  # also one that starts at a constant
            factors = PRODUCTS.get(node.target)
            for one, other in (factors, factors[::-1]) if factors else ():
                if self.kinds[node.args[one]] == ACTIVITY:
                    self._add_layer(node, one, other, sources)

    def _add_layer(self, node: fx.Node, activity: int, weight: int, sources: Mapping) -> None:
        if names := sources.get(node.args[weight]):
            self.layers[node] = Layer(node, activity, weight, tuple(sorted(names)))

    def origin(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """The activation function whose output, rearranged alone, an activity is, and what rearranges it, in order."""
        path: list[fx.Node] = []
        while _operator(node) not in ACTIVATIONS:
            parts = [part for part in node.all_input_nodes if self.kinds[part] != FIXED and _flows(part)]
            if len(parts) != 1 or not _rearranges(node):
                return None, []
            path.insert(0, node)
            node = parts[0]
        return node, path

    def require_layers(self) -> None:
        """Raise TypeError unless every learned tensor meets activities in a way that a rule knows."""
        found = [] if self.layers else ["there is no product of an activity and a weight at all"]
        differentiated, more = set(), [*self.results]
        while more:
            if (node := more.pop()) not in differentiated and _flows(node) and node.target is not torch.detach:
                differentiated.add(node)
                more += node.all_input_nodes
        for node in (node for node in self.nodes if node in differentiated):
            learned = any(self.kinds[part] == WEIGHT and _flows(part) for part in node.all_input_nodes)
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            known = node in self.layers or pointwise or _operator(node) in MEETING or _rearranges(node)
            if self.kinds[node] == ACTIVITY and learned and not known:
                found.append(f"{_operator(node)} at {_line(node)}")
        if found:
            raise TypeError(
                "learned tensors must meet activities in a product, entry by entry or by look-up, but: "
                f"{'; '.join(found)}. If such a tensor is an activity (a learned query or state), name its parameter: "
                f"added=(...). {REMEDY}"
            )

    def require_proportional(self, layer: Layer) -> None:
        """Raise TypeError unless a layer's weight is one parameter, scaled, masked or rearranged."""
        node = layer.weight
        while node.op != "placeholder":
            parts = [part for part in node.all_input_nodes if self.kinds[part] == WEIGHT and _flows(part)]
            if len(parts) != 1 or not (_rearranges(node) or _operator(node) in ("mul", "div")):
                raise TypeError(
                    f"the network makes a weight of {', '.join(layer.names)} in a way that is not proportional "
                    f"({_operator(node)} at {_line(node)}), so that noise cannot find it; scale or mask it only"
                )
            node = parts[0]


def _operator(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _rearranges(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False) or _operator(node) in REARRANGING


def _flows(node: fx.Node) -> bool:
    """Whether a gradient can go through a node's value."""
    value = node.meta.get("val")
    return any(map(_differentiable, value if isinstance(value, tuple | list) else [value]))


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _draws(node: fx.Node) -> bool:
    """Whether it is a random draw, through which no gradient goes; of what draws inside see `Draft.follow`."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target is bernoulli or (seeded and not _may_draw_inside(node))


def _may_draw_inside(node: fx.Node) -> bool:
    """Whether it is a function of activities that can draw random numbers itself."""
    return _operator(node).startswith(("_scaled_dot_product", "rrelu"))


def _line(node: fx.Node) -> str:
    """Where the network calls it."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    places = [k for k, line in enumerate(lines) if line.startswith("File ") and __file__ not in line]
    if not places:
        return "a line that torch does not tell"
    return " ".join([_place(lines[places[-1]]), *lines[places[-1] + 1 : places[-1] + 2]])


def _place(line: str) -> str:
    """From a line of a stack trace: file:line."""
    return line.removeprefix("File ").split(", in ")[0].replace('"', "").replace(", line ", ":")


# -------------------------------------------------------------------------------------------------- the graph: writing


class Draft:
    """A rule's version of a network's call, while it is written: operators and functions, applied to values.

    Values are nodes of a new graph, which becomes code; or, where a call is recorded as it runs (`_Live`), tensors.

    Attributes:
        places: the values of the call's inputs, by the places of its graph.
        written: what is written back in the end: an input's number, or the name of a tensor of the rule's, and a value.
        extras: values that `Rule.finish` gets beside the outputs.
    """

    def __init__(self, graph: Graph):
        self.graph, self.code, self.owned, self.written, self.extras = graph, fx.Graph(), {}, [], []
        self.places = {p: self._placeholder(graph.names[p] or p.name) for p in graph.places}

    def _placeholder(self, name: str) -> fx.Node:
        name = name.replace(".", "_")
        return self.code.placeholder(f"layer_{name}" if name[0].isdigit() else name)

    def own(self, name: str) -> Any:
        """One of `Rule.tensors`."""
        if name not in self.owned:
            with self.code.inserting_after([n for n in self.code.nodes if n.op == "placeholder"][-1]):
                self.owned[name] = self._placeholder(name)
        return self.owned[name]

    def call(self, function: Callable, *args, **kwargs) -> Any:
        return self.code.call_function(function, args, kwargs)

    def constant(self, node: fx.Node) -> Any:
        return self.code.get_attr(node.target)

    def again(
        self, node: fx.Node, values: Mapping, instead: Mapping[int, Any] = types.MappingProxyType({}), **more
    ) -> Any:
        """What the network does at a node, with these values of its arguments, and others instead at some positions."""
        if node.op == "get_attr":
            return self.constant(node)
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        args = [instead.get(position, value) for position, value in enumerate(args)]
        if _draws(node):
            args = [self.call(sg, value) for value in args]
        return self.call(node.target, *args, **kwargs, **more)

    def product(self, layer: Layer, values: Mapping) -> tuple:
        """A layer's operator, which of its factors the activity is, and its options: of a convolution stride and the
        like, of others the number that multiplies the product."""
        node = layer.node
        convolves = node.target is aten.convolution.default
        options = node.args[3:9] if convolves else node.kwargs.get("alpha", 1)
        return node.target, layer.side, map_arg(options, values.__getitem__)

    def inputs(self) -> dict[fx.Node, Any]:
        """The values of the call's inputs; copies of those that are written back, so that no gradient needs these."""
        return self.places | {place: self.call(torch.clone, self.places[place]) for place in self.graph.state}

    def stand_ins(self, kind: str, names: Names) -> dict[fx.Node, Any]:
        """In the places of these parameters the rule's tensors "kind.name", in those of others what is there."""
        learned = {place: name for place, name in self.graph.names.items() if self.graph.kinds[place] == WEIGHT}
        return {p: self.own(f"{kind}.{n}") if n in names else self.call(sg, self.places[p]) for p, n in learned.items()}

    def follow(
        self, values: dict, at_layer: Callable | None = None, stand_ins: dict | None = None, own_state: bool = False
    ) -> dict:
        """Compute every node that has no value yet, in order, and write state back.

        Args:
            at_layer: computes a layer's output in its own way, from the layer and the values.
            stand_ins: values in the places of weights; what the network makes of them is added.
            own_state: of an initial network: it writes its own statistics, and no other state.
        """
        if own_state:
            for node in self.graph.nodes:
                _require_no_draw_inside(node)
            values |= {p: self.call(torch.clone, values[p]) for p in self.graph.state if self._own(p)}
        for node in self.graph.nodes:
            if node not in values:
                layer = self.graph.layers.get(node) if at_layer else None
                values[node] = at_layer(layer, values) if layer else self.again(node, values)
            if stand_ins is not None and self.graph.kinds[node] == WEIGHT:
                stand_ins[node] = self.again(node, collections.ChainMap(stand_ins, values))
        self.write_state(values, own_state)
        return values

    def _own(self, place: fx.Node) -> str | None:
        name = f"initial.{self.graph.names[place]}"
        return name if name in self.owned else None

    def write_state(self, values: dict, own: bool = False) -> None:
        for place, node in self.graph.state.items():
            target = self._own(place) if own else self.graph.places.index(place)
            if target is not None:
                self.written.append((target, values[node]))

    def outputs(self, values: dict) -> list:
        return [values[f] if isinstance(f, fx.Node) else f for f in self.graph.output]


class _Live(Draft):
    """A draft that is carried out as it is written, on tensors.

    `recorded` are the values that a recording found, of which draws and constants are taken as they are.
    """

    def __init__(self, graph: Graph, arguments: list, tensors: Mapping[str, Any], recorded: Mapping[fx.Node, Any]):
        self.graph, self.owned, self.written, self.extras = graph, tensors, [], []
        self.places = dict(zip(graph.places, arguments, strict=True))
        self.fixed = {n: recorded[n] for n in graph.nodes if graph.kinds[n] == FIXED}

    def own(self, name: str) -> Any:
        return self.owned[name]

    def call(self, function: Callable, *args, **kwargs) -> Any:
        return function(*args, **kwargs)

    def inputs(self) -> dict[fx.Node, Any]:
        return super().inputs() | self.fixed


def _require_no_draw_inside(node: fx.Node) -> None:
    if _may_draw_inside(node):
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if given.get("dropout_p") or given.get("training"):
            raise TypeError(
                f"{_operator(node)} at {_line(node)} draws random numbers inside, which a rule that computes the "
                "network twice cannot repeat; set its dropout to 0, or use "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )


# -------------------------------------------------------------------------------------------------- the graph: capture
# What is private of torch stands here, tried on torch 2.11 and 2.14: Dynamo's settings, errors and ways of writing.

_SETTINGS = {
    "allow_rnn": True,  # LSTM, GRU and RNN, as their products
    "recompile_limit": 2**16, "accumulated_recompile_limit": 2**16,  # many rules share a code object
    "skip_nnmodule_hook_guards": False,  # hooks that come later are noticed
    "allow_unspec_int_on_nn_module": True,  # counters on modules are numbers, and no reason to capture anew
    "optimize_ddp": False,  # which would cut the graph
    "suppress_errors": False,
}  # fmt: skip
_FUNCTION = torch.ops.higher_order.autograd_function_apply  # a torch.autograd.Function
_INLINED = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")  # calls of a part of the graph


def _transforms() -> str | None:
    """What is around this call that a rule's gradient cannot go through."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "a functional transform (torch.func, torch.vmap)"
    return "forward-mode derivatives" if torch.autograd.forward_ad._current_level >= 0 else None


class _Refused(Exception):
    """torch cannot write a call down; why."""


class _Unproved(Exception):
    """A graph that has not been checked; with the tensors that it was called with."""


_now = threading.local()  # .call: the one that this thread is in
_LOCK = threading.RLock()  # one call at a time
_COUNT = itertools.count()
_ENTRIES: "weakref.WeakValueDictionary[tuple, _Entry]" = weakref.WeakValueDictionary()
_LATEST: "collections.deque[_Entry]" = collections.deque(maxlen=8)


def _call_network(network, inputs, keywords):
    return network(*inputs, **keywords)


class _Entry:
    """What networks of one kind are called through: they share its captures, which end with the last of them."""

    def __init__(self):
        # Dynamo keeps captures by code object, and what it knows of sizes by its name.
        code = _call_network.__code__.replace(co_name=f"network_{next(_COUNT)}")
        self.function = torch.compile(types.FunctionType(code, globals()), backend=_Capture, fullgraph=True)

    @staticmethod
    def of(network: nn.Module) -> "_Entry":
        modules = tuple((name, type(module)) for name, module in network.named_modules())
        kind = modules, tuple((name, tuple(p.shape)) for name, p in network.named_parameters())
        if (entry := _ENTRIES.get(kind)) is None:
            entry = _ENTRIES[kind] = _Entry()
        _LATEST.append(entry)  # for the next rule on such a network
        return entry


class _Capture:
    """What Dynamo calls in a network's place, with the tensors of the call: the graph of torch calls that it wrote
    down, made one of operators; `programs`, what rules have made of that."""

    def __init__(self, torch_graph: fx.GraphModule, example_inputs: list):
        self.root = _functional(torch_graph)  # now, so that Dynamo guards what it takes for granted of sizes
        self.programs, self.proved = {}, set()

    def __call__(self, *arguments):
        call, rule = _now.call, _now.call.rule
        if call.hooks not in self.proved and not call.proving:
            raise _Unproved(self, arguments)
        call.carried = True
        names, parameters = _named(rule, arguments)
        key = type(rule), rule.settings(), names
        if (program := self.programs.get(key)) is None:
            program = self.programs[key] = _program(
                rule, Graph(self.root.graph, names, parameters, rule.activities), self.root
            )
        tensors, arguments = rule.tensors(), list(arguments)
        values = [*arguments, *(tensors[name] for name in program.own)]
        run = _compiled(program, rule.compiler, values) if rule.compiler else program.forward
        with _autocast_off(arguments):
            results, count = run(*values), len(program.targets)
        outputs, written = results[: program.outputs], results[program.outputs : program.outputs + count]
        extras = results[program.outputs + count :]
        _write(zip(program.targets, written, strict=True), arguments, tensors)
        call.read = program.read, program
        return rule.finish(list(outputs), list(extras), arguments)


def _program(rule: Rule, graph: Graph, root: nn.Module) -> fx.GraphModule:
    """A rule on a graph, as code."""
    _require_learnable(rule, graph)
    draft = Draft(graph)
    outputs = rule.derive(draft)
    draft.code.output((*outputs, *(value for _, value in draft.written), *draft.extras))
    draft.code.eliminate_dead_code()
    program = fx.GraphModule(root, draft.code)
    program.targets, program.own, program.read = [t for t, _ in draft.written], list(draft.owned), graph
    program.outputs, program.compiled = len(outputs), {}
    return program


def _compiled(program: fx.GraphModule, compiler: str, values: list) -> Callable:
    """A program for values of these sizes, as a backend of torch.compile makes it."""
    sizes = compiler, *(value.shape if isinstance(value, Tensor) else value for value in values)
    if sizes not in program.compiled:
        with _autocast_off(values):
            program.compiled[sizes] = torch._dynamo.lookup_backend(compiler)(program, values)
    return program.compiled[sizes]


def _functional(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of ATen operators with nothing in place, from one of torch calls."""
    values = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in values if isinstance(value, Tensor))
    # oneDNN's recurrent layers are one operator each; without it they are products.
    without_onednn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with mode, torch.fx.traceback.preserve_node_meta(), without_onednn, _Spelling():
        made = make_fx(functools.partial(_functionalised, _Walk(module).run))(*values)
    for node in made.graph.nodes:
        _respell(node)
    made.graph.eliminate_dead_code()
    return made


def _functionalised(function: Callable, *values) -> Any:
    """What a function computes, with nothing in place; what it writes into its arguments is written in the end.

    torch.func.functionalize would do, if its tensors had a gradient, on which torch's choice of operators depends.
    """
    with FunctionalTensorMode():
        inside = [FunctionalTensor.to_functional(v) if isinstance(v, Tensor) else v for v in values]
        results = function(*inside)
        plain = [_outside(value) for value in inside]
        results = pytree.tree_map(_outside, results)
    with torch.no_grad():
        for value, now in zip(values, plain, strict=True):
            if isinstance(value, Tensor) and now is not value:
                value.copy_(now)
    return results


def _outside(value: Any) -> Any:
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)
    return torch._from_functional_tensor(value.elem)


class _Walk(fx.Interpreter):
    """Runs a graph of torch calls, for another to be made of it."""

    def call_function(self, target, args, kwargs):
        if target is _FUNCTION:  # one operator, which is differentiated as it stands
            functions, number = _functions(), next(_COUNT)
            functions[number] = lambda inputs: target(*args[:2], *inputs, **kwargs)
            return torch.ops.align_rules.function.default(list(args[2:]), number)
        if getattr(target, "_name", None) in _INLINED and isinstance(args[0], fx.GraphModule):
            return _Walk(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


@functools.cache
def _functions() -> dict[int, Callable]:
    """torch.autograd.Functions that are being written down, by number; an operator holds their places."""
    functions: dict[int, Callable] = {}

    @torch.library.custom_op("align_rules::function", mutates_args=())
    def function(inputs: list[Tensor], number: int) -> list[Tensor]:
        return list(functions[number](inputs))

    function.register_fake(lambda inputs, number: [torch.clone(t) for t in functions[number](inputs)])
    return functions


class _Spelling(TorchFunctionMode):
    """What functionalisation would lose or change, in other words: what has no gradient, dropout, nn.Bilinear."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = SPELLED.get(function, function)(*args, **(kwargs or {}))
        return result if torch.is_grad_enabled() else pytree.tree_map_only(Tensor, _cut, result)


def _cut(tensor: Tensor) -> Tensor:
    return aten.detach_copy.default(tensor) if _differentiable(tensor) else tensor


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    if input.device.type in ("cpu", "mps"):
        mask = aten.bernoulli.p(_cut(input), 1 - p).div(1 - p)
    else:
        mask = aten.native_dropout.default(_cut(input), p, True)[1].to(input.dtype) * (1 / (1 - p))
    return input.mul_(mask) if inplace else input.mul(mask)


def _bilinear(one: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear((one[..., :, None] * other[..., None, :]).flatten(-2), weight.flatten(1), bias)


SPELLED = {
    Tensor.detach: _cut, torch.detach: _cut, Tensor.data.__get__: _cut,
    F.dropout: _dropout, torch.dropout: _dropout, F.bilinear: _bilinear, torch.bilinear: _bilinear,
}  # fmt: skip


def bernoulli(like: Tensor, p: float, **keywords) -> Tensor:
    """Drawn in the order of the tensor's memory, as dropout does."""
    return torch.empty_like(like).bernoulli_(p, **keywords)


def copied(to: Tensor, source: Tensor, *_) -> Tensor:
    """What writing one tensor into all of another gives."""
    return source.to(to).expand(to.shape)


RESPELLED = {
    aten.view.default: aten.reshape.default,  # the strides of real tensors may differ from those of fake ones
    aten._unsafe_view.default: aten.reshape.default,
    aten.bernoulli.p: bernoulli,
    aten.copy.default: copied,  # which has no derivative
    aten.detach_copy.default: torch.detach,  # functionalisation takes detach for an alias
    aten._embedding_bag_forward_only.default: aten._embedding_bag.default,
}


def _respell(node: fx.Node) -> None:
    if node.target is aten.copy_.default:  # into an input: what reads the result reads what was written
        node.replace_all_uses_with(node.args[1])
    if str(node.target) == "align_rules.function.default":
        node.target, node.args = _functions().pop(node.args[1]), (node.args[0],)
        node.target.__name__ = node.target.__qualname__ = "autograd_function"
    elif node.op == "call_function":
        node.target = RESPELLED.get(node.target, node.target)


def _autocast_off(arguments: Iterable):
    """The graph has the casts that autocast makes, and is not cast again."""
    kind = next((t.device.type for t in arguments if isinstance(t, Tensor)), "cpu")
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


@torch.no_grad()
def _write(written: Iterable, arguments: list, tensors: Mapping[str, Any]) -> None:
    """Put state back where it came from."""
    for target, value in written:
        tensor = tensors[target] if isinstance(target, str) else arguments[target]
        if tensor.requires_grad:
            raise TypeError(
                f"the network writes into an input {tuple(tensor.shape)} that has a gradient; let it write a copy"
            )
        tensor.copy_(value)


class _Call:
    """A call of a rule: written down once for its kind, or recorded as it runs. `read`: its graph, the rule's code."""

    def __init__(self, rule: Rule, inputs: tuple, keywords: dict, proving: bool = False):
        self.rule, self.inputs, self.keywords, self.proving = rule, inputs, keywords, proving
        self.carried, self.read, self.hooks = False, None, ()

    def result(self) -> Any:
        rule, network = self.rule, self.rule.network
        with _LOCK:
            _require_same_network(rule)
            hooks = [
                hook for m in network.modules() for held in (m._backward_hooks, m._backward_pre_hooks) for hook in held
            ]
            self.hooks = tuple(hooks)  # a graph is checked anew with others, which may change gradients
            drawn, reason = random.getstate(), None  # from which Dynamo may draw before it runs the graph
            while not hasattr(rule, "recorded") and reason is None:
                try:
                    return self.enter()
                except _Unproved as unproved:
                    capture, arguments = unproved.args
                except _Refused as refused:
                    reason, lasts = str(refused), refused.__cause__ is not None
                random.setstate(drawn)
                if reason is None:
                    self.prove(_Call(Backprop(network), self.inputs, self.keywords, True).enter, arguments)
                    capture.proved.add(self.hooks)
            if self.hooks not in getattr(rule, "recorded", ()):
                self.prove(_Call(Backprop(network), self.inputs, self.keywords).record, None)
            result = self.record()
            if reason is None:
                rule.recorded.add(self.hooks)
            else:
                if lasts:
                    rule.recorded = {self.hooks}
                warnings.warn(
                    f"{type(network).__name__} is recorded anew at every call, at some 20 us an operator, since torch "
                    f"cannot write it down: {reason}",
                    stacklevel=_depth(),
                )
            return result

    def enter(self) -> Any:
        """By way of Dynamo."""
        if not hasattr(self.rule, "entry"):
            self.rule.entry = _Entry.of(self.rule.network)
        before, _now.call = getattr(_now, "call", None), self
        try:
            with torch._dynamo.config.patch(**_SETTINGS), _without_backward_hooks(self.rule.network):
                result = self.rule.entry.function(self.rule.network, self.inputs, self.keywords)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _Refused(_reason(error)) from error
        except RuntimeError as error:
            if self.carried or "fullgraph=True" not in str(error):
                raise
        finally:
            _now.call = before
        if not self.carried:
            raise _Refused("torch.compile is switched off here, or another mode watches what torch is called for")
        return result

    def record(self) -> Any:
        """As it runs."""
        with _without_backward_hooks(self.rule.network):
            record = _Record(self.rule.network, self.inputs, self.keywords)
        names, parameters = _named(self.rule, record.arguments)
        graph, tensors = Graph(record.graph, names, parameters, self.rule.activities), self.rule.tensors()
        _require_learnable(self.rule, graph)
        draft = _Live(graph, record.arguments, tensors, record.values)
        with _autocast_off(record.arguments):
            outputs = self.rule.derive(draft)
        _write(draft.written, record.arguments, tensors)
        self.read = graph, None
        return record.returned(self.rule.finish(outputs, draft.extras, record.arguments))

    def prove(self, written_down: Callable[[], Any], arguments: tuple | None) -> None:
        """Check that what was written down gives, as backprop, the network's output and gradients.

        Raises:
            TypeError: it does not, or that cannot be told.
        """
        network, found = self.rule.network, []
        given = _tensors((self.inputs, self.keywords, arguments))
        watched = list({id(t): t for t in (*network.parameters(), *given) if t.requires_grad}.values())
        for function in (lambda: network(*self.inputs, **self.keywords), written_down):
            with _undisturbed(network, (self.inputs, self.keywords)):
                output = function()
                if not found and (outside := _leaves(output, watched)):
                    watched += outside
                outputs, stream = _tensors(output), torch.Generator("cpu").manual_seed(0)
                learning = [f for f in outputs if f.requires_grad]
                signs = [
                    torch.randn(f.shape, generator=stream, dtype=f.dtype, device="cpu").to(f.device) for f in learning
                ]
                total = sum((f * sign).sum().abs() for f, sign in zip(learning, signs, strict=True))
                try:
                    found.append((outputs, _gradients(total, watched)))
                except RuntimeError as error:
                    raise TypeError(f"its gradient cannot be compared: {_reason(error)}. {REMEDY}") from error
        (outputs, gradients), (own, own_gradients) = found
        name = type(network).__name__
        if len(own) != len(outputs):
            raise TypeError(
                f"{name} returns {type(output).__name__}, in which tensors cannot be found; return a tuple or dict"
            )
        names = {id(p): f"the gradient of {key}" for key, p in network.named_parameters()}
        told = [f"output {k}" for k in range(len(outputs))]
        told += [names.get(id(t), f"the gradient of a tensor {tuple(t.shape)}") for t in watched]
        shares = _shares(own, outputs) + _shares(own_gradients, gradients)
        for what, share, tensor in zip(told, shares, (*outputs, *watched), strict=True):
            if not share <= _tolerance(tensor.dtype, 1e-2, 0.3):
                raise TypeError(f"torch writes {name} down wrongly: {what} is off by {share:.2g} of its size. {REMEDY}")


@contextlib.contextmanager
def _without_backward_hooks(network: nn.Module):
    """A rule has no gradients to show them."""
    held = [
        (m, m._backward_hooks, m._backward_pre_hooks)
        for m in network.modules()
        if m._backward_hooks or m._backward_pre_hooks
    ]
    for module, *_ in held:
        module._backward_hooks, module._backward_pre_hooks = collections.OrderedDict(), collections.OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in held:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks


def _reason(error: BaseException) -> str:
    """What went wrong, in a line, and at which line of the network."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = [line.removeprefix("Explanation: ") for line in text if line.startswith("Explanation: ")]
    places = [
        _place(line) for line in text if line.startswith("File ") and "/torch/" not in line and __file__ not in line
    ]
    return ": ".join([text[0], *told[:1]]) + "".join(f" (at {place})" for place in places[-1:])


# ------------------------------------------------------------------------------------------------ the graph: recording


class _Record(TorchDispatchMode):
    """A call of a network, carried out and written down operator by operator, for this call alone.

    `arguments` are the tensors that its graph's places stand for, `values` what was computed.
    """

    def __init__(self, network: nn.Module, inputs: tuple, keywords: dict):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # below functionalisation
        given: list[Tensor] = []
        structure = _mapped(lambda t: _Slot(given, t), (inputs, keywords))
        parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
        self.network, self.held = network, [*parameters.values(), *buffers.values(), *given]

        def run(tensors: list[Tensor]) -> list[Tensor]:
            held = dict(zip((*parameters, *buffers), tensors, strict=False))
            for name, parameter in parameters.items():
                vars(held[name]).update(vars(parameter))
            inputs, keywords = _filled(structure, tensors[len(held) :])
            before = {id(m): dict(vars(m)) for m in network.modules()}
            output = torch.func.functional_call(network, now := dict(held), inputs, keywords)
            found: list[Tensor] = []
            self.output = _mapped(lambda t: _Slot(found, t), output)
            # What the network keeps: tensors in attributes, and others in the places of buffers.
            kept = [(vars(m), key, value) for m in network.modules() for key, value in vars(m).items()
                    if isinstance(value, Tensor) and before[id(m)].get(key) is not value]  # fmt: skip
            for name in buffers:
                path, _, key = name.rpartition(".")
                if now[name] is not held[name]:
                    kept.append((network.get_submodule(path)._buffers, key, now[name]))
            self.kept = [(place, key) for place, key, _ in kept]
            self.traced = [*found, *(value for _, _, value in kept)]
            return self.traced

        self.graph, self.nodes, self.values, self.arguments = fx.Graph(), {}, {}, []
        stand_ins = [t.detach().requires_grad_(t.requires_grad) for t in self.held]
        for k, tensor in enumerate(self.held):
            if not isinstance(tensor, nn.Parameter):  # which the network may write to
                stand_ins[k] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            self.arrived(stand_ins[k], tensor)
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None), _Spelling(), self:
            results = _functionalised(lambda *tensors: run(list(tensors)), *stand_ins)
        if any(isinstance(node, BackwardCFunction) for node in _nodes_behind(self.traced)):
            raise TypeError(
                f"the network has a torch.autograd.Function, whose backward pass is lost in recording. {REMEDY}"
            )
        self.graph.output([self.node_of(t) for t in results])
        for node in self.graph.nodes:
            _respell(node)

    def node_of(self, tensor: Tensor) -> fx.Node:
        return self.nodes[id(tensor)] if id(tensor) in self.nodes else self.arrived(tensor, tensor)

    def arrived(self, value: Tensor, argument: Tensor) -> fx.Node:
        """An input of the call, or a tensor from outside."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_after(places[-1]) if places else contextlib.nullcontext():
            self.noted(value, node := self.graph.placeholder(f"input_{len(places)}"))
        self.arguments.append(argument)
        return node

    def noted(self, value: Any, node: fx.Node) -> None:
        node.meta["val"] = self.values[node] = value  # which lives as long as this, and keeps its id
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(Tensor, self.node_of, (args, kwargs or {}))
        self.noted(result, node := self.graph.call_function(operation, args, kwargs))
        frame = sys._getframe(_depth() - 1)
        node.meta["stack_trace"] = f'File "{frame.f_code.co_filename}", line {frame.f_lineno}'
        for k, part in enumerate(result if isinstance(result, tuple | list) else ()):
            self.noted(part, self.graph.call_function(operator.getitem, (node, k)))
        return result

    def returned(self, outputs: list) -> Any:
        """What the network returns, with these tensors in it; those that it keeps are put there."""
        for (place, key), value in zip(self.kept, outputs[len(outputs) - len(self.kept) :], strict=True):
            place[key] = value
        return _filled(self.output, outputs)


def _depth() -> int:
    """How many calls up is the first line that is neither torch's nor this file's."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        depth, frame = depth + 1, frame.f_back
    return depth


class _Slot:
    """Where a tensor stood among others."""

    def __init__(self, found: list, tensor: Tensor):
        self.index = len(found)
        found.append(tensor)


def _filled(values: Any, tensors: list) -> Any:
    return _mapped(lambda slot: tensors[slot.index], values, _Slot)


# -------------------------------------------------------------------------------------- tensors, and what holds them


class _Tensors(nn.Module):
    """Tensors by names, with dots or without, which move and are saved with the module that holds them."""

    def __init__(self, tensors: Named):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                module = module._modules.setdefault(part, nn.Module())
            module._buffers[last] = tensor

    def named(self) -> dict[str, Tensor]:
        return dict(self.named_buffers(remove_duplicate=False))

    def append(self, tensor: Tensor) -> None:
        self._buffers[str(len(self))] = tensor

    def __len__(self) -> int:
        return len(self.named())

    def __iter__(self):
        return iter(self.named().values())


def _stood_in_for(network: nn.Module, activities: Names, given: Named) -> tuple[str, ...]:
    """The parameters that feedback stands in for: weights of torch.nn's layers, in order; then all others of two
    dimensions or more but gains of weight norm, and those for which it is given.

    Raises:
        ValueError: what is given does not fit.
    """
    parameters, layers = dict(network.named_parameters()), layer_weights(network)
    shapes = {name: tuple(weight.shape) for name, weight in layers.items() if name not in activities}
    fits = all(name in parameters and B.shape == parameters[name].shape for name, B in given.items())
    if given and not (fits and set(shapes) <= set(given)):
        got = {name: tuple(B.shape) for name, B in given.items()}
        raise ValueError(f"feedback weights must have the names and shapes {shapes}, not {got}")
    others = [n for n, p in parameters.items() if p.dim() > 1 and n.rpartition(".")[2] not in ("original0", "weight_g")]
    return tuple(name for name in dict.fromkeys([*shapes, *others, *given]) if name not in activities)


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """A copy, in the type and the order of memory that the parameter has."""
    return torch.empty_like(parameter, requires_grad=False).copy_(values.detach())


def _seed(generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**62, (), generator=generator, device="cpu")


def _normal_like(tensor: Tensor, std: float | Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the CPU, where a seed means the same everywhere, unless the generator is another device's."""
    device = "cpu" if generator is None else generator.device
    return _like(tensor, torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=device) * float(std))


def _tensors(values: Any) -> list[Tensor]:
    """Every tensor in what goes into a network or comes out of it."""
    found: list[Tensor] = []
    _mapped(found.append, values)
    return found


def _mapped(function: Callable[[Any], Any], values: Any, kind: type = Tensor) -> Any:
    """With a function applied to every tensor: in all containers that torch knows, and in dataclasses and the like."""

    def mapped(value):
        if isinstance(value, kind):
            return function(value)
        if isinstance(value, collections.abc.Iterator):
            raise TypeError(f"an input is a {type(value).__name__}, which can be read only once: hand over a list")
        if isinstance(value, collections.UserDict) or (
            hasattr(value, "__dataclass_fields__") and not isinstance(value, type)
        ):
            twin = copy.copy(value)
            for name, part in vars(value).items():
                object.__setattr__(twin, name, _mapped(function, part, kind))
            return twin
        return value

    return pytree.tree_map(mapped, values)


def _nodes_behind(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> set:
    """Of the autograd graph, but what lies behind known tensors."""
    nodes, seen = [t.grad_fn for t in tensors], {None, *(t.grad_fn for t in known)}
    found = set()
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            found.add(node)
            nodes += [before for before, _ in node.next_functions]
    return found


def _leaves(values: Any, known: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of the autograd graph behind tensors, but those that are known, or behind known tensors."""
    known = list(known)
    leaves = [n.variable for n in _nodes_behind(_tensors(values), known) if hasattr(n, "variable")]
    return [leaf for leaf in leaves if not any(leaf is t for t in known)]


def _gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor | None]:
    if not of or not isinstance(loss, Tensor) or not loss.requires_grad:
        return [None] * len(of)
    with torch.autocast(loss.device.type, enabled=False):  # which is for forward passes
        return list(torch.autograd.grad(loss, of, allow_unused=True))


def _tolerance(dtype: torch.dtype, single: float, below: float) -> float:
    """Of what is computed in two ways, as a share of its largest entry."""
    return {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: single, torch.complex64: single}.get(
        dtype, below
    )


def _shares(found: list[Tensor | None], expected: list[Tensor | None]) -> list[float]:
    """The largest differences, relative to the largest entries expected; a missing gradient is one of zeros."""
    sizes = [0.0 if t is None or not t.numel() else t.detach().abs().nan_to_num(0, 0).max().item() for t in expected]
    # Below such a share of the largest a gradient is rounding, as for a bias in front of a normalisation.
    floor = max(1e-4 * max(sizes, default=0.0), 1e-30)
    shares = []
    for one, other, size in zip(found, expected, sizes, strict=True):
        there = next((t for t in (one, other) if t is not None), torch.zeros(()))
        one, other = (torch.zeros_like(there) if t is None else t.detach() for t in (one, other))
        if one.shape == other.shape:
            gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0, (one - other).abs())
            shares.append(gap.max().item() / max(size, floor) if gap.numel() else 0.0)
        else:
            shares.append(math.inf)
    return shares


@contextlib.contextmanager
def _undisturbed(network: nn.Module, values: Any = ()):
    """What runs inside leaves no trace in a network, in these tensors, in generators of random numbers."""
    containers = (dict, list, set, collections.deque)
    places = [held for module in network.modules() for held in (vars(module), module._buffers)]
    places += [value for place in places for value in place.values() if isinstance(value, containers)]
    before = [(place, copy.copy(place)) for place in places]
    held = [value for _, kept in before for value in (kept.values() if isinstance(kept, dict) else kept)]
    tensors = {
        id(t): t for t in (*_tensors(values), *held) if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)
    }
    contents = [(t, t.detach().clone()) for t in tensors.values()]
    data = [(parameter, parameter.data) for parameter in network.parameters()]
    states = [(write, read()) for read, write in _generators(held)]
    kind = next((p.device.type for p in network.parameters() if p.device.type not in ("cpu", "meta", "mps")), "cpu")
    devices = {p.device.index for p in network.parameters() if p.device.type == kind != "cpu"}
    try:
        with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
            yield
    finally:
        for place, kept in before:
            place.clear()
            (place.extend if isinstance(place, list | collections.deque) else place.update)(kept)
        for tensor, content in contents:
            tensor.data.copy_(content)
        for parameter, kept in data:
            parameter.data = kept
        for write, state in states:
            write(state)


def _generators(held: Iterable) -> list[tuple[Callable, Callable]]:
    """How to read and write the state of Python's and NumPy's generators, and of those that a network holds."""
    found = [(random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")
    for value in (*held, *([numpy.random] if numpy else [])):
        if numpy and isinstance(value, numpy.random.Generator):
            found.append(
                (lambda g=value: g.bit_generator.state, lambda s, g=value: setattr(g.bit_generator, "state", s))
            )
        for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
            if hasattr(value, get) and hasattr(value, put):
                found.append((getattr(value, get), getattr(value, put)))
    return found


# ------------------------------------------------------------------------------------------------------------ refusals

REMEDY = "Backprop takes it; for other rules write that part of the network with torch's own operators"


def _modules_and_parameters(network: nn.Module) -> list[tuple]:
    return [(name, id(m), *map(id, m._modules.values()), *m._parameters.items()) for name, m in network.named_modules()]


def _require_same_network(rule: Rule) -> None:
    """Raise RuntimeError where a rule's gradient is not what is asked for, or the network is not the rule's."""
    if (around := _transforms()) is not None:
        raise RuntimeError(
            f"this rule's gradient is the gradient of nothing, and {around} cannot go through it; Backprop can"
        )
    if getattr(rule, "_is_replica", False):
        raise RuntimeError("DataParallel copies parameters, which a rule cannot follow; use DistributedDataParallel")
    now = _modules_and_parameters(rule.network)
    if all(map(_same, now, rule.known)) and len(now) == len(rule.known):
        return
    for one, other in itertools.zip_longest(now, rule.known, fillvalue=("the network",)):
        if len(one) != len(other) or not all(map(_alike, one, other)):
            raise RuntimeError(
                f"{one[0] or 'the network'} has other modules or parameters than when the rule was made (or torch.func "
                "has put other tensors in their places): make the rule anew"
            )
    rule.known = now  # other parameters of the same shapes: load_state_dict(assign=True)


def _same(one: tuple, other: tuple) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and a[1] is b[1] if isinstance(a, tuple) and isinstance(b, tuple) else a == b
        for a, b in zip(one, other, strict=True)
    )


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return one == other
    (name, parameter), (other_name, other_parameter) = one, other
    both = isinstance(parameter, nn.Parameter) and isinstance(other_parameter, nn.Parameter)
    return name == other_name and (parameter is other_parameter or (both and parameter.shape == other_parameter.shape))


def _named(rule: Rule, arguments: Iterable) -> tuple[tuple[str | None, ...], dict[str, Tensor]]:
    """The names of the parameters and buffers among a call's inputs; and all parameters."""
    parameters = dict(rule.network.named_parameters())
    names = {id(t): name for name, t in (*rule.network.named_buffers(), *parameters.items())}
    return tuple(names.get(id(t)) for t in arguments), parameters


def _require_learnable(rule: Rule, graph: Graph) -> None:
    if written := [name for place, name in graph.parameters.items() if place in graph.state]:
        raise TypeError(f"the network writes into its parameters {', '.join(written)} when it is called; do so outside")
    if rule.layerwise:
        graph.require_layers()


def _require_plain(network: nn.Module) -> None:
    """Raise TypeError for modules that no rule can be made on."""
    for name, module in network.named_modules():
        name = name or "the network"
        if isinstance(module, Rule):
            raise TypeError(f"{name} is a rule itself; make one rule for the whole network")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name} is scripted; make the rule on the module before torch.jit.script")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise TypeError(f"{name} is compiled; make the rule on the module")
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module._parameters.values()):
            raise TypeError(f"{name} has no shapes yet; call the network on a batch before making the rule")


def _parameters_within(network: nn.Module, places: Names) -> tuple[str, ...]:
    """The names of the parameters that are named here, or that modules named here hold; "" is the network itself.

    Raises:
        ValueError: a name has none.
    """
    names = dict(network.named_parameters(remove_duplicate=False))  # a shared one by each of its names
    chosen = set()
    for place in places:
        within = {id(p) for name, p in names.items() if not place or name == place or name.startswith(f"{place}.")}
        if not within:
            raise ValueError(f"the network has no parameter {place!r}; it has {', '.join(names)}")
        chosen |= within
    return tuple(name for name, parameter in network.named_parameters() if id(parameter) in chosen)
