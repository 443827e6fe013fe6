"""A rule inside of torch.compile stays a call of its own, and is not lost; a rule's graph can be compiled."""

import pytest
import torch
from rules_helpers import assert_close, each_kind, each_rule, gradients, make, mlp, move

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


@each_rule
@each_kind
def test_handed_to_the_compiler(name, kind):
    """Its eager backends give what the rule gives as it is, for each size of a batch."""
    rule, inputs = make(name, kind, torch.float64)
    rule(inputs)  # direct feedback is drawn
    move(rule.network, 0.1)
    batches = [inputs] if kind == "recurrent" else [inputs, inputs[:3]]
    expected = [(rule(batch), gradients(rule, rule.network, batch)) for batch in batches]
    for rule.compiler in ("eager", "aot_eager"):
        for batch, (output, found) in zip(batches, expected, strict=True):
            torch.testing.assert_close(rule(batch), output, rtol=0, atol=1e-10)
            assert_close(gradients(rule, rule.network, batch), found)
