"""The README's example, and a step of every rule on the networks of benchmarks/other_networks.py."""

import pytest
import torch
from rules_helpers import each_rule
from running import ROOT

import align_rules
from benchmarks import other_networks

pytestmark = pytest.mark.usefixtures("seeded")


LIGHT = [title for title in other_networks.CASES if "vgg" not in title]


def test_the_readmes_example(kmnist):
    section = (ROOT / "README.md").read_text().partition("## On your own network")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert 'KMNIST("data")' in code
    names = {}
    exec(code.replace('KMNIST("data")', f"KMNIST({str(kmnist)!r})"), names)
    rule = names["rule"]
    assert isinstance(rule, align_rules.AlignAda)
    assert names["loss"] < 5
    for key, weight in align_rules.layer_weights(rule.network).items():
        assert not torch.equal(weight, rule.initial.get_buffer(key)), key


@pytest.mark.parametrize("title", LIGHT)
@each_rule
def test_one_step_changes_what_it_should(name, title):
    assert other_networks.problems(name, other_networks.CASES[title]) == []
