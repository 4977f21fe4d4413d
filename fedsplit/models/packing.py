"""Several texts in one row, told apart by position ids that begin again, as transformers does."""

from collections.abc import Mapping

from torch import Tensor


def apart(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments of a model; without the mask if rows hold several texts.

    Where there is no mask, transformers' models let tokens attend within runs of position ids
    only. Padding at a row's end must be a run of its own then.
    """
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None or places is None:
        return dict(inputs)
    within = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if not bool(((places[:, 1:] != places[:, :-1] + 1) & within).any()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name != "attention_mask"}
