"""What scripts need to know of a learning rule, a row for each. What the rules are stands in align_rules.py."""

import dataclasses
from collections.abc import Callable, Mapping

from torch import nn

import align_rules
from wide.alignment import Pair
from wide.networks import draw
from wide.runs import Run

# A recurrent network's learned initial state: an activity that learns, and no weight.
STATE = ("initial_state",)


def nothing_more(run: Run) -> dict[str, object]:
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
        arguments: the constructor's other arguments for a run, such as what differs between kinds of network. A rule
            with random numbers of its own takes them from a generator that is seeded here with the run's seed.
        settings: fields of `Run` that the rule sets, such as the decay of weights: they are part of a run's identity.
        unsuited: kinds of network for which it is not defined, with the reason.
    """

    rule: type[align_rules.Rule]
    title: str
    color: str
    marker: str
    linestyle: str
    feedback: str | None = None
    arguments: Callable[[Run], Mapping[str, object]] = nothing_more
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    unsuited: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def style(self) -> dict[str, str]:
        """The same in every figure."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.linestyle}


def recurrent(**arguments) -> Callable[[Run], Mapping[str, object]]:
    """These arguments on recurrent networks, none on others."""
    return lambda run: arguments if run.network == "rnn" else {}


def align_ada_arguments(run: Run) -> dict[str, object]:
    if run.network != "rnn":
        return {}
    # The published copy's readout reads its own state alone: its input is not coupled.
    uncoupled = ("readout",) if run.variant == "published" else ()
    return {"coupling": "activity", "live": STATE, "uncoupled": uncoupled}


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
        align_rules.LastLayer, "Last layer", "#8a8a8a", "X", "-.", arguments=recurrent(learns=("readout", *STATE))
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
    return spec.rule(network, **feedback, **spec.arguments(run))
