"""A rule inside of torch.compile stays a call of its own, and is not lost."""

import pytest
import torch
from rules_helpers import assert_close, each_rule, gradients, mlp, move

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


@each_rule
@pytest.mark.parametrize("around", ["rule", "step"])
def test_compiled(name, around):
    torch.compiler.reset()
    network, inputs = mlp(), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    rule(inputs)
    move(network)
    expected = gradients(rule, network, inputs)
    compiled = torch.compile(rule if around == "rule" else lambda x: 2 * rule(x) - rule(x), backend="eager")
    assert_close(gradients(compiled, network, inputs), expected, 1e-5)
