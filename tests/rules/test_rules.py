"""The table of rules: whole, and what it hands to networks, runs and optimisers."""

import dataclasses

import pytest
import torch

import align_rules
from wide.models import rules
from wide.models.networks import RecurrentNetwork, draw
from wide.models.rules import RULES, RuleSpec, make_rule
from wide.runs.folder import RunFolder
from wide.runs.run import Run
from wide.training.loop import Training
from wide.training.tasks import AddTask

RUN = Run("add", "rnn", "backprop", 4, 0.001, 99, 50, variant="published")


def test_every_rule_has_a_row():
    assert {name: spec.rule for name, spec in RULES.items() if name != "pair"} == align_rules.RULES


def test_no_two_rules_look_alike():
    looks = {name: spec.style for name, spec in RULES.items() if name != "pair"}
    assert (
        len({tuple(look.values()) for look in looks.values()})
        == len({s.title for s in RULES.values()}) - 1
        == len(looks)
    )


@pytest.mark.parametrize("variant", ["published", "corrected"])
def test_the_published_recurrent_rule_leaves_its_readout_uncoupled(variant):
    run = dataclasses.replace(RUN, rule="align_ada", variant=variant)
    rule = make_rule(run, RecurrentNetwork(4, 50))
    assert rule.uncoupled == (("readout.weight", "readout.bias") if variant == "published" else ())
    assert rule.live == ("initial_state",)


def test_feedback_is_that_of_the_published_stream():
    rule = make_rule(dataclasses.replace(RUN, rule="fa"), RecurrentNetwork(4, 50))
    expected = draw(RecurrentNetwork(4, 50), 99, "layers")
    assert all(torch.equal(B, expected[name]) for name, B in rule.feedback_weights().items())


class Noisy(align_rules.Backprop):
    """Draws a number of its own."""

    def __init__(self, network, generator):
        super().__init__(network)
        self.drawn = torch.rand((), generator=generator)


def test_a_rule_with_settings_and_random_numbers_of_its_own(monkeypatch, tmp_path):
    spec = RuleSpec(
        Noisy, "Noisy", "red", "o", "-",
        arguments=lambda run, network: {"generator": torch.Generator().manual_seed(run.seed)},
        settings={"decay": 0.5, "rule_variant": "loud"},
    )  # fmt: skip
    monkeypatch.setitem(rules.RULES, "noisy", spec)
    run = dataclasses.replace(RUN, rule="noisy", **spec.settings)
    assert run.name == "rnn-noisy-width4-lr0.001-seed99-batch50-published-loud-decay0.5"
    assert run.settings()["decay"] == 0.5
    task = AddTask("published", torch.device("cpu"))
    training, again, other = (Training(task, r) for r in (run, run, dataclasses.replace(run, seed=1)))
    assert training.rule.drawn == again.rule.drawn != other.rule.drawn
    assert {group["weight_decay"] for group in training.optimizer.param_groups} == {0.5}


def test_runs_of_other_rules_are_described_as_before(tmp_path):
    settings = RunFolder(tmp_path, RUN).identity("data")
    assert not {"decay", "rule_variant"} & settings.keys()
    assert "decay" not in RUN.name
