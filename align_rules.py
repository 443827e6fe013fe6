"""Learning rules for wide networks, as drop-in forward passes with another backward pass.

    rule = align_rules.AlignAda(network)          # snapshots the initial parameters
    loss = loss_function(rule(inputs), targets)   # rule(inputs) equals network(inputs) to the last bit
    loss.backward()                               # fills .grad by the rule; any torch optimiser steps

The rules are those of Boopathy & Fiete, "How to Train Your Wide Neural Network Without Backprop: An Input-Weight
Alignment Perspective" (ICML 2022, arXiv 2106.08453), the ones it compares with, and their nearest relatives. This file
imports torch only and can be copied alone into another project.

Principle. A *layer* is a call of a linear map with a weight of torch.nn.Linear, torch.nn.Conv1d, 2d, 3d or a subclass.
Everything else a network is made of (biases, normalisation, activations, pooling, additions, products of activities,
reshaping) is differentiated as it stands. Backprop sends the error delta that arrives at a layer's output on to the
layer's input through the transpose of its current weight; a rule sends something else there. That, and which activity
the layer's own weight gradient is formed with, is all that distinguishes the rules. With e the gradient of the loss at
the output of the network, W the current weight, W0 the initial one, B a random one, a the input activity of the layer,
and an index 0 for what the same network computes and sends back with all of its initial parameters (section 4 of the
paper):

    rule                     error sent to the layer's input          weight gradient        memory beside the network
    Backprop                 W^T delta                                delta a^T              -
    LastLayer                none                                     e a^T, readout only    -
    FeedbackAlignment        B^T delta                                delta a^T              B, like the weights
    AlignProp                W0^T delta                               delta a^T              W0
    SignSymmetry             (M o sign W)^T delta                     delta a^T              M, like the weights
    KolenPollack             B^T delta, and B learns: dB = delta a^T  delta a^T              B, like the weights
    WeightMirror             B^T delta, and B is estimated from noise delta a^T              B, like the weights
    DirectFeedbackAlignment  B^T e, at the block's activity           delta a^T              B, outputs x activities
    AlignAda                 W0^T delta0 (delta0: initial network)    delta a^T              the initial network
    AlignZero                W0^T delta0                              delta0 a0^T            the initial network

In every rule e is computed at the current network's output, and the layers above the last learn by their own gradient.

Blocks. A block is a layer with all that follows it up to the next layers, on every path: the error that enters at their
inputs goes back through the block's own derivatives, to its bias and normalisation, and becomes the layer's delta.

- AlignAda: the error enters at the argument of the activation function directly in front of the next layer if there is
  one, with nothing between but functions that rearrange, copy or pad entries (so that the initial network's derivative
  of the activation is used, as published), else at the layer's input; at the readout, which is the layer called last,
  always at its input. `coupling="activity"` puts it at the layer's input everywhere, which is how the paper defines the
  rule for recurrent networks. Activation functions with parameters (PReLU) count as part of the block, and learn.
- DirectFeedbackAlignment: a block ends at the output of the first activation function after the layer, or at the input
  of the next layer if none comes before it. e enters there, and nothing flows back past such a place.

Branches. Errors add up wherever an activity is used more than once, as in backprop: a residual addition hands the error
to both of its sides as it is, a concatenation to each its part, and a layer that is called several times (or two that
share one weight) gets the sum over its calls, all with the same B or W0. A skip connection is cut by no layer, so an
error that enters behind it goes back along it, through the current network's derivatives, to all the blocks that it
passes (in AlignZero: the initial network's; in DirectFeedbackAlignment: as far as the next end of a block).

Normalisation. Running statistics are updated once per step, by the current network. The initial network of AlignAda and
AlignZero has running statistics of its own, updated by its own activities in the same steps. Every module of it is in
the mode, train or eval, of the same module in the current network, draws the same random numbers (from torch's, NumPy's
and Python's generators and those that modules hold), and starts each call from the same state: what modules keep
between calls, as spiking neurons do, in attributes and in buffers other than running statistics, is copied from the
current network.

Frozen parameters (requires_grad False) do not learn; errors go through their layers as through the others. A layer
whose weights are zero gets feedback of zero by default (B is drawn with the deviation that W has), and so do the
Align rules' and the sign's: nothing goes back through it until other feedback is given.

A rule is right or raises. Learned weights that it cannot follow raise TypeError: when the rule is made, for fused
modules (LSTM, MultiheadAttention), transposed convolutions, Bilinear, weights made from other parameters, complex
weights, and matrices that a module of your own holds; at the call, for learned tensors in matrix products outside a
layer (products entry by entry, such as gains, are differentiated as they stand), and for weights that reach the output
past the calls that were followed (activation checkpointing, scripted functions, a torch.autograd.Function of your own,
functional transforms). A torch.autograd.Function of activities is differentiated as it stands, as a whole. Backprop
takes any network as it is, AlignZero any that can be copied, and LastLayer does if it is told what learns. A loss term
that the network keeps beside its output (`loss + network.penalty`) follows its own errors in the rules that send errors
back layer by layer; in DirectFeedbackAlignment, AlignAda and AlignZero, which know no error but e, it raises
RuntimeError in backward(). So does differentiating twice (gradient penalties): a rule's gradient is no gradient of
anything; only Backprop allows it.

"Activation function" means one of ACTIVATIONS below; others are differentiated as they stand and end no block. Forward
hooks that change an output run in the initial network of AlignAda and AlignZero too.

`verify` checks a rule on your network, `gradient_angles` and `feedback_angles` measure how far it is from backprop.
"""

import collections
import collections.abc
import contextlib
import copy
import dataclasses
import enum
import functools
import inspect
import itertools
import math
import random
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint  # noqa: F401 - as torch.utils.checkpoint

# ------------------------------------------------------------------------------------------------ gradient primitives


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, path: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _require_once()
        return gradient, gradient


def couple(value: Tensor, path: Tensor) -> Tensor:
    """`value + path - sg(path)`, sg the stop-gradient: the value of `value`, bit for bit; its gradient goes to both.

    Both tensors have the same shape.
    """
    return _Couple.apply(value, path)


def swap_grad(value: Tensor, path: Tensor) -> Tensor:
    """`sg(value) + path - sg(path)`: the value of `value`, bit for bit; its gradient goes to `path` alone."""
    return _Couple.apply(value.detach(), path)


class _Transport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, layer_input: Tensor, transpose: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.transpose, ctx.dtype = transpose, layer_input.dtype
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _require_once()
        sent = ctx.transpose(gradient)
        return gradient, sent if sent.dtype == ctx.dtype else sent.to(ctx.dtype), None


def transport(output: Tensor, layer_input: Tensor, transpose: Callable[[Tensor], Tensor]) -> Tensor:
    """The value `output`; its gradient goes to `output`, and through `transpose` to the layer's input."""
    return _Transport.apply(output, layer_input, transpose) if layer_input.requires_grad else output


class _Substitute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, gradients: Callable[[Tensor], list[Tensor | None]], *receivers: Tensor) -> Tensor:
        ctx.gradients = gradients
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _require_once()
        if ctx.gradients is None:
            raise RuntimeError("this graph has been used and freed: give backward() retain_graph=True to use it again")
        sent = ctx.gradients(gradient)
        if not _graph_is_kept():
            ctx.gradients = None  # which holds the graph behind the output
        return None, None, *sent


def substitute(output: Tensor, gradients: Callable[[Tensor], list[Tensor | None]], receivers: list[Tensor]) -> Tensor:
    """The value `output`; its gradient e goes to the receivers, as `gradients(e)`, one for each."""
    return _Substitute.apply(output.detach(), gradients, *receivers)


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
        network: any torch.nn.Module that returns one tensor. It is not changed; its parameters are the ones that learn.

    Where gradients are disabled (torch.no_grad) a rule just calls the network. `state_dict` holds what the rule keeps.
    A rule can be compiled (torch.compile); call it once on a batch before.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.known = _Known()  # what was found out about the network's calls
        self.key = _registered(self)

    def forward(self, *inputs, **keywords) -> Tensor:
        if not torch.is_grad_enabled():
            return self.network(*inputs, **keywords)
        if torch.compiler.is_compiling():
            return _compiled(self, inputs, keywords)
        with _lock(self.network):
            # Tensors of other libraries' own kinds see every function that they are given, and so must the rule.
            self.known.everything |= any(type(t) not in PLAIN for t in _tensors_in((inputs, keywords)))
            return self.attached(*inputs, **keywords)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)  # of a deep copy, or from a pickle
        self.key = _registered(self)

    def attached(self, *inputs, **keywords) -> Tensor:
        """The network's output with the rule's gradient."""
        raise NotImplementedError

    def feedback_weights(self) -> dict[str, Tensor]:
        """What stands in for the layers' weights when errors go back, by the weights' names; empty if nothing does."""
        return {}

    def become_backprop(self) -> None:
        """Change the network's parameters to those at which the rule is backprop.

        Raises:
            ValueError: there are none for this rule.
        """
        raise ValueError(f"{type(self).__name__} is backprop at no parameters; nothing can be compared")


class Backprop(Rule):
    """Gradient descent as it is, for comparison: the error W^T delta."""

    def attached(self, *inputs, **keywords) -> Tensor:
        return self.network(*inputs, **keywords)

    def become_backprop(self) -> None:
        pass  # it is


class LastLayer(Rule):
    """Only the readout learns, by e a^T; no graph is kept below it.

    Below the readout activities have no gradient (`requires_grad` is False), if the network asks. The output is the
    network's own to the last bit but for products of activities with each other (attention), which torch may compute in
    another order where they have none. A weight that the readout shares (a tied embedding) learns wherever it is used.

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
        frozen = [p for name, p in self.network.named_parameters() if name not in self.learns]
        with _WithoutGraph(self.network, frozen, watched=not self.known.everything):
            output = _unwatched(self.network(*inputs, **keywords))
        names = {id(p): name for name, p in self.network.named_parameters() if name not in self.learns}
        for node, through in _ends_of_graph([tensor.grad_fn for tensor in _tensors_in((output,))], set(), 0):
            if (name := names.get(id(getattr(node, "variable", None)))) is not None:
                raise TypeError(_unseen(name, f"through {through}"))
        return output


class FeedbackAlignment(Rule):
    """The error goes back through fixed random weights in place of the transposed ones (Lillicrap et al., 2016).

        sent to the layer's input: B^T delta        dW = delta a^T

    By hand: tests/test_updates_by_hand.py. With B = W it is backprop.

    Args:
        feedback: one tensor per layer weight, by the weight's name and of its shape. Default: drawn from a normal
            distribution with the standard deviation that the weight has now (its size, for a single weight).
        generator: for that draw.
        added: names of parameters with two or more dimensions, held by modules of your own, that are added to
            activities and do not multiply them: position embeddings, initial states. (Those whose first dimension is 1
            need not be named.)

    Raises:
        TypeError: the network has no layers, or keeps weights where the rule cannot follow them (module docstring); at
            a call, it multiplies activities by a learned tensor outside its layers, or uses weights unseen.
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
            feedback = {name: _normal_like(w, _spread(w), generator) for name, w in weights.items()}
        self.feedback = self.kept([B.detach().clone() for B in _fitting(feedback, weights)])

    def kept(self, feedback: list[Tensor]) -> nn.Module:
        """The feedback weights, in the order of the layers', as the rule holds them."""
        return _Buffers(feedback)

    def attached(self, *inputs, **keywords) -> Tensor:
        with _Pass(self, self.network, layer=self.layer, stand_ins=self.stand_ins()) as calls:
            output = self.network(*inputs, **keywords)
        return calls.examined(output)

    def layer(self, call: "Call") -> Tensor:
        return transport(call.output(call.input.detach()), call.input, call.transpose(call.stand_in))

    def stand_ins(self) -> dict[str, Tensor]:
        """What errors of the call at hand go back through."""
        return self.feedback_weights()

    def feedback_weights(self) -> dict[str, Tensor]:
        return dict(zip(layer_weights(self.network), self.feedback, strict=True))

    @torch.no_grad()
    def become_backprop(self) -> None:
        weights = layer_weights(self.network)
        for name, feedback in self.feedback_weights().items():
            weights[name].copy_(feedback)


class AlignProp(FeedbackAlignment):
    """Feedback alignment with the initial weights as feedback weights (section 4 of the paper).

        sent to the layer's input: W0^T delta       dW = delta a^T

    `added` and errors as for FeedbackAlignment. At the initial weights it is backprop.
    """

    def __init__(self, network: nn.Module, added: Iterable[str] = ()):
        _require_plain(network)
        super().__init__(network, layer_weights(network), added=added)


