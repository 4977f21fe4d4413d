"""Which tokens of a mini-batch have to cross a cut: all but padding on which nothing depends."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor

from fedsplit.models import SplitModel
from fedsplit.models.crossing import IGNORED_LABEL
from fedsplit.models.routes import ignores_padding
from fedsplit.plan import Segment

# By cut and side; finding the answer, even one that is kept, reads the model's configuration.
_KNOWN: WeakKeyDictionary[SplitModel, dict[tuple[int, bool], bool]] = WeakKeyDictionary()


def kept_of(model: SplitModel, segment: Segment, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens of a mini-batch hold something for the tiers behind `segment`.

    Parameters
    ----------
    model : SplitModel
        Of the first tier.
    segment : Segment
        What it runs.
    inputs : mapping of str to Tensor
        The mini-batch, with labels.

    Returns
    -------
    Tensor or None
        Boolean ``[batch, tokens]``; None if all do, the model depends on its padding, or what a
        padding token predicts is learnt.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    where = (mask != 0).cpu()
    labels = inputs["labels"].cpu()
    if labels.dim() == 2 and bool((labels[:, 1:] != IGNORED_LABEL)[~where[:, :-1]].any()):
        return None
    left, right = bool((~where[:, 0]).any()), bool((where[:, :-1] & ~where[:, 1:]).any())
    sides = [side for side, present in ((True, left), (False, right)) if present]
    return where if all(_ignores(model, segment.stop, side) for side in sides) else None


def _ignores(model: SplitModel, cut: int, left: bool) -> bool:
    known = _KNOWN.setdefault(model, {})
    if (cut, left) not in known:
        known[cut, left] = ignores_padding(model.spec, cut, left)
    return known[cut, left]
