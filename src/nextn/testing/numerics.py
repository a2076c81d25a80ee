"""Comparing a kernel's output with its reference, row by row.

Hides the field's measure of difference and how NaN, empty rows and masked columns enter it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

QUANTISED_MAX_DIFF = 5e-6  # against the maths on the same quantised bytes; DeepGEMM's own limit
EXACT_MAX_DIFF = 1e-3  # against the maths on the inputs before they were quantised
MAX_ERROR = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class RowComparison:
    """How far rows lie apart.

    Attributes:
        diff: float64 ``[R]``, ``1 - 2 sum(x y) / sum(x x + y y)`` per row; 0 for two rows of zeros.
        error: float64 ``[R]``, largest absolute error over the largest expected magnitude of the row.
    """

    diff: torch.Tensor
    error: torch.Tensor

    @property
    def max_diff(self) -> float:
        """The worst row's ``diff``; NaN if any is; 0 without rows."""
        return float(self.diff.max()) if self.diff.numel() else 0.0

    @property
    def max_error(self) -> float:
        """The worst row's ``error``; NaN if any is; 0 without rows."""
        return float(self.error.max()) if self.error.numel() else 0.0


def compare_rows(actual: torch.Tensor, expected: torch.Tensor, *, defined: torch.Tensor | None = None) -> RowComparison:
    """Measure how far two tensors lie apart, per row of the first dimension, in float64.

    Args:
        actual: ``[R, ...]``, any floating dtype.
        expected: the same shape, finite where defined.
        defined: bool, same shape; elements where it is False do not count. All count if None.

    Returns:
        The measures per row; a NaN or infinity in ``actual`` where defined makes its row's measures NaN or infinite.

    Example:
        >>> compare_rows(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])).max_diff
        0.0
    """
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ"
    x, y = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    if defined is not None:
        keep = defined.to("cpu")
        x, y = torch.where(keep, x, 0.0), torch.where(keep, y, 0.0)
    num_columns = x[0].numel() if x.shape[0] else 0
    x, y = x.reshape(x.shape[0], num_columns), y.reshape(x.shape[0], num_columns)
    if num_columns == 0:
        nothing = torch.zeros(x.shape[0], dtype=torch.float64)
        return RowComparison(diff=nothing, error=nothing)
    energy = (x * x + y * y).sum(dim=1)
    squares = ((x - y) ** 2).sum(dim=1)  # the same as energy - 2 sum(x y), without its cancellation
    largest = y.abs().amax(dim=1)
    error = (x - y).abs().amax(dim=1)
    return RowComparison(
        diff=torch.where(energy == 0, 0.0, squares / energy),
        error=torch.where(error == 0, 0.0, error / largest),
    )


def assert_rows_match(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    max_diff: float = QUANTISED_MAX_DIFF,
    max_error: float | None = MAX_ERROR,
    defined: torch.Tensor | None = None,
) -> None:
    """Check every row's ``diff`` and largest error.

    Args:
        actual: ``[R, ...]``.
        expected: the same shape.
        max_diff: limit of each row's ``diff``.
        max_error: limit of each row's largest error over its largest magnitude; None for no limit.
        defined: as in :func:`compare_rows`.

    Raises:
        AssertionError: a row is beyond a limit, or holds NaN; names the row and the measures.
    """
    comparison = compare_rows(actual, expected, defined=defined)
    bad = ~(comparison.diff <= max_diff)
    if max_error is not None:
        bad |= ~(comparison.error <= max_error)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.shape[0]} rows differ; row {row} has diff {float(comparison.diff[row]):.3g} "
            f"(limit {max_diff:g}) and error {float(comparison.error[row]):.3g} (limit {max_error})"
        )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two tensors agree to the last bit; every NaN counts as the same.

    Raises:
        AssertionError: they do not; says how many elements differ and the first of them.
    """
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ"
    assert actual.dtype == expected.dtype, f"dtypes {actual.dtype} and {expected.dtype} differ"
    x, y = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    differs = _bits(x) != _bits(y)
    if x.is_floating_point():
        differs &= ~(x.isnan() & y.isnan())
    if differs.any():
        place = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} elements differ in bits, first at {place}: "
            f"{x[place].item()!r} against {y[place].item()!r}"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(dtypes[tensor.element_size()])