class SignSymmetry(FeedbackAlignment):
    """The error goes back through the signs of the current weights, with magnitudes M of their own.

        sent to the layer's input: (M o sign W)^T delta        dW = delta a^T

    (Liao, Leibo & Poggio, 2016; Moskovitz, Litwin-Kumar & Abbott, 2018.) Where |W| = M it is backprop.

    Args:
        variant: "uSF": M is one constant for each layer, sqrt(2/(fan_in + fan_out)), the fans as torch.nn.init counts
            them; "frSF": M = |N(0, 1)| times that constant, drawn once; "brSF": drawn anew at every call that is
            differentiated (not by looking at it, as `feedback_angles` does), from a seed and a count that are part of
            the state.
        magnitudes: M itself, one tensor >= 0 per layer weight, by its name and of its shape; for uSF and frSF.
        exact: names of layers that send the exact error W^T delta (Xiao et al., 2019, let the readout).
        generator: for M, or brSF's seed.
        added: as for FeedbackAlignment.

    Raises:
        TypeError: as for FeedbackAlignment.
        ValueError: an unknown variant or name; magnitudes that do not fit, are negative, or are given to brSF.
    """

    VARIANTS = ("uSF", "frSF", "brSF")

    def __init__(
        self,
        network: nn.Module,
        variant: str = "uSF",
        magnitudes: Mapping[str, Tensor] | None = None,
        exact: Iterable[str] = (),
        generator: torch.Generator | None = None,
        added: Iterable[str] = (),
    ):
        chosen = {name.lower(): name for name in self.VARIANTS}.get(str(variant).lower())
        if chosen is None:
            raise ValueError(f"variant must be one of {', '.join(self.VARIANTS)}, not {variant!r}")
        if magnitudes is not None and chosen == "brSF":
            raise ValueError("brSF draws its magnitudes at every call; give them to uSF or frSF")
        _require_layers(network, added := tuple(added))
        weights = layer_weights(network)
        if magnitudes is None:
            magnitudes = {name: _magnitudes(w, generator, draw=chosen != "uSF") for name, w in weights.items()}
        elif any((M < 0).any() for M in magnitudes.values()):
            raise ValueError("magnitudes must not be negative")
        super().__init__(network, magnitudes, added=added)
        self.variant, self.exact = chosen, _named_weights(network, exact)
        if chosen == "brSF":
            self.register_buffer("seed", _seed(generator))
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def become_backprop(self) -> None:
        if self.variant == "brSF":
            raise ValueError("brSF draws its magnitudes anew at every call: it is backprop nowhere")
        super().become_backprop()

    def stand_ins(self) -> dict[str, Tensor]:
        if self.variant == "brSF":
            self._redraw()
        return self.feedback_weights()

    @torch.compiler.disable
    @torch.no_grad()
    def _redraw(self) -> None:
        stream = torch.Generator().manual_seed(int(self.seed) + int(self.draws))
        self.draws += 1
        for M, weight in zip(self.feedback, layer_weights(self.network).values(), strict=True):
            M.copy_(_magnitudes(weight, stream))

    def feedback_weights(self) -> dict[str, Tensor]:
        weights = {name: weight.detach() for name, weight in layer_weights(self.network).items()}
        magnitudes = zip(weights.items(), self.feedback, strict=True)
        return {name: weight if name in self.exact else M * weight.sign() for (name, weight), M in magnitudes}


class KolenPollack(FeedbackAlignment):
    """Feedback weights that learn from the same products as the weights (Kolen & Pollack, 1994; Akrout et al., 2019).

        sent to the layer's input: B^T delta        dW = delta a^T = dB     (equations 16 and 17 of Akrout et al.)

    B is a parameter of the rule, whose .grad backward() fills: give an optimiser `rule.parameters()`, not
    `network.parameters()`. With weight decay, W - B shrinks by (1 - learning rate x decay) a step of SGD, so that the
    rule becomes backprop; without weight decay W - B never shrinks. Momentum and Adam move both as they do W. A frozen
    layer's B does not learn.

    Args:
        feedback, generator, added: as for FeedbackAlignment. With feedback = the weights it is backprop.

    Warns:
        UserWarning: at a call, weights have changed since the last one and no B has: the optimiser lacks B.

    Raises:
        TypeError, ValueError: as for FeedbackAlignment.
    """

    def kept(self, feedback: list[Tensor]) -> nn.Module:
        self.versions: tuple[int, int] | None = None
        return nn.ParameterList(feedback)

    def attached(self, *inputs, **keywords) -> Tensor:
        self._require_learning()
        return super().attached(*inputs, **keywords)

    def layer(self, call: "Call") -> Tensor:
        if call.learns:  # dB = dW, through whatever the network makes of the weight before it uses it
            call.weight = couple(call.weight, call.stand_in)
        return super().layer(call)

    def _require_learning(self) -> None:
        """Warn where the optimiser moves W and not B."""
        weights = [weight for weight in layer_weights(self.network).values() if weight.requires_grad]
        versions = sum(w._version for w in weights), sum(B._version for B in self.feedback)
        if self.versions is not None and versions[0] != self.versions[0] and versions[1] == self.versions[1]:
            warnings.warn(
                "the weights have changed and their feedback weights have not: give the optimiser rule.parameters(), "
                "not network.parameters(), or KolenPollack is feedback alignment",
                stacklevel=6,
            )
        self.versions = versions


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
        TypeError, ValueError: as for FeedbackAlignment; ValueError for a rate outside of 0 < rate <= 1.
    """

    def __init__(
        self,
        network: nn.Module,
        rate: float = 0.01,
        feedback: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        added: Iterable[str] = (),
    ):
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, not {rate}")
        super().__init__(network, feedback, generator, added)
        self.rate = rate
        self.register_buffer("seed", _seed(generator))
        self.register_buffer("mirrored", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def mirror(self, *inputs, **keywords) -> None:
        """A mirror step. It changes B alone: no parameter, no buffer of the network, no generator's state.

        Its noise follows from a seed and the number of the mirror step, which are part of the rule's state.

        Args:
            inputs, keywords: a batch, as for the network; its values matter only as far as they decide which layers are
                called.
        """
        stream = torch.Generator().manual_seed(int(self.seed) + int(self.mirrored))
        self.mirrored += 1
        rate = max(self.rate, 1 / int(self.mirrored))
        for B, (products, positions) in zip(self.feedback, self._sums(stream, inputs, keywords), strict=True):
            met = positions != 0  # not of a layer that was not called, a tap that lies outside, a masked weight
            B.copy_(torch.where(met, B + rate * (products / positions - B), B))

    def _sums(self, stream: torch.Generator, inputs, keywords) -> list[list[Tensor]]:
        weights = layer_weights(self.network)
        # What the network makes of ones in the weight's place (scaling, for one) tells how often a product was counted.
        ones = {name: torch.ones_like(weight, requires_grad=True) for name, weight in weights.items()}
        sums = {name: [torch.zeros_like(weight) for _ in range(2)] for name, weight in weights.items()}

        def layer(call: Call) -> Tensor:
            products = _noise_products(call, list(ones.values()), stream)
            if not any(part is not None and part.isfinite().all() and part.any() for part in products[1]):
                raise TypeError(
                    f"the network makes the weight that it uses from {call.name} in a way that is not proportional to "
                    "it, so that noise cannot find it; scale or mask it only"
                )
            for kind, parts in enumerate(products):
                for total, part in zip(sums.values(), parts, strict=True):
                    if part is not None:
                        total[kind] += part
            return call.output(call.input)

        with torch.enable_grad(), _undisturbed(self.network), _Pass(self, self.network, layer, stand_ins=ones):
            self.network(*inputs, **keywords)
        return list(sums.values())


def _noise_products(call: "Call", ones: list[Tensor], stream: torch.Generator):
    """y x^T for noise x and y = W x at this call, and what its mean is W's multiple of; both for every parameter that
    the layer's weight is made of, and None for the others."""
    used, weight = call.stand_in, call.weight.detach()  # made from `ones` as the weight is from the parameter
    x = _normal_like(call.input, 1, stream)
    y = call.linear(x, weight)
    taps = used.detach().requires_grad_()
    (products,) = torch.autograd.grad(call.linear(x, taps), taps, y)
    (positions,) = torch.autograd.grad(call.linear(torch.ones_like(x), taps), taps, torch.ones_like(y))
    # The first has the mean positions * W as used; both then go through what the network does to a weight.
    return [
        torch.autograd.grad(used, ones, part, retain_graph=True, allow_unused=True)
        for part in (products, positions * taps.detach())
    ]


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

    Raises:
        TypeError: as for FeedbackAlignment; at a call, complex activities.
        ValueError: at a call, `feedback` does not fit the network's blocks, the network ends in an activation, or an
            activity's first dimension is not the output's (the batch); an unknown name in `added`.
        RuntimeError: in backward(), a loss reaches the network's parameters past its output.
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
        self.pooled = pooled
        self.feedback = _Buffers([] if feedback is None else [B.detach().clone() for B in feedback])
        self.drawn = feedback is not None
        if not self.drawn:
            self.register_buffer("seed", _seed(generator))

    def attached(self, *inputs, **keywords) -> Tensor:
        inputs, keywords = _without_gradient((inputs, keywords))  # data: e does not go back to them
        with (blocks := _Blocks(self, self.network, self.layer, self.activation)):
            output = _one_tensor(self.network(*inputs, **keywords))
        ends = blocks.ends
        output = blocks.examined(output)
        if not output.dim():
            raise ValueError("the network returns a single number; DirectFeedbackAlignment needs outputs per example")
        if not blocks.in_block(output):
            raise ValueError(
                "the network ends in an activation function, behind which its last layer would not see its own error; "
                "apply that function outside the network"
            )
        if not self.drawn:
            self._draw(output, ends)
        self._check(output, ends)
        feedback = list(self.feedback)

        def errors(e: Tensor) -> list[tuple[GradientEdge, Tensor]]:
            return [(end.edge, _project(_by_example(e), B, end)) for B, end in zip(feedback, ends, strict=True)]

        return blocks.connected(output, errors)

    def activation(self, call: "ActivationCall") -> Tensor:
        if not call.behind_layer:  # of data, or of a parameter: part of the block that uses it
            return call.network_result()
        return call.returned(call.blocks.landed(call.output(call.argument)))

    def layer(self, call: "Call") -> Tensor:
        if call.blocks.in_block(call.input):
            call.input = call.blocks.landed(call.input)
        output = call.output(call.input.detach())
        # Behind a frozen layer too, so that freezing changes what learns and not where the blocks are.
        return output if output.requires_grad else _with_graph(output)

    def _draw(self, output: Tensor, ends: list["_End"]) -> None:
        outputs, stream = output[0].numel(), torch.Generator().manual_seed(int(self.seed))
        for end in ends:
            shape = end.shape[1:2] if self.pooled else end.shape[1:]
            empty = torch.empty(outputs, *shape, dtype=end.dtype, device=end.device)
            self.feedback.append(_normal_like(empty, shape.numel() ** -0.5, stream))
        self.drawn = True

    def _check(self, output: Tensor, ends: list["_End"]) -> None:
        outputs = output[0].numel()
        if output.is_complex() or any(end.dtype.is_complex for end in ends):
            raise TypeError("DirectFeedbackAlignment needs real activities; split complex ones into two")
        if any(end.shape[0] != output.shape[0] for end in ends):
            raise ValueError(
                "DirectFeedbackAlignment needs activities whose first dimension is the output's, the batch"
            )
        shapes = [(outputs, *end.shape[1:]) for end in ends]
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


class _End(NamedTuple):
    """Of a block: where its activity's gradient enters the graph."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _by_example(error: Tensor) -> Tensor:
    return error.reshape(len(error), -1)  # (batch, outputs)


def _project(error: Tensor, feedback: Tensor, end: _End) -> Tensor:
    """B^T e for a block: (batch, outputs) onto its shape; feedback is (outputs, *shape[1:]), or (outputs, channels)."""
    # In the order of the feedback's memory, channels last for one, so that the error comes in that of the activity.
    last = feedback.movedim(1, -1)
    turned = feedback.dim() > 2 and last.is_contiguous()
    rows = last if turned else feedback
    sent = (error @ rows.flatten(1).to(error.dtype)).unflatten(1, rows.shape[1:])
    if turned:
        sent = sent.movedim(-1, 1)
    if feedback.dim() < len(end.shape):  # feedback onto activities that are averaged over all positions
        positions = end.shape[2:].numel()
        sent = (sent / positions).reshape(*sent.shape, *[1] * len(end.shape[2:])).expand(end.shape)
    return sent.to(end.dtype)


class _FromInitial(Rule):
    """A rule that keeps the network as it was when the rule was made, in `initial`.

    Args:
        live: names of parameters that the initial network reads at their current value, because they are activities
            and not weights: the learned initial state of a recurrent network.
    """

    def __init__(self, network: nn.Module, live: Iterable[str] = ()):
        super().__init__(network)
        _require_plain(network)
        self.live = tuple(live)
        _require_parameters(network, self.live)
        self.initial = copied(network).requires_grad_(False)
        self.initial.zero_grad()
        for module in self.initial.modules():  # what looks at errors, or changes them, does so in the current network
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()

    def prepare_initial(self) -> None:
        """Let the initial network start where the current one does: in each module's mode, and with its state.

        And freeze it again, where `rule.requires_grad_()` was meant for the network.
        """
        for parameter in self.initial.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                parameter.requires_grad_(False)
        _carry_state(self.network, self.initial)

    def feedback_weights(self) -> dict[str, Tensor]:
        return layer_weights(self.initial)

    @torch.no_grad()
    def become_backprop(self) -> None:
        initial = dict(self.initial.named_parameters())
        for name, parameter in self.network.named_parameters():
            if name not in self.live:
                parameter.copy_(initial[name])


class AlignZero(_FromInitial):
    """The gradient of the initial network at the current error: J(theta0)^T e, applied to the current parameters.

        sent to the layer's input: W0^T delta0      dW = delta0 a0^T

    output = sg(f) + f0 - sg(f0), and d(output)/d(theta0) is what theta gets. Takes any network that can be copied,
    fused modules included. At the initial parameters it is backprop.

    Raises:
        TypeError: the network cannot be copied; at a call, it checkpoints activations, or its copy uses the original's
            parameters.
        ValueError: an unknown name in `live`.
        RuntimeError: in backward(), a loss reaches the network's parameters past its output.
    """

    def attached(self, *inputs, **keywords) -> Tensor:
        self.prepare_initial()
        again = _Again(self, inputs, keywords)
        with _forward_hooks_noted(self.network, self.initial):
            output = _value(self.network, inputs, keywords)
        with again as (inputs, keywords):
            return swap_grad(output, self.from_initial(self.network, *inputs, **keywords))

    def from_initial(self, target: nn.Module, *inputs, **keywords) -> Tensor:
        """f0, the initial network's output, with d(f0)/d(theta0) going to the namesakes of theta0 in `target`."""
        initial = dict(self.initial.named_parameters())
        routed = {
            id(initial[name]): parameter
            if name in self.live
            else _named_like(parameter, swap_grad(initial[name], parameter))
            for name, parameter in target.named_parameters()
            if parameter.requires_grad
        }
        foreign = [p for name, p in target.named_parameters() if name not in self.live]
        with (calls := _Routed(self.initial, routed, foreign, self.known)):
            output = self.initial(*inputs, **keywords)
        return calls.examined(output)


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
        TypeError: as for FeedbackAlignment; the network cannot be copied; at a call, what came in front of a layer was
            made where the rule cannot follow it.
        ValueError: an unknown coupling or name.
        RuntimeError: at a call, the initial network calls other functions than the current one; in backward(), a loss
            reaches the network's parameters past its output.
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
        self.uncoupled = _named_weights(network, uncoupled)

    def attached(self, *inputs, **keywords) -> Tensor:
        self.prepare_initial()
        again = _Again(self, inputs, keywords, detach=True)
        current = _Private(self, self.network, layer=_cut, origins=self.coupling == "preactivation")
        inputs, keywords = current.receiving((inputs, keywords))
        with _hooks_told(self.network), _forward_hooks_noted(self.network, self.initial), current:
            output = _one_tensor(self.network(*inputs, **keywords))
        output = current.examined(output)
        with again as (inputs, keywords), (initial := _Replay(self, current, self._coupled(current.calls))):
            initial_output = self.initial(*inputs, **keywords)
        initial.ended(initial_output)
        return current.connected(output, initial.errors)

    def _coupled(self, calls: list["Call"]) -> list[bool]:
        """For each call of a layer: whether an error enters in front of it; where it does says `call.origin`."""
        for call in calls:
            if call.name == calls[-1].name:  # the readout: at its input
                call.origin = None
        return [call.name not in self.uncoupled and call.input.requires_grad for call in calls]


