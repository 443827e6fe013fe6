"""What scripts need to know of a learning rule, a row for each. What the rules are stands in align_rules.py."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import align_rules
from wide.models.networks import Parameterised, draw
from wide.models.pair import Pair
from wide.runs.run import Run

# A recurrent network's learned initial state: an activity that learns, and no weight.
STATE = ("initial_state",)


# Of Kolen-Pollack, a step, as a share of a weight: lambda of Akrout et al. (2019), section 5.
DECAY = 1e-4


def nothing_more(run: Run, network: nn.Module) -> dict[str, object]:
    return {}


@dataclasses.dataclass(frozen=True)
class RuleSpec:
    """A rule, as scripts make and show it.

    Args:
        rule: its class.
        title: its name in tables and figures.
        color, marker, linestyle: how figures draw it, as matplotlib takes them; lightness, marker and dashes tell the
            rules apart without colour.
        feedback: what is drawn beside the weights from the published stream and becomes the argument `feedback`:
            "layers", a weight like each layer's, or "blocks", one from the outputs to each block (`networks.draw`).
        arguments: the constructor's other arguments for a run and its network, such as what differs between kinds of
            network. A rule with random numbers of its own takes them from a generator that is seeded here with the
            run's seed.
        between_steps: what the rule does after every update, given a batch's shape in zeros (batch size of the run).
        settings: fields of `Run` that the rule sets, such as the decay of weights: they are part of a run's identity.
        unsuited: kinds of network for which it is not defined, with the reason.
    """

    rule: type[align_rules.Rule]
    title: str
    color: str
    marker: str
    linestyle: str
    feedback: str | None = None
    arguments: Callable[[Run, nn.Module], Mapping[str, object]] = nothing_more
    between_steps: Callable[[align_rules.Rule, Tensor], None] | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    unsuited: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def style(self) -> dict[str, str]:
        """The same in every figure."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.linestyle}


def recurrent(**arguments) -> Callable[[Run, nn.Module], Mapping[str, object]]:
    """These arguments on recurrent networks, none on others."""
    return lambda run, network: arguments if run.network == "rnn" else {}


def align_ada_arguments(run: Run, network: nn.Module) -> dict[str, object]:
    if run.network != "rnn":
        return {}
    # The published copy's readout reads its own state alone: its input is not coupled.
    uncoupled = ("readout",) if run.variant == "published" else ()
    return {"coupling": "activity", "live": STATE, "uncoupled": uncoupled}


def sign_symmetry_arguments(run: Run, network: nn.Module) -> dict[str, object]:
    """uSF's constant for weights as they are used: NTK parameterisation scales M by 1/sqrt(fan_in), as it does W."""
    magnitudes = {}
    for name, layer in network.named_modules():
        if isinstance(layer, Parameterised):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            used = math.sqrt(2 / (fan_in + fan_out))
            scale = math.sqrt(fan_in) if layer.parameterisation == "ntk" else 1.0
            magnitudes[f"{name}.weight"] = torch.full_like(layer.weight.detach(), used * scale)
    return {"magnitudes": magnitudes, **recurrent(added=STATE)(run, network)}


def weight_mirror_arguments(run: Run, network: nn.Module) -> dict[str, object]:
    return {"generator": torch.Generator().manual_seed(run.seed), **recurrent(added=STATE)(run, network)}


RULES = {
    "backprop": RuleSpec(align_rules.Backprop, "Backprop", "#111111", "o", "-"),
    "align_ada": RuleSpec(align_rules.AlignAda, "Align-ada", "#0b5fa5", "s", "-", arguments=align_ada_arguments),
    "align_zero": RuleSpec(align_rules.AlignZero, "Align-zero", "#4fa3e0", "D", "--", arguments=recurrent(live=STATE)),
    "align_prop": RuleSpec(align_rules.AlignProp, "Align-prop", "#7a4fb5", "P", "-.", arguments=recurrent(added=STATE)),
    "fa": RuleSpec(
        align_rules.FeedbackAlignment, "FA", "#c2410c", "^", "--", feedback="layers", arguments=recurrent(added=STATE)
    ),
    "dfa": RuleSpec(
        align_rules.DirectFeedbackAlignment, "DFA", "#e0a030", "v", ":", feedback="blocks",
        unsuited={"rnn": "direct feedback is not defined for the recurrent network; choose other rules"},
    ),
    "last_layer": RuleSpec(
        align_rules.LastLayer, "Last layer", "#8a8a8a", "X", "-.", arguments=recurrent(learns=("readout", *STATE)),
    ),
    "sign_symmetry": RuleSpec(
        align_rules.SignSymmetry, "Sign-symmetry", "#2e7d32", "<", "-.", arguments=sign_symmetry_arguments,
        settings={"rule_variant": "uSF"},
    ),
    "kolen_pollack": RuleSpec(
        align_rules.KolenPollack, "Kolen-Pollack", "#a3195b", ">", "-", feedback="layers",
        arguments=recurrent(added=STATE), settings={"decay": DECAY},
    ),
    "weight_mirror": RuleSpec(
        align_rules.WeightMirror, "Weight mirror", "#5d4037", "*", ":", feedback="layers",
        arguments=weight_mirror_arguments, between_steps=align_rules.WeightMirror.mirror,
    ),
    "pair": RuleSpec(Pair, "Backprop, beside it Align", "#111111", "o", "-", arguments=recurrent(live=STATE)),
}  # fmt: skip


def make_rule(
    run: Run, network: nn.Module, image_shape: tuple[int, ...] = (), pooled: bool = False
) -> align_rules.Rule:
    """The network, with the published initial parameters for the run's seed, in the run's rule.

    Args:
        image_shape: (channels, h, w) of the images; () where there are none.
        pooled: direct feedback reaches a block's channels, averaged over positions, and not every entry.
    """
    spec = RULES[run.rule]
    kind = "pooled" if spec.feedback == "blocks" and pooled else spec.feedback
    drawn = draw(network, run.seed, kind, image_shape)
    feedback = {"feedback": drawn} if drawn else {}
    return spec.rule(network, **feedback, **spec.arguments(run, network))
