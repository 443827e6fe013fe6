"""Which runs are compared with each other: the settings that claims and figures are about."""

import dataclasses
from collections.abc import Mapping

from wide.results.judging import Setting
from wide.results.studies import CENTRED_RATES, LITTLE, RATES
from wide.runs.run import effective_batch

TRAINED = {"parameterisation": "ntk", "optimizer": "sgd", "timed_on": None, "precision": "fp32"}
FULL = TRAINED | {"batch_size": 100, "data_limit": None}
CNN = FULL | {"network": "cnn", "learning_rate": 5.0}
MLP = FULL | {"dataset": "kmnist", "network": "mlp"}
PLAIN = Setting("Fully connected", MLP | {"learning_rate": RATES}, 50)
# Align-zero's rate suits narrow networks; wide ones take the others' too.
AT_5 = Setting("Rate 5 for all, fully connected", MLP | {"learning_rate": 5.0}, 50)
CENTRED = Setting("Fully connected, centred", MLP | {"learning_rate": CENTRED_RATES, "centred": True}, 50)
KMNIST = Setting("KMNIST, convolutional", CNN | {"dataset": "kmnist"}, 100)
CIFAR = Setting("CIFAR-10, convolutional", CNN | {"dataset": "cifar"}, 5)
# Added when the curves of KMNIST at widths 8 to 32 had been seen, before width 64 and these of CIFAR-10 were trained.
EARLY = dataclasses.replace(KMNIST, title=f"{KMNIST.title}: first 20 epochs", epochs=20)
EARLY_CIFAR = Setting(
    f"{CIFAR.title}: 600 updates", CNN | {"dataset": "cifar", "data_limit": 3000, "batch_size": 50}, 10
)
ADDS = tuple(
    Setting(
        f"Add, {variant}", {"dataset": "add", "learning_rate": 0.001, "batch_size": 50, "variant": variant}, 200,
        loss=True,
    )
    for variant in ("published", "corrected")
)  # fmt: skip
LAST_ADDS = tuple(dataclasses.replace(one, title=f"{one.title}, last epoch", last=True) for one in ADDS)
IMAGES = (PLAIN, CENTRED, KMNIST, CIFAR)
ACCURACIES = (PLAIN, CENTRED, KMNIST, EARLY, CIFAR, EARLY_CIFAR)
PAIR = {"rule": "pair", "data_limit": None, "precision": "fp32"}
PAIRS = (
    Setting(KMNIST.title, PAIR | {"dataset": "kmnist"}, 20),
    Setting(CIFAR.title, PAIR | {"dataset": "cifar"}, 5),
    Setting("Add, published", {"dataset": "add", "rule": "pair", "variant": "published"}, 40),
)


def few(setting: Setting, epochs: Mapping[int, int], **fields) -> dict[int, Setting]:
    """The same with few training images, {images: ...}; `epochs`: by the number of images."""
    return {
        n: Setting(
            f"{setting.title}: {n} images",
            {**setting.fields, "data_limit": n, "batch_size": effective_batch(100, n), **fields},
            epochs[n],
        )
        for n in epochs
    }


FEW: Mapping[str, Mapping[int, Setting]] = {
    PLAIN.title: few(PLAIN, LITTLE, width=1024, learning_rate=5.0),
    CENTRED.title: few(CENTRED, LITTLE, width=1024),
    CIFAR.title: few(CIFAR, dict.fromkeys((45, 150, 450, 1500), 150)),
}
PRECISIONS = {name: Setting(KMNIST.title, KMNIST.fields | {"precision": name}, 10) for name in ("fp32", "bf16")}
PRECISION_PAIRS = {
    name: Setting(KMNIST.title, PAIR | {"dataset": "kmnist", "precision": name}, 10) for name in ("fp32", "bf16")
}
THEORIES = tuple(
    Setting(
        f"{title}: after 9 updates",
        TRAINED | {"dataset": "kmnist", "network": network, "batch_size": 50, "data_limit": 500, "learning_rate": 5.0},
        1,
    )
    for title, network in ((PLAIN.title, "mlp"), (KMNIST.title, "cnn"))
)
OUTPUTS = Setting(f"{PLAIN.title}: 100 images", MLP | {"learning_rate": 5.0, "data_limit": 100}, 1000)
