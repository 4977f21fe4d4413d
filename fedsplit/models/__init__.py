"""Models that are cut into segments: load, run and exchange their adapters."""

from fedsplit.models.bottleneck import Bottleneck
from fedsplit.models.boundary import Boundary, Output
from fedsplit.models.check import check_model, read_tokenizer
from fedsplit.models.crossing import Arrival, Crossing
from fedsplit.models.loading import load
from fedsplit.models.lora import adapter_settings
from fedsplit.models.routes import check_route, possible_cuts
from fedsplit.models.spec import ModelSpec
from fedsplit.models.split import SplitModel

__all__ = [
    "Arrival",
    "Bottleneck",
    "Boundary",
    "Crossing",
    "ModelSpec",
    "Output",
    "SplitModel",
    "adapter_settings",
    "check_model",
    "check_route",
    "load",
    "possible_cuts",
    "read_tokenizer",
]
