"""What a network must beat: guessing, ridge regression and the nearest neighbour on the pixels of the same images."""

import csv
from pathlib import Path

import torch
import torch.nn.functional as F

from wide.data.datasets import ImageDataset, Split
from wide.results.studies import ROOT
from wide.runs.files import csv_text, replace_text, writing

PATH = ROOT / "results" / "reports" / "kmnist_baselines.csv"
PENALTIES = [10.0**k for k in range(-4, 5)]  # times the number of images
Rows = list[dict[str, object]]


def baselines(data: ImageDataset) -> Rows:
    """Test accuracy of each, in percent."""
    ridge, penalty = best_ridge(data)
    found = {"guessing": 100 / data.classes, "ridge regression": ridge, "nearest neighbour": nearest(data)}
    notes = {"ridge regression": f"penalty {penalty:g} of {len(PENALTIES)}, by validation accuracy"}
    return [
        {"baseline": name, "test_accuracy": round(value, 2), "note": notes.get(name, ""), "data": data.fingerprint}
        for name, value in found.items()
    ]


def pixels(split: Split) -> torch.Tensor:
    """Rows of pixels from 0 to 1."""
    return split.inputs.flatten(1).double() / 255


def best_ridge(data: ImageDataset) -> tuple[float, float]:
    """Test accuracy of the regression onto one-hot vectors with an intercept, and the penalty that validation chose."""
    centre = pixels(data.train).mean(0)
    inputs = pixels(data.train) - centre
    wanted = F.one_hot(data.train.targets.long(), data.classes).double()
    covariance, products = inputs.T @ inputs / len(inputs), inputs.T @ (wanted - wanted.mean(0)) / len(inputs)
    best = (-1.0, 0.0, 0.0)
    for penalty in PENALTIES:
        weights = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance)).double(), products)

        def accuracy(split: Split, weights=weights) -> float:
            outputs = (pixels(split) - centre) @ weights + wanted.mean(0)
            return 100 * (outputs.argmax(1) == split.targets).double().mean().item()

        best = max(best, (accuracy(data.validation), accuracy(data.test), penalty))
    return best[1:]


def nearest(data: ImageDataset) -> float:
    """Test accuracy of the label of the nearest training image, in Euclidean distance."""
    inputs = pixels(data.train)
    found = [torch.cdist(part, inputs).argmin(1) for part in pixels(data.test).split(500)]
    return 100 * (data.train.targets[torch.cat(found)] == data.test.targets).double().mean().item()


def write(path: Path, rows: Rows) -> None:
    with writing(path.parent):
        replace_text(path, csv_text(rows, header=True))


def read(path: Path) -> dict[str, float]:
    """Test accuracies in percent, by name; empty where none were computed."""
    if not path.exists():
        return {}
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return {row["baseline"]: float(row["test_accuracy"]) for row in rows}
