"""Learning rules for wide networks, as drop-in forward passes with another backward pass.

    rule = align_rules.AlignAda(network)          # keeps the initial parameters
    loss = loss_function(rule(inputs), targets)   # rule(inputs) has the value of network(inputs)
    loss.backward()                               # fills .grad by the rule; any torch optimiser steps

The rules of Boopathy & Fiete, "How to Train Your Wide Neural Network Without Backprop: An Input-Weight Alignment
Perspective" (ICML 2022, arXiv 2106.08453), those it compares with, and their nearest relatives. This file imports torch
only and can be copied alone into another project.

A *layer* is a product (matrix product or convolution) of an activity with something that is made of parameters and
constants, its *weight*. All else (biases, normalisation, activation functions, pooling, additions, products of
activities, look-up) is differentiated as it stands. Backprop sends the error delta at a layer's output on to its input
through the transpose of its weight. A rule sends something else there, or forms the weight's gradient with something
else; that is all that distinguishes the rules. With e the gradient of the loss at the network's output, W the current
weight, W0 the initial one, B a random one, a the layer's input, and an index 0 for what the same network computes and
sends back with its initial parameters (section 4):

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

Weights. B, M and W0 stand in for parameters and go through all that the network makes of these before they meet an
activity: scaling, masks, casts, W + A C of an adapter (B for all three), slices of packed attention and of LSTM, GRU
and RNN. Tied weights share one B. In weight norm B stands in for v, and g, a gain, for itself; in spectral norm B is
divided by its own norm along u and v, the network's vectors (in training after a power iteration with B); standardised
weights standardise B. Complex weights have complex B, and errors go back through the conjugate transpose. nn.Bilinear's
activity is the outer product of its inputs. `recurrence` is a loop over layers as one operator. Frozen parameters do
not learn; errors go through their layers as through the others.

Activities are what depends on the inputs of the call and on the state that the network keeps. All else is made of
parameters, constants (buffers, masks) and random draws, and is a weight where it is multiplied with activities. Where
it meets them otherwise (positions, noise, zeros, a memory given in an attribute), or is an output of its own, the
products that made it are layers too, whose weight is the factor that is made of parameters; of two such the one that is
the same weight elsewhere, else name the other: `added`. (Memory that one kind of call writes and another reads must be
an input.) A product of two activities is no layer (attention scores), nor is a penalty of weights: an output that is a
number. A weight that an activity scales is an activity.

Blocks. A block is a layer with all that follows it up to the next layers, on every path: the error that enters at their
inputs goes back through the block's own derivatives and becomes the layer's delta. In AlignAda it enters at the
argument of the activation function in front of the next layer, if nothing but rearranging, copying and padding lies
between (so that the initial network's derivative of the activation is used, as published), else at the layer's input;
at the readout, the layer called last, always at its input. `coupling="activity"` puts it at the input everywhere, as
the paper defines the rule for recurrent networks. In DirectFeedbackAlignment a block ends at the output of the first
activation function, or at the next layer's input if none comes before; e enters there, and nothing flows back past it.
Activation functions are those in ACTIVATIONS; others, and those with parameters, are part of the block. Errors add up
wherever an activity is used more than once, as in backprop, and go back along a skip connection, which no layer cuts.

The initial network is its parameters and its own statistics (buffers named in STATISTICS, the vectors of spectral
norm), which its own activities update in the same steps. All else it shares with the current one: modules, modes,
random draws, which are made once (also where activities decide on their distribution), and the state that the network
keeps between calls, from which both start. Calls without gradients (torch.no_grad) are the current network's alone,
and leave the initial statistics as they are.

How it works. torch.compile's Dynamo writes a call down, and notices when anything that Python decided has changed; the
rest of torch makes that one graph of operators; a rule is a small change to the graph, and runs as generated code under
autograd. Each new graph is checked on the batch that caused it: as backprop it must give the network's output and
gradients. What Dynamo cannot write down (control flow on values) is recorded anew at every call, with one warning;
its outputs are all tensors that are still held, wherever that may be, when it ends.
Backward hooks of modules, and hooks for all modules of a process, are not called.

A rule is right or raises, with the network's line of code and a remedy: TypeError for a learned tensor that meets
activities in any other way than by a product, entry by entry or by look-up, for a torch.autograd.Function that uses
weights, and for what neither way can write down; RuntimeError for differentiating twice, forward-mode derivatives and
torch.func around a rule (a rule's gradient is the gradient of nothing), for DataParallel, and for modules or parameters
other than those that the rule was made with. Backprop takes all of it.
"""

import collections
import contextlib
import functools
import gc
import inspect
import itertools
import math
import operator
import random
import re
import sys
import textwrap
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.fx.traceback
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import has_side_effect, map_aggregate, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# isort: split
# What is private of torch stands here, tried on torch 2.11, 2.14 and 2.15. (Beside it: what modules and tensors hold.)
from torch import (
    _disable_functionalization,
    _dynamo,
    _enable_functionalization,
    _from_functional_tensor,
    _is_functional_tensor,
    _mirror_autograd_meta_to,
    _sync,
    _to_functional_tensor,
)
from torch._C import (
    DisableTorchFunction,
    DispatchKey,
    DispatchKeySet,
    _DisablePythonDispatcher,
    _ExcludeDispatchKeyGuard,
    _len_torch_dispatch_stack,
    _overlaps,
    _swap_tensor_impl,
    _TorchDispatchModeKey,
)
from torch._C._autograd import _get_data_attr, _top_saved_tensors_default_hooks
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch._dispatch.python import enable_python_dispatcher
from torch._VF import _pad_packed_sequence
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
Names = Iterable[str]  # of parameters, or of modules
Named = Mapping[str, Tensor]

# ------------------------------------------------------------------------------------------------ gradient primitives


class _Route(torch.autograd.Function):
    """The value of `value`, bit for bit. Its gradient g goes to it and, as `route(g, *kept)`, one each, to `paths`."""

    @staticmethod
    def forward(ctx, value: Tensor, route: Callable[..., Iterable], kept: Iterable[Tensor], *paths: Tensor) -> Tensor:
        ctx.route = route
        ctx.save_for_backward(*kept)
        return value.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a rule's gradient cannot be differentiated again (create_graph=True, as for gradient penalties): it "
                "is the gradient of nothing; only Backprop allows it"
            )
        return gradient, None, None, *ctx.route(gradient, *ctx.saved_tensors)


def sg(value: Any) -> Any:
    """The stop-gradient."""
    return value.detach() if isinstance(value, Tensor) else value


def couple(value: Tensor, path: Tensor) -> Tensor:
    """`value + path - sg(path)`, of one shape: its gradient goes to both."""
    coupled = isinstance(path, Tensor) and path.requires_grad
    return _Route.apply(value, lambda gradient: (gradient,), (), path) if coupled else value


def swap_grad(value: Tensor, path: Tensor) -> Tensor:
    """`sg(value) + path - sg(path)`: its gradient goes to `path` alone."""
    return couple(sg(value), path)


def transport(output: Tensor, activity: Tensor, weight: Tensor, product: Callable, side: int, options: Any) -> Tensor:
    """The output of a layer; its gradient goes to it, and through `weight` to the activity that the layer reads.

    `product` is the layer's operator, `side` tells which factor the activity is, `options` are the operator's others.
    """
    if not activity.requires_grad:
        return output
    return _Route.apply(
        output, lambda *tensors: (_transposed(*tensors, product, side, options),), (activity, weight), activity
    )


def _transposed(gradient: Tensor, activity: Tensor, weight: Tensor, product: Callable, side: int, options) -> Tensor:
    """The gradient of a product for its factor `activity`, if the other one is `weight`."""
    if product is aten.convolution.default:
        wanted = (side == 0, side == 1, False)
        factors = (activity, weight) if side == 0 else (weight, activity)
        return aten.convolution_backward(gradient, *factors, None, *options, wanted)[side]
    if product is aten.vdot.default:  # conj(one) other
        sent = gradient.conj() * weight if side == 0 else gradient * weight
    elif not gradient.dim():  # a product of vectors
        sent = gradient * weight.conj()
    elif gradient.dim() == 1 and side == 0:  # of a matrix and a vector
        sent = gradient[:, None] * weight.conj()
    else:
        sent = gradient @ weight.mH if side == 0 else weight.mH @ gradient
    return sent if options == 1 else options * sent


@torch.library.custom_op("align_rules::recurrence", mutates_args=())
def _recurrence(
    s0: Tensor, W: Tensor, drive: Tensor, feedback: Tensor | None = None, path: Tensor | None = None
) -> Tensor:
    """`recurrence`. Errors go back in time through `feedback`; without one through W, and nowhere if it is empty. What
    is sent to states in this way also goes to `path`, a tensor of their shape."""
    states, state, weight = drive.clone(memory_format=torch.contiguous_format), s0, W.t().contiguous()
    for row in states.unbind():
        state = row.addmm_(state, weight).relu_()
    return states


def _back_in_time(ctx, gradient: Tensor):
    if torch.is_grad_enabled():
        raise RuntimeError("the gradient of a recurrence cannot be differentiated again; write its steps as a loop")
    s0, W, states, feedback = ctx.saved_tensors
    of_s0, of_W, _, _, of_path = (*ctx.needs_input_grad, False, False)[:5]  # arguments left out are left out there
    back = W if feedback is None else feedback
    slopes, sent, to_s0, to_W = states.sign(), torch.zeros_like(states) if of_path else None, None, None
    deltas = slopes * gradient  # at first what comes from outside
    if back.numel():
        delta = deltas[-1]
        if of_path:
            for row, slope, path in zip(*(t.unbind()[-2::-1] for t in (deltas, slopes, sent)), strict=True):
                delta = row.addcmul_(path.addmm_(delta, back), slope)
        else:
            for row, slope in zip(*(t.unbind()[-2::-1] for t in (deltas, slopes)), strict=True):
                delta = row.addmm_(delta, back).mul_(slope)
        to_s0 = delta @ back if of_s0 else None
    if of_W:  # the sum over all steps in one product
        to_W = torch.addmm(deltas[0].t() @ s0, deltas[1:].flatten(0, 1).t(), states[:-1].flatten(0, 1))
    return to_s0, to_W, deltas, None, sent


def _keep(ctx, inputs, output) -> None:
    s0, W, _, feedback, _ = inputs
    ctx.save_for_backward(s0, W, output, feedback)


_recurrence.register_fake(lambda s0, W, drive, *_, **__: torch.empty_like(drive, memory_format=torch.contiguous_format))
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
    return RECURRENCE(s0.to(drive.dtype), W.to(drive.dtype), drive)


# ------------------------------------------------------------------------------------------------------------ the rules


class Rule(nn.Module):
    """A network with a learning rule: called, it gives the network's own output; differentiated, the rule's gradient.

    The first call with a new kind of input takes seconds: it is written down and checked. Where gradients are disabled
    (torch.no_grad) a rule just calls the network. `state_dict` holds what the rule keeps. A rule of your own is a
    `derive` and `tensors`; numbers, strings and tuples that it holds are its settings, on which these may depend.

    Args:
        network: any torch.nn.Module that returns tensors (in tuples, lists, dicts). It is not changed; its parameters
            are the ones that learn.
        activities: names of its parameters that are activities and not weights.

    Raises:
        TypeError: the network is scripted, compiled, lazy without shapes, or holds a rule; at a call, see the module.
        ValueError: a name that no parameter or module of the network has. (Of rules, what they raise beside these.)
    """

    compiler: str | None = None  # of torch.compile's, the backend that a rule's graph is handed to; None: it runs as is
    layerwise = True  # it looks at layers, and so must know what every learned tensor does
    back, entry = "W", "its input"  # what carries errors back through a layer and where they enter, in words
    recorded: Mapping = types.MappingProxyType({})  # kinds of recorded calls: whether always recorded, and proofs taken

    def __init__(self, network: nn.Module, activities: Names = ()):
        super().__init__()
        _require_plain(network)
        self.network, self.activities = network, _parameters_within(network, activities)
        self.known = _Anatomy(network)

    @torch.compiler.disable  # a torch.compile around a rule leaves it as one call
    def forward(self, *inputs, **keywords) -> Any:
        if not torch.is_grad_enabled():
            return self.network(*inputs, **keywords)
        return _called(self, inputs, keywords)

    def derive(self, draft: "Draft") -> list:
        """Write the network's outputs, with the rule's gradient, into a draft."""
        raise NotImplementedError

    def tensors(self) -> Mapping[str, Any]:
        """What `derive` asks for by `draft.own`, as it is at this call."""
        return {}

    def enters(self, graph: "Graph", layer: "Layer") -> str:
        """Where the error that is sent through a layer enters, in words."""
        return self.entry

    def feedback_weights(self) -> dict[str, Tensor]:
        """What stands in for parameters when errors go back, by their names; empty if nothing does."""
        return {}

    def backprop_at(self) -> dict[str, Tensor]:
        """Values of parameters, by name, at which the rule is backprop; ValueError if there are none."""
        raise ValueError(f"{type(self).__name__} is backprop at no parameters; nothing can be compared")

    def become_backprop(self) -> None:
        for name, value in self.backprop_at().items():
            self.network.get_parameter(name).data.copy_(value.data)

    def explain(self, *inputs, code: bool = False, **keywords) -> str:
        """What the rule is on this network, for a batch: its layers in the order of their calls, what carries their
        errors back and where these enter, what is differentiated as it stands, and what does not learn; with `code`,
        also the code, in which the rule's own tensors have the names of those that they stand in for."""
        with torch.enable_grad(), _undisturbed(self, (inputs, keywords)):
            behind = _nodes_behind(_tensors(_called(self, inputs, keywords)))
        graph, program = _now.read

        def shape(node: fx.Node) -> str:
            return "x".join(map(str, getattr(node.meta.get("val"), "shape", ()))) or "1"

        rows = [("layer", "activity -> output", "error enters at")]
        for k in graph.layers.values():
            rows.append((", ".join(k.names), f"{shape(k.activity)} -> {shape(k.node)}", self.enters(graph, k)))
        second = max(len(shapes) for _, shapes, _ in rows)
        first = min(max(len(names) for names, _, _ in rows), max(56 - second, 24))
        lines = [f"{type(self).__name__} on {type(self.network).__name__}: errors go back through {self.back}", ""]
        for names, shapes, entry in rows:
            names = names if len(names) <= first else f"{names}\n{'':<{first}}"
            lines.append(f"{names:<{first}}  {shapes:<{second}}  {entry}")
        others = (_operator(n) for n in graph.nodes if graph.kinds[n] == ACTIVITY and n not in graph.layers)
        counts = collections.Counter(others)
        detached = counts.pop("detach", 0)
        learning = _variables(behind)
        told = {
            "differentiated as they stand": [f"{name} {n}" for name, n in counts.items()],
            "stop-gradients": [str(detached)] if detached else [],
            "drawn once": sorted({_operator(n) for n in graph.nodes if _draws(n)}),
            "do not learn": [n for n, p in self.network.named_parameters() if p not in learning],
        }
        for title, parts in told.items():
            lines += ["", *textwrap.wrap(f"{title}: {', '.join(parts)}", 80)] if parts else []
        return "\n".join([*lines, program.code] if code and program else lines)

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key not in ("known", "recorded")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # of a deep copy, or from a pickle
        self.known = _Anatomy(self.network)


