"""What identifies a run: everything that determines its numbers."""

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that determines a run's numbers. Settings at their usual value do not appear in its name."""

    dataset: str
    network: str  # cnn, mlp or rnn
    rule: str
    width: int
    learning_rate: float
    seed: int
    batch_size: int
    data_limit: int | None = None
    optimizer: str = "sgd"
    parameterisation: str = "ntk"
    variant: str | None = None
    precision: str = "fp32"
    timed_on: str | None = None  # the device, for runs whose time is the result
    batches: int = 1  # per step, each normalised by itself
    decay: float = 0.0  # of weights: L2, as torch's optimisers take it
    rule_variant: str | None = None  # of rules that come in several
    centred: bool = False  # outputs are f - f0, f0 the function at the initial parameters

    @property
    def name(self) -> str:
        words = [self.network, self.rule, f"width{self.width}", f"lr{self.learning_rate:g}", f"seed{self.seed}"]
        words.append(self.batches_name)
        if self.data_limit is not None:
            words.append(f"images{self.data_limit}")
        unusual = {"sgd", "ntk", None, "fp32"}
        words += [
            word
            for word in (self.parameterisation, self.optimizer, self.variant, self.precision, self.rule_variant)
            if word not in unusual
        ]
        if self.decay:
            words.append(f"decay{self.decay:g}")
        if self.centred:
            words.append("centred")
        if self.timed_on is not None:
            words.append("timed-on-" + "-".join(re.findall(r"\w+", self.timed_on)))
        return "-".join(words)

    @property
    def batches_name(self) -> str:
        return f"batch{self.batch_size}" + (f"x{self.batches}" if self.batches > 1 else "")

    def settings(self) -> dict[str, object]:
        """What describes the run in its config.json and in tables."""
        values = dataclasses.asdict(self)
        return {name: v for name, v in values.items() if name not in _OF_SOME_RUNS or v != _USUAL[name]}


# Settings that only some runs have; the others are described without them.
_OF_SOME_RUNS = ("decay", "rule_variant", "centred")
_USUAL = {field.name: field.default for field in dataclasses.fields(Run) if field.default is not dataclasses.MISSING}


def effective_batch(batch_size: int, data_limit: int | None) -> int:
    """The batch size for limited data, so that the data are a whole number of batches (spec: published rule)."""
    if data_limit is None:
        return batch_size
    return data_limit if batch_size > data_limit else math.gcd(batch_size, data_limit)


def _same(mine: object, theirs: object) -> bool:
    """Whether two settings are equal; what is no setting, such as a tensor in a file of another program, is not."""
    return isinstance(theirs, str | int | float | None) and mine == theirs


def differences(mine: Mapping[str, object], theirs: object) -> str:
    """In words, where another identity of a run differs from this one; empty where it does not."""
    if not isinstance(theirs, Mapping):
        return "no settings"
    # A setting that came into use after a run was made had its usual value then.
    mine, theirs = _USUAL | mine, _USUAL | theirs
    differing = sorted(key for key in mine.keys() | theirs.keys() if not _same(mine.get(key), theirs.get(key)))
    return ", ".join(f"{key} {theirs.get(key)!r} instead of {mine.get(key)!r}" for key in differing)
