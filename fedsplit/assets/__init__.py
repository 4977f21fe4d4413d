"""What ships with fedsplit: a small language model, and codec settings measured on it."""

from fedsplit.assets._locate import default_checkpoint, default_codec_table

__all__ = ["default_checkpoint", "default_codec_table"]