class Backprop(Rule):
    """Gradient descent as it is, for comparison: the error W^T delta. It takes any network, and torch.func."""

    layerwise = False

    def forward(self, *inputs, **keywords) -> Any:
        return super().forward(*inputs, **keywords) if self.compiler else self.network(*inputs, **keywords)

    def derive(self, draft: "Draft") -> list:
        return draft.outputs(draft.follow(draft.places)[0])

    def backprop_at(self) -> dict[str, Tensor]:
        return {}  # at any


class LastLayer(Rule):
    """Only the readout learns, by e a^T; no graph is kept below it, unless an input is to have backprop's gradient.

    Args:
        learns: names of the parameters, or of modules that hold them, that learn. Default: the last layer registered.

    Raises:
        TypeError: no layer of torch.nn is registered, and `learns` is not given.
    """

    layerwise = False
    back, entry = "nothing", "-"

    def __init__(self, network: nn.Module, learns: Names | None = None):
        super().__init__(network)
        if learns is None:
            if not (layers := [name for name, module in network.named_modules() if isinstance(module, LAYERS)]):
                raise TypeError("the network has no torch.nn.Linear or Conv layer; name what learns: learns=(...)")
            learns = layers[-1:]
        self.learns = _parameters_within(network, learns)

    def derive(self, draft: "Draft") -> list:
        frozen = [place for place, name in draft.graph.parameters.items() if name not in self.learns]
        now = draft.places | {place: draft.call(sg, draft.places[place]) for place in frozen}
        return draft.outputs(draft.follow(now)[0])


class FeedbackAlignment(Rule):
    """The error goes back through fixed random weights in place of the transposed ones (Lillicrap et al., 2016).

        sent to the layer's input: B^T delta        dW = delta a^T

    Args:
        feedback: tensors by the names of the parameters that they stand in for, and of their shapes; at least one for
            every weight of a torch.nn.Linear or Conv layer. Default, and for other parameters of two dimensions or
            more: drawn from a normal distribution with the standard deviation that the parameter has now (its size,
            for a single weight).
        generator: for that draw.
        added: names of parameters that are activities: learned initial states of recurrent networks, learned queries.
            (What is only added to activities, as position embeddings are, needs no name.)
        vectors: names of parameters, or of modules, of fewer dimensions that feedback is drawn for as well: those that
            are weights, or a part of weights, as the bias of an nn.Linear that makes one; "" is the whole network.

    With B = W it is backprop. By hand: tests/rules/test_updates_by_hand.py.

    Raises:
        ValueError: `feedback` does not fit the network's parameters; at a call, a layer has a weight for which there is
            no feedback (a vector, for one).
    """

    back = "B"

    def __init__(
        self, network: nn.Module, feedback: Named | None = None, generator: torch.Generator | None = None,
        added: Names = (), vectors: Names = (),
    ):  # fmt: skip
        super().__init__(network, added)
        given, parameters = feedback or {}, self.known.parameters
        names = [*_stood_in_for(network, self.activities, given), *_parameters_within(network, vectors)]
        self.names = tuple(name for name in dict.fromkeys(names) if name not in self.activities)
        self.feedback = _Tensors(
            (str(k), _like(parameters[n], given[n]) if n in given else self.drawn(parameters[n].detach(), generator))
            for k, n in enumerate(self.names)
        )

    def drawn(self, parameter: Tensor, generator: torch.Generator | None) -> Tensor:
        """The feedback for a parameter, where none is given."""
        return _normal_like(parameter, parameter.std() if parameter.numel() > 1 else parameter.abs().sum(), generator)

    def tensors(self) -> Mapping[str, Any]:
        return {f"feedback.{name}": B.data for name, B in self.feedback_weights().items()}

    def derive(self, draft: "Draft") -> list:
        graph = draft.graph
        layers = [layer for layer in graph.layers.values() if graph.kinds[layer.activity] != FIXED]
        alone = [layer.names for layer in layers if set(layer.names).isdisjoint(self.names)]
        if missing := [*alone, *graph.added_to_weights(layers, self.names)]:
            told = "give it two dimensions, or name it: vectors=(...)"
            raise ValueError(f"the weight {missing[0]} has no feedback; {told}")
        now, B = {**draft.places}, {}  # B: what stands in for parameters, and what the network makes of that
        for place, name in graph.names.items():
            if graph.kinds[place] == WEIGHT:
                B[place] = draft.own(f"feedback.{name}") if name in self.names else draft.call(sg, now[place])
        for node in graph.nodes:
            layer = graph.layers.get(node)
            now[node] = self.layer(draft, layer, now, B[layer.weight]) if layer else draft.again(node, now)
            if graph.kinds[node] == WEIGHT:
                B[node] = draft.again(node, collections.ChainMap(B, now))
        draft.put_back(now)
        return [draft.call(swap_grad, f, f) for f in draft.outputs(now)]  # of which all refuse second derivatives

    def layer(self, draft: "Draft", layer: "Layer", now: dict, B: Any) -> Any:
        """y = a W, and the error at y goes to a through B."""
        if layer.recurrent:
            return draft.again(layer.node, now, feedback=B)
        return draft.call(transport, draft.cut(layer, now), now[layer.activity], B, *draft.product(layer, now))

    def feedback_weights(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.feedback, strict=True))

    def backprop_at(self) -> dict[str, Tensor]:
        return self.feedback_weights()


