"""Direct feedback and the order of memory."""

import pytest
import torch
from torch import nn

import align_rules


@pytest.mark.parametrize("last", [True, False])
def test_direct_feedback_is_the_same_in_either_order_of_memory(last):
    """And where it lies channels last, as activities do, the error does so too: else every derivative turns it."""
    torch.manual_seed(0)
    error, feedback = torch.randn(5, 3), torch.randn(3, 4, 6, 7)
    if last:
        feedback = feedback.contiguous(memory_format=torch.channels_last)
    sent = align_rules._projected(error, feedback, torch.Size((5, 4, 6, 7)), torch.float32)
    torch.testing.assert_close(sent, torch.einsum("be,echw->bchw", error, feedback))
    assert sent.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_no_error_goes_to_inputs():
    encoder, network = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    output = align_rules.DirectFeedbackAlignment(network)(encoder(torch.randn(4, 6))).sum()
    output.backward()
    assert encoder.weight.grad is None