def _cut(call: "Call") -> Tensor:
    return call.output(call.input.detach())


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


# ------------------------------------------------------------------------------------------------ checks and alignment


def verify(
    rule: Rule,
    loss_function: Callable[[Tensor], Tensor],
    *inputs,
    double: bool = False,
    tolerance: float | None = None,
    **keywords,
) -> dict[str, float]:
    """Check, on a copy of rule and network, that the rule is backprop where it should be: at the initial parameters for
    AlignProp, AlignAda and AlignZero, at W = B for feedback alignment and its kin.

    Nothing that belongs to the rule, the network or the generators of random numbers is changed.

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
    rule = copied(rule)
    if double:
        rule = rule.double()
        inputs, keywords = _map_tensors(lambda t: t.double() if t.is_floating_point() else t, (inputs, keywords))
    inputs, keywords = _map_tensors(lambda t: t.detach().clone(), (inputs, keywords))
    rule.become_backprop()
    reference = copied(rule.network)
    found = []
    with torch.enable_grad():
        for function, network in ((reference, reference), (rule, rule.network)):
            with _Randomness(rule.network):
                output = function(*inputs, **keywords)
            learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
            with torch.autocast(_one_tensor(output).device.type, enabled=False):  # which is for forward passes
                grads = torch.autograd.grad(loss_function(output), list(learning.values()), allow_unused=True)
            found.append((output.detach(), dict(zip(learning, grads, strict=True))))
    (output, expected), (own, gradients) = found
    if not torch.equal(output, own):
        raise RuntimeError("the rule's output is not the network's own")
    largest = max((g.abs().max().item() for g in expected.values() if g is not None and g.numel()), default=0.0)
    # Below such a share of the largest a gradient is rounding, as for a bias in front of a normalisation.
    floor = max(1e-4 * largest, torch.finfo(output.dtype).tiny)
    shares = {name: _share(gradients[name], gradient, floor) for name, gradient in expected.items()}
    if tolerance is None:
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(output.dtype, 0.1)
    if wrong := {name: share for name, share in shares.items() if not share <= tolerance}:
        told = ", ".join(f"{name} by {share:.2g}" for name, share in wrong.items())
        raise RuntimeError(
            f"where the rule should be backprop, gradients differ from it (as shares of its own): {told}"
        )
    return shares


def _share(gradient: Tensor | None, expected: Tensor | None, floor: float) -> float:
    """The largest difference, relative to the largest entry expected; a missing gradient is one of zeros."""
    if gradient is None and expected is None:
        return 0.0
    expected = torch.zeros_like(gradient) if expected is None else expected
    gradient = torch.zeros_like(expected) if gradient is None else gradient
    if not expected.numel():
        return 0.0
    return (gradient - expected).abs().max().item() / max(expected.abs().max().item(), floor)


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
    with torch.enable_grad(), _undisturbed(network):
        loss = loss_function(network(*inputs, **keywords))
        with torch.autocast(loss.device.type, enabled=False):  # which is for forward passes
            exact = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    exact = dict(zip(learning, exact, strict=True))
    return {name: _angle(weight.grad, exact.get(name)) for name, weight in weights.items()}


def feedback_angles(rule: Rule) -> dict[str, float | None]:
    """Angles between the weights that errors go back through and the current ones, as they stand.

    Errors go back through B in FeedbackAlignment and its kin, through M o sign W in SignSymmetry, and through the
    initial weights in AlignProp, AlignAda and AlignZero.

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
    # Double precision, on the host where a device has none (mps).
    one, other = ((t.cpu() if t.device.type == "mps" else t).detach().double().flatten() for t in (one, other))
    if not one.any() or not other.any():
        return None
    one, other = one / one.norm(), other / other.norm()
    # Exact for small angles too, unlike the arc cosine (Kahan, 2006, "How futile are mindless assessments").
    return math.degrees(2 * math.atan2((one - other).norm().item(), (one + other).norm().item()))


def layer_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that a rule treats as layers', by name, in order of registration; a shared one once."""
    return _Inventory(network).layers


# --------------------------------------------------------------------------------------------------- feedback weights


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


