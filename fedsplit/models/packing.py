"""Several texts in one row, told apart by position ids that begin again, as transformers does."""

from collections.abc import Mapping

from torch import Tensor


def holds_several(inputs: Mapping[str, Tensor]) -> bool:
    """Return whether rows hold several texts.

    Where there is no mask, transformers' models let tokens attend within runs of position ids
    only, so these are run without. Padding at a row's end must be a run of its own then.
    """
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None or places is None:
        return False
    within = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(((places[:, 1:] != places[:, :-1] + 1) & within).any())
