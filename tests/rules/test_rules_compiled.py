"""A rule inside of torch.compile stays a call of its own, and is not lost; a rule's graph can be compiled."""

import pytest
import torch
from rules_helpers import assert_close, gradients, make, mlp, move

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")
OF_OTHER_CODE = ("backprop", "fa", "kolen_pollack", "dfa", "align_zero", "align_ada")  # what the others do is in these


@pytest.mark.parametrize("name", OF_OTHER_CODE)
def test_compiled(name):
    torch.compiler.reset()
    network, inputs = mlp(), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    rule(inputs)
    move(network)
    expected = gradients(rule, network, inputs)
    for around in (rule, lambda x: 2 * rule(x) - rule(x)):
        compiled = torch.compile(around, backend="eager")
        assert_close(gradients(compiled, network, inputs), expected, 1e-5)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("recurrent", name) for name in align_rules.RULES), *(("residual", n) for n in OF_OTHER_CODE)]
)
def test_handed_to_the_compiler(kind, name):
    """Which gives what the rule gives as it is, for each size of a batch."""
    rule, inputs = make(name, kind, torch.float64)
    rule(inputs)  # direct feedback is drawn
    move(rule.network, 0.1)
    batches = [inputs] if kind == "recurrent" else [inputs, inputs[:3]]
    expected = [(rule(batch), gradients(rule, rule.network, batch)) for batch in batches]
    rule.compiler = "aot_eager"
    for batch, (output, found) in zip(batches, expected, strict=True):
        torch.testing.assert_close(rule(batch), output, rtol=0, atol=1e-10)
        assert_close(gradients(rule, rule.network, batch), found)
