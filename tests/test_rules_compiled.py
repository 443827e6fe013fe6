"""Rules under torch.compile."""

import pytest
import torch
from rules_helpers import IMAGES, assert_close, each_rule, gradients, mlp, move, residual

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


@each_rule
def test_compiled(name):
    torch._dynamo.reset()
    network, inputs = mlp(), torch.randn(5, 6)
    rule = align_rules.RULES[name](network)
    move(network)
    rule(inputs)  # draws the feedback weights that wait for the first call
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close(gradients(compiled, network, inputs), gradients(rule, network, inputs), 1e-5)
        move(network)


@pytest.mark.parametrize("name", ["dfa", "align_ada"])
def test_compiled_residual_network(name):
    torch._dynamo.reset()
    rule, images = align_rules.RULES[name](residual(inplace=True)), torch.randn(IMAGES)
    move(rule.network, 0.1)
    rule(images)  # draws the feedback weights that wait for the first call
    compiled = torch.compile(rule, backend="aot_eager")
    for _ in range(2):
        assert_close(gradients(compiled, rule.network, images), gradients(rule, rule.network, images), 1e-4)
        rule.network.eval()