class AlignProp(FeedbackAlignment):
    """Feedback alignment with the initial weights as feedback weights (section 4 of the paper).

        sent to the layer's input: W0^T delta       dW = delta a^T

    `added`, `vectors` and errors as for FeedbackAlignment. At the initial weights it is backprop.
    """

    back = "W0"

    def __init__(self, network: nn.Module, added: Names = (), vectors: Names = ()):
        super().__init__(network, added=added, vectors=vectors)

    def drawn(self, parameter: Tensor, generator: torch.Generator | None) -> Tensor:
        return parameter.clone()


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
        generator, added, vectors: as for FeedbackAlignment.

    Raises:
        ValueError: an unknown variant; magnitudes that do not fit, are negative, or are given to brSF.
    """

    VARIANTS = ("uSF", "frSF", "brSF")
    back = "M o sign W"

    def __init__(
        self, network: nn.Module, variant: str = "uSF", magnitudes: Named | None = None, exact: Names = (),
        generator: torch.Generator | None = None, added: Names = (), vectors: Names = (),
    ):  # fmt: skip
        chosen = {name.lower(): name for name in self.VARIANTS}.get(str(variant).lower())
        if chosen is None:
            raise ValueError(f"variant must be one of {', '.join(self.VARIANTS)}, not {variant!r}")
        if magnitudes is not None and chosen == "brSF":
            raise ValueError("brSF draws its magnitudes at every call; give them to uSF or frSF")
        if any((M < 0).any() for M in (magnitudes or {}).values()):
            raise ValueError("magnitudes must not be negative")
        self.variant = chosen
        super().__init__(network, magnitudes, generator, added, vectors)
        self.exact = _parameters_within(network, exact)
        if chosen == "brSF":
            self.register_buffer("seed", _seed(generator))
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device="cpu"))

    def enters(self, graph: "Graph", layer: "Layer") -> str:
        return "its input" + (", through W" if set(layer.names) & set(self.exact) else "")

    def drawn(self, parameter: Tensor, generator: torch.Generator | None) -> Tensor:
        constant = (2 / ((sum(parameter.shape[:2]) or 1) * math.prod(parameter.shape[2:]))) ** 0.5
        if self.variant == "uSF":
            return torch.full_like(parameter, constant, requires_grad=False)
        return _normal_like(parameter, constant, generator).abs()

    def backprop_at(self) -> dict[str, Tensor]:
        if self.variant == "brSF":
            raise ValueError("brSF draws its magnitudes anew at every call: it is backprop nowhere")
        return self.feedback_weights()

    @torch.no_grad()
    def tensors(self) -> Mapping[str, Any]:
        if self.variant == "brSF":
            stream = _stream(self.seed + self.draws)
            self.draws += 1
            for name, M in super().feedback_weights().items():
                M.copy_(self.drawn(self.network.get_parameter(name), stream))
        return super().tensors()

    def feedback_weights(self) -> dict[str, Tensor]:
        M = super().feedback_weights()
        weights = {name: self.network.get_parameter(name).detach() for name in M}
        return {name: W if name in self.exact else M[name] * W.sgn() for name, W in weights.items()}


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

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.feedback = nn.ParameterList(self.feedback)
        self.versions: list[int] = []  # of weights and feedback at the last call

    def tensors(self) -> Mapping[str, Any]:
        B = self.feedback_weights()
        learning = {name: w for name in B if (w := self.network.get_parameter(name)).requires_grad}
        before, self.versions = self.versions, [sum(t._version for t in ts) for ts in (learning.values(), B.values())]
        if before and before[0] != self.versions[0] and before[1] == self.versions[1]:
            warnings.warn(
                "the weights have changed and their feedback weights have not, which is feedback alignment: give the "
                "optimiser rule.parameters(), not network.parameters()", stacklevel=_depth()
            )  # fmt: skip
        return {f"feedback.{name}": b if name in learning else b.data for name, b in B.items()}

    def layer(self, draft: "Draft", layer: "Layer", now: dict, B: Any) -> Any:
        # dB = dW, through whatever the network makes of the weight before it uses it; 1 B, so that .grad has memory of
        # its own.
        now = {**now, layer.weight: draft.call(couple, now[layer.weight], draft.call(torch.mul, B, 1))}
        return super().layer(draft, layer, now, draft.call(sg, B))


class WeightMirror(FeedbackAlignment):
    """Feedback weights that are estimated from noise, between the steps (Akrout et al., 2019, section 4.1).

        sent to the layer's input: B^T delta        dW = delta a^T

    `mirror(*inputs)`, between steps as often as you like, puts noise x ~ N(0, 1) into every layer by itself, in the
    shapes that it has in a pass of `inputs`, and lets y = W x (no bias) and x meet: the mean of y x^T is W, times the
    number of positions at which a convolution's tap lies inside of its input, by which it is divided.

        B <- B + r (y x^T / positions - B),     r = max(rate, 1/number of the mirror step)

    Args:
        rate: of forgetting, since W moves.
        feedback, generator, added, vectors: as for FeedbackAlignment. With feedback = the weights it is backprop.

    Raises:
        ValueError: as for FeedbackAlignment; a rate outside of 0 < rate <= 1.
        TypeError: from `mirror`, a weight that is not its parameter scaled, masked or rearranged.
    """

    def __init__(
        self, network: nn.Module, rate: float = 0.01, feedback: Named | None = None,
        generator: torch.Generator | None = None, added: Names = (), vectors: Names = (),
    ):  # fmt: skip
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, not {rate}")
        super().__init__(network, feedback, generator, added, vectors)
        self.rate, self.mirroring, self.met, self.ones = rate, False, [], []
        self.register_buffer("seed", _seed(generator))
        self.register_buffer("mirrored", torch.zeros((), dtype=torch.int64, device="cpu"))

    def mirror(self, *inputs, **keywords) -> None:
        """A mirror step, for a batch as the network takes it, whose values matter only as far as they decide which
        layers are called. It changes B alone, and the count of mirror steps: its noise follows from that and a seed."""
        self.mirroring, self.met = True, [_stream(self.seed + self.mirrored)]
        # What the network makes of ones in a weight's place tells how often it is counted.
        self.ones = [torch.ones_like(self.network.get_parameter(n), requires_grad=True) for n in self.names]
        try:
            with torch.enable_grad(), _undisturbed(self.network, (inputs, keywords)):
                _called(self, inputs, keywords)
            sums = [_gradients(sum(totals), self.ones) for totals in zip(*self.met[1:], strict=True)]
        finally:
            self.mirroring, self.met, self.ones = False, [], []
        self.mirrored += 1
        rate = max(self.rate, 1 / int(self.mirrored))
        for B, product, positions in zip(self.feedback, *sums, strict=True):
            if product is not None:  # of a layer that was called
                met = positions != 0  # not of a tap that lies outside, a masked weight
                B.copy_(torch.where(met, B + rate * (product / positions - B), B))

    def tensors(self) -> Mapping[str, Any]:
        ones = {f"feedback.{name}": one for name, one in zip(self.names, self.ones, strict=False)}
        return {**super().tensors(), **ones, "met": self.met}

    def layer(self, draft: "Draft", layer: "Layer", now: dict, B: Any) -> Any:
        if not self.mirroring:
            return super().layer(draft, layer, now, B)
        draft.graph.require_proportional(layer)
        y = draft.again(layer.node, now)
        a = y if layer.recurrent else now[layer.activity]  # a recurrence's states have the shape of what it reads
        return draft.call(_meet, draft.own("met"), y, a, now[layer.weight], B, *draft.product(layer, now))


def _meet(met: list, output: Tensor, activity: Tensor, weight: Tensor, ones: Tensor, product, side: int, options):
    """A layer's output. To `met` are added two numbers, whose gradients for ones in the weight's place are, if the
    network scales that by s, s y x^T and s^2 times the number of positions: in the mean the weight times the latter."""

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        if product is RECURRENCE:
            return x @ weight.mT
        left, right = (x, weight) if side == 0 else (weight, x)
        convolves = product is aten.convolution.default
        return product(left, right, None, *options) if convolves else options * (left @ right)

    x = _normal_like(activity, 1, met[0])
    y = linear(x, weight.detach())
    met.append(((y * linear(x, ones)).sum(), linear(torch.ones_like(x), ones.square()).sum() / 2))
    return output


class DirectFeedbackAlignment(Rule):
    """The error e at the output goes straight to every block through a fixed random weight (Nokland, 2016).

        sent to the block's activity: B^T e         dW = delta a^T

    e lands on the activity at the end of each block and goes back to its parameters through the block's derivatives.
    What lies between that end and the next layer (a normalisation behind the activation function) does not learn; what
    learns in front of the first layer (an embedding) is a block. What no input has reached (positions, noise) is
    differentiated as it stands.

    Args:
        feedback: one tensor per block, in the order of the forward pass: (outputs, *activity shape without batch), or
            (outputs, channels) to project activities averaged over their positions. Default: drawn at the first call,
            when their shapes are known, from a seed that is drawn when the rule is made and is part of its state;
            normal with standard deviation 1/sqrt(entries of an activity).
        pooled: draw the default feedback for activities averaged over their positions.
        generator, added: for that seed; as for FeedbackAlignment.
        batch_dim: which dimension of the output counts the examples. Default: the first, if no other can be meant.

    Raises:
        TypeError: at a call, complex activities, or outputs other than one tensor.
        ValueError: at a call, `feedback` does not fit the network's blocks, the network ends in an activation, an
            activity's first dimension is not the batch, or `batch_dim` is needed (as many time steps as examples).
        RuntimeError: at backward(), an input is to have a gradient: none goes there, nor to what an input is made by.
    """

    back, entry = "nothing; B^T e enters at the end of every block", "-"

    def __init__(
        self, network: nn.Module, feedback: Iterable[Tensor] | None = None, pooled: bool = False,
        generator: torch.Generator | None = None, added: Names = (), batch_dim: int | None = None,
    ):  # fmt: skip
        super().__init__(network, added)
        self.pooled, self.batch_dim, self.given = pooled, batch_dim, feedback is not None
        self.feedback = _Tensors((str(k), B.detach().clone()) for k, B in enumerate(feedback or ()))
        if not self.given:
            self.register_buffer("seed", _seed(generator))

    def tensors(self) -> Mapping[str, Any]:
        return {"rule": self}

    def derive(self, draft: "Draft") -> list:
        graph, now = draft.graph, {**draft.places}
        if len(graph.results) != 1:
            raise TypeError("DFA needs one output that learns; detach the others, and what the network keeps")
        result, ends, inside, begun = graph.results[0], [], set(), set()  # inside: of a block that has not ended
        examples = result.meta["val"].movedim(self.batch_dim or 0, 0).shape[:1] if result.meta["val"].dim() else ()

        def end(node: fx.Node) -> None:
            ends.append(now[node])
            now[node] = draft.call(sg, now[node])
            inside.discard(node)

        def ends_elsewhere(node: fx.Node) -> bool:  # at what it copies, or folds: (batch x positions, ...)
            copies = _operator(node) in ("clone", "_to_copy")
            return copies or (_rearranges(node) and node.meta["val"].shape[:1] != examples)

        fed = self.fed(graph, examples)
        for node in graph.nodes:
            layer, parts = graph.layers.get(node), set(node.all_input_nodes)
            if layer and layer.recurrent:
                raise TypeError("DFA needs a block for every step of a recurrence; write its steps as a loop")
            if _operator(node).startswith("_thnn_fused"):
                raise TypeError("DFA's blocks end inside of a GPU's fused cells; write their steps out, or use a CPU")
            if layer and node in fed:
                place = layer.activity
                while place in inside and ends_elsewhere(place) and len(graph.parts(place)) == 1:
                    inside.discard(place)
                    place = graph.parts(place)[0]
                if place in inside:
                    end(place)
                now[node] = draft.cut(layer, now)
                inside.add(node)
            else:
                now[node] = draft.again(node, now)
                learned = graph.reached & parts if node in fed else set()
                joins = any(graph.kinds[part] == ACTIVITY for part in learned - fed)  # what no input has reached
                embeds = not begun & parts and any(graph.kinds[part] == WEIGHT for part in learned)  # before any layer
                if graph.kinds[node] == ACTIVITY and (inside & parts or joins or embeds):
                    inside.add(node)
            begun |= {node} if layer or begun & parts else set()
            activation = node.args[0] if _operator(node) == "getitem" else node
            if node in inside and _operator(activation) in ACTIVATIONS and isinstance(node.meta["val"], Tensor):
                end(node)
        if result not in inside:
            told = "ends in an activation, behind which e is not seen; apply that outside of it"
            raise ValueError(f"the network {told if ends else 'hands no input to a layer; hand over tensors'}")
        data = [value for place, value in draft.places.items() if _flows(place) and not graph.names[place]]
        now[result] = draft.call(DirectFeedbackAlignment.direct, draft.own("rule"), now[result], ends, data)
        draft.put_back(now)
        return draft.outputs(now)

    @staticmethod
    def fed(graph: "Graph", examples: Iterable) -> set[fx.Node]:
        """What inputs have reached; and steps before they come: what has their shape where it meets them."""
        fed = {place for place in graph.places if graph.kinds[place] == ACTIVITY}
        for node in graph.nodes:
            fed |= {node} if fed & {*node.all_input_nodes} else set()
        for node in reversed(graph.nodes):
            layer = graph.layers.get(node)
            parts = [layer.activity] if layer else node.all_input_nodes if _is_pointwise(node) else []
            for part in parts if node in fed else []:
                shape, of_node = (getattr(n.meta["val"], "shape", ()) for n in (part, node))
                if graph.kinds[part] == ACTIVITY and shape[:1] == examples and (layer or shape == of_node):
                    fed.add(part)
        return fed

    def direct(self, output: Tensor, ends: list[Tensor], inputs: list[Tensor]) -> Tensor:
        """The output; its gradient goes to it and, through the feedback, to the ends of blocks, not to the inputs."""
        examples, entries = self._by_example(output, ends, inputs)
        shapes = [(entries, *end.shape[1:]) for end in ends]
        if not self.given and not len(self.feedback):
            stream = _stream(self.seed)
            for k, (end, shape) in enumerate(zip(ends, shapes, strict=True)):
                B = end.new_empty(shape[:2] if self.pooled else shape)
                self.feedback.add(str(k), _normal_like(B, max(B.shape[1:].numel(), 1) ** -0.5, stream))
        given = [tuple(B.shape) for B in self.feedback]
        if len(given) != len(shapes) or any(B not in (s, s[:2]) for B, s in zip(given, shapes, strict=True)):
            raise ValueError(f"feedback weights must have the shapes {shapes} (or their first two), not {given}")
        for (_, held, key), end in zip(self.feedback.places, ends, strict=True):
            if held[key].dim() == 4 and end.is_contiguous(memory_format=torch.channels_last):  # B in that order too
                held[key] = held[key].contiguous(memory_format=torch.channels_last)
        places = [(B.data, end.shape, end.dtype) for B, end in zip(self.feedback, ends, strict=True)]
        asked = [t for t in inputs if t.requires_grad]

        def send(e: Tensor) -> list[Tensor | None]:
            if any(t.is_leaf for t in asked):
                raise RuntimeError("inputs get no error in direct feedback, and one has requires_grad; hand over data")
            e = e.movedim(self.batch_dim or 0, 0).reshape(examples, entries)
            return [*(_projected(e, *place) for place in places), *[None] * len(asked)]

        return _Route.apply(output, send, (), *ends, *asked)

    def _by_example(self, output: Tensor, ends: list[Tensor], inputs: list[Tensor]) -> tuple[int, int]:
        """The number of examples, and of the output's entries for each."""
        if any(t.is_complex() for t in (output, *ends)):
            raise TypeError("DirectFeedbackAlignment needs real activities; split complex ones into two")
        if not output.dim():
            raise ValueError("the network returns a single number; DirectFeedbackAlignment needs outputs per example")
        square, fed = ([t for t in ts if t.dim() > 1 < t.shape[0] == t.shape[1]] for ts in ([output, *ends], inputs))
        # Two signs that there are as many time steps as examples.
        in_doubt = any((t is output) + (t.dim() > 2) + bool(fed) > 1 for t in square)
        if self.batch_dim is None and in_doubt and (self.given or not len(self.feedback)):
            told = f"which dimension of the output {tuple(output.shape)} counts the examples of the batch?"
            raise ValueError(f"{told} Say so: DirectFeedbackAlignment(..., batch_dim=...)")
        examples, *others = output.movedim(self.batch_dim or 0, 0).shape
        if any(end.shape[:1] != (examples,) for end in ends):
            raise ValueError("activities' first dimension must be the batch, the output's first or batch_dim=...")
        return examples, math.prod(others)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        if not self.given:  # drawn at the first call: there, or not yet, as in the state
            start, like = f"{prefix}feedback.", next(self.network.parameters())
            stored = {key.removeprefix(start): B for key, B in state_dict.items() if key.startswith(start)}
            self.feedback = _Tensors((k, like.new_empty(B.shape, requires_grad=False)) for k, B in stored.items())
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
        kept = {**self.known.parameters, **self.known.statistics}
        self.initial = _Tensors((name, t.detach().clone()) for name, t in kept.items())
        self.kept = tuple(name for name in kept if name not in self.live)

    def tensors(self) -> Mapping[str, Any]:
        return {f"initial.{name}": t.data for name, t in self.initial.named().items()}

    def initially(self, draft: "Draft", places: Mapping) -> dict:
        """The values of places in the initial network: these, but its own parameters and statistics."""
        graph = draft.graph
        own = {place: draft.own(f"initial.{name}") for place, name in graph.names.items() if name in self.kept}
        copies = {place: draft.call(torch.clone, own[place]) for place in graph.renewed if place in own}
        return {**places, **own, **copies}

    def cut_off(self, draft: "Draft") -> dict:
        return {place: draft.call(sg, value) for place, value in draft.places.items()}

    def feedback_weights(self) -> dict[str, Tensor]:
        kept = self.initial.named()
        return {name: kept[name] for name in _stood_in_for(self.network, self.activities, {})}

    def backprop_at(self) -> dict[str, Tensor]:
        kept = self.initial.named()
        return {name: kept[name] for name in self.kept if name in self.known.parameters}