def _fitting(feedback: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
    """In the order of the weights.

    Raises:
        ValueError: other names or shapes than theirs.
    """
    expected = {name: tuple(weight.shape) for name, weight in weights.items()}
    if (given := {name: tuple(B.shape) for name, B in feedback.items()}) != expected:
        raise ValueError(f"feedback weights must have the names and shapes {expected}, not {given}")
    return [feedback[name] for name in weights]


def _spread(weight: Tensor) -> Tensor:
    """The standard deviation of its entries; of a single one, which has none, its size."""
    return weight.detach().std() if weight.numel() > 1 else weight.detach().abs().sum()


def _seed(generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**62, (), generator=generator)


def _normal_like(tensor: Tensor, std: float | Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return (drawn * float(std)).to(tensor.device)


def _magnitudes(weight: Tensor, generator: torch.Generator | None, draw: bool = True) -> Tensor:
    """M of sign-symmetry for a weight: a constant, or drawn with that constant as the deviation of its normal."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    constant = math.sqrt(2 / (fan_in + fan_out))
    if draw:
        return _normal_like(weight, constant, generator).abs()
    return torch.full_like(weight, constant, requires_grad=False)


# --------------------------------------------------------------------------------- the engine: a network's calls, seen

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Inventory:
    """What the modules of a network hold, in one walk: `places` of its tensors, as (who holds it, by what name, the
    tensor); `parameters` by name and `buffers`, each once; and `layers`, those of them that are layers' weights."""

    def __init__(self, network: nn.Module):
        self.places: list[tuple[dict, str, Tensor]] = []
        self.parameters: dict[str, Tensor] = {}
        self.buffers: list[Tensor] = []
        self.layers: dict[str, Tensor] = {}
        seen, layers = set(), set()
        for name, module in network.named_modules():
            prefix = f"{name}." if name else ""
            for key, tensor in module._parameters.items():
                if tensor is None:
                    continue
                self.places.append((module._parameters, key, tensor))
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.parameters[prefix + key] = tensor
                if key == "weight" and isinstance(module, LAYERS) and id(tensor) not in layers:
                    layers.add(id(tensor))
                    self.layers[prefix + key] = tensor
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    self.places.append((module._buffers, key, tensor))
                    self.buffers.append(tensor)

    @contextlib.contextmanager
    def holding(self, twins: Mapping[int, Tensor], shared: bool = True):
        """The network's modules hold these tensors in the place of their own, given by id.

        Args:
            shared: they share their content with their own, and shall afterwards (`weight.data = ...` in forward).
        """
        swapped = [place for place in self.places if id(place[2]) in twins]
        for holder, key, tensor in swapped:
            holder[key] = twins[id(tensor)]
        try:
            yield
        finally:
            for holder, key, tensor in swapped:
                twin = twins[id(tensor)]
                if holder[key] is twin:  # and not what the network has put there
                    holder[key] = tensor
                if shared and not _tracing() and type(tensor) in PLAIN and twin.data_ptr() != tensor.data_ptr():
                    tensor.data = twin.detach().as_subclass(Tensor)


LINEAR_MAPS = {F.linear, F.conv1d, F.conv2d, F.conv3d}

ACTIVATIONS = {
    F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus,
    F.softsign, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.threshold, torch.selu, torch.celu,
    F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit, F.tanh, torch.tanh, Tensor.tanh, torch.threshold,
}  # fmt: skip

# The same functions where they change their argument. (The others do where they take `inplace`.)
IN_PLACE = {
    torch.relu_: torch.relu, Tensor.relu_: torch.relu, torch.sigmoid_: torch.sigmoid, Tensor.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh, Tensor.tanh_: torch.tanh, F.leaky_relu_: F.leaky_relu, F.elu_: F.elu, F.celu_: F.celu,
    F.selu_: F.selu, F.hardtanh_: F.hardtanh, F.threshold_: F.threshold,
}  # fmt: skip


# The same functions as operators of torch.ops.aten.
CANONICAL = {
    operator: function
    for function in (
        torch.relu, torch.tanh, torch.sigmoid, torch.selu, torch.celu, F.gelu, F.silu, F.mish, F.softplus, F.elu,
        F.leaky_relu, F.hardtanh, F.linear, F.conv1d, F.conv2d, F.conv3d, torch.relu_, torch.tanh_, torch.sigmoid_,
    )
    for packet in (getattr(torch.ops.aten, function.__name__),)
    for operator in (packet, packet.default)
}  # fmt: skip


class Call:
    """A call of a layer, as a rule's `layer` handler sees it. The handler returns the layer's output.

    `name` of the layer's weight; `input`; `weight`, as the network uses it; `stand_in`, what takes that one's place in
    the backward pass; `learns`, whether the weight does; `origin`, the activation that the input came out of, if it is
    followed and if there is one; `blocks`, the pass of direct feedback.
    """

    __slots__ = (
        "blocks",
        "function",
        "input",
        "keywords",
        "learns",
        "name",
        "node",
        "origin",
        "rest",
        "stand_in",
        "state",
        "weight",
    )

    def __init__(self, function, arguments: tuple, keywords: Mapping, source: "_Source"):
        if len(arguments) < 2:
            keywords = dict(keywords)
            arguments += tuple(keywords.pop(name) for name in ("input", "weight")[len(arguments) :])
        self.function, self.keywords = function, keywords
        self.input, self.weight, self.rest = arguments[0], arguments[1], arguments[2:]
        self.name, _, self.learns, self.stand_in = source
        self.origin = self.node = self.state = None

    def output(self, layer_input: Tensor) -> Tensor:
        """What the network would have called, with this input."""
        output = self.function(layer_input, self.weight, *self.rest, **self.keywords)
        self.node = output.grad_fn  # behind which lie the weight, the bias and what was done to them
        return output

    def linear(self, layer_input: Tensor, weight: Tensor) -> Tensor:
        """The same without its bias, with another weight."""
        return self.function(layer_input, weight, None, **self.settings())

    def settings(self) -> dict[str, Any]:
        """Stride and so on, by name."""
        given = dict(zip(("stride", "padding", "dilation", "groups"), self.rest[1:], strict=False)) | self.keywords
        return {name: value for name, value in given.items() if name != "bias"}

    def transpose(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """What sends an error at the layer's output to its input, through this weight, when the pass is over."""
        if self.function is F.linear:
            transposed = lambda error: error @ (weight if weight.dtype == error.dtype else weight.to(error.dtype))  # noqa: E731
        else:
            transposed = _transposed_convolution(self.function, self.settings(), weight, self.input.shape)
        state = self.state

        def sent(error: Tensor) -> Tensor:
            if state.open:
                raise RuntimeError(INSIDE)
            return transposed(error)

        return sent


def _transposed_convolution(function: Callable, options: Mapping[str, Any], weight: Tensor, shape: torch.Size):
    """`Call.transpose` for a convolution with these options, of an input of this shape."""
    if len(shape) < weight.dim():  # one example, without a batch
        batched = _transposed_convolution(function, options, weight, torch.Size((1, *shape)))
        return lambda error: batched(error.unsqueeze(0)).squeeze(0)
    if isinstance(options.get("padding"), str):
        return _transposed_padded(function, options, weight, shape)
    gradients = {F.conv1d: nn.grad.conv1d_input, F.conv2d: nn.grad.conv2d_input, F.conv3d: nn.grad.conv3d_input}
    return lambda error: gradients[function](shape, weight.to(error.dtype), error.contiguous(), **options)


def _transposed_padded(function: Callable, options: Mapping[str, Any], weight: Tensor, shape: torch.Size):
    """`_transposed_convolution` for padding "same", whose odd pixel comes last (torch.nn.Conv2d), and "valid"."""
    sizes, kernel, dilation = shape[-weight.dim() + 2 :], weight.shape[2:], options.get("dilation", 1)
    dilation = (dilation,) * len(sizes) if isinstance(dilation, int) else dilation
    same = options["padding"] == "same"
    totals = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=True)]
    padded = (*shape[: -len(sizes)], *(size + total for size, total in zip(sizes, totals, strict=True)))
    transpose = _transposed_convolution(function, {**options, "padding": 0}, weight, torch.Size(padded))
    window = (..., *(slice(total // 2, total // 2 + size) for size, total in zip(sizes, totals, strict=True)))
    return lambda error: transpose(error)[window]


class ActivationCall:
    """A call of an activation function, as a rule's `activation` handler sees it.

    `output` is the function with its settings, changing nothing; `argument` what it is given: a copy, if the network's
    call would change it, since the rules still need it afterwards. `behind_layer`: the argument is an activity that
    learns, and not made of parameters alone.
    """

    __slots__ = ("_arguments", "_function", "_keywords", "argument", "behind_layer", "blocks", "output")

    def __init__(self, function, arguments: tuple, keywords: Mapping, behind_layer: bool):
        self._function, self._arguments, self._keywords = function, arguments, keywords
        self.output, changes = _out_of_place(function, arguments, keywords)
        self.argument = arguments[0].clone() if changes and behind_layer else arguments[0]
        self.behind_layer = behind_layer

    def network_result(self) -> Tensor:
        """What the network's own call gives."""
        return self._function(*self._arguments, **self._keywords)

    def returned(self, result: Tensor) -> Tensor:
        """This result, without a graph; in the network's own tensor, if its call changes that in place."""
        own = self._arguments[0]
        if self.argument is own:
            return result
        if own._base is not None:
            raise TypeError(IN_PLACE_VIEW)
        return own.detach_().copy_(result)


def _out_of_place(function: Callable, arguments: tuple, keywords: Mapping) -> tuple[Callable[[Tensor], Tensor], bool]:
    """An activation function with its settings, changing nothing, and whether the call would change its argument."""
    rest, keywords = list(arguments[1:]), dict(keywords)
    changes = function in IN_PLACE or bool(keywords.pop("inplace", False))
    place = _inplace_position(function) - 1
    if 0 <= place < len(rest):
        changes = bool(rest[place])
        rest[place] = False
    activate = IN_PLACE.get(function, function)
    return (lambda tensor: activate(tensor, *rest, **keywords)), changes


@functools.cache
def _inplace_position(function: Callable) -> int:
    """Among the arguments that a function takes; 0 if it takes no `inplace`."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C++: such functions end in an underscore instead
        return 0
    return names.index("inplace") if "inplace" in names else 0


def _in_place(function: Callable, arguments: tuple = (), keywords: Mapping = {}) -> bool:
    """Whether a call changes its first argument, or what it is given as `out`."""
    name = getattr(function, "__name__", "").partition(".")[0]
    if name.startswith("__"):
        if name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__")):
            return True
    elif name.endswith("_"):
        return True
    if keywords.get("inplace") or keywords.get("out") is not None:
        return True
    place = _inplace_position(function) if arguments else 0
    return bool(0 < place < len(arguments) and arguments[place])


class _Known:
    """What earlier calls have found out: which sequences of calls were examined, which calls rearrange an activity, and
    whether passes must see everything, or the network changes its inputs."""

    def __init__(self):
        self.sequences: set[int] = set()
        self.rearranging: dict[tuple, bool] = {}
        self.everything = False
        self.changes_inputs: bool | None = None  # None: not called yet

    def __reduce__(self):
        return _Known, ()  # a copy finds out anew


class _Watch(TorchFunctionMode):
    """Tells a pass every call of torch's functions."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if self.calls.everything:  # and nothing is a _Watched tensor, but some may be of other libraries' kinds
            return self.calls.called(function, arguments, keywords or {})
        with torch._C.DisableTorchFunctionSubclass():
            if function in SHOWING:
                return function(*_unwatched(arguments), **_unwatched(keywords or {}))
            return self.calls.called(function, arguments, keywords or {})


class _Watched(Tensor):
    """A parameter in a pass, or what is made of it: tells the pass, while it lasts, the calls that are given it."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        for tensor in arguments:
            if type(tensor) is _Watched:
                break
        else:
            tensor = next(t for t in _tensors_in((arguments, keywords or {})) if type(t) is _Watched)
        calls = tensor._calls()
        with torch._C.DisableTorchFunctionSubclass():
            if calls is not None and calls.state.open and function not in SHOWING:
                return calls.called(function, arguments, keywords or {})
            return function(*_unwatched(arguments), **_unwatched(keywords or {}))


# Functions that look at a tensor's kind.
SHOWING = {Tensor.__format__, Tensor.__repr__, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.numpy, Tensor.tolist}
PLAIN = (Tensor, nn.Parameter)


def _watched(tensor: Tensor, calls) -> Tensor:
    twin = tensor.as_subclass(_Watched)
    twin._calls = weakref.ref(calls)  # a strong one would be a circle that keeps the graph
    return twin


def _unwatched(values):
    with torch._C.DisableTorchFunctionSubclass():
        return _map_arguments(lambda t: t.as_subclass(Tensor) if type(t) is _Watched else t, values)


class _State:
    """Whether a pass is under way. (Of the pass itself no graph may know: it would keep what it has seen.)"""

    open = False
    sending = False  # the rule's own errors, in the backward pass


class _Pass:
    """One run of a network, during which `layer` and `activation` stand in for its calls of layers and activations.

    The pass sees every call of torch's functions, at a cost of microseconds each; or, where the rule needs no others
    and the first call has shown that it is enough, those that are given parameters or what is made of them. What
    happens while gradients are disabled (inside of a torch.autograd.Function, in a torch.no_grad of the network's own)
    is none of its business.

    Args:
        rule: whose pass it is; it knows what was examined before.
        layer, activation: handlers, given a `Call`, an `ActivationCall`.
        stand_ins: by the name of a layer's weight, the tensor that takes its place in the backward pass.
        twins: by the id of a parameter, what is used in its place.
        everything: the pass must see every call.

    Raises:
        TypeError: on the way, the network uses its parameters in a way that the rule cannot follow (module docstring).
    """

    def __init__(
        self, rule: Rule, network: nn.Module, layer, activation=None, *, stand_ins=None, twins=None, everything=False
    ):
        self.rule, self.own, self.layer, self.activation = rule, _Inventory(network), layer, activation
        self.hooks, self.start, self.state = _saved_tensor_hooks(), _sequence_number(), _State()
        everything = everything or activation is not None or rule.known.everything
        self.everything = everything or not _watchable(self.own.parameters.values())
        self.all, twins = self.everything or not rule.known.sequences, dict(twins or {})
        if self.all and not _tracing():
            # In a call that is examined the graph shows frozen layers too, where they are used unseen.
            frozen = [w for w in self.own.layers.values() if not w.requires_grad and id(w) not in twins]
            twins |= {id(w): _named_like(w, _with_graph(w)) for w in frozen if w.is_floating_point()}
        if not self.everything:
            own = self.own.parameters.values()
            twins = {id(p): _named_like(p, _watched(twins.get(id(p), p), self)) for p in own}
        self.held = twins
        self.sources = _Sources(self.own, stand_ins or {}, twins)
        self.functions: list[Callable] = []
        self.with_own: list[tuple[Callable, str | None]] = []  # those that were given a layer's weight, and its name
        self.followed = set()  # nodes of the graph behind which lies nothing unseen: layers, rows that are looked up
        self.refusal: str | None = None

    def __enter__(self):
        self.context = contextlib.ExitStack()
        self.context.enter_context(self.own.holding(self.held))
        if self.all:
            self.context.enter_context(_Watch(self))
        self.state.open = True
        return self

    def __exit__(self, kind, error, traceback):
        self.state.open = False
        self.context.close()
        del self.context  # it knows the pass
        refusal = self.refusal or self.sources.refusal
        if refusal is not None and str(error) != refusal:
            # Raised in an operator such as @, a TypeError loses its message to "unsupported operand types".
            raise TypeError(refusal) from error

    def called(self, function, arguments, keywords):
        """A call of one of torch's functions by the network."""
        if not torch.is_grad_enabled():
            return self.aside(function, arguments, keywords)
        function = CANONICAL.get(function, function)
        if function in LINEAR_MAPS and (source := self.of_layer(arguments, keywords)) is not None:
            result = self.layer_called(function, arguments, keywords, source)
        elif self.activation is not None and (function in ACTIVATIONS or function in IN_PLACE):
            result = self.activated(function, *_spelled(arguments, keywords))
        elif self.sources.among(arguments, keywords):
            result = self.with_parameters(function, arguments, keywords)
        else:
            result = self.other(function, arguments, keywords)
        if isinstance(result, Tensor) or function is Tensor.__setitem__ or _tensors_in((result,)):
            self.count(function)  # and not what only asks for a shape and the like
        return result

    def count(self, function) -> None:
        self.functions.append(function)

    def of_layer(self, arguments, keywords) -> "_Source | None":
        """Of the weight of a linear map; None if it is no layer's."""
        source = self.sources.of_weight(arguments[1] if len(arguments) > 1 else keywords["weight"])
        return source if source.layer else None

    def layer_called(self, function, arguments, keywords, source: "_Source") -> Tensor:
        self.with_own.append((function, source.name))
        if self.all:
            arguments, keywords = self.sources.twinned(arguments), self.sources.twinned(keywords)
        call = Call(function, arguments, keywords, source)
        call.state = self.state
        hooks = _saved_tensor_hooks()
        if hooks is not None and hooks != self.hooks and not _only_stores(hooks):
            raise TypeError(CHECKPOINTED)
        if _functional_transform() is not None:
            raise TypeError(TRANSFORMED.format(source.name))
        if id(call.input) in self.sources.known and self.sources.find(call.input).layer:
            self.refuse(source, function)
        output = self.met(call)
        self.followed.add(call.node)
        return output

    def met(self, call: Call) -> Tensor:
        """What the rule makes of a layer's call."""
        return self.layer(call)

    def with_parameters(self, function, arguments, keywords):
        """Any other call that may use parameters, or what is made of them."""
        arguments, keywords = self.sources.twinned(arguments), self.sources.twinned(keywords)
        result = self.other(function, arguments, keywords)
        return self.sources.follow(self, function, arguments, keywords, result)

    def other(self, function, arguments, keywords):
        return function(*arguments, **keywords)

    def aside(self, function, arguments, keywords):
        """A call while gradients are disabled."""
        if function in LINEAR_MAPS:
            source = self.sources.find(arguments[1] if len(arguments) > 1 else keywords["weight"])
            if source is not None and source.learns and (inside := _autograd_function()) is not None:
                checkpoints = inside is torch.utils.checkpoint.CheckpointFunction
                raise TypeError(CHECKPOINTED if checkpoints else _unseen(source.name, f"in {inside.__name__}"))
        return function(*arguments, **keywords)

    def refuse(self, misused: "_Source", function) -> None:
        used = f"{misused.name!r} in torch.{_name(function).strip('_')}"
        # An operator that is refused is tried once more with its sides exchanged: the first says more.
        self.refusal = self.refusal or (
            f"the network uses its parameter {used}, outside a torch.nn.Linear or Conv layer, where this rule "
            f"cannot follow it; make it the weight of such a layer ({ANYTHING})"
        )
        raise TypeError(self.refusal)

    def examined(self, output):
        """The output, as plain tensors. Once for every sequence of calls, with the same parameters frozen:

        Raises:
            TypeError: weights reach the output past what was followed. The graph behind the output, and behind the
                places where the pass has cut it, knows which ones do.
        """
        known = self.rule.known
        known.everything |= self.sources.strays
        frozen = tuple(p.requires_grad for p in self.own.parameters.values())
        sequence = hash((tuple(self.functions if self.everything else self.with_own), frozen))
        if sequence not in known.sequences:
            made = {id(tensor) for tensor, _ in self.sources.known.values()}  # of parameters alone: its own way out
            roots = [t.grad_fn for t in _tensors_in((output,)) if id(t) not in made]
            roots += [edge.node for edge in self.cuts()]
            names = self.names()
            for node, through in _ends_of_graph(roots, self.followed, self.start):
                self.require_followed(names.get(getattr(node, "variable", node)), node, through)
            known.sequences.add(sequence)
        return _unwatched(output)

    def names(self) -> dict:
        """Of parameters, by themselves and by the nodes through which a graph comes to them."""
        own = {id(tensor): name for name, tensor in (self.own.parameters | self.own.layers).items()}
        named = {tensor: own[id(tensor)] for _, _, tensor in self.own.places if id(tensor) in own}
        for key, twin in self.sources.twins.items():
            node = twin.grad_fn
            while node is not None and not _is_entrance(node) and node.next_functions:
                node = node.next_functions[0][0]  # a watched tensor is an alias
            named[node] = own[key]
        return named

    def cuts(self) -> list[GradientEdge]:
        """Where the pass has cut the graph."""
        return []

    def require_followed(self, name: str | None, node, through: str) -> None:
        """Raise TypeError for an end of the graph, a parameter of this name, that the pass should have met."""
        if name in self.sources.layers:
            raise TypeError(_unseen(name, f"through {through}"))


class _Private(_Pass):
    """A pass whose graph is closed: what it computes reaches parameters through twins of its own.

    So what the parameters get is what `connected` gives them, and an error that enters the graph anywhere else, from a
    loss on something that the network keeps, is told.
    """

    def __init__(self, rule: Rule, network: nn.Module, layer, activation=None, *, origins: bool = False):
        self.receivers = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.leaves = [_entrance(parameter) for parameter in self.receivers]
        twins = {id(parameter): leaf for parameter, leaf in zip(self.receivers, self.leaves, strict=True)}
        super().__init__(rule, network, layer, activation, twins=twins, everything=origins)
        self.sources.forbid(_kept_graphs(network))
        self.origins = _Origins(rule.known.rearranging, self.start) if origins else None
        self.calls: list[Call] = []

    def receiving(self, values):
        """The same values, where tensors that have a gradient are replaced by twins, and get theirs."""
        if not any(tensor.requires_grad for tensor in _deep_tensors(values)):
            return values

        def received(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            self.receivers.append(tensor)
            self.leaves.append(_entrance(tensor))
            return self.leaves[-1]

        return _map_tensors(received, values)

    def met(self, call: Call) -> Tensor:
        self.calls.append(call)
        if self.origins is None:
            return self.layer(call)
        call.origin = self.origins.of(call)
        output = self.layer(call)
        self.origins.note(output)
        return output

    def other(self, function, arguments, keywords):
        if self.origins is None:
            return function(*arguments, **keywords)
        return self.origins.called(len(self.functions), function, arguments, keywords)

    def cuts(self) -> list[GradientEdge]:
        return [_edge(call.input) for call in self.calls if call.input.requires_grad]

    def require_followed(self, name: str | None, node, through: str) -> None:
        if name is not None and (name in self.sources.layers or hasattr(node, "variable")):
            raise TypeError(_unseen(name, f"through {through}"))
        if name is None and not _is_entrance(node):
            raise TypeError(f"the network {FOREIGN}")

    def connected(self, output: Tensor, errors: Callable) -> Tensor:
        """The output; at its gradient e the receivers get what e, and `errors(e)` at their edges, give them."""
        if not output.requires_grad:
            return output
        out, leaves, state = _edge(output), [_edge(leaf) for leaf in self.leaves], self.state

        def gradients(e: Tensor) -> list[Tensor | None]:
            entering = [(out, e), *((edge, error) for edge, error in errors(e) if error is not None)]
            roots, grads = zip(*entering, strict=True)
            state.sending = True
            try:
                return _gradients(roots, grads, leaves)
            finally:
                state.sending = False

        return substitute(output, gradients, self.receivers)


class _Blocks(_Private):
    """DirectFeedbackAlignment's pass: blocks end where an activity lands."""

    def __init__(self, rule: Rule, network: nn.Module, layer, activation):
        super().__init__(rule, network, layer, activation)
        self.ends: list[_End] = []

    def met(self, call: Call) -> Tensor:
        call.blocks = self
        return super().met(call)

    def activated(self, function, arguments, keywords) -> Tensor:
        argument = arguments[0]
        behind_layer = self.sources.find(argument) is None and self.in_block(argument)
        call = ActivationCall(function, self.sources.twinned(arguments), keywords, behind_layer)
        call.blocks = self
        result = self.activation(call)
        return result if behind_layer else self.sources.follow(self, function, arguments, keywords, result)

    def cuts(self) -> list[GradientEdge]:
        return [end.edge for end in self.ends]

    def landed(self, activity: Tensor) -> Tensor:
        """The activity, cut from the block that ends with it. An error may come back to it along a skip connection, as
        far as here, but not from a loss of its own."""
        self.ends.append(_End(_edge(activity), activity.shape, activity.dtype, activity.device))
        return _Seal.apply(activity.detach(), torch.empty((), requires_grad=True), self.state)

    def in_block(self, tensor: Tensor) -> bool:
        """Whether there is a layer, or anything else that learns, between a tensor and the ends of blocks before it."""
        nodes, seen = [tensor.grad_fn], set()
        if tensor.grad_fn is None:
            return tensor.requires_grad
        while nodes:
            node = nodes.pop()
            if node in seen or isinstance(node, _Seal._backward_cls):
                continue
            seen.add(node)
            behind = [following for following, _ in node.next_functions if following is not None]
            if node in self.followed or _is_entrance(node) or not behind or hasattr(node, "variable"):
                return True
            nodes += behind
        return False


class _Replay(_Pass):
    """The initial network's pass. It must call what the current one has called, and has an alias of the input of every
    layer in front of which an error enters the current network.

    Args:
        coupled: for each call of a layer, whether one does.
    """

    remedy = "AlignAda needs a network whose calls do not depend on its parameters, nor their order of calls"

    def __init__(self, rule: Rule, current: _Private, coupled: list[bool]):
        initial, network = rule.initial, rule.network
        live = {id(initial.get_parameter(name)): network.get_parameter(name).detach() for name in rule.live}
        super().__init__(rule, initial, self.alias, twins=live, everything=current.everything)
        self.all = current.all
        self.current, self.coupled, self.made = current, coupled, 0
        self.foreign = {id(parameter) for parameter in current.own.parameters.values()}
        self.aliases: list[tuple[GradientEdge, GradientEdge, _Origin | None]] = []  # here, in the current network
        # By the index of its call, the edges of an activation function's result and argument.
        self.activations: dict[int, tuple[GradientEdge, GradientEdge] | None] = {
            call.origin.index: None for call in current.calls if call.origin is not None
        }

    def called(self, function, arguments, keywords):
        if self.all:
            _require_copied((arguments, keywords), self.foreign)
        return super().called(function, arguments, keywords)

    def count(self, function) -> None:
        number, expected = len(self.functions), self.current.functions
        if number >= len(expected) or expected[number] != function:
            raise self.differs(f"calls torch.{_name(function).strip('_')}")
        super().count(function)

    def differs(self, what: str) -> RuntimeError:
        return RuntimeError(f"the initial network {what} where the current one does not: {self.remedy}")

    def alias(self, call: Call) -> Tensor:
        """The layer's output, from an alias of its input where an error enters the current network."""
        number = self.made
        if number == len(self.coupled) or self.current.calls[number].name != call.name:
            raise self.differs(f"calls {call.name}")
        self.made, there = number + 1, self.current.calls[number]
        layer_input = call.input
        if self.coupled[number]:
            if layer_input.shape != there.input.shape:
                raise self.differs(f"comes to {call.name} with another shape")
            layer_input = _alias(layer_input)
            self.aliases.append((_edge(layer_input), _edge(there.input), there.origin))
        output = call.output(layer_input)
        # So that all behind the first layer has a gradient, as in the current network.
        return output if output.requires_grad else _with_graph(output)

    def other(self, function, arguments, keywords):
        index = len(self.functions)
        if index not in self.activations or function != self.current.functions[index]:
            return function(*arguments, **keywords)
        # Once more, beside the network: no hook of its tensors has a part in this derivative.
        arguments, keywords = _spelled(arguments, keywords)
        activate, changes = _out_of_place(function, arguments, keywords)
        alias = _alias(arguments[0].clone() if changes else arguments[0])
        self.activations[index] = _edge(activate(alias)), _edge(alias)
        return function(*arguments, **keywords)

    def ended(self, output: Tensor) -> None:
        """The pass is over, and this is its output."""
        if len(self.functions) != len(self.current.functions):
            raise self.differs("ends")
        self.root = _edge(output) if output.requires_grad else None
        del self.current, self.sources, self.layer  # which keep graphs alive

    def errors(self, e: Tensor) -> list[tuple[GradientEdge, Tensor | None]]:
        """The edges of the current network where the initial one's errors enter, and these errors."""
        if not self.aliases or self.root is None:
            return []
        here, there, origins = zip(*self.aliases, strict=True)
        found = list(zip(there, _gradients((self.root,), (e,), here), origins, strict=True))
        entering = [(edge, error) for edge, error, origin in found if origin is None]
        inside: dict[int, list] = collections.defaultdict(list)  # by activation function
        for edge, error, origin in found:
            if origin is not None and error is not None:
                inside[origin.index].append((origin, edge, error))
        for group in inside.values():
            # From layers' inputs back to the activation function: through what rearranges, and hooks, in the current
            # network; then through the function itself, in the initial one.
            (origin, *_), (result, argument) = group[0], self.activations[group[0][0].index]
            _, roots, errors = zip(*group, strict=True)
            errors = _gradients(roots, errors, (origin.result,))
            (sent,) = _gradients((result,), errors, (argument,))
            entering.append((origin.argument, sent))
        return entering


# --------------------------------------------------------------------------- the engine: where activities come from


class _Origin(NamedTuple):
    """Where an activity comes from: the activation function with this index among the calls, with the edges of its
    result and of its argument."""

    index: int
    result: GradientEdge
    argument: GradientEdge


class _Origins:
    """Where the tensors of a pass come from, by the nodes of its graph, which nothing that a network does can lose.

    Args:
        rearranging: what is known of calls.
        start: sequence number of the graph's first node that belongs to the pass.
    """

    def __init__(self, rearranging: dict[tuple, bool], start: int):
        self.rearranging, self.start = rearranging, start
        self.nodes = set()  # of results that were seen
        self.activities: dict[tuple, _Origin] = {}  # by node and number of its output

    def note(self, result: Tensor) -> None:
        if result.requires_grad:
            self.nodes.add(result.grad_fn)

    def find(self, tensor: Tensor) -> _Origin | None:
        return self.activities.get((tensor.grad_fn, tensor.output_nr)) if tensor.requires_grad else None

    def called(self, index: int, function, arguments, keywords):
        """Call a function and note where its results come from."""
        if function in ACTIVATIONS or function in IN_PLACE:
            return self.activated(index, function, arguments, keywords)
        leaves = arguments if not keywords and not _nested(arguments) else pytree.tree_leaves((arguments, keywords))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and self.find(leaf) is not None:
                return self.handed_on(function, arguments, keywords)
        result = function(*arguments, **keywords)
        for tensor in _results(function, arguments, result):
            self.note(tensor)
        return result

    def activated(self, index: int, function, arguments, keywords) -> Tensor:
        argument = arguments[0] if arguments else keywords["input"]
        if not argument.requires_grad:
            return function(*arguments, **keywords)
        if argument._base is not None and _in_place(function, arguments, keywords):
            raise TypeError(IN_PLACE_VIEW)
        before = _edge(argument)
        result = function(*arguments, **keywords)
        if result.grad_fn is not before.node:
            self.note(result)
            self.activities[result.grad_fn, result.output_nr] = _Origin(index, _edge(result), before)
        return result

    def handed_on(self, function, arguments, keywords):
        """A call that is given an activity: its results are that activity rearranged, or something else."""
        leaves = pytree.tree_leaves((arguments, keywords))
        origins = [self.find(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        positions = tuple(k for k, origin in enumerate(origins) if origin is not None)
        origin = origins[positions[0]]
        alone = all(origins[k].index == origin.index for k in positions)  # not two that meet
        rearranges = alone and self.rearranges(function, arguments, keywords, positions)
        result = function(*arguments, **keywords)
        for tensor in _results(function, arguments, result):
            if tensor.requires_grad and (tensor.grad_fn, tensor.output_nr) not in self.activities:
                self.note(tensor)
                if rearranges:
                    self.activities[tensor.grad_fn, tensor.output_nr] = origin
        return result

    def rearranges(self, function, arguments, keywords, positions: tuple[int, ...]) -> bool:
        if function in REARRANGING:
            return True
        name = _name(function).strip("_")
        if name in DROPOUTS:
            return not _drops(arguments, keywords)
        others = [t for k, t in enumerate(pytree.tree_leaves((arguments, keywords)))
                  if k not in positions and isinstance(t, Tensor) and t.is_floating_point()]  # fmt: skip
        if name in ARITHMETIC or (name in PRODUCTS and others):
            return False
        key = (function, positions, *map(_looks, pytree.tree_leaves((arguments, keywords))))
        if key not in self.rearranging:
            if _tracing():
                raise RuntimeError(
                    "call the rule once on a batch, in this mode, before compiling it: it must look at the calls"
                )
            self.rearranging[key] = _rearranges(function, arguments, keywords, positions)
        return self.rearranging[key]

    def of(self, call: Call) -> _Origin | None:
        """The activity that a layer gets; None if it is known to be something else.

        Raises:
            TypeError: neither is known.
        """
        tensor = call.input
        if not tensor.requires_grad or tensor.grad_fn is None:
            return None
        node, number = tensor.grad_fn, tensor.output_nr
        while node not in self.nodes:
            if isinstance(node, _HOOK_NODE):  # of a module's backward hook, through which the error goes back as well
                node, number = node.next_functions[number]
            elif _ends_at(node, self.start) or _copies_into(node) or _base_was_changed(tensor):
                return None
            else:
                raise TypeError(
                    f"the input of {call.name} is made by {node.name()} in a way that this rule cannot see (a scripted "
                    f"or compiled function, for one), so that it cannot tell where it comes from; call torch's own "
                    f"functions ({ANYTHING})"
                )
        return self.activities.get((node, number))


_HOOK_NODE = torch.nn.modules._functions.BackwardHookFunction._backward_cls


def _looks(leaf):
    """What of an argument may decide whether a call rearranges: a tensor's shape and type; anything else itself."""
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)


def _ends_at(node, start: int) -> bool:
    """Whether a node is a leaf, belongs to what was there before a pass, or to a torch.autograd.Function as a whole."""
    older = node._sequence_nr() < start
    return older or hasattr(node, "variable") or isinstance(node, torch.autograd.function.BackwardCFunction)


def _base_was_changed(tensor: Tensor) -> bool:
    """Whether a tensor is a view of one that was changed in place, and got another node by that."""
    return tensor._base is not None and tensor._base.grad_fn is not None and _copies_into(tensor._base.grad_fn)


def _copies_into(node) -> bool:
    """Whether a node stands for a tensor that was changed through a view of it."""
    return node.name().endswith("CopySlices")


# Functions that rearrange, copy or pad the entries of their first argument. Others are tried out (see `_rearranges`).
REARRANGING = {
    F.pad, torch.flatten, Tensor.flatten, torch.unflatten, Tensor.unflatten, torch.reshape, Tensor.reshape, Tensor.view,
    torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, torch.movedim, Tensor.movedim,
    torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.contiguous,
}  # fmt: skip

# Names of functions that hand on their argument, or a copy of it, where they do not drop entries of it.
DROPOUTS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
}  # fmt: skip


def _drops(arguments: tuple, keywords: Mapping) -> bool:
    """Whether such a call drops entries."""
    given = {"p": 0.5, "training": True, **dict(zip(("input", "p", "training"), arguments, strict=False)), **keywords}
    return bool(given.get("train", given["training"]) and given["p"])


# Names of functions that compute with entries, also where they happen to give them back (times one, plus zero).
ARITHMETIC = {
    "add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "float_power", "lerp",
    "addcmul", "addcdiv", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "abs",
    "nan_to_num", "matmul", "mm", "bmm", "softmax", "log_softmax", "batch_norm", "layer_norm", "group_norm",
    "instance_norm", "rms_norm", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "iadd", "isub", "imul",
    "itruediv", "radd", "rmul", "rdiv", "rpow", "ipow", "truediv", "rtruediv", "rmatmul",
}  # fmt: skip


def _rearranges(function, arguments, keywords, positions: tuple[int, ...]) -> bool:
    """Whether a call's results are entries of the arguments at these places, each at its own place whatever the entries
    are, or constants. Found by trying: entries that spell their own places, digit by digit, then random ones."""
    with torch.no_grad(), _randomness_kept(keywords):
        leaves = pytree.tree_leaves((arguments, keywords))
        activities = [leaves[k] for k in positions]
        sizes = [activity.numel() for activity in activities]
        places = torch.arange(sum(sizes), device=activities[0].device)

        def tried(entries: Tensor) -> list[Tensor]:
            values = [
                torch.empty_like(activity, requires_grad=False).copy_(part.view(activity.shape))
                for activity, part in zip(activities, entries.split(sizes), strict=True)
            ]
            return _tried(function, arguments, keywords, dict(zip(positions, values, strict=True)))

        try:
            digits = [
                places // BASE**k % BASE + 1 for k in range(max(1, math.ceil(math.log(max(len(places), 2), BASE))))
            ]
            spelled = list(zip(*map(tried, digits), strict=True))
            mirrored = tried(-digits[0])
            probe = torch.randn(len(places), device=places.device).to(activities[0].dtype)
            results = tried(probe)
        except Exception:  # whatever refuses such entries looks at them
            return False
        return bool(results) and all(
            _spells(numbers, negative, result, probe)
            for numbers, negative, result in zip(spelled, mirrored, results, strict=True)
        )


BASE = 127  # digits that every floating-point type holds exactly


def _spells(digits: tuple[Tensor, ...], mirrored: Tensor, result: Tensor, probe: Tensor) -> bool:
    """Whether a result of a trial holds the entries of `probe` at the places that the digits spell, or constants."""
    if not result.is_floating_point() and not result.is_complex():
        return False
    constant = digits[0] == mirrored
    if constant.all():
        return not constant.numel()
    digits = [torch.nan_to_num(d.real if d.is_complex() else d).long() - 1 for d in digits]
    place = sum(digit * BASE**k for k, digit in enumerate(digits)).clamp(0, len(probe) - 1)
    entries = probe.to(result.dtype)[place]
    return bool(((result == entries) | constant).all())


def _tried(function, arguments, keywords, values: Mapping[int, Tensor]) -> list[Tensor]:
    """A call's results with these values at their places among the arguments, changing nothing else."""
    leaves, structure = pytree.tree_flatten((tuple(arguments), dict(keywords)))
    if _in_place(function, arguments, keywords):
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for k, value in values.items():
        leaves[k] = value
    arguments, keywords = pytree.tree_unflatten(leaves, structure)
    return _results(function, arguments, function(*arguments, **keywords))


def _results(function, arguments, result) -> list[Tensor]:
    """The tensors that a call gives; `x[...] = y` gives x."""
    return _tensors_in(arguments[:1] if function is Tensor.__setitem__ else (result,))


def _nested(arguments: tuple) -> bool:
    return any(type(argument) in (tuple, list, dict) for argument in arguments)


def _spelled(arguments: tuple, keywords: Mapping) -> tuple[tuple, dict]:
    """A call's arguments, with its first one in its place also where it was given as `input`."""
    keywords = dict(keywords)
    return arguments or (keywords.pop("input"),), keywords


# ------------------------------------------------------------------------------ the engine: where weights come from


class _Source(NamedTuple):
    """Where a tensor comes from that is made of the network's own tensors alone, and of no activity.

    `name` of the parameter that learns in it; None for fixed tensors, such as buffers. `layer`: it is a layer's weight,
    `learns` or not, and `stand_in` is what takes its place in the backward pass, where a rule wants that.
    """

    name: str | None = None
    layer: bool = False
    learns: bool = False
    stand_in: Tensor | None = None


class _Sources:
    """The network's own tensors, and what a pass makes of them before they meet an activity (scaled, cast, reshaped or
    split weights), and with their stand-ins the same."""

    def __init__(self, own: _Inventory, stand_ins: Mapping[str, Tensor], twins: Mapping[int, Tensor]):
        self.layers, self.twins = own.layers, twins
        self.strays = False  # whether some were met past the network's modules, or can be known only by every call
        self.forbidden: set[int] = set()
        self.refusal: str | None = None
        self.known: dict[int, tuple[Tensor, _Source]] = {}  # by id; the tensors stay alive, so that their ids do
        for buffer in own.buffers:
            self.known[id(buffer)] = buffer, _Source()
        for name, parameter in own.parameters.items():
            self.known[id(parameter)] = parameter, _Source(name if parameter.requires_grad else None)
        for name, weight in self.layers.items():
            self.known[id(weight)] = weight, _Source(name, True, weight.requires_grad, stand_ins.get(name))
        self.own = set(self.known)
        for key, twin in twins.items():
            self.known[id(twin)] = twin, self.known[key][1]
            self.own.add(id(twin))

    def forbid(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that the network must not use, for it keeps their graph from an earlier call."""
        for tensor in tensors:
            self.known.setdefault(id(tensor), (tensor, _Source()))
            self.forbidden.add(id(tensor))

    def among(self, arguments: tuple, keywords: Mapping | None) -> bool:
        """Whether some of them may be known here. (This runs at every call of a network, and so is spelled out.)"""
        known = self.known
        for argument in arguments:
            if id(argument) in known or type(argument) in CONTAINERS:
                return True
        if keywords:
            for argument in keywords.values():
                if id(argument) in known or type(argument) in CONTAINERS:
                    return True
        return False

    def find(self, tensor: Tensor) -> _Source | None:
        known = self.known.get(id(tensor))
        if known is not None:
            if id(tensor) in self.forbidden:
                self.refusal = f"the network {FOREIGN}"
                raise TypeError(self.refusal)
            return known[1]
        return _Source() if tensor.dim() == 0 and not tensor.requires_grad else None

    def of_weight(self, weight: Tensor) -> _Source:
        """Of what a linear map multiplies with.

        Raises:
            TypeError: it learns, and was made where it could not be followed.
        """
        source = self.find(weight)
        if source is None and weight.requires_grad:
            raise TypeError(
                "the network makes the weight of a linear map from activities or in a torch.autograd.Function, where "
                f"this rule cannot follow it; multiply activities with torch.matmul ({ANYTHING})"
            )
        return source or _Source()

    def twinned(self, values):
        """The arguments of a call, with twins in the place of parameters that have one."""
        if not self.twins:
            return values
        return _map_arguments(self.twin, values)

    def twin(self, tensor: Tensor) -> Tensor:
        twin = self.twins.get(id(tensor))
        self.strays |= twin is not None  # where modules hold twins
        return tensor if twin is None else twin

    def follow(self, calls: _Pass, function, arguments, keywords, result):
        """Note where a call's results come from, and return them, as tensors that are watched if they are made of
        parameters alone; refuse a use of learned tensors that the rule cannot follow."""
        results = _results(function, arguments, result)
        if not results:
            return result
        sources = [self.find(tensor) for tensor in _tensors_in((arguments, keywords))]
        name = _name(function)
        multiplied = [source for source in self.multiplied(function, arguments, keywords) if source is not None]
        learned = [source for source in multiplied if source.name is not None]
        if None not in sources and name not in LOOKUPS:
            if learned[1:]:
                calls.refuse(learned[1], function)
            return self.derive(calls, function, arguments, keywords, result)
        if any(tensor.requires_grad for tensor in results):
            layers = [source for source in sources if source is not None and source.layer]
            if misused := learned or (layers if name not in HARMLESS else []):
                calls.refuse(misused[0], function)
            if layers and name in LOOKUPS:
                calls.followed.update(tensor.grad_fn for tensor in results)
        if None in sources and _in_place(function, arguments, keywords) and id(results[0]) not in self.own:
            self.known.pop(id(results[0]), None)  # an activity has come in
        return result

    def multiplied(self, function, arguments, keywords) -> list[_Source | None]:
        """Where the tensors come from that the function multiplies, if it is a product."""
        name = _name(function)
        if name not in PRODUCTS:
            return []
        named = {key: value for key, value in keywords.items() if key not in NOT_MULTIPLIED}
        return [self.find(tensor) for tensor in _tensors_in((arguments[PRODUCTS[name]], named))]

    def derive(self, calls: _Pass, function, arguments, keywords, result):
        """Note results that are made of the network's own tensors alone, and make the same of stand-ins."""
        tensors, results = _tensors_in((arguments, keywords)), _results(function, arguments, result)
        sources = [self.find(tensor) for tensor in tensors]
        source = max((s for s in sources if s.name is not None), key=lambda s: s.layer, default=_Source())
        stand_ins = [None] * len(results)
        standing = [source.stand_in for source in sources if source.stand_in is not None]
        if standing:
            if _in_place(function, arguments, keywords) and sources[0].stand_in is None:
                calls.refuse(source, function)  # it would write into the network's own tensor
            replaced = self.replaced(arguments)
            # With gradients where a stand-in learns itself; nothing else in the chain gets a second one.
            with torch.set_grad_enabled(any(stand_in.requires_grad for stand_in in standing)):
                stand_ins = _results(function, replaced, function(*replaced, **self.replaced(keywords)))
        watched = {}
        if any(type(tensor) is _Watched for tensor in tensors):
            calls.with_own.append((function, source.name))
            self.strays |= any(type(t) is not _Watched and t.dim() and id(t) not in self.own for t in tensors)
            watched = {id(tensor): _watched(tensor, calls) for tensor in results if type(tensor) is not _Watched}
        for tensor, stand_in in zip(results, stand_ins, strict=True):
            noted = watched.get(id(tensor), tensor)
            if id(noted) not in self.own:  # not a buffer that was changed in place
                self.known[id(noted)] = noted, source._replace(stand_in=stand_in)
        return _map_arguments(lambda tensor: watched.get(id(tensor), tensor), result) if watched else result

    def replaced(self, values):
        """The arguments of a call, with its stand-in in the place of every layer's weight in them."""

        def replace(tensor: Tensor) -> Tensor:
            stand_in = self.find(tensor).stand_in
            return tensor.detach() if stand_in is None else stand_in

        return _map_arguments(replace, values)


def _name(function: Callable) -> str:
    """By which PRODUCTS and others know a function: without the underscore of those that change their argument."""
    name = getattr(function, "__name__", type(function).__name__).partition(".")[0]
    return name if name.startswith("_") else name.rstrip("_")


CONTAINERS = {tuple, list, dict}

# Functions that multiply activities by each other or by a weight, by name, and which of their arguments multiply.
PRODUCTS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "conv_tbc"), slice(0, 2)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), slice(0, 2)),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm", "addr"), slice(1, 3)),
    **dict.fromkeys(("bilinear", "scaled_dot_product_attention"), slice(0, 3)),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "__matmul__", "__rmatmul__"), slice(None)),
    **dict.fromkeys(("einsum", "tensordot", "chain_matmul", "linalg_multi_dot", "linalg_matmul", "kron"), slice(None)),
    **dict.fromkeys(("linalg_vecdot", "cdist", "multi_head_attention_forward", "outer", "ger"), slice(None)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), slice(None)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), slice(None)),
}
NOT_MULTIPLIED = ("bias", "attn_mask")  # named arguments of these that are added

