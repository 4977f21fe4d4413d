"""What planners raise: a problem that has no solution, and input that is no problem at all."""

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.errors import InfeasibleError, require

__all__ = ["InfeasibleError", "checked", "checked_links"]


def checked(
    field: str,
    values: ArrayLike,
    shape: tuple[int, ...] | None = None,
    *,
    positive: bool = False,
    infinite: bool = False,
) -> Array:
    """Return `values` as a float array of `shape` (scalars are repeated), all of them >= 0.

    Parameters
    ----------
    field : str
        Name for the error.
    values : array_like
        What to check.
    shape : tuple of int, optional
        The shape to broadcast to; as given by default.
    positive : bool
        Whether 0 is refused as well.
    infinite : bool
        Whether infinity is allowed.

    Raises
    ------
    FedsplitError
        If a value is NaN, negative, not allowed to be 0 or infinite, or the shape does not fit.
    """
    array = np.asarray(values, dtype=np.float64)
    if shape is not None and array.shape != shape:
        require(
            array.ndim <= len(shape)
            and all(
                size in (1, wanted)
                for size, wanted in zip(array.shape[::-1], shape[::-1], strict=False)
            ),
            f"{field} shape",
            array.shape,
            str(shape),
        )
        array = np.broadcast_to(array, shape)
    good = array > 0 if positive else array >= 0
    if not infinite:
        good &= array < np.inf
    if not good.all():
        where = tuple(int(index) for index in np.argwhere(~good)[0])
        place = f"{field}[{', '.join(map(str, where))}]" if where else field
        allowed = f"{'above' if positive else 'at least'} 0{'' if infinite else ' and finite'}"
        require(False, place, float(array[where]), allowed)
    return array


def checked_links(name: str, quality: ArrayLike, shape: tuple[int, ...], bits: ArrayLike) -> Array:
    """Return `quality` (a rate, gain or efficiency per user) as `checked` does, none of it 0.

    Raises
    ------
    InfeasibleError
        If a link has quality 0, saying how many of its `bits` cannot be sent.
    """
    array = checked(name, quality, shape)
    dead = np.flatnonzero(array == 0)
    if len(dead):
        needed = np.broadcast_to(np.asarray(bits, dtype=np.float64), shape)
        raise InfeasibleError(f"{name}[{dead[0]}]=0, what it carries", needed[dead[0]], 0, "bit")
    return array