class AlignZero(_FromInitial):
    """The gradient of the initial network at the current error: J(theta0)^T e, applied to the current parameters.

        sent to the layer's input: W0^T delta0      dW = delta0 a0^T

    output = sg(f) + f0 - sg(f0), and d(output)/d(theta0) is what theta gets. At the initial parameters it is backprop.
    Learned tensors may meet activities in any way.
    """

    layerwise = False

    def derive(self, draft: "Draft") -> list:
        now, first = draft.follow(self.cut_off(draft), None, self.received_by(draft.places, draft), self.kept)
        return [draft.call(swap_grad, f, f0) for f, f0 in zip(draft.outputs(now), draft.outputs(first), strict=True)]

    def received_by(self, receivers: Mapping, draft: "Draft") -> dict:
        """The values of places in the initial network, where d(f0)/d(theta0) goes to the receivers, by place."""
        first = self.initially(draft, draft.places)
        for place, name in draft.graph.parameters.items():
            to = receivers[place]
            first[place] = to if name in self.live else draft.call(swap_grad, first[place], to)
        return first


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
        ValueError: an unknown coupling.
    """

    def __init__(
        self, network: nn.Module, coupling: str = "preactivation", live: Names = (), uncoupled: Names = (),
        added: Names = (),
    ):  # fmt: skip
        super().__init__(network, live, added)
        if coupling not in ("preactivation", "activity"):
            raise ValueError(f"coupling must be 'preactivation' or 'activity', not {coupling!r}")
        self.coupling, self.uncoupled = coupling, _parameters_within(network, uncoupled)

    def derive(self, draft: "Draft") -> list:
        coupled = {}  # activation functions of the initial network, and what rearranges their outputs

        def coupling(layer: Layer, first: dict, now: dict) -> Any:
            """y0 = a0 W0; the error at a0 also goes to the place in the current network where it enters."""
            a = layer.activity
            if set(layer.names) & set(self.uncoupled):
                return draft.again(layer.node, first)
            path = self.entrance(draft.graph, layer)
            for node in path:
                if node not in coupled:
                    u = node.args[0]
                    at_u = {0: draft.call(couple, first[u], now[u])} if node is path[0] else {}
                    coupled[node] = draft.again(node, collections.ChainMap(coupled, first), at_u)
            a0 = coupled[a] if path else draft.call(couple, first[a], now[a])
            states = {"path": now[layer.node]} if layer.recurrent else {}
            return draft.again(layer.node, first, {layer.position: a0}, **states)

        first = self.initially(draft, self.cut_off(draft))
        now, first = draft.follow(draft.places, draft.cut, first, self.kept, coupling)
        return [draft.call(couple, f, f0) for f, f0 in zip(draft.outputs(now), draft.outputs(first), strict=True)]

    def entrance(self, graph: "Graph", layer: "Layer") -> list[fx.Node]:
        """The activation function at whose argument the error enters, and what rearranges its output; empty: at a."""
        readout = layer.names == graph.last.names
        return [] if readout or self.coupling == "activity" else graph.origin(layer.activity)

    def enters(self, graph: "Graph", layer: "Layer") -> str:
        if set(layer.names) & set(self.uncoupled):
            return "nowhere"
        path = self.entrance(graph, layer)
        return f"the argument of {_operator(path[0])}" if path else "its input"


RULES: dict[str, type[Rule]] = {
    "backprop": Backprop, "last_layer": LastLayer, "fa": FeedbackAlignment, "dfa": DirectFeedbackAlignment,
    "align_prop": AlignProp, "align_ada": AlignAda, "align_zero": AlignZero, "sign_symmetry": SignSymmetry,
    "kolen_pollack": KolenPollack, "weight_mirror": WeightMirror,
}  # fmt: skip


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
        ValueError: the rule is backprop nowhere (LastLayer, DirectFeedbackAlignment, SignSymmetry's brSF), or all
            gradients of backprop are zero or NaN.
    """
    fed: list[Tensor] = []

    def feed(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(torch.float64 if double and tensor.is_floating_point() else tensor.dtype).clone()
        if _differentiable(tensor):
            fed.append(tensor.requires_grad_())
        return tensor.clone()  # which the network may write to

    inputs, keywords = pytree.tree_map_only(Tensor, feed, (inputs, keywords))
    with _undisturbed(rule), torch.enable_grad():
        for parameter in rule.parameters():
            parameter.data = _not_zero(parameter.data.clone())
        if double:
            rule.double()
        for held in rule.backprop_at().values():
            held.data.copy_(_not_zero(held.data))
        rule.become_backprop()
        learning = {name: p for name, p in rule.network.named_parameters() if p.requires_grad}
        calls = [functools.partial(function, *inputs, **keywords) for function in (rule.network, rule)]
        watched, (outputs, gradients, kept), own = _compared(
            calls, loss_function, [*learning.values(), *fed], rule.network, (inputs, keywords)
        )
    if not any(g is not None and g.isfinite().all() and g.any() for g in gradients):
        raise ValueError("nothing can be compared: all gradients of this loss by backprop are zero or NaN")
    limit = max(_tolerance(t.dtype, 1e-3, 0.1) for t in outputs) if tolerance is None else tolerance
    if not all(share <= limit for share in _shares(own[0], outputs)):
        raise RuntimeError("the rule's output is not the network's own")
    if not all(share <= limit for share in _shares(own[2], kept)):
        raise RuntimeError("the rule leaves other buffers, or other state, behind than the network")
    outside = [f"a tensor {tuple(t.shape)} outside of the network" for t in watched[len(learning) + len(fed) :]]
    names = [*learning, *(f"input {k}" for k in range(len(fed))), *outside]
    shares = dict(zip(names, _shares(own[1], gradients), strict=True))
    if wrong := ", ".join(f"{name} by {share:.2g}" for name, share in shares.items() if not share <= limit):
        raise RuntimeError(f"where the rule should be backprop, gradients differ (as shares of backprop's): {wrong}")
    return {name: shares[name] for name in learning}


def gradient_angles(rule: Rule, loss_function: Callable[[Any], Tensor], *inputs, **keywords) -> dict[str, float | None]:
    """Angles between the gradients that a rule has left in .grad and those of backprop, at one forward and backward.

    To be called between `loss.backward()` and the optimiser's step, with the inputs that were given to the rule; under
    autocast where the rule was. It changes nothing. Dropout draws masks other than the step's, unless the state of the
    generator of random numbers is first put back to what it was before the step.

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
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    modules = (module for module in network.modules() if isinstance(module, LAYERS))
    weights = (weight for module in modules if (weight := module._parameters.get("weight")) is not None)
    return {names[id(weight)]: weight for weight in weights}


def _compared(
    calls: list[Callable], loss_function: Callable, watched: list[Tensor], network: nn.Module, values: Any
) -> tuple:
    """What is differentiated, with leaves outside of a network; and of each of two calls outputs, gradients of a loss,
    and the tensors that the network and the values hold then."""
    found = []
    for call in calls:
        with _undisturbed(network, values):
            for parameter in network.parameters():
                parameter.data = _not_zero(parameter.data.clone())  # into which the network may write
            generators = _pythons(_Held(network, values).others)
            for generator in generators:  # from whose first draws Dynamo may have made constants
                generator.getrandbits(10**4)
            output = call()
            if not found:
                # Not those that the call has made, which nobody holds but autograd, as nobody does this one.
                alone = torch.ones(1, requires_grad=True) * 1
                leaves = [*_variables(_nodes_behind([alone])), *_variables(_nodes_behind(_tensors(output), watched))]
                unheld, *holders = map(sys.getrefcount, leaves)
                outside = (t for t, n in zip(leaves[1:], holders, strict=True) if n > unheld)
                watched = [*watched, *(t for t in outside if not any(t is other for other in watched))]
            kept = [t.detach().clone() for t in _Held(network, values).buffers()]
            kept += [torch.tensor(hash(generator.getstate()), device="cpu") for generator in generators]
            gradients = _gradients(loss_function(output), watched)
            found.append(([f.detach().clone() for f in _tensors(output)], gradients, kept))
    return watched, *found


def _not_zero(weight: Tensor) -> Tensor:
    """Below a weight of zeros all gradients are zero, and nothing could be compared."""
    zero = _differentiable(weight) and not weight.any()
    return _normal_like(weight, 0.01, torch.Generator("cpu").manual_seed(0)).abs() if zero else weight


def _gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor | None]:
    if not of or not isinstance(loss, Tensor) or not loss.requires_grad:
        return [None] * len(of)
    with torch.autocast(loss.device.type, enabled=False):  # which is for forward passes
        try:
            # What the inputs come from stays the caller's.
            gradients = torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True)
            return [None if gradient is None else gradient.to_dense() for gradient in gradients]
        except RuntimeError as error:
            raise TypeError(f"its gradient cannot be compared: {_reason(error)}. {REMEDY}") from error


def _nodes_behind(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> set:
    """Of the autograd graph, but what lies behind known tensors."""
    nodes, seen, found = [t.grad_fn for t in tensors], {None, *(t.grad_fn for t in known)}, set()
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            found.add(node)
            nodes += [before for before, _ in node.next_functions]
    return found


def _variables(nodes: Iterable) -> set[Tensor]:
    return {node.variable for node in nodes if hasattr(node, "variable")}


def _tolerance(dtype: torch.dtype, single: float, below: float) -> float:
    """Of what is computed in two ways, as a share of its largest entry."""
    precision = torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0
    return 1e-8 if precision < 1e-12 else single if precision < 1e-6 else below


def _shares(found: list[Tensor | None], expected: list[Tensor | None]) -> list[float]:
    """The largest differences, relative to the largest entries expected; a missing gradient is one of zeros. Whole
    numbers must be equal."""
    if len(found) != len(expected):
        return [math.inf]
    found, expected = ([None if t is None else t.to_dense() for t in ts] for ts in (found, expected))
    flows = [_differentiable(t) and t.numel() for t in expected]
    sizes = [t.detach().abs().nan_to_num(0, 0).max().item() if f else 0.0 for t, f in zip(expected, flows, strict=True)]
    # Below such a share of the largest a gradient is rounding, as for a bias in front of a normalisation.
    floor = max(1e-4 * max(sizes, default=0.0), 1e-30)
    shares = []
    for one, other, size in zip(found, expected, sizes, strict=True):
        there = next((t for t in (one, other) if t is not None), torch.zeros(()))
        one, other = (torch.zeros_like(there) if t is None else t.detach() for t in (one, other))
        gap = 0.0 if torch.equal(one, other) else math.inf
        if one.shape == other.shape and gap and _differentiable(other):
            gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0, (one - other).abs()).max().item()
        shares.append(gap / max(size, floor))
    return shares


# -------------------------------------------------------------------------------------------------- the graph: reading

FIXED, WEIGHT, ACTIVITY = range(3)  # made of neither of the following; of parameters and statistics; of activities
GIVEN = "given"  # in a place's meta: whether the call hands it to the network

# Products, and the positions that an activity and a weight can have among their arguments.
PRODUCTS = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default,
                     aten.convolution.default), ((0, 1), (1, 0))),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addmv.default, aten._sparse_addmm.default),
                    ((1, 2), (2, 1))),
    RECURRENCE: ((0, 1),),
}  # fmt: skip


def _named_operators(names: str) -> set[str]:
    return set(names.split())


ACTIVATIONS = _named_operators(
    "relu leaky_relu elu gelu silu mish softplus hardtanh hardswish hardsigmoid log_sigmoid_forward threshold sigmoid "
    "tanh"
)
# What rearranges, copies or pads entries, beside views.
REARRANGING = _named_operators(
    "clone _to_copy constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d index index_select gather flip roll repeat pixel_shuffle pixel_unshuffle "
    "channel_shuffle im2col stack cat reshape lift_fresh_copy getitem slice_scatter select_scatter copied"
)
# How a learned tensor may meet activities beside products and entry by entry: it is looked up, put beside them or
# written into them; it is the gain or bias of a normalisation or of gates.
MEETING = REARRANGING | _named_operators(
    "embedding _embedding_bag take index_put scatter index_copy index_add scatter_add "
    "masked_scatter native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional "
    "_batch_norm_no_update cudnn_batch_norm native_layer_norm native_group_norm _fused_rms_norm _prelu_kernel "
    "_thnn_fused_lstm_cell _thnn_fused_gru_cell complex"
)
# Where factors, also gains, stand among an operator's arguments.
FACTORS = {
    **dict.fromkeys(("mul", "div", "mm", "bmm", "mv", "dot", "native_group_norm", "native_batch_norm", "_prelu_kernel",
                     "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_weight_norm_interface",
                     "_native_batch_norm_legit_no_training", "convolution"), (0, 1)),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), (0, 2)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addcmul"), (1, 2)),
}  # fmt: skip
# What is made of the shape of its argument alone, and a number that leaves torch.
UNLEARNED = _named_operators(
    "empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full sym_size _local_scalar_dense"
)
# Buffers of which the initial network has its own, beside the vectors of spectral norm.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Layer(NamedTuple):
    """A product of an activity and a weight, by their positions among its node's arguments, and the names of the
    parameters that the weight is made of."""

    node: fx.Node
    position: int
    weight_position: int
    names: tuple[str, ...]

    activity = property(lambda self: self.node.args[self.position])
    weight = property(lambda self: self.node.args[self.weight_position])
    recurrent = property(lambda self: self.node.target is RECURRENCE)


class Graph:
    """A call of a network, read: what each of its nodes is made of (`kinds`), and which are `layers`, in order.

    `places` are its inputs, `names` those of parameters and buffers among them, `parameters` the former alone;
    `sources` the parameters that a weight is made of; `reached` what is learned, and all that is made of it with a
    gradient; `results` what it gives that learns; by place, `state` what it writes there, `kept` what it puts there
    instead, and `renewed` either; `unclear` products that may be layers or not.

    Args:
        graph: the call as torch wrote it down, `written`.
        replaced: of tensors in whose place the network puts others, these, by positions (`_Held.replaced`).
    """

    def __init__(self, graph: fx.Graph, known: "_Anatomy", arguments: Iterable, activities: Names, replaced: Mapping):
        self.written, (*nodes, output) = graph, graph.nodes
        self.places = [node for node in nodes if node.op == "placeholder"]
        given = dict(zip(self.places, arguments, strict=True))
        self.names = {place: known.names.get(id(value)) for place, value in given.items()}
        self.parameters = {place: name for place, name in self.names.items() if name in known.parameters}
        writes = {n: n.args[0] for n in nodes if n.target is aten.copy_.default and n.args[0] in self.names}
        self.state = {place: node.args[1] for node, place in writes.items()}
        self.nodes = [node for node in nodes if node.op != "placeholder" and node not in writes]
        self.output = output.args[0]
        tensors = [*self.places, *self.output]
        self.kept = {tensors[k]: [tensors[n] for n in others] for k, others in replaced.items()}
        self.renewed = {place: nodes[0] for place, nodes in self.kept.items() if nodes} | self.state
        put = [*((place, [node]) for place, node in self.state.items()), *self.kept.items()]
        self.reached = {place for place, t in given.items() if isinstance(t, Tensor) and t.requires_grad}
        handed = {p for p, t in given.items() if isinstance(t, Tensor) and (p.meta[GIVEN] or t in _LEFT)}
        active, unfed = handed | self.reached | self.parameters.keys(), set()
        sources = {place: frozenset() for place, name in self.names.items() if name in known.statistics}
        sources |= {place: frozenset([name]) for place, name in self.parameters.items() if name not in activities}
        while True:  # until every activity is known as one
            others = self._classify(sources, active, unfed)
            if more := {p for p, nodes in put if self.kinds[p] == FIXED and ACTIVITY in map(self.kinds.get, nodes)}:
                active |= more
            elif found := self._unfed(others):
                unfed.add(found)
            else:
                break
        self.last = next(reversed(self.layers.values()), None)
        for node in self.nodes:  # `reached` by what is learned, with a gradient
            if node.target is not torch.detach and _flows(node) and not self.reached.isdisjoint(node.all_input_nodes):
                self.reached.add(node)
        self.results = [f for f in self.output if self.kinds.get(f) == ACTIVITY and f in self.reached]

    def _classify(self, sources: Mapping, active: set, unfed: set) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
        """Finds kinds and layers; `unfed` are those layers, with their activities, that no input has reached.

        Returns the products with weights that are no layers: node, other factor, weight.
        """
        self.kinds = {p: WEIGHT if p in sources else ACTIVITY if p in active else FIXED for p in self.places}
        self.sources, self.layers, others = {**sources}, {}, []
        for node in self.nodes:
            kind = max((self.kinds[part] for part in node.all_input_nodes), default=FIXED)
            kind = FIXED if _operator(node) in UNLEARNED or _draws(node) else kind
            for one, other in PRODUCTS.get(node.target, ()):
                read, weight = node.args[one], node.args[other]
                if (names := self.sources.get(weight)) and (self.kinds[read] == ACTIVITY or (node, read) in unfed):
                    self.layers[node] = Layer(node, one, other, tuple(sorted(names)))
                    kind = ACTIVITY
                elif names:
                    others.append((node, read, weight))
            self.kinds[node] = kind
            if kind == WEIGHT:
                parts = (self.sources.get(part, ()) for part in node.all_input_nodes)
                self.sources[node] = frozenset().union(*parts)
        return others

    def _unfed(self, others: Iterable) -> tuple[fx.Node, fx.Node] | None:
        """The first of these products that is a layer although no input has reached it, for it meets activities
        otherwise than in the weight of a layer, or is an output; with its activity. Notes those that are `unclear`."""

        def parts(node: fx.Node) -> set[fx.Node]:
            return {*node.all_input_nodes} - ({self.layers[node].weight} if node in self.layers else set())

        weighing = self.behind((layer.weight for layer in self.layers.values()), parts)
        # An output that is a number is a penalty, unless activation functions have made it.
        given = [f for f in self.output if isinstance(f, fx.Node) and getattr(f.meta["val"], "shape", ())]
        meeting = self.behind([*given, *(node for node in self.nodes if self.kinds[node] == ACTIVITY)], parts)
        activated = self.behind((a for n in self.nodes if _operator(n) in ACTIVATIONS for a in parts(n)), parts)
        known = {name for layer in self.layers.values() for name in layer.names}
        elsewhere = {self.made(layer.weight) for layer in self.layers.values()}
        whole = {of for of, *_ in elsewhere}
        self.unclear = set()
        # Two learned factors first: what makes the weight among them, with constants, is then no layer.
        for node, read, weight in sorted(others, key=lambda other: self.kinds[other[1]] == FIXED):
            of_read, of_weight = self.sources.get(read, frozenset()), self.sources[weight]
            if node in weighing or node in self.layers:
                continue
            if self.layers and node not in meeting:
                self.unclear |= {node} if self.kinds[read] == FIXED and node in activated else set()
            # Of two learned factors that is the weight which is one elsewhere, as in a recurrent network's first step.
            elif self.kinds[read] == FIXED or (self.made(weight) in elsewhere and not of_read & of_weight):
                return node, read
            # Penalties of weights stay as they stand, and what is made of what makes weights, as their biases are.
            elif of_read and not (
                of_read | of_weight <= known or any(of & known for of in {of_read, of_weight} - whole)
            ):
                self.unclear.add(node)
        return None

    def behind(self, nodes: Iterable, parts: Callable[[fx.Node], Iterable]) -> set[fx.Node]:
        """These nodes, their parts, the parts of these, and so on."""
        found, more = set(), [*nodes]
        while more:
            if (node := more.pop()) not in found:
                found.add(node)
                more += parts(node)
        return found

    def made(self, weight: fx.Node) -> tuple:
        """Of which parameters a weight is made and how, less what rearranges it; and its size."""
        chain = self.behind([weight], lambda node: self.sources.keys() & {*node.all_input_nodes})
        operators = sorted(_operator(node) for node in chain if node.op != "placeholder" and not _rearranges(node))
        return self.sources[weight], str(weight.meta["val"].numel()), *operators

    def parts(self, node: fx.Node) -> list[fx.Node]:
        """What a node's value is made of: all of its inputs that are not fixed, and have a gradient."""
        return [part for part in node.all_input_nodes if self.kinds[part] != FIXED and _flows(part)]

    def origin(self, node: fx.Node) -> list[fx.Node]:
        """The activation function whose output, rearranged alone, an activity is, and what rearranges it, in order;
        empty if it is anything else."""
        path, origins, more = set(), set(), [node]
        while more:
            if _operator(node := more.pop()) in ACTIVATIONS:
                origins.add(node)
            elif node not in path:
                path.add(node)
                more += (parts := self.parts(node))
                if not parts or not _rearranges(node):
                    return []
        return [*origins, *sorted(path)] if len(origins) == 1 else []

    def added_to_weights(self, layers: Iterable[Layer], names: Names) -> list[tuple[str, ...]]:
        """Which parameters other than these are a part of layers' weights beside them, and no gains of theirs."""

        def learned(node: fx.Node) -> list[fx.Node]:
            return [part for part in node.all_input_nodes if self.sources.get(part) and _flows(part)]

        found = []
        for node in self.behind((layer.weight for layer in layers), learned):
            parts, whole = learned(node), str(node.meta["val"].shape) if _is_pointwise(node) else None
            named = [part for part in parts if not self.sources[part].isdisjoint(names)]
            factors = [node.args[k] for k in FACTORS.get(_operator(node), ()) if k < len(node.args)]
            # Entry by entry a gain leaves the size as it is; m n^T is none.
            scales = whole is None or all(str(part.meta["val"].shape) == whole for part in named)
            gains = factors if scales and any(part in factors for part in named) else []
            found += [tuple(self.sources[part]) for part in parts if named and part not in (*named, *gains)]
        return sorted(found)

    def require_layers(self) -> None:
        """Raise TypeError unless every learned tensor meets activities in a way that a rule knows."""
        found = [] if self.layers else ["there is no product of an activity and a weight at all"]
        outputs = self.reached.intersection(self.output)
        differentiated = self.behind(outputs, lambda node: self.reached.intersection(node.all_input_nodes))
        for node in self.nodes:
            learned = any(self.kinds[part] == WEIGHT and _flows(part) for part in node.all_input_nodes)
            met = [self.kinds[node.args[k]] for k in PRODUCTS.get(node.target, [()])[0]]  # factors, not what is added
            known = node in self.layers or _is_pointwise(node) or _operator(node) in MEETING or _rearranges(node)
            known |= bool(met) and ACTIVITY not in met and node.target is not RECURRENCE
            wrong = node in self.unclear or (self.kinds[node] == ACTIVITY and learned and not known)
            if node in differentiated and wrong:
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
        if node.meta["val"].is_complex():
            raise TypeError(f"noise finds real weights, not the complex ones of {', '.join(layer.names)}")
        while node.op != "placeholder":
            parts = self.parts(node)
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


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _flows(node: fx.Node) -> bool:
    """Whether a gradient can go through a node's value."""
    value = node.meta.get("val")
    return any(map(_differentiable, value if isinstance(value, tuple | list) else [value]))


def _may_draw_inside(node: fx.Node) -> bool:
    """Whether it is a function of activities that can draw random numbers itself."""
    foreign = getattr(node.target, "namespace", "aten") not in ("aten", "prims", "align_rules")
    differentiable = ("_scaled_dot_product", "rrelu", "autograd_function", "_standard_gamma", "_sample_dirichlet")
    return foreign or _operator(node).startswith(differentiable)


def _draws(node: fx.Node) -> bool:
    """Whether it is a random draw, through which no gradient goes."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target is bernoulli or (seeded and not _may_draw_inside(node))


def _line(of: fx.Node | BaseException) -> str:
    """Where the network calls an operator, or what an error of torch is about."""
    trace = of.meta.get("stack_trace", "") if isinstance(of, fx.Node) else str(of)
    lines = [line.strip() for line in trace.splitlines()]
    calls = [k for k, s in enumerate(lines) if s.startswith("File ") and "/torch/" not in s and __file__ not in s]
    if not calls:
        return "a line that torch does not tell"
    file = lines[calls[-1]].removeprefix("File ").split(", in ")[0]
    return " ".join([file.replace('"', "").replace(", line ", ":"), *lines[calls[-1] + 1 :][:1]])


# -------------------------------------------------------------------------------------------------- the graph: writing


class Draft:
    """A rule's version of a network's call, while it is written: functions, applied to values.

    Values are nodes of a new graph, which becomes code; or, where a call is recorded as it runs, tensors.

    Args:
        call: applies a function to values.
        own: from a name of `Rule.tensors` to its value.
        places: values of the graph's inputs. (As an attribute, by place; of what is written back copies, so that what
            is written changes nothing that a gradient needs.)
        fixed: values of nodes that are there before the call: constants; when it is recorded, all that is fixed.
    """

    def __init__(self, graph: Graph, call: Callable, own: Callable[[str], Any], places: Iterable, fixed: dict):
        self.graph, self.call, self.own, self.fixed = graph, call, own, fixed
        self.held = dict(zip(graph.places, places, strict=True))
        self.places = self.held | {place: call(torch.clone, self.held[place]) for place in graph.state}

    def again(self, node: fx.Node, values: Mapping, instead: Mapping = types.MappingProxyType({}), **more) -> Any:
        """What the network does at a node, with these values of its arguments, and others instead at some positions."""
        if node in self.fixed:
            return self.fixed[node]
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        args = [instead.get(position, value) for position, value in enumerate(args)]
        return self.call(node.target, *args, **kwargs, **more)

    def cut(self, layer: Layer, values: Mapping) -> Any:
        """A layer's output, from which no error goes on to the layer's input."""
        if layer.recurrent:
            return self.again(layer.node, values, feedback=self.call(aten.new_empty.default, values[layer.weight], [0]))
        return self.again(layer.node, values, {layer.position: self.call(sg, values[layer.activity])})

    def product(self, layer: Layer, values: Mapping) -> tuple:
        """A layer's operator, which of its factors the activity is, and its options: of a convolution stride and the
        like, of others the number that multiplies the product."""
        node = layer.node
        options = node.args[3:9] if node.target is aten.convolution.default else node.kwargs.get("alpha", 1)
        return node.target, int(layer.position > layer.weight_position), map_arg(options, values.__getitem__)

    def follow(
        self, now: Mapping, cut: Callable | None = None, first: Mapping | None = None, own: Names = (),
        coupling: Callable | None = None,
    ) -> tuple[dict, dict]:  # fmt: skip
        """From the values of places those of all nodes, in order; and write state back.

        Args:
            cut: computes a layer's output in its own way, from the layer and the values.
            first: the values of places in the initial network.
            own: names of what the initial network has of its own: no other state of it is written.
            coupling: like `cut`, for the initial network; from the layer and the values of both. It is then followed
                beside the current one, and errors are used up where they are made; without, after it.
        """
        now, first, layers, states = {**now}, {**(first or {})}, self.graph.layers, {}
        others = {place for place, name in self.graph.names.items() if name in own}  # other values than in `now`

        def initially(node: fx.Node) -> Any:
            if self.graph.kinds[node] == FIXED:
                return now[node]
            if node in states:
                args, kwargs = map_arg((node.args, node.kwargs), first.__getitem__)
                return self.call(_with_draws_again(node.target), states[node], *args, **kwargs)
            return coupling(layers[node], first, now) if coupling and node in layers else self.again(node, first)

        for node in self.graph.nodes:
            others |= {node} if others & {*node.all_input_nodes} else set()
            if others & {*_selecting(node)} and self.graph.kinds[node] == ACTIVITY:
                raise TypeError(
                    f"{_operator(node)} at {_line(node)} selects entries by activities' values, and in the initial "
                    "network others; use torch.where, or a mask that multiplies"
                )
            if first and _may_draw_inside(node):
                states[node] = self.call(_generators_now)
            now[node] = cut(layers[node], now) if cut and node in layers else self.again(node, now)
            if coupling:
                first[node] = initially(node)
        if first and not coupling:
            for node in self.graph.nodes:
                first[node] = initially(node)
        self.put_back(now)
        for place, node in self.graph.renewed.items():
            if first and (name := self.graph.names[place]) in own:
                self.call(put_back, self.own(f"initial.{name}"), first[node])
        return now, first

    def put_back(self, now: dict) -> None:
        """Write state where it came from."""
        for place, node in self.graph.state.items():
            self.call(put_back, self.held[place], now[node])

    def outputs(self, values: dict) -> list:
        return [values[f] if isinstance(f, fx.Node) else f for f in self.graph.output]


@has_side_effect
@torch.no_grad()
def put_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.requires_grad:
        raise TypeError(f"the network writes into an input {tuple(tensor.shape)} with a gradient; let it use a copy")
    tensor.copy_(value)


def _generators_now() -> tuple:
    """States of torch's generators of random numbers."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _with_draws_again(function: Callable) -> Callable:
    """From states of generators and a function's arguments its value, with the random draws that these states give."""

    def from_states(states: tuple, *args, **kwargs) -> Any:
        cpu, cuda = states
        with torch.random.fork_rng(range(len(cuda))):
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(cuda)
            return function(*args, **kwargs)

    return from_states


