"""The alignment score of a layer: how alike the weight changes of two trainings act on the layer's input.

For a layer with the linear operator C (a matrix, or a convolution with its stride and padding on its input size), let
V be C with the weight change of the "normal" network, A be C with that of the "align" network, P = V'V and Q = A'A
(' is the transpose). The score is the cosine between P and Q,

    score = E<Pz, Qz> / sqrt(E<Pz, Pz> E<Qz, Qz>) = tr(PQ) / (|P| |Q|) = |V A'|^2 / (|V V'| |A A'|),

with z standard normal of the layer's input shape and Frobenius norms (Boopathy & Fiete, ICML 2022). It is 1 for changes
that are equal up to a factor. The published code estimates the expectations from draws of z
(benchmarks/alignment_score.py); here they are in closed form.

The closed form. At output position p, tap k of a convolution with stride s reads input pixel p s + k - b, with b the
padding before the image. Hence

    tr(PQ) = sum over taps (k, l, m, n) of  count(k, l, m, n) <V_k' V_m, A_l' A_n>                           (inputs)
           = the same sum of                count(k, l, m, n) <V_k A_l', V_m A_n'>                           (outputs)

with V_k the (outputs, inputs) matrix of tap k, and `count` the number of pairs of output positions (p, q) at which k at
p and l at q read one pixel, and m at p and n at q read one pixel, both inside the image. Counts are products over rows
and columns, and vanish unless k - m = l - n (equally, k - l = m - n), so that one difference, or *shift*, of taps is
dealt with at a time. A dense layer is a convolution with one tap on one pixel.
"""

import numpy as np
import torch
from torch import Tensor, nn

from wide.models.networks import Convolution, Dense, activity_shapes, same_padding

# (rows, columns) of a shift, and the weights of the products of taps with that shift
Shifts = list[tuple[tuple[int, int], Tensor]]