# Functions that may take a layer's weight beside an activity: they look up rows of it (and those are activities), or
# read its type or shape.
LOOKUPS = {"embedding", "embedding_bag"}
HARMLESS = LOOKUPS | {"to", "type_as", "expand_as", "view_as", "reshape_as"}


# ------------------------------------------------------------------------------------ the engine: graphs and their ends


class _Entrance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise RuntimeError(PAST_OUTPUT)


PAST_OUTPUT = (
    "an error reaches the network's parameters past its output, from something that the network keeps (a loss term, an "
    "activity caught by a hook, a state): the rule knows the error at the output alone; let the network return what "
    "the loss needs, or compute it outside (Backprop and FeedbackAlignment's kin take it)"
)


def _entrance(tensor: Tensor) -> Tensor:
    """A tensor with its attributes, from which no error may go back but one that is asked for."""
    return _named_like(tensor, _Entrance.apply(tensor))


def _named_like(tensor: Tensor, twin: Tensor) -> Tensor:
    """The twin, with what is kept on the tensor: mup keeps a parameter's infshape there, others a multiplier."""
    if twin is not tensor:
        for key, value in vars(tensor).items():
            vars(twin).setdefault(key, value)
        if isinstance(tensor, nn.Parameter):
            twin._is_param = True  # what isinstance(twin, nn.Parameter) asks for
    return twin


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


