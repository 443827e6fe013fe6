"""The README's example, and what docs/own_networks.md shows."""

import csv
import re

import pytest
import torch
from running import ROOT
from torch import nn

import align_rules
from benchmarks import other_networks

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.quick]
PAGE = (ROOT / "docs" / "own_networks.md").read_text(encoding="utf-8")


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


def test_the_explanation_on_the_page(capsys):
    code, printed = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_the_generated_code_on_the_page():
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    shown = re.search(r"```\n(def forward.*?)```", PAGE, re.DOTALL)[1]
    code = align_rules.FeedbackAlignment(network).explain(torch.randn(4, 8), code=True)
    assert shown in re.sub(r";  \w+( = \w+)* = None", "", code).replace("align_rules_", "").replace("torch.ops.", "")


def test_the_table_on_the_page():
    rows = {}
    with (ROOT / "docs" / "own_networks.csv").open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["network"], {})[row["rule"]] = row["value"]
    assert rows.keys() == other_networks.CASES.keys()
    assert other_networks.table(rows) in PAGE


@pytest.mark.parametrize("title", ["own matrices, einsum", "CTRNN, Dale's law"])
def test_the_benchmark_tells_what_is_wrong(title, monkeypatch):
    right = align_rules._transposed
    monkeypatch.setattr(align_rules, "_transposed", lambda *arguments: 1.01 * right(*arguments))
    told = other_networks.differences(title)
    assert told["align_prop"].startswith("where the rule should be backprop, gradients differ")
    assert float(told["align_zero"]) < 1e-9