def _selecting(node: fx.Node) -> list[fx.Node]:
    """The values by which it selects entries: masks, of index; not places."""
    if node.target is aten.index.Tensor:
        return [part for part in node.args[1] if part is not None and part.meta["val"].dtype == torch.bool]
    if node.target is aten.masked_select.default:
        return [node.args[1]]
    return node.all_input_nodes if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()) else []


# -------------------------------------------------------------------------------------------------- the graph: capture
_SETTINGS = _dynamo.config.patch(
    allow_rnn=True,  # LSTM, GRU and RNN, as their products
    recompile_limit=2**16, accumulated_recompile_limit=2**16,  # many rules share a code object
    skip_nnmodule_hook_guards=False,  # hooks that come later are noticed
    allow_unspec_int_on_nn_module=True,  # counters on modules are numbers, and no reason to capture anew
    optimize_ddp=False,  # which would cut the graph
    suppress_errors=False,
)  # fmt: skip
_FUNCTION = torch.ops.higher_order.autograd_function_apply  # a torch.autograd.Function
_INLINED = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")  # calls of a part of the graph
_COUNT = itertools.count()
MANY = 16  # captures in a row, after which calls are recorded
PROOFS = 4  # are enough, though some gradients have always been zero
_LOCK = threading.RLock()  # one call at a time


class _Now(threading.local):
    """The call that this thread is in: its rule, the backward hooks of its network (None: proof is being taken), and
    when it has run its graph and the rule's code."""

    rule = hooks = read = None


_now = _Now()


class _Refused(Exception):
    """torch cannot write a call down; why."""


class _Unasked(_Refused):
    """Or is not asked to, at this call."""


class _Unproved(Exception):
    """A graph that has not been checked; with the tensors that it was called with."""


def _called(rule: Rule, inputs: tuple, keywords: dict) -> Any:
    """A call of a rule: written down once for its kind, or recorded as it runs; checked where it is new."""
    network, reason = rule.network, None
    with _LOCK:
        _require_same_network(rule)
        # A graph is checked anew with other backward hooks, which may change gradients.
        modules = rule.known.modules.values()
        hooks = tuple(hook for m in modules for held in (m._backward_hooks, m._backward_pre_hooks) for hook in held)

        def kind() -> tuple:
            return hooks, tuple((module.training, len(module._forward_hooks)) for module in modules)

        def recorded() -> tuple[bool, int]:  # always, and after how many proofs
            return rule.recorded.get(kind(), (False, 0)) if rule.recorded else (False, 0)

        always, proofs = recorded()
        if not always:
            known, before = rule.known, rule.known.in_a_row
            try:
                output = _written_down(rule, inputs, keywords, hooks)
                known.in_a_row = 0 if known.in_a_row == before else known.in_a_row
                return output
            except _Refused as refused:
                reason = refused
            always, (_, proofs) = not isinstance(reason, _Unasked), recorded()
        if proofs < PROOFS:
            try:
                proofs = PROOFS if _prove(network, inputs, keywords, _record, ()) else proofs + 1
            except TypeError as error:
                if reason is None or isinstance(reason.__cause__, TypeError):
                    raise
                raise TypeError(f"{error}. It was recorded, since torch cannot write it down: {reason}") from error
            if not rule.recorded:
                warnings.warn(
                    f"{type(network).__name__} is recorded anew at every call, at some 0.1 ms an operator, since torch "
                    f"cannot write it down: {reason}", stacklevel=_depth()
                )  # fmt: skip
            rule.recorded = {**rule.recorded, kind(): (always, proofs)}
        if isinstance(reason, _Unasked):  # it may be asked the next time, by an entry that it has not put aside
            _entry.cache_clear()
            rule.known.entry = None
        return _record(rule, inputs, keywords)


def _written_down(rule: Rule, inputs: tuple, keywords: dict, hooks: tuple) -> Any:
    """Raises _Refused where that cannot be."""
    generators = _pythons((*rule.known.generators, *inputs, *keywords.values()))
    drawn = [(generator, generator.getstate()) for generator in generators]  # Dynamo draws before it runs the graph

    def as_backprop(*call) -> Any:
        before = _Held(rule.network)
        result = _enter(*call, None)
        capture.replaced, capture.outputs = before.replaced(arguments, capture.outputs), ()
        return result

    for _ in range(3 if rule.known.in_a_row < MANY else 0):  # the first call may make what later ones find
        try:
            return _enter(rule, inputs, keywords, hooks)
        except _Unproved as unproved:
            capture, arguments = unproved.args
        for generator, state in drawn:
            generator.setstate(state)
        try:
            told = _prove(rule.network, inputs, keywords, as_backprop, arguments)
        except TypeError as error:
            raise _Refused(error) from error
        capture.proofs[hooks] += 1
        capture.proved[hooks] = math.inf if told or capture.proofs[hooks] >= PROOFS else 1
    raise _Refused("it depends on what is another at every call (a number or list of Python, a size; make it a tensor)")