class _Seal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activity: Tensor, leaf: Tensor, state: "_State") -> Tensor:
        ctx.state = state
        return activity.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if not ctx.state.sending:
            raise RuntimeError(PAST_OUTPUT)
        return None, None, None


class _WithGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, leaf: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None


def _with_graph(tensor: Tensor) -> Tensor:
    """The tensor, as one that has a gradient, which goes nowhere. Unlike a leaf it can be changed in place."""
    return _WithGraph.apply(tensor, torch.empty((), requires_grad=True))


def _edge(tensor: Tensor) -> GradientEdge:
    """Where a tensor's gradient enters the graph behind it, whatever becomes of the tensor."""
    node = tensor.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):  # which do not keep the graph alive by themselves
        return torch.autograd.graph.get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def _gradients(roots, grads, inputs) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad inside of a backward pass, without the checks that take longer than the rest where there are
    hundreds of roots. The graph is kept: whoever holds it lets go of it as a whole."""
    engine = torch.autograd.graph._engine_run_backward
    return engine(tuple(roots), tuple(grads), True, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False)


def _graph_is_kept() -> bool:
    """Whether the backward pass at hand keeps the graph (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _sequence_number() -> int:
    """Of the next node of a graph: nodes are numbered as they are made, in every thread by itself."""
    return torch.empty((), requires_grad=True).clone().grad_fn._sequence_nr() + 1


def _ends_of_graph(roots: Iterable, followed: set, start: int):
    """The ends of the graph behind these nodes: leaves, entrances, and nodes from before a pass; with the name of one
    that has such an end as its input. Nothing behind `followed` nodes is looked at."""
    nodes, seen = [(root, "the output") for root in roots], set()
    while nodes:
        node, through = nodes.pop()
        if node is None or node in seen or node in followed:
            continue
        seen.add(node)
        if hasattr(node, "variable") or _is_entrance(node) or node._sequence_nr() < start:
            yield node, through
        else:
            aliased = node.name() == "AliasBackward0"  # of a watched tensor: says nothing
            nodes.extend((behind, through if aliased else node.name()) for behind, _ in node.next_functions)


def _is_entrance(node) -> bool:
    return isinstance(node, (_Entrance._backward_cls, _WithGraph._backward_cls, _Seal._backward_cls))


def _saved_tensor_hooks():
    """What handles tensors saved for the backward pass, as torch.autograd.graph.saved_tensors_hooks sets it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


_functional_transform = torch._C._functorch.peek_interpreter_stack  # None outside of torch.func and torch.vmap


def _only_stores(hooks) -> bool:
    """Whether such hooks are torch's own that put tensors elsewhere, and not those of activation checkpointing."""
    return hooks is None or hooks[0].__module__ == "torch.autograd.graph"


def _autograd_function() -> type | None:
    """The torch.autograd.Function whose forward is running; None if none is."""
    codes, kinds = {}, [torch.autograd.Function]
    while kinds:
        kinds += (kind := kinds.pop()).__subclasses__()
        codes[getattr(kind.forward, "__code__", None)] = kind
    frame = sys._getframe(1)
    while frame is not None:
        first = frame.f_locals.get("ctx")
        if frame.f_code in codes:
            return codes[frame.f_code]
        if isinstance(first, torch.autograd.function.BackwardCFunction):
            return type(first)._forward_cls
        frame = frame.f_back
    return None


class _WithoutGraph:
    """A run of a network in which these of its parameters have no gradient, and products with them are computed as if
    they had: torch multiplies matrices in another order, with other rounding, where none is wanted."""

    def __init__(self, network: nn.Module, frozen: Iterable[Tensor], watched: bool):
        self.watched, self.state = watched, _State()
        self.twins = {id(p): self.twin(p.detach(), p.requires_grad, p) for p in frozen}
        own = _Inventory(network)
        self.holding, self.buffers = own.holding(self.twins), set(map(id, own.buffers))

    def __enter__(self):
        self.state.open = True
        self.holding.__enter__()

    def __exit__(self, *error):
        self.state.open = False
        self.holding.__exit__(*error)

    def twin(self, tensor: Tensor, with_gradient: bool, like: Tensor | None = None) -> Tensor:
        if not self.watched or not _watchable((tensor,)):
            return tensor if like is None else _named_like(like, tensor)
        twin = _watched(tensor, self)
        twin._with_gradient = with_gradient
        return twin if like is None else _named_like(like, twin)

    def called(self, function, arguments, keywords):
        tensors = _tensors_in((arguments, keywords))
        if any(tensor.requires_grad for tensor in tensors) or not torch.is_grad_enabled():
            return function(*arguments, **keywords)
        if _name(function) in PRODUCTS and not _in_place(function, arguments, keywords):
            return _map_arguments(
                Tensor.detach, function(*_map_arguments(self.leaf, arguments), **_map_arguments(self.leaf, keywords))
            )
        result = function(*arguments, **keywords)
        if not all(type(tensor) is _Watched or not tensor.dim() or id(tensor) in self.buffers for tensor in tensors):
            return result
        with_gradient = any(type(tensor) is _Watched and tensor._with_gradient for tensor in tensors)
        return _map_arguments(lambda t: t if type(t) is _Watched else self.twin(t, with_gradient), result)

    def leaf(self, tensor: Tensor) -> Tensor:
        wanted = type(tensor) is _Watched and tensor._with_gradient and tensor.is_floating_point()
        return tensor.detach().requires_grad_() if wanted else tensor


class _Routed:
    """A run of AlignZero's initial network, which must use its own parameters, as they are routed, and none else.

    Args:
        routed: what its modules hold in the place of their parameters, by the ids of those.
        foreign: the current network's parameters, which a copied function may still refer to.
        known: the rule's; in its first call every call of torch's functions is seen.
    """

    def __init__(self, network: nn.Module, routed: dict[int, Tensor], foreign: Iterable[Tensor], known: _Known):
        self.hooks, self.unrouted, self.foreign = _saved_tensor_hooks(), set(routed), {id(p) for p in foreign}
        self.everything = known.everything or not _watchable(routed.values())
        self.all, self.state, self.refusal = self.everything or not known.sequences, _State(), None
        if not self.everything:
            routed = {key: _named_like(tensor, _watched(tensor, self)) for key, tensor in routed.items()}
        own = _Inventory(network)
        self.held, self.known, self.functions = own.holding(routed), known, []
        self.raw = {name: p for name, p in own.parameters.items() if id(p) in routed}

    def __enter__(self):
        for parameter in self.raw.values():
            parameter.requires_grad_()  # so that the graph shows where it is used past the modules
        self.context = contextlib.ExitStack()
        self.context.enter_context(self.held)
        if self.all:
            self.context.enter_context(_Watch(self))
        self.state.open = True

    def __exit__(self, kind, error, traceback):
        self.state.open = False
        self.context.close()
        del self.context
        for parameter in self.raw.values():
            parameter.requires_grad_(False)
        if self.refusal is not None and error is not self.refusal:
            raise self.refusal from error  # which an operator such as @ has swallowed

    def called(self, function, arguments, keywords):
        try:
            self.require_routed(arguments, keywords)
        except TypeError as error:
            self.refusal = self.refusal or error
            raise
        if not self.all:
            watched = [tensor for tensor in _tensors_in((arguments, keywords)) if type(tensor) is _Watched]
            self.functions.append((function, len(watched)))
        return function(*arguments, **keywords)

    def examined(self, output):
        """The output as plain tensors; for a new sequence of calls, without parameters used past modules."""
        sequence = hash((self.all, *self.functions))
        if sequence not in self.known.sequences:
            names = {id(parameter): name for name, parameter in self.raw.items()}
            for node, through in _ends_of_graph([tensor.grad_fn for tensor in _tensors_in((output,))], set(), 0):
                if (name := names.get(id(getattr(node, "variable", None)))) is not None:
                    raise TypeError(_unseen(name, f"through {through}"))
            self.known.sequences.add(sequence)
        return _unwatched(output)

    def require_routed(self, arguments, keywords) -> None:
        hooks = _saved_tensor_hooks()
        if (hooks is not None and hooks != self.hooks and not _only_stores(hooks)) or (
            not torch.is_grad_enabled() and _autograd_function() is torch.utils.checkpoint.CheckpointFunction
        ):
            raise TypeError(CHECKPOINTED)
        if self.all:
            _require_copied((arguments, keywords), self.foreign)
            if any(id(tensor) in self.unrouted for tensor in _tensors_in((arguments, keywords))):
                raise TypeError(
                    "the network uses its parameters past its modules (from a list of its own, for one), where "
                    "AlignZero cannot route their gradients; use them as module.weight and so on"
                )


def _value(network: nn.Module, inputs, keywords) -> Tensor:
    """The network's output, computed as with gradients, to the last bit; its graph is dropped."""
    own = _Inventory(network)
    with own.holding({id(p): _entrance(p) for p in own.parameters.values() if p.requires_grad}):
        return _one_tensor(network(*inputs, **keywords)).detach()


# -------------------------------------------------------------------------------- the engine: copies, state, randomness


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, which a module that keeps an activation, or attributes on its parameters, can have too.

    Raises:
        TypeError: the module cannot be copied; it names the one that is in the way.
    """
    memo = {id(tensor): tensor.detach().clone() for tensor in _kept_graphs(module)}
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        place = next((place for place in _attributes(module) if not _copies(*place)), (module, None))
        names = {id(part): name for name, part in module.named_modules()}
        name = ".".join(filter(None, (names[id(place[0])], place[1]))) or "itself"
        raise TypeError(
            f"this rule keeps a copy of the network, and {name} (in a {type(place[0]).__name__}) cannot be copied: "
            f"{error}; remove it before the rule is made, and put it back afterwards, or give its class a __deepcopy__"
        ) from error
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        for key, value in vars(parameter).items():
            if key not in vars(other):
                setattr(other, key, copy.copy(value))
    return twin


def _copies(module: nn.Module, key: str) -> bool:
    try:
        copy.deepcopy(vars(module)[key], {id(tensor): tensor.detach().clone() for tensor in _kept_graphs(module)})
    except Exception:
        return False
    return True


MODULE_KEYS = frozenset(vars(nn.Module())) | {"_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"}


def _attributes(network: nn.Module):
    """(module, name) of every attribute of the network's modules that is their own, and not nn.Module's."""
    for module in network.modules():
        for key in tuple(vars(module)):
            if key not in MODULE_KEYS:
                yield module, key


def _kept_graphs(network: nn.Module) -> list[Tensor]:
    """Tensors that modules keep in attributes, buffers included, with the graph that they were made by."""
    values = [vars(module)[key] for module, key in _attributes(network)] + list(network.buffers())
    return [t for value in values for t in _tensors_in((value,)) if t.requires_grad and t.grad_fn is not None]


PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
# What no call changes: attributes of these kinds are compared, and not copied.
FIXED = (
    str, bytes, int, float, complex, type(None), type, enum.Enum, range, slice, torch.dtype, torch.device, torch.Size,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of torch's normalisation, which a copy has itself


def _carry_state(network: nn.Module, twin: nn.Module) -> None:
    """Put every module of a copy into the mode and the state of the same one in the network.

    State is what a call may leave to the next one, or what may be set between calls: all attributes and buffers, but
    parameters and the statistics of torch's normalisation.

    Raises:
        TypeError: the network has other modules than when it was copied, or an attribute that cannot be copied.
    """
    modules, others = list(network.modules()), list(twin.modules())
    same = dict(zip(map(id, modules), others, strict=False))
    memo = None
    for module, other in zip(modules, others, strict=False):
        if type(module) is not type(other) or len(modules) != len(others) or not _same_children(module, other, same):
            raise TypeError(
                f"the network's modules have changed since the rule was made (at a {type(module).__name__}), and the "
                "rule keeps a copy of it as it was: make the rule anew"
            )
        other.training = module.training
        for hooks in PRE_HOOKS:  # those that came and went since the copy was made
            if vars(module)[hooks].keys() != vars(other)[hooks].keys():
                kept = vars(other)[hooks]
                vars(other)[hooks] = type(kept)((k, kept.get(k, hook)) for k, hook in vars(module)[hooks].items())
        if len(vars(module)) > len(MODULE_KEYS) - 2:
            for key in vars(module).keys() - MODULE_KEYS:
                value, theirs = vars(module)[key], vars(other).get(key)
                if isinstance(value, FIXED):
                    vars(other)[key] = value
                elif isinstance(value, torch.Generator) and isinstance(theirs, torch.Generator):
                    theirs.set_state(value.get_state())
                elif not isinstance(value, nn.Module):
                    memo = memo or _counterparts(network, twin, same)
                    vars(other)[key] = _copy_of(value, memo, f"{key} of a {type(module).__name__}")
        for key, buffer in module._buffers.items():
            if buffer is not None and not (key in STATISTICS and isinstance(module, nn.modules.batchnorm._NormBase)):
                other._buffers[key] = buffer.detach().clone()


def _same_children(module: nn.Module, other: nn.Module, same: Mapping[int, nn.Module]) -> bool:
    mine, theirs = module._modules, other._modules
    return mine.keys() == theirs.keys() and all(
        child is theirs[key] if child is None else same.get(id(child)) is theirs[key] for key, child in mine.items()
    )


def _counterparts(network: nn.Module, twin: nn.Module, same: Mapping[int, nn.Module]) -> dict[int, Any]:
    """Of the network's own modules and tensors those of a copy, as copy.deepcopy's memo; and of tensors that it keeps
    with their graph, ones without."""
    tensors = zip((*network.parameters(), *network.buffers()), (*twin.parameters(), *twin.buffers()), strict=True)
    kept = {id(tensor): tensor.detach().clone() for tensor in _kept_graphs(network)}
    return {**same, **{id(tensor): other for tensor, other in tensors}, **kept}


def _copy_of(value, memo: dict[int, Any], place: str):
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise TypeError(
            f"the network keeps {place}, of type {type(value).__name__}, which cannot be copied for its initial twin: "
            f"{error}; keep tensors, numbers or containers of them, or give its class a __deepcopy__"
        ) from error


@contextlib.contextmanager
def _undisturbed(network: nn.Module):
    """A run of the network leaves no trace: in its buffers, in what it keeps between calls, in generators."""
    buffers = {id(buffer): buffer.detach().clone() for buffer in network.buffers()}
    memo = _counterparts(network, network, {id(module): module for module in network.modules()})
    before = [(held, dict(held)) for module in network.modules() for held in (vars(module), module._buffers)]
    for module, key in list(_attributes(network)):
        value = vars(module)[key]
        if not isinstance(value, (*FIXED, nn.Module)):
            vars(module)[key] = _copy_of(value, memo, f"{key} of a {type(module).__name__}")
    try:
        with _Inventory(network).holding(buffers, shared=False), _Randomness(network):
            yield
    finally:
        for now, attributes in before:
            now.clear()
            now.update(attributes)


class _Again:
    """Made before a pass and entered for the next, it gives that one the same inputs and lets it draw the same numbers,
    whatever the first pass does to them.

    Raises:
        TypeError: when it is made, an input can be read only once.
        RuntimeError: when it is entered, the network has changed its inputs in place, which it did not do in its first
            call.
    """

    def __init__(self, rule: Rule, inputs, keywords, detach: bool = False):
        self.known, self.randomness = rule.known, _Randomness(rule.network)
        self.first = [t for t in _deep_tensors((inputs, keywords)) if not _tracing() and not t.is_inference()]
        self.versions = [tensor._version for tensor in self.first]
        self.copies = self.known.changes_inputs is not False and not _tracing()

        def again(tensor: Tensor) -> Tensor:
            tensor = tensor.detach() if detach else tensor
            return tensor.clone() if self.copies else tensor

        self.given = _map_tensors(again, (inputs, keywords))

    def __enter__(self):
        changed = [tensor._version for tensor in self.first] != self.versions
        if changed and not self.copies:
            raise RuntimeError(
                "the network changes its inputs in place, but has not done so in its first call; let it work on a copy "
                "(inputs = inputs.clone())"
            )
        self.known.changes_inputs = changed or bool(self.known.changes_inputs)
        self.randomness.__enter__()
        return self.given

    def __exit__(self, *error):
        self.randomness.__exit__(*error)


@contextlib.contextmanager
def _forward_hooks_noted(network: nn.Module, twin: nn.Module):
    """Of the network's forward hooks, a copy of it gets those that change an output in this run; others only look, and
    shall see the network itself."""
    changing = set()

    def noted(key: int, hook: Callable) -> Callable:
        def run(*arguments, **keywords):
            if (result := hook(*arguments, **keywords)) is not None:
                changing.add(key)
            return result

        return run

    pairs = [(m, other) for m, other in zip(network.modules(), twin.modules(), strict=True)
             if m._forward_hooks or other._forward_hooks]  # fmt: skip
    before = [module._forward_hooks for module, _ in pairs]
    for (module, _), hooks in zip(pairs, before, strict=True):
        module._forward_hooks = type(hooks)((key, noted(key, hook)) for key, hook in hooks.items())
    try:
        yield
    finally:
        for (module, other), hooks in zip(pairs, before, strict=True):
            module._forward_hooks, kept = hooks, other._forward_hooks
            other._forward_hooks = type(hooks)((k, kept.get(k, h)) for k, h in hooks.items() if k in changing)
            other._forward_hooks_with_kwargs = module._forward_hooks_with_kwargs


@contextlib.contextmanager
def _hooks_told(network: nn.Module):
    """Modules' backward hooks that change gradients raise RuntimeError in backward(): AlignAda's errors come from the
    initial network, and know nothing of them. Those of layers are not called at all, of which a warning tells."""

    def told(hook: Callable, name: str) -> Callable:
        def looks(*arguments):
            if hook(*arguments) is not None:
                raise RuntimeError(
                    f"a backward hook of {name} changes gradients, which AlignAda cannot follow; let it return None, "
                    "or change them by a hook of a tensor"
                )

        return looks

    before = []
    for name, module in network.named_modules():
        for kind in ("_backward_hooks", "_backward_pre_hooks"):
            if hooks := getattr(module, kind):
                before.append((module, kind, hooks))
                setattr(module, kind, type(hooks)((key, told(hook, name)) for key, hook in hooks.items()))
                if isinstance(module, LAYERS) and kind == "_backward_hooks":
                    warnings.warn(
                        f"backward hooks of {name} are not called where AlignAda cuts the network in front of it",
                        stacklevel=6,
                    )
    try:
        yield
    finally:
        for module, kind, hooks in before:
            setattr(module, kind, hooks)


_DRAWING: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # networks that were seen to draw on a GPU


class _Randomness:
    """Made before a pass and entered for the next, it makes both draw the same random numbers, as for dropout; at the
    end the generators stand where they stood when it was entered.

    torch's generators, on the devices of the network's tensors too, NumPy's and Python's. (For what modules hold, see
    `_carry_state`.)
    """

    def __init__(self, network: nn.Module):
        devices = {tensor.device for _, _, tensor in _Inventory(network).places}
        self.devices = sorted((d.type, d.index) for d in devices if d.type not in ("cpu", "meta"))
        if _capturing():  # a CUDA graph, in which the GPU's generators cannot be read: the warm-up told
            if network in _DRAWING:
                raise RuntimeError(
                    "the network draws random numbers on the GPU, which a rule that runs it twice cannot repeat in a "
                    "CUDA graph; train it without capturing"
                )
            self.devices = []
        self.network, self.state = network, self.read()

    def __enter__(self):
        self.before = self.read()
        if any(not torch.equal(one, other) for one, other in zip(self.state[3:], self.before[3:], strict=True)):
            _DRAWING.add(self.network)
        self.write(self.state)

    def __exit__(self, *error):
        self.write(self.before)

    def read(self) -> list:
        if _tracing():
            return []
        numpy = sys.modules.get("numpy")
        return [
            torch.get_rng_state(),
            random.getstate(),
            numpy and numpy.random.get_state(),
            *(torch.get_device_module(kind).get_rng_state(*_index(index)) for kind, index in self.devices),
        ]

    def write(self, state: list) -> None:
        if not state:
            return
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        if state[2]:
            sys.modules["numpy"].random.set_state(state[2])
        for (kind, index), of_device in zip(self.devices, state[3:], strict=True):
            torch.get_device_module(kind).set_rng_state(of_device, *_index(index))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _index(index: int | None) -> tuple[int, ...]:
    return () if index is None else (index,)


@contextlib.contextmanager
def _randomness_kept(keywords: Mapping):
    """Nothing that a function draws, from torch's generators or one that it is given, shows afterwards."""
    generator = keywords.get("generator")
    state = None if generator is None else generator.get_state()
    with torch.random.fork_rng():
        yield
    if generator is not None:
        generator.set_state(state)


# ---------------------------------------------------------------------------- the engine: threads and torch.compile

_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()


def _lock(network: nn.Module):
    """Held by a pass: its network's modules hold twins of their parameters meanwhile."""
    return _LOCKS.setdefault(network, threading.RLock())


_RULES: "weakref.WeakValueDictionary[int, Rule]" = weakref.WeakValueDictionary()  # by their key
_KEYS = itertools.count()
_TRACED = threading.local()  # whether a rule is running to be compiled


def _registered(rule: Rule) -> int:
    """A key by which a compiled graph can name the rule."""
    key = next(_KEYS)
    _RULES[key] = rule
    return key


def _watchable(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors can be made into ones that are watched: not those of other libraries' own kinds."""
    return not _tracing() and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _tracing() -> bool:
    return getattr(_TRACED, "running", False)


def _compiled(rule: Rule, inputs, keywords) -> Tensor:
    """The rule as one function of a compiled graph: torch follows the tensors through it, not Python's doings."""
    if any(isinstance(module, _DropoutNd) and module.training for module in rule.network.modules()):
        return _uncompiled(rule, inputs, keywords)  # two passes must draw the same masks
    state = {**dict(rule.named_parameters()), **dict(rule.named_buffers())}
    modes = tuple(module.training for module in rule.modules())  # so that another mode is compiled anew
    return _in_graph(rule.key, modes, state, inputs, keywords)


@torch.compiler.disable
def _uncompiled(rule: Rule, inputs, keywords) -> Tensor:
    return rule.attached(*inputs, **keywords)


def _in_graph(key: int, modes: tuple[bool, ...], state: dict[str, Tensor], inputs, keywords) -> Tensor:
    rule = _RULES[key]
    own = {**dict(rule.named_parameters()), **dict(rule.named_buffers())}
    before, _TRACED.running = _tracing(), True
    try:
        tensors = {id(own[name]): _named_like(own[name], tensor) for name, tensor in state.items()}
        with _Inventory(rule).holding(tensors, shared=False):
            return rule.attached(*inputs, **keywords)
    finally:
        _TRACED.running = before


torch.compiler.allow_in_graph(_in_graph)


# ----------------------------------------------------------------------------------------------- the engine: refusals

ANYTHING = "Backprop takes any network as it is, AlignZero any that can be copied"  # what errors end with

CHECKPOINTED = (
    "the network checkpoints activations (torch.utils.checkpoint): it runs again in the backward pass, where this rule "
    "cannot follow it; switch that off (Backprop takes it)"
)
INSIDE = (
    "the network computes gradients (torch.autograd.grad, backward) inside of its forward pass, where this rule would "
    "send its own errors; compute them outside (Backprop takes it)"
)
IN_PLACE_VIEW = (
    "the network changes a view in place by an activation function (h.view(...).relu_()), which this rule cannot "
    "follow; write it out of place"
)
TRANSFORMED = (
    "the network calls {} inside a functional transform (torch.func, torch.vmap), where this rule cannot follow it; "
    f"write it without ({ANYTHING})"
)
FOREIGN = (
    "uses a tensor that has a gradient and is none of its parameters or inputs, or that it keeps from an earlier call: "
    "hand it over as an input, or detach it"
)

# Modules that use weights inside one fused call, where a rule cannot reach the single layers.
FUSED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

# Modules whose `weight` and `bias` are no linear map of an activity: they look up, scale and shift.
OTHERS = (
    nn.Embedding, nn.EmbeddingBag, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip


def _unseen(name: str, where: str) -> str:
    return (
        f"the network uses its parameter {name!r} {where}, past the calls that this rule can follow (a scripted or "
        f"compiled function, a torch.autograd.Function of your own); call torch's own functions ({ANYTHING})"
    )


def _require_copied(values, foreign: set[int]) -> None:
    for value in values[0]:
        if id(value) in foreign or type(value) in CONTAINERS:
            break
    else:
        if not values[1]:
            return
    if any(isinstance(tensor, nn.Parameter) and id(tensor) in foreign for tensor in _tensors_in(values)):
        raise TypeError(
            "the copy of the network uses the original's parameters, because a function that it holds refers to the "
            "original (a lambda or a replaced `forward`); refer to modules through self"
        )


def _require_layers(network: nn.Module, added: Iterable[str] = (), remedy: str = ANYTHING) -> None:
    """Raise TypeError where a network keeps weights in a form that the layer-wise rules cannot follow.

    Args:
        added: names of parameters that are added to activities; others that look like a matrix must be a layer's.
        remedy: what else the user can do.
    """
    _require_parameters(network, added)
    _require_plain(network)
    for name, module in network.named_modules():
        if isinstance(module, Rule):
            raise TypeError(f"{name or 'the network'} is a rule itself; make one rule for the whole network ({remedy})")
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
    if isinstance(module, LAYERS):
        if "weight" not in module._parameters:
            return (
                "makes its weight from other parameters (weight norm, for example), which this rule cannot follow; "
                "remove the parametrisation"
            )
        if module.weight is not None and module.weight.is_complex():
            return "has complex weights, for which this rule is not defined; split them into real and imaginary parts"
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
    """Raise TypeError for what cannot be copied: scripted, compiled modules, lazy ones that have not seen an input."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the network'} is scripted; make the rule on the module before torch.jit.script")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise TypeError(f"{name or 'the network'} is compiled; make the rule on the module, and compile the rule")
    for name, parameter in network.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise TypeError(f"{name} has no shape yet; call the network on a batch before making the rule")


def _require_parameters(network: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a name that no parameter has."""
    known = dict(network.named_parameters())
    for name in names:
        if name not in known:
            raise ValueError(f"the network has no parameter {name!r}; it has {', '.join(known)}")


def _named_weights(network: nn.Module, layers: Iterable[str]) -> tuple[str, ...]:
    """The names of these layers' weights.

    Raises:
        ValueError: the network has no such layer.
    """
    names = tuple(f"{name}.weight".lstrip(".") for name in layers)
    if unknown := set(names) - set(layer_weights(network)):
        raise ValueError(f"the network has no layer with the weight {', '.join(sorted(unknown))}")
    return names


def _within(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")  # "" is the network itself


def _one_tensor(output) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"the network returns a {type(output).__name__}, but this rule needs one tensor")
    return output


# ---------------------------------------------------------------------------------------- the engine: tensors in values


def _map_arguments(function: Callable[[Tensor], Any], values):
    """The arguments of one of torch's functions, with the function applied to every tensor in them."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: _map_arguments(function, value) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_map_arguments(function, value) for value in values)
    if isinstance(values, tuple) and hasattr(values, "_make"):
        return type(values)._make(_map_arguments(function, value) for value in values)
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


def _deep_tensors(values) -> list[Tensor]:
    """Every tensor in what a user hands over."""
    found: list[Tensor] = []
    _map_tensors(lambda tensor: found.append(tensor) or tensor, values)
    return found


def _without_gradient(values):
    """What a user hands over, as data."""
    if any(tensor.requires_grad for tensor in _deep_tensors(values)):
        return _map_tensors(Tensor.detach, values)
    return values


def _map_tensors(function: Callable[[Tensor], Any], values):
    """What a user hands over, with the function applied to every tensor in it: in all containers that torch knows
    (torch.utils._pytree), named tuples such as PackedSequence, dataclasses and the like."""

    def mapped(value):
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return type(value)._make(_map_tensors(function, part) for part in value)
        if isinstance(value, collections.abc.Iterator):
            raise TypeError(f"an input is a {type(value).__name__}, which can be read only once: hand over a list")
        if (dataclasses.is_dataclass(value) and not isinstance(value, type)) or isinstance(value, collections.UserDict):
            twin = copy.copy(value)
            for name, part in vars(value).items():
                object.__setattr__(twin, name, _map_tensors(function, part))
            return twin
        return value

    return pytree.tree_map(mapped, values)
