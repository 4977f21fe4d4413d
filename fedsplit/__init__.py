"""Split federated fine-tuning of large models over wireless networks, on top of Flower."""

from pathlib import Path

# Installed, the schemes and the command line are packages in this one, so that nobody's own
# `apps` or `strategies` are taken for them; in a checkout their folders lie beside it.
_here = Path(__file__).resolve().parent
if not (_here / "apps").is_dir():
    __path__.append(str(_here.parent))