def _enter(rule: Rule, inputs: tuple, keywords: dict, hooks: tuple | None) -> Any:
    """By way of Dynamo."""
    known, distribution = rule.known, torch.distributions.Distribution
    # Its checks of values cannot be written down; Dynamo would leave them off for ever.
    validates, distribution._validate_args = distribution._validate_args, False
    _forget_last()
    _now.rule, _now.hooks = rule, hooks
    try:
        if known.entry is None:
            known.entry = _entry_of(known)
        inference = torch.inference_mode(torch.is_inference_mode_enabled())  # also where the network's ends in an error
        with _SETTINGS, _without_backward_hooks(rule.known.modules.values()), inference:
            # Dynamo does not notice that an attribute is there now, where a network tries it; it does notice a string.
            objects = [v for v in (*inputs, *keywords.values()) if not isinstance(v, Tensor) and hasattr(v, "__dict__")]
            attributes = repr([sorted(vars(value)) for value in objects])
            result = known.entry(rule.network, inputs, keywords, attributes)
    except (RuntimeError, AssertionError) as error:  # as Dynamo's are
        if _now.read:
            raise
        watched = _len_torch_dispatch_stack()
        raise (_Unasked if watched else _Refused)(_reason(error)) from error
    finally:
        _now.rule, distribution._validate_args = None, validates
    return result


def _entry_of(known: "_Anatomy") -> Callable:
    modules, parameters = known.modules, known.parameters
    held = [value for module in modules.values() for value in vars(module).values()]
    if any(isinstance(value, collections.deque) and value.maxlen for value in held):
        raise _Refused("what a deque of limited length holds would be that of the first calls")
    kinds = tuple((name, type(module)) for name, module in modules.items()), *known.code()
    return _entry(kinds, tuple((name, p.shape) for name, p in parameters.items()))


@functools.lru_cache(maxsize=8)
def _entry(*_kind) -> Callable:
    """What networks of one kind are called through, so that they share captures, which end with the last of them."""
    # Dynamo keeps captures by code object, and what it knows of sizes by its name.
    code = _call_network.__code__.replace(co_name=f"network_{next(_COUNT)}")
    names = {"__name__": __name__, "__builtins__": __builtins__, "torch": torch, "_Unasked": _Unasked}
    function = types.FunctionType(code, names)
    entry = torch.compile(function, backend=_captured, fullgraph=True)
    entry.captures = []
    return entry


def _captured(torch_graph: fx.GraphModule, example_inputs: list) -> Callable:
    captures = _now.rule.known.entry.captures
    captures.append(capture := _Capture(torch_graph))
    _now.rule.known.in_a_row += 1
    held = weakref.ref(capture)  # what Dynamo holds it never lets go
    return lambda *arguments: held()(*arguments)


def _call_network(network, inputs, keywords, attributes):
    if not torch.compiler.is_compiling():  # but is run as it stands
        raise _Unasked("torch.compile is switched off here, or another mode watches what torch is called for")
    return network(*inputs, **keywords) if attributes is not None else None


class _Capture:
    """What Dynamo calls in a network's place, with the tensors of the call: the graph of torch calls that it wrote
    down, made one of operators; `programs`, what rules have made of that; `proved`, for how many calls, by how many
    `proofs`, for each kind of hooks; when proof is taken, `outputs`, and by what of these tensors are `replaced`."""

    def __init__(self, torch_graph: fx.GraphModule):
        self.root = _functional(torch_graph)  # now, so that Dynamo guards what it takes for granted of sizes
        self.programs, self.replaced, self.outputs = {}, {}, ()
        self.proved, self.proofs = collections.Counter(), collections.Counter()

    def __call__(self, *arguments):
        rule, hooks = _now.rule, _now.hooks
        if hooks is not None:
            if not self.proved[hooks]:
                raise _Unproved(self, arguments)
            self.proved[hooks] -= 1
        names = tuple(rule.known.names.get(id(t)) for t in arguments)
        key = type(rule), _settings(rule), names
        if (program := self.programs.get(key)) is None:
            read = _read(rule, self.root.graph, arguments, self.replaced)
            program = self.programs[key] = _program(rule, read, self.root)
        _now.read, tensors = (program.read, program), rule.tensors()
        values = [*arguments, *(tensors[name] for name in program.own)]
        with _autocast_off(arguments):
            outputs = (program.forward if hooks is None else _compiled(program, rule.compiler, values))(*values)
        self.outputs = outputs if hooks is None else ()
        return outputs


def _settings(rule: Rule) -> tuple:
    """What `derive` may depend on beside the network: what the rule holds but tensors and modules. A rule of another's
    may hold more, and shares no code."""
    held = vars(rule).values()
    own = type(rule).__module__ != __name__ or any(isinstance(f, types.FunctionType | types.MethodType) for f in held)
    functions = (getattr(type(rule), name, None) for name in ("derive", "layer", "initially", "entrance"))
    settings = (value for value in held if isinstance(value, str | int | float | tuple | None))
    return rule.known.number if own else None, *functions, *settings


def _read(rule: Rule, graph: fx.Graph, arguments: Iterable, replaced: Mapping) -> Graph:
    """Raises TypeError where the rule cannot be right."""
    read = Graph(graph, rule.known, arguments, rule.activities, replaced)
    if written := [name for place, name in read.parameters.items() if place in read.state]:
        raise TypeError(f"the network writes into its parameters {', '.join(written)} when it is called; do so outside")
    if rule.layerwise:
        read.require_layers()
    if not isinstance(rule, Backprop):
        known = set(rule.known.parameters.values())
        for place, t in zip(read.places, arguments, strict=True):
            strange = isinstance(t, Tensor) and t.requires_grad and not (read.names[place] or place.meta[GIVEN])
            behind = _variables(_nodes_behind([t])) if strange else set()
            if strange and place not in read.kept and (isinstance(t, nn.Parameter) or not known.isdisjoint(behind)):
                raise TypeError(
                    f"the network uses a learned tensor {tuple(t.shape)} that is none of its parameters: register it "
                    "(in an nn.ModuleList), make weights within the call, or hand it over as an input"
                )
    return read


def _program(rule: Rule, graph: Graph, root: nn.Module) -> fx.GraphModule:
    """A rule on a graph, as code, which takes the call's inputs and the tensors of the rule named in `own`."""
    code, own = fx.Graph(), {}

    def placeholder(name: str) -> fx.Node:
        return code.placeholder(re.sub(r"\W|^(?=\d)", "_", name))

    def owned(name: str) -> fx.Node:
        if name not in own:
            own[name] = placeholder(name)
        return own[name]

    constants = {node: code.get_attr(node.target) for node in graph.nodes if node.op == "get_attr"}
    places = [placeholder(graph.names[place] or place.name) for place in graph.places]
    draft = Draft(graph, lambda f, *args, **kwargs: code.call_function(f, args, kwargs), owned, places, constants)
    code.output(rule.derive(draft))
    code.eliminate_dead_code()
    program = fx.GraphModule(root, code)
    program.own, program.read, program.compiled = list(own), graph, {}
    return program


def _compiled(program: fx.GraphModule, compiler: str | None, values: list) -> Callable:
    """A program for values of these sizes, as a backend of torch.compile makes it; as it is, where it holds objects."""
    if compiler is None or not all(isinstance(value, Tensor | int | float) for value in values):
        return program.forward
    sizes = compiler, *(value.shape if isinstance(value, Tensor) else value for value in values)
    if sizes not in program.compiled:
        program.compiled[sizes] = _dynamo.lookup_backend(compiler)(program, values)
    return program.compiled[sizes]


def _functional(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of ATen operators with nothing in place, from one of torch calls."""

    def run(*values) -> Any:
        with _Functional() as functional:
            return pytree.tree_map(_outside, _Walk(module).run(*map(functional.inside, values)))

    values = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in values if isinstance(value, Tensor))
    # torch's Python has operators for sizes that are not known, where its C++ has none.
    with mode, torch.fx.traceback.preserve_node_meta(), _Spelling(), _unseen(), enable_python_dispatcher():
        made = make_fx(run)(*values)
    _respell(made.graph)
    for place, before in zip(
        made.graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="placeholder"), strict=True
    ):
        place.meta[GIVEN] = before.target.startswith(("L_inputs_", "L_keywords_"))  # as Dynamo names these arguments
    return made


class _Functional(contextlib.AbstractContextManager):
    """While it lasts, torch computes with nothing in place; what is written into a tensor is written in the end.

    torch.func.functionalize would do, if its tensors had a gradient, on which torch's choice of operators depends.
    """

    def __enter__(self):
        self.insides: dict[int, Tensor] = {}  # of tensors from outside, by identity
        self.outsides: dict[int, Tensor] = {}  # the other way round
        _enable_functionalization(reapply_views=True)
        return self

    def inside(self, value: Any) -> Any:
        plain = isinstance(value, Tensor) and not (_is_inside(value) or is_functorch_wrapped_tensor(value))
        if id(value) in self.insides or not plain:
            return self.insides.get(id(value), value)
        self.insides[id(value)] = inside = _to_functional_tensor(value)
        _mirror_autograd_meta_to(value, inside)
        self.outsides[id(inside)] = value
        return inside

    def __exit__(self, *error) -> None:
        try:
            written = [] if error[0] else [(self.outsides[id(t)], _outside(t)) for t in self.insides.values()]
        finally:
            _disable_functionalization()
            self.insides, self.outsides = {}, {}
        with torch.no_grad():
            for value, new in written:
                if new is not value:
                    value.copy_(new)


def _outside(value: Any) -> Any:
    if not _is_inside(value):
        return value
    _sync(value)
    return _from_functional_tensor(value)


def _is_inside(value: Any) -> bool:
    return isinstance(value, Tensor) and _is_functional_tensor(value)


class _Walk(fx.Interpreter):
    """Runs a graph of torch calls, for another to be made of it."""

    def call_function(self, target, args, kwargs):
        if target is _FUNCTION:  # one operator, which is differentiated as it stands
            functions, number, given = _functions(), next(_COUNT), args[2:]
            tensors, sizes = ([v for v in given if isinstance(v, Tensor) == kind] for kind in (True, False))
            functions[number] = _made_once(*args[:2], [isinstance(v, Tensor) for v in given], **kwargs)
            return torch.ops.align_rules.function.default(tensors, sizes, number)
        if getattr(target, "_name", None) in _INLINED and isinstance(args[0], fx.GraphModule):
            return _Walk(args[0]).run(*args[1:])
        return super().call_function(_cut if target is _get_data_attr else target, args, kwargs)


def _made_once(forward: fx.GraphModule, backward: fx.GraphModule, order: list[bool], **options) -> Callable:
    """A torch.autograd.Function from its graphs, as torch's operator makes it anew, and slowly, at every call; of
    tensors and sizes, and of their order (True: a tensor)."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs, kept = forward.forward(*inputs)
            ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in kept))
            ctx.others = [None if isinstance(value, Tensor) else value for value in kept]
            several = outputs if isinstance(outputs, tuple | list) else [outputs]
            ctx.mark_non_differentiable(*(several[k] for k in options["non_differentiable_idx"]))
            return outputs

        @staticmethod
        def backward(ctx, *gradients):
            kept = zip(ctx.saved_tensors, ctx.others, strict=True)
            return backward.forward(*gradients, *(other if tensor is None else tensor for tensor, other in kept))

    def apply(tensors: list, sizes: list) -> Any:
        both = iter(sizes), iter(tensors)
        inputs = [next(both[is_tensor]) for is_tensor in order]
        return _FUNCTION(forward, backward, *inputs, **options) if options.get("dirty_idx") else Function.apply(*inputs)

    return apply


@functools.cache
def _functions() -> dict[int, Callable]:
    """torch.autograd.Functions that are being written down, by number; an operator holds their places."""
    functions: dict[int, Callable] = {}

    @torch.library.custom_op("align_rules::function", mutates_args=())
    def function(tensors: list[Tensor], sizes: list[int], number: int) -> list[Tensor]:
        return list(functions[number](tensors, sizes))

    @function.register_fake
    def _(*given) -> list[Tensor]:  # sizes that it also gives, on torch 2.11, nobody reads
        results = functions[given[-1]](*given[:-1])
        return [torch.clone(t) if isinstance(t, Tensor) else torch.empty(0) for t in results]

    return functions


class _Spelling(TorchFunctionMode):
    """What functionalisation would lose or change, in other words: what has no gradient, dropout, nn.Bilinear; and
    recurrent layers as their products, which oneDNN and cuDNN have as one operator each."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function, kwargs = SPELLED.get(function, function), kwargs or {}
        if torch.is_grad_enabled():
            return function(*args, **kwargs)
        if getattr(function, "__name__", "") == "__get__":  # of an attribute
            return _mapped(_cut_learned, function(*args))
        # What is written reaches what was cut.
        return function(*_mapped(_cut_learned, args), **_mapped(_cut_learned, kwargs))


def _cut(tensor: Tensor) -> Tensor:
    """The stop-gradient, a view: functionalisation takes detach for an alias, but keeps this."""
    return aten.squeeze.dims(tensor, ())


def _cut_learned(value: Any) -> Any:
    return _cut(value) if isinstance(value, Tensor) and value.requires_grad else value


def _mapped(function: Callable, values: Any) -> Any:
    """Of values, those of a function. A size stays one: Tensor.new takes other tuples for data."""
    if type(values) is tuple:
        return tuple([_mapped(function, value) for value in values])
    return values if type(values) is torch.Size else map_aggregate(values, function)


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


def _einsum(equation: Any, *parts: Any) -> Any:
    """A sum over an index of one entry alone is a product too: it becomes one over two entries."""
    parts = parts[0] if len(parts) == 1 and isinstance(parts[0], list | tuple) else parts
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    if len(terms := terms.split(",")) != len(parts):
        return torch.einsum(equation, *parts)
    places = []  # of every part, dimensions and the indices that they have
    for term, part in zip(terms, parts, strict=True):
        before, _, after = term.partition("...")
        places.append([*enumerate(before), *((part.dim() - k, i) for k, i in enumerate(reversed(after), start=1))])
    letters = "".join(terms)
    sizes = [(i, part.shape[d]) for indices, part in zip(places, parts, strict=True) for d, i in indices]
    # A size that is not a number is never one.
    more = {i for i, size in sizes if not (isinstance(size, int) and size == 1)}
    alone = {i for i in letters if (i not in result if arrow else letters.count(i) > 1)} - more

    def padded(part: Tensor, indices: list) -> Tensor:
        ends = {d for d, i in indices if i in alone}
        pads = [end for d in reversed(range(part.dim())) for end in (0, int(d in ends))]
        return F.pad(part, pads) if ends else part

    return torch.einsum(equation, *map(padded, parts, places))


def _unchecked(function: Callable, *args, **kwargs) -> Any:
    return function(*args, **kwargs)[0]


def _read_off(function: Callable, tensor: Tensor, *args, **kwargs) -> Any:
    return function(_outside(tensor).detach(), *args, **kwargs)


def _in_python(function: Callable, *args, **kwargs) -> Any:
    """By the operators of torch's Python, which tell that they write into running statistics."""
    with enable_python_dispatcher():
        return function(*args, **kwargs)


