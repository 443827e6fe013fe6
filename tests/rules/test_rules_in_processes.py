"""Rules under DistributedDataParallel: every process trains one rule with one feedback, whatever it was seeded with."""

import multiprocessing

import pytest
import torch
import torch.distributed as distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import align_rules

NAMES = ("fa", "dfa", "align_prop", "align_ada", "align_zero", "sign_symmetry", "kolen_pollack", "weight_mirror")
BATCH = 8


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    return tuple(torch.randn(BATCH, size, generator=stream, dtype=torch.float64) for size in (5, 3))


def train(call, rule: align_rules.Rule, rank: int, of: int) -> None:
    inputs, targets = (tensor[rank::of] for tensor in data())
    optimiser = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        optimiser.zero_grad()
        (call(inputs) - targets).square().mean().backward()
        optimiser.step()


def listed(rule: align_rules.Rule) -> dict[str, list]:
    return {key: value.tolist() for key, value in rule.state_dict().items()}


def work(rank: int, place: str, results) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    for name in NAMES:
        torch.manual_seed(1000 + rank)
        # brSF is the one that draws at every call.
        rule = align_rules.RULES[name](network(), **({"variant": "brSF"} if name == "sign_symmetry" else {}))
        wrapped = DistributedDataParallel(rule)
        before = listed(rule)
        train(wrapped, rule, rank, 2)
        results.put((rank, name, before, listed(rule)))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """(rank, rule) -> its state before the first step, and after the last."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])  # once for both, which takes seconds
    results, place = context.Queue(), str(tmp_path_factory.mktemp("gloo") / "store")
    processes = [context.Process(target=work, args=(rank, place, results)) for rank in range(2)]
    for process in processes:
        process.start()
    states = {}
    for _ in range(2 * len(NAMES)):
        rank, name, before, after = results.get(timeout=120)
        states[rank, name] = before, after
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return states


@pytest.mark.parametrize("name", NAMES)
def test_all_processes_hold_the_same(trained, name):
    assert trained[0, name] == trained[1, name]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_does_on_the_whole_batch(trained, name):
    before, after = trained[0, name]
    rule = align_rules.RULES[name](network(), **({"variant": "brSF"} if name == "sign_symmetry" else {}))
    rule.load_state_dict({key: torch.tensor(value, dtype=dtype_of(rule, key)) for key, value in before.items()})
    train(rule, rule, 0, 1)
    for key, value in rule.state_dict().items():
        torch.testing.assert_close(value, torch.tensor(after[key], dtype=value.dtype), rtol=0, atol=1e-12, msg=key)
    assert after["network.0.weight"] != before["network.0.weight"]


def dtype_of(rule: align_rules.Rule, key: str) -> torch.dtype:
    found = rule.state_dict().get(key)
    return torch.float64 if found is None else found.dtype
