"""Schemes that really train."""

from tests.flower.conftest import fedavg, federation

__all__ = ["fedavg", "federation"]
