"""Inputs in containers of all kinds: their gradient comes once, or not at all where the rule takes them as data."""

import pytest
import torch
from rules_helpers import mlp
from torch import Tensor, nn

import align_rules

pytestmark = pytest.mark.usefixtures("seeded")


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        return self.second(torch.relu(input=self.first(inputs + state)))


def test_inputs_get_their_gradient_once_however_they_are_given():
    rule, inputs = align_rules.AlignAda(Stateful()), torch.randn(5, 6)
    gradients = []
    for by_name in (False, True):
        state = torch.zeros(5, 6, requires_grad=True)
        (rule(inputs, state=state) if by_name else rule(inputs, state)).sum().backward()
        gradients.append(state.grad)
    torch.testing.assert_close(*gradients)


def test_direct_feedback_takes_inputs_with_a_gradient_as_data():
    rule, inputs = align_rules.DirectFeedbackAlignment(mlp()), torch.randn(5, 6, requires_grad=True)
    rule(inputs).sum().backward()
    assert inputs.grad is None
    assert len(rule.feedback) == 2
