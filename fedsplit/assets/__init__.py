"""The small language model that ships with fedsplit, so that the default job downloads nothing."""

from fedsplit.assets._locate import default_checkpoint

__all__ = ["default_checkpoint"]