def _in_cpp(function: Callable, *args, **kwargs) -> Any:
    """By the operator of torch's C++, which draws in the order in which the network does."""
    with _DisablePythonDispatcher():
        return function(*args, **kwargs)


def _as_products(function: Callable, *args) -> Any:
    # What packed sequences have of batch sizes is read, not computed with.
    args = pytree.tree_map_only(Tensor, lambda t: t if _differentiable(t) else _outside(t), args)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None), torch.backends.cudnn.flags(enabled=False):
        return _in_cpp(function, *args)


def _padded(data: Tensor, batch_sizes: Tensor, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
    """torch.nn.utils.rnn.pad_packed_sequence: (steps of all sequences, one after the other) -> (time, batch, ...)."""
    sizes = _outside(batch_sizes).tolist()
    sizes += [0] * (total - len(sizes))
    ends = [[0, 0] * (data.dim() - 1) + [0, sizes[0] - size] for size in sizes]
    padded = torch.stack([F.pad(row, end, value=value) for row, end in zip(data.split(sizes), ends, strict=True)])
    lengths = torch.tensor([sum(size > k for size in sizes) for k in range(sizes[0])])
    return padded.transpose(0, 1) if batch_first else padded, lengths


SPELLED = {
    _pad_packed_sequence: _padded,
    **{f: functools.partial(_as_products, f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **{f: functools.partial(_in_cpp, f) for f in (F.scaled_dot_product_attention, F.multi_head_attention_forward)},
    **{f: functools.partial(_in_python, f)
       for f in (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm)},
    **{f: functools.partial(_unchecked, g) for f, g in (
        (torch.linalg.inv, torch.linalg.inv_ex), (torch.inverse, torch.linalg.inv_ex),
        (torch.linalg.solve, torch.linalg.solve_ex), (torch.linalg.cholesky, torch.linalg.cholesky_ex),
    )},
    # Numbers that leave torch are those of this call, as with item().
    **{f: functools.partial(_read_off, f) for f in (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__repr__)},
    Tensor.__deepcopy__: lambda tensor, _: tensor.clone(),
    torch.einsum: _einsum, Tensor.detach: _cut, torch.detach: _cut, Tensor.data.__get__: _cut,
    F.dropout: _dropout, torch.dropout: _dropout, F.bilinear: _bilinear, torch.bilinear: _bilinear,
}  # fmt: skip


@has_side_effect  # as every draw: what is drawn later depends on it
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
    aten.zero.default: aten.zeros_like.default,  # of which only the shape of the argument counts
    aten.fill.Scalar: aten.full_like.default,
    aten.copy.default: copied,  # which has no derivative
    aten._embedding_bag_forward_only.default: aten._embedding_bag.default,
}


# What eager torch checks of values.
CHECKED = aten.linalg_inv_ex.default, aten._linalg_solve_ex.default, aten.linalg_cholesky_ex.default


def _respell(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is aten.copy_.default:  # into an input: what reads the result reads what was written
            node.replace_all_uses_with(node.args[1])
        if node.target is aten.squeeze.dims and not node.args[1]:
            node.target, node.args = torch.detach, node.args[:1]
        if str(node.target) == "align_rules.function.default":
            node.target, node.args = _functions().pop(node.args[2]), node.args[:2]
            node.target.__name__ = node.target.__qualname__ = "autograd_function"
        elif node.target in CHECKED:
            node.kwargs = {**node.kwargs, "check_errors": True}
        elif node.op == "call_function":
            node.target = RESPELLED.get(node.target, node.target)
    graph.eliminate_dead_code()


def _autocast_off(arguments: Iterable):
    """The graph has the casts that autocast makes, and is not cast again."""
    kind = next((t.device.type for t in arguments if isinstance(t, Tensor)), "cpu")
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _prove(network: nn.Module, inputs: tuple, keywords: dict, enter: Callable, arguments: Iterable) -> bool:
    """Check that what was written down gives, as backprop, the network's output, gradients and state.

    Returns:
        Whether that could be told of all gradients: none of zeros, as from a batch of zeros.

    Raises:
        TypeError: it does not, or that cannot be told.
    """

    def loss(output: Any) -> Tensor:
        stream, total = torch.Generator("cpu").manual_seed(0), 0
        for f in _tensors(output):
            if f.requires_grad:
                sign = torch.randn(f.shape, generator=stream, dtype=f.dtype, device="cpu")
                total = total + (f * sign.to(f.device)).sum().real
        return total

    given = (*network.parameters(), *_tensors((inputs, keywords, arguments)))
    watched = list({id(t): t for t in given if t.requires_grad}.values())
    name = type(network).__name__
    held = {type(value) for value in _Held(network, inputs, keywords).others}
    if any(issubclass(kind, Iterator) and kind.__module__ in ("builtins", "itertools") for kind in held):
        raise TypeError(f"{name} has an iterator, which cannot be put back when proof has been taken; {REMEDY}")

    def written_down() -> Any:
        try:
            return enter(Backprop(network), inputs, keywords)
        except (RuntimeError, AssertionError) as error:
            raise TypeError(f"torch cannot write {name} down: {_reason(error)}. {REMEDY}") from error

    calls = [functools.partial(network, *inputs, **keywords), written_down]
    watched, (outputs, gradients, kept), own = _compared(calls, loss, watched, network, (inputs, keywords, arguments))
    if not outputs or len(own[0]) != len(outputs):
        raise TypeError(
            f"{name} returns something in which tensors cannot be found; let it return tensors, in tuples or dicts"
        )
    names = {id(p): f"the gradient of {key}" for key, p in network.named_parameters()}
    told = [f"output {k}" for k in range(len(outputs))]
    told += [names.get(id(t), f"the gradient of a tensor {tuple(t.shape)}") for t in watched]
    told.append("a buffer, or what else it keeps (or a generator of random numbers),")
    shares = [*_shares(own[0], outputs), *_shares(own[1], gradients), max(_shares(own[2], kept), default=0.0)]
    kinds = {t.device.type for t in watched if torch.is_autocast_enabled(t.device.type)}
    precisions = {*(t.dtype for t in (*outputs, *watched)), *map(torch.get_autocast_dtype, kinds)}
    limit = max(_tolerance(precision, 1e-2, 0.3) for precision in precisions)
    for what, share in zip(told, shares, strict=True):
        if not share <= limit:
            raise TypeError(
                f"torch writes {name} down wrongly, or it has hooks on tensors, gradients of its own "
                "(torch.autograd.grad), writes under torch.no_grad or by .data into activities, draws that depend on "
                "values (RReLU) or from generators elsewhere, or state elsewhere than in its modules' attributes: "
                f"{what} is off by {share:.2g} of its size. {REMEDY}"
            )
    return all(gradient is None or gradient.any() for gradient in gradients)


@contextlib.contextmanager
def _without_backward_hooks(modules: Iterable[nn.Module]):
    """A rule has no gradients to show them."""
    kinds = "_backward_hooks", "_backward_pre_hooks"
    held = [(vars(m), kind, vars(m)[kind]) for m in modules for kind in kinds if vars(m)[kind]]
    for place, kind, _ in held:
        place[kind] = collections.OrderedDict()
    try:
        yield
    finally:
        for place, kind, hooks in held:
            place[kind] = hooks


def _reason(error: BaseException) -> str:
    """What went wrong, in a line, and at which line of the network."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = [line.removeprefix("Explanation: ") for line in text if line.startswith("Explanation: ")]
    told = text[1:2] if text[0].endswith("raised:") else told  # an error in what Dynamo calls
    if "created in no_grad mode" in str(error):
        text[0] = "the network writes into its parameters, or into activities, under torch.no_grad; do so outside"
    return f"{': '.join([text[0], *told[:1]])} (at {_line(error)})"


def _depth() -> int:
    """How many calls up is the first line that is neither torch's nor this file's."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        depth, frame = depth + 1, frame.f_back
    return depth


# ------------------------------------------------------------------------------------------------ the graph: recording


_VIEWS = DispatchKeySet(DispatchKey.ADInplaceOrView)
_LEFT = WeakIdKeyDictionary()  # activities that recorded calls have left: state, wherever it is held


class _AtUse(_Spelling):
    """Tensors from outside go into functionalisation where torch uses them; `made` are those that come out of it."""

    def __init__(self, functional: _Functional):
        super().__init__()
        self.functional, self.made = functional, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.retain_grad:
            raise TypeError("what a rule sends back is no gradient that retain_grad could keep; leave it out")
        map_aggregate((args, kwargs or {}), self.note)  # some come by other ways than by a function of torch
        args, kwargs = _mapped(self.functional.inside, args), _mapped(self.functional.inside, kwargs or {})
        result = super().__torch_function__(function, types, args, kwargs)
        if (outside := self.functional.outsides.get(id(result))) is not None:  # it was written into
            return outside
        results = list(result) if isinstance(result, Iterator) else result
        map_aggregate(results, self.note)
        return iter(results) if isinstance(result, Iterator) else result

    def note(self, value: Any) -> None:
        if _is_inside(value):
            self.made[id(value)] = value


class _Record(TorchDispatchMode):
    """A call of a network, carried out and written down operator by operator, for this call alone.

    `arguments` are the tensors that its graph's places stand for, `values` what was computed, `output` its result.
    The graph's outputs are the tensors `kept`: all that the call has made and that are held, wherever that may be.
    """

    def __init__(self, network: nn.Module, inputs: tuple, keywords: dict):
        super().__init__()
        self._mode_key = _TorchDispatchModeKey.FAKE  # below functionalisation
        self.graph, self.nodes, self.values, self.arguments, self.kept = fx.Graph(), {}, {}, [], []
        handed = _Held(inputs, keywords)
        self.given = {id(t) for t in handed.tensors}
        if any(type(value).__name__ == "ndarray" and value.dtype.kind in "fc" for value in handed.others):
            raise TypeError("a NumPy array is handed to the network; hand over a tensor: torch.as_tensor(array)")
        _forget_last()
        collects, functions = gc.isenabled(), False
        gc.disable()  # what the call leaves in cycles stays young, and is found
        try:
            with self, _Functional() as functional, _AtUse(functional) as at_use:
                self.output = network(*inputs, **keywords)
                map_aggregate(pytree.tree_leaves(self.output), at_use.note)
                functions = any(map(_is_function, _nodes_behind(at_use.made.values())))
        finally:
            if collects:
                gc.enable()
            self.keep(at_use.made)
        if functions:
            raise TypeError(
                f"the network has a torch.autograd.Function, whose backward pass is lost in recording. {REMEDY}"
            )
        self.graph.output([self.nodes[id(value)] for _, value in self.kept])
        _respell(self.graph)

    def keep(self, made: dict) -> None:
        """Of tensors of functionalisation find those that are held; from here on they are plain ones."""
        gc.collect(0)
        waiting = [*made.values(), torch.empty(0)]  # the last of which nobody else holds
        made.clear()
        unheld, count = None, 0
        while len(waiting) != count:
            # From the last to the first: views hold their bases, and autograd what it has saved.
            later, count = [], len(waiting)
            while waiting:
                tensor = waiting.pop()
                holders = sys.getrefcount(tensor)
                unheld = unheld or holders
                if holders > unheld and tensor._use_count() > 1:
                    later.append(tensor)
                elif holders > unheld:
                    with self, _ExcludeDispatchKeyGuard(_VIEWS):  # its base would be held by it
                        value = _outside(tensor)
                        self.node_of(value)
                    self.kept.append((tensor, value))
                    _swap_tensor_impl(tensor, value.detach())
            waiting = later[::-1]

    def fill(self, outputs: Iterable[Tensor]) -> None:
        """What is held becomes these tensors; without a gradient, views of what they are views of."""
        for (tensor, _), output in zip(self.kept, outputs, strict=True):
            _swap_tensor_impl(tensor, output.clone() if output.requires_grad else output.detach())

    def node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self.nodes:
            return self.nodes[id(tensor)]
        self.arguments.append(tensor)  # it comes from outside
        place = self.graph.placeholder(f"input_{len(self.arguments)}")
        place.meta[GIVEN] = id(tensor) in self.given
        return self.noted(tensor, place)

    def noted(self, value: Any, node: fx.Node) -> fx.Node:
        node.meta["val"] = self.values[node] = value  # which lives as long as this, and keeps its id
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node
        return node

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        written = operation is aten.copy_.default and self.node_of(args[0]).op == "placeholder"  # by the rule's code
        if written and any(_overlap(args[0], t) for t in self.arguments if t is not args[0]):
            raise TypeError("the network writes into memory that several of its tensors share; let it use one of them")
        with DisableTorchFunction():  # scripted code would come to the mode around this one again
            run = RESPELLED.get(operation, operation)  # as the rule's code will
            result = args[0] if written else run(*args, **(kwargs or {}))
        args, kwargs = map_aggregate((args, kwargs or {}), lambda v: self.node_of(v) if isinstance(v, Tensor) else v)
        node = self.noted(result, self.graph.call_function(operation, args, kwargs))
        frame = sys._getframe(_depth() - 1)
        node.meta["stack_trace"] = f'File "{frame.f_code.co_filename}", line {frame.f_lineno}'
        for k, part in enumerate(result if isinstance(result, tuple | list) else ()):
            self.noted(part, self.graph.call_function(operator.getitem, (node, k)))
        return result


def _forget_last() -> None:
    """Take the graph of the last recorded call apart: its nodes refer to each other, which Python would find late."""
    if _now.read and not _now.read[1]:
        graph = _now.read[0].written
        for node in [*reversed(graph.nodes)]:  # a node then refers to those before it alone
            node.users.clear()
            node._remove_from_list()
        vars(graph).clear()
    _now.read = None


def _overlap(*tensors: Tensor) -> bool:
    """Whether two tensors share memory, or lie within each other's."""
    if not _overlaps(*tensors):  # of one storage
        return False
    firsts = [t.data_ptr() for t in tensors]
    spans = [sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    lasts = [first + span * t.element_size() for first, span, t in zip(firsts, spans, tensors, strict=True)]
    return max(firsts) <= min(lasts)


def _is_function(node: Any) -> bool:
    """Of autograd's nodes, whether it is a torch.autograd.Function's, and not that of a torch.library operator."""
    return isinstance(node, BackwardCFunction) and not node.name().startswith("GeneratedBackwardFor_")


def _record(rule: Rule, inputs: tuple, keywords: dict) -> Any:
    """A call of a rule, as it runs."""
    before = _Held(rule.network, inputs, keywords)
    try:
        return _recorded(rule, inputs, keywords, before)
    except BaseException:
        before.restore()
        raise


def _recorded(rule: Rule, inputs: tuple, keywords: dict, before: "_Held") -> Any:
    with _without_backward_hooks(rule.known.modules.values()):
        record = _Record(rule.network, inputs, keywords)
    replaced = before.replaced(record.arguments, [tensor for tensor, _ in record.kept])
    graph, tensors = _read(rule, record.graph, record.arguments, replaced), rule.tensors()
    fixed = {node: record.values[node] for node in graph.nodes if graph.kinds[node] == FIXED}

    def call(function: Callable, *args, **kwargs) -> Any:
        return function(*args, **kwargs)

    with _autocast_off(record.arguments):
        record.fill(rule.derive(Draft(graph, call, tensors.__getitem__, record.arguments, fixed)))
    _LEFT.update((t, None) for t, value in record.kept if graph.kinds.get(record.nodes[id(value)]) == ACTIVITY)
    watched = _len_torch_dispatch_stack()  # by another mode, which may keep what it sees
    outside = {id(t) for t in record.arguments}
    for node, value in record.values.items():
        free = watched or id(value) in outside or graph.kinds.get(node) == FIXED
        if isinstance(value, Tensor) and value._use_count() > 1 and not free:
            raise TypeError(f"what {_operator(node)} computes at {_line(node)} is kept where a rule does not find it")
    _now.read = graph, None
    for node, value in record.values.items():  # nodes refer to each other, and would keep values until Python tidies up
        node.meta = {"val": types.SimpleNamespace(shape=getattr(value, "shape", ()))}
    return record.output


# -------------------------------------------------------------------------------------- tensors, and what holds them


class _Tensors(nn.Module):
    """Tensors by names, with dots or without, which move and are saved with the module that holds them."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]):
        super().__init__()
        self.places: list[tuple[str, dict, str]] = []
        for name, tensor in tensors:
            self.add(name, tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            module = module._modules.setdefault(part, nn.Module())
        module._buffers[last] = tensor
        self.places.append((name, module._buffers, last))

    def named(self) -> dict[str, Tensor]:
        return {name: place[key] for name, place, key in self.places}

    def __len__(self) -> int:
        return len(self.places)

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
    others = [name for name, p in parameters.items() if p.dim() > 1 and not _is_gain(name, parameters)]
    return tuple(name for name in dict.fromkeys([*shapes, *others, *given]) if name not in activities)


def _is_gain(name: str, parameters: Named) -> bool:
    """Whether it is the g of weight norm, by its name and that of v, and their shapes."""
    g, v = parameters[name], parameters.get(name[:-1] + ("v" if name.endswith("_g") else "1"))
    if v is None or not name.endswith(("_g", ".original0")) or g.dim() != v.dim():
        return False
    return g.numel() == max(g.shape) < v.numel() and all(a in (1, b) for a, b in zip(g.shape, v.shape, strict=True))


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """A copy, in the type and the order of memory that the parameter has."""
    return torch.empty_like(parameter, requires_grad=False).copy_(values.detach())


def _seed(generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**62, (), generator=generator, device="cpu")


def _stream(seed: Tensor) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(int(seed))


def _normal_like(tensor: Tensor, std: float | Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the CPU, where a seed means the same everywhere, unless the generator is another device's."""
    device = "cpu" if generator is None else generator.device
    return _like(tensor, torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=device) * float(std))


def _tensors(values: Any) -> list[Tensor]:
    """Every tensor in what goes into a network or comes out of it."""
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


CONTAINERS = (collections.OrderedDict, dict, list, set, collections.deque, tuple)
PLAIN = {int, float, bool, str, type(None)}  # which hold nothing else
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", __name__} - {"__main__"}  # whose objects and code hold no state


def _unseen():
    """Hooks on what is saved for gradients, such as a checkpoint's around a rule, do not see what runs inside."""
    if _top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t)  # the same tensor would be a cycle


class _Held:
    """What networks, inputs and the like hold at this moment.

    `contents` of places, which are attributes of modules and of objects, containers, and what hooks and forward name,
    and all that is reached from there, as far as it is of the user's own making; the `tensors` in them; what `others`
    they hold.
    """

    def __init__(self, *roots: Any):
        self.contents: list[tuple[Any, list]] = []
        self.tensors, self.others, seen = [], [], set()
        modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
        more = [*roots, *modules, *{type(module).forward for module in modules}]
        for value in more:  # and those that are found on the way
            kind = type(value)  # isinstance would ask the value itself
            if issubclass(kind, Tensor):
                self.tensors.append(value)
            elif kind not in PLAIN and id(value) not in seen:
                seen.add(id(value))
                self.others.append(value)
                if (place := _place_of(value)) is not None:
                    self.contents.append((place, _items(place)))
                    more += (part for _, part in self.contents[-1][1])
                elif issubclass(kind, types.FunctionType | types.MethodType | functools.partial):
                    more += _referred(value)

    def buffers(self) -> list[Tensor]:
        """And other tensors than parameters."""
        return [t for t in self.tensors if not isinstance(t, nn.Parameter)]

    def restore(self) -> None:
        for place, content in self.contents:
            if [(key, id(value)) for key, value in content] != [(key, id(value)) for key, value in _items(place)]:
                kind = _container(place)
                kind.clear(place)
                if issubclass(kind, dict):
                    kind.update(place, content)
                else:
                    (set.update if kind is set else kind.extend)(place, (value for _, value in content))

    def replaced(self, arguments: Iterable, outputs: Iterable) -> dict[int, list[int]]:
        """Of tensors that are no longer where they were, those that are there now (of a list that grows, all), by their
        positions among a call's arguments and outputs."""
        positions = {id(t): k for k, t in reversed([*enumerate([*arguments, *outputs])])}
        later_ones: dict[int, list[Tensor]] = {}
        contents = {id(place): content for place, content in self.contents}
        for place, content in self.contents:
            if isinstance(place, dict):
                later = dict(_items(place))
                pairs = [([value], [later.get(key)]) for key, value in content if later.get(key) is not value]
            else:
                values, later = ([value for _, value in items] for items in (content, _items(place)))
                same = len(values) == len(later) and all(map(operator.is_, values, later))
                pairs = [] if same else [(values, later)]
            for pair in pairs:
                old, new = _tensors_within(pair[0], contents), _tensors_within(pair[1], {})
                as_they_stand = len(old) == len(new)
                for k, one in enumerate(old):
                    others = [t for t in (new[k : k + 1] if as_they_stand else new) if t is not one]
                    if others or not as_they_stand:
                        later_ones.setdefault(id(one), []).extend(others)
        found = {}
        for key in later_ones.keys() & positions.keys():
            seen, more = {key}, [*later_ones[key]]
            for t in more:  # one that the call does not know has another's place, in a delay line
                if id(t) not in seen and id(t) not in positions:
                    seen.add(id(t))
                    more += later_ones.get(id(t), ())
            found[positions[key]] = [positions[id(t)] for t in more if id(t) in positions]
        return found


def _place_of(value: Any) -> Any:
    """Where a value holds others: itself, or its attributes; None for what is not of the user's making."""
    kind = type(value)
    if issubclass(kind, CONTAINERS):
        return value
    followed = issubclass(kind, nn.Module | types.SimpleNamespace) or not _is_foreign(kind)
    place = getattr(value, "__dict__", None) if followed else None
    return place if isinstance(place, dict) else None


def _is_foreign(code: Any) -> bool:
    return (code.__module__ or "").partition(".")[0] in FOREIGN


def _container(place: Any) -> type:
    return next(kind for kind in CONTAINERS if isinstance(place, kind))


def _items(place: Any) -> list[tuple[Any, Any]]:
    return list(_container(place).items(place) if isinstance(place, dict) else enumerate(place))


def _referred(function: Any) -> list:
    """What a function is bound to, its arguments' defaults, and the variables outside of it that it names."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), function.func]
    if isinstance(function, types.MethodType):
        return [function.__self__, function.__func__]
    if _is_foreign(function):
        return []
    found = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    with contextlib.suppress(ValueError):  # a variable that is not there yet
        variables = inspect.getclosurevars(function)
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    return found


def _tensors_within(values: Iterable, contents: Mapping[int, list], seen: set | None = None) -> list[Tensor]:
    """Those among these values and in what these hold: what is given here by identity, else what they hold now."""
    found, seen = [], set() if seen is None else seen
    for value in values:
        if issubclass(type(value), Tensor):
            found.append(value)
        elif type(value) not in PLAIN and id(value) not in seen and (place := _place_of(value)) is not None:
            seen.add(id(value))
            inside = contents[id(place)] if id(place) in contents else _items(place)
            found += _tensors_within([part for _, part in inside], contents, seen)
    return found


@contextlib.contextmanager
def _undisturbed(network: nn.Module, values: Any = ()):
    """What runs inside leaves no trace in a network, in these tensors, in generators of random numbers."""
    before = _Held(network, values)
    contents = [(t, t.detach().clone()) for t in {id(t): t for t in before.buffers()}.values()]
    data = [(parameter, parameter.data, parameter.grad) for parameter in network.parameters()]
    states = [(write, read()) for read, write in _generators(before.others)]
    kind = next((p.device.type for p in network.parameters() if p.device.type not in ("cpu", "meta", "mps")), "cpu")
    devices = {p.device.index for p in network.parameters() if p.device.type == kind != "cpu"}
    try:
        with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"), _unseen():
            for parameter, _, _ in data:
                parameter.grad = None
            yield
    finally:
        before.restore()
        for tensor, content in contents:
            with contextlib.suppress(RuntimeError):  # where entries share memory, which nothing can write to
                tensor.data.copy_(content)
        for parameter, kept, gradient in data:
            parameter.grad, parameter.data = None, kept
            parameter.grad = gradient
        for write, state in states:
            write(state)


def _pythons(held: Iterable) -> list:
    """Python's generators of random numbers: its own, and those among what is held."""
    return [random, *(value for value in held if type(value) is random.Random)]


def _generators(held: Iterable) -> list[tuple[Callable, Callable]]:
    """How to read and write the state of Python's and NumPy's generators, and of those that a network holds."""
    found = []
    numpy = sys.modules.get("numpy")
    for value in (random, *([numpy.random] if numpy else []), *held):
        kind = value if type(value) is types.ModuleType else type(value)  # hasattr would ask the value itself
        if numpy and kind is numpy.random.Generator:
            bits = value.bit_generator
            found.append((lambda bits=bits: bits.state, functools.partial(setattr, bits, "state")))
        for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
            if hasattr(kind, get) and hasattr(kind, put) and kind is not random.SystemRandom:
                found.append((getattr(value, get), getattr(value, put)))
    return found


# ------------------------------------------------------------------------------------------------------------ refusals

REMEDY = "Backprop takes it; for other rules write that part of the network with torch's own operators"


class _Anatomy:
    """A network's modules, parameters and buffers, as they are now; `names` of parameters and buffers, by identity."""

    def __init__(self, network: nn.Module):
        self.modules = dict(network.named_modules(remove_duplicate=False))
        self.parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
        self.names = {id(t): name for name, t in (*buffers.items(), *self.parameters.items())}
        self.statistics = {name: t for name, t in buffers.items() if self.of_normalisation(*name.rpartition("."))}
        self.parts, self.number, self.entry, self.in_a_row = self.found(), next(_COUNT), None, 0
        self.generators = _pythons(_Held(network).others)

    def of_normalisation(self, path: str, _, name: str) -> bool:
        owner, weight = self.modules[path], name.removesuffix("_u").removesuffix("_v")
        spectral = type(owner).__name__ == "_SpectralNorm" or f"{weight}_orig" in owner._parameters
        return name in STATISTICS or (spectral and name != weight)

    def code(self) -> list:
        """What Dynamo does not notice: methods that are redefined, attributes that appear."""
        return [
            part for m in self.modules.values() for part in (getattr(type(m).forward, "__code__", None), len(vars(m)))
        ]

    def found(self) -> list:
        held = (parts for m in self.modules.values() for parts in (m._modules, m._parameters, m._buffers))
        return [*(id(part) for parts in held for part in parts.values()), *self.code()]


def _require_same_network(rule: Rule) -> None:
    """Raise RuntimeError where a rule's gradient is not what is asked for, or the network is not the rule's."""
    transformed = maybe_current_level() is not None
    if transformed or forward_ad._current_level >= 0:
        around = "a functional transform (torch.func, torch.vmap)" if transformed else "forward-mode derivatives"
        raise RuntimeError(
            f"a rule's gradient is the gradient of nothing, and {around} cannot go through it; Backprop can"
        )
    if torch.compiler.is_exporting():
        raise RuntimeError("a rule cannot be exported; export its network")
    if getattr(rule, "_is_replica", False):
        raise RuntimeError("DataParallel copies parameters, which a rule cannot follow; use DistributedDataParallel")
    known = rule.known
    if known.modules[""] is rule.network and known.found() == known.parts:
        return
    rule.known = now = _Anatomy(rule.network)
    now.number = known.number
    for parts, before in ((now.modules, known.modules), (now.parameters, known.parameters)):
        for name in parts | before:
            one, other = parts.get(name), before.get(name)
            # Other parameters of the same shapes are fine: load_state_dict(assign=True).
            parameters = isinstance(one, nn.Parameter) and isinstance(other, nn.Parameter) and one.shape == other.shape
            if one is not other and not parameters:
                rule.known = known
                raise RuntimeError(
                    f"{name or 'the network'} is another than when the rule was made (or torch.func has put other "
                    "tensors in the places of parameters): make the rule anew"
                )


def _require_plain(network: nn.Module) -> None:
    """Raise TypeError for modules that no rule can be made on."""
    for name, module in network.named_modules():
        compiled = isinstance(module, _dynamo.OptimizedModule) or module._compiled_call_impl is not None
        lazy = any(isinstance(parameter, nn.UninitializedParameter) for parameter in module._parameters.values())
        for refused, told in (
            (isinstance(module, Rule), "is a rule itself; make one rule for the whole network"),
            (isinstance(module, torch.jit.ScriptModule), "is scripted; make the rule before torch.jit.script"),
            (compiled, "is compiled; make the rule on the module"),
            (lazy, "has no shapes yet; call the network on a batch before making the rule"),
        ):
            if refused:
                raise TypeError(f"{name or 'the network'} {told}")


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