def input_sizes(network: nn.Module, image_size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """(rows, columns) of what each convolution takes in, () for each dense layer, by the layer's name, in order."""
    sizes, size = {}, tuple(image_size)
    for name, shape in activity_shapes(network, (0, *image_size)).items():
        sizes[name] = size if isinstance(network.get_submodule(name), Convolution) else ()
        size = shape[1:]
    return sizes


def shuffled(weights: list[Tensor], seed: int = 99) -> list[Tensor]:
    """The weights of the control: the entries of each, in random order. The control's change is shuffle(W) - W(0).

    As published: `numpy.random.shuffle`, seeded once, of the weight of one layer after the other, each flattened from
    the layout (row, column, input, output).

    Args:
        weights: (outputs, inputs, rows, columns) or (outputs, inputs) each, from the first layer on. Left as they are.
        seed: of the stream.
    """
    stream = np.random.RandomState(seed)
    return [_shuffle(stream, weight.detach()) for weight in weights]


def _shuffle(stream: np.random.RandomState, weight: Tensor) -> Tensor:
    # Dense layers, transposed like this, are in published order too: W_hh, which multiplies from the right, included.
    published = weight.permute(*range(2, weight.dim()), 1, 0)
    order = torch.from_numpy(stream.permutation(weight.numel())).to(weight.device)
    entries = published.flatten()[order].view(published.shape)
    return entries.permute(-1, -2, *range(weight.dim() - 2))


@torch.no_grad()
def exact_score(
    layer: nn.Module, delta_normal: Tensor, delta_align: Tensor, input_size: tuple[int, ...] = ()
) -> float | None:
    """The score, in [0, 1], in closed form (module docstring), in float64 throughout.

    For the state's weights of a recurrent network, P = dW dW' with s_t = s_{t-1} W_hh on row vectors. `Recurrence`
    stores D = W_hh', so that P = D'D: the same input side as everywhere, and no case of its own.

    Args:
        layer: a `Convolution`, or a `Dense` layer (`Recurrence` among them); only its geometry is used.
        delta_normal, delta_align: the two changes of its weight, of the weight's shape, on one device.
        input_size: (rows, columns) of a convolution's input; () for a dense layer.

    Returns:
        None where it is undefined, because one of the changes does nothing to any input (at epoch 0) or is not finite.

    Raises:
        TypeError: another kind of layer.
        ValueError: changes of another shape, or an input size that does not fit the layer.
    """
    _check(layer, delta_normal, delta_align, input_size)
    normal, align = _taps(delta_normal), _taps(delta_align)
    coincidences = [_coincidences(*axis).to(normal.device) for axis in _axes(layer, input_size)]
    by_inputs = _shifts(*coincidences)
    by_outputs = _shifts(*(counts.transpose(1, 2) for counts in coincidences))
    outputs, inputs = layer.weight.shape[:2]
    # By inputs two, by outputs four products of matrices are formed per pair of taps.
    if 2 * _pairs(by_inputs) * inputs <= 4 * _pairs(by_outputs) * outputs:
        traces = _traces_by_inputs(normal, align, by_inputs)
    else:
        traces = _traces_by_outputs(normal, align, by_outputs)
    PQ, PP, QQ = traces
    defined = PP > 0 and QQ > 0  # not so for NaN
    return (PQ / (PP.sqrt() * QQ.sqrt())).item() if defined else None


def _taps(delta: Tensor) -> Tensor:
    """(rows, columns, outputs, inputs)."""
    kernel = delta if delta.dim() == 4 else delta[..., None, None]
    return _scaled(kernel.permute(2, 3, 0, 1).to(torch.float64).contiguous())


def _axes(layer: nn.Module, input_size: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Size, kernel and stride along rows, and along columns."""
    if not input_size:
        return [(1, 1, 1)] * 2
    return list(zip(input_size, layer.kernel_size, layer.stride, strict=True))


def _coincidences(size: int, kernel: int, stride: int) -> Tensor:
    """count(k, l, m, n) of the module docstring along one axis, (kernel, kernel, kernel, kernel)."""
    positions = torch.arange(-(-size // stride))
    pixels = positions[:, None] * stride + torch.arange(kernel) - same_padding(size, kernel, stride)[0]
    inside = (pixels >= 0) & (pixels < size)  # (positions, kernel)
    same = (pixels[:, None, :, None] == pixels[:, None]) & inside[:, None, :, None]
    same = same.flatten(2).flatten(0, 1).to(torch.float64)  # (pairs of positions, pairs of taps)
    return (same.T @ same).view(kernel, kernel, kernel, kernel)


def _shifts(rows: Tensor, columns: Tensor) -> Shifts:
    """The shifts of taps that occur, each with the weights of the products that `_products` returns for it.

    Args:
        rows, columns: counts of (left tap, right tap, left tap - shift, right tap - shift).
    """
    found = []
    for row in range(len(rows)):
        for column in range(1 - len(columns) if row else 0, len(columns)):
            weights = torch.kron(_weights_at(rows, row), _weights_at(columns, column))
            if weights.any():
                # A shift stands for its opposite too, which pairs the same taps the other way round.
                found.append(((row, column), weights * (2 if row or column else 1)))
    return found


def _weights_at(counts: Tensor, shift: int) -> Tensor:
    first, second = (torch.arange(len(counts), device=counts.device)[part] for part in _overlap(shift))
    return counts[first[:, None], first, second[:, None], second]


def _overlap(shift: int) -> tuple[slice, slice]:
    """The taps k for which k - shift exists, and those k - shift."""
    return slice(max(shift, 0), min(shift, 0) or None), slice(max(-shift, 0), min(-shift, 0) or None)


def _pairs(shifts: Shifts) -> int:
    return sum(len(weights) for _, weights in shifts)


def _products(left: Tensor, right: Tensor, shift: tuple[int, int]) -> Tensor:
    """left_k right_(k - shift)' for every tap k that has a partner, flattened to (taps, entries)."""
    (rows, partner_rows), (columns, partner_columns) = map(_overlap, shift)
    products = left[rows, columns] @ right[partner_rows, partner_columns].mT
    return products.flatten(2).flatten(0, 1)


def _traces_by_inputs(normal: Tensor, align: Tensor, shifts: Shifts) -> Tensor:
    """tr(PQ), tr(PP) and tr(QQ), from the products V_k' V_m and A_l' A_n, (inputs, inputs)."""
    normal, align = normal.mT, align.mT
    traces = normal.new_zeros(3)
    for shift, weights in shifts:
        P, Q = _products(normal, normal, shift), _products(align, align, shift)
        traces += torch.stack([_form(weights, left, right) for left, right in ((P, Q), (P, P), (Q, Q))])
    return traces


def _traces_by_outputs(normal: Tensor, align: Tensor, shifts: Shifts) -> Tensor:
    """The same from the products V_k A_l', V_k V_l' and A_k A_l', (outputs, outputs)."""
    traces = normal.new_zeros(3)
    for shift, weights in shifts:
        pairs = ((normal, align), (align, normal), (normal, normal), (align, align))
        VA, AV, VV, AA = (_form(weights, products, products) for products in (_products(*p, shift) for p in pairs))
        traces += torch.stack([(VA + AV) / 2, VV, AA])  # AV is what the opposite shift has for VA
    return traces


def _form(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (weights * (left @ right.T)).sum()


def _scaled(delta: Tensor) -> Tensor:
    """By its largest entry, so that fourth powers neither underflow nor overflow; NaN where zero or not finite."""
    return delta / delta.abs().max()


def _check(layer: nn.Module, delta_normal: Tensor, delta_align: Tensor, input_size: tuple[int, ...]) -> None:
    if not isinstance(layer, (Convolution, Dense)):
        raise TypeError(f"the layer must be a Convolution or Dense, not {type(layer).__name__}")
    shapes = {tuple(delta.shape) for delta in (delta_normal, delta_align)}
    if shapes != {tuple(layer.weight.shape)}:
        raise ValueError(f"the changes must have the weight's shape {tuple(layer.weight.shape)}, not {shapes}")
    if len(input_size) != layer.weight.dim() - 2 or any(size < 1 for size in input_size):
        expected = "(rows, columns)" if isinstance(layer, Convolution) else "()"
        raise ValueError(f"the input size of a {type(layer).__name__} must be {expected}, not {input_size}")
