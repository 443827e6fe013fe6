"""Comparing the folders of two runs."""

import torch


def without_seconds(folder):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in folder.rows()]


def parameters(folder):
    return folder.load(torch.device("cpu"))["rule"]


def assert_same(first, second):
    assert without_seconds(first) == without_seconds(second)
    mine, theirs = parameters(first), parameters(second)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
