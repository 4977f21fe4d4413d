"""One besieged server for all attacks."""

from collections.abc import Iterator

import pytest

from tests.tiny_split import Cluster
from tests.trust.besieged import SPEC, Besieged


@pytest.fixture(scope="session")
def besieged() -> Iterator[Besieged]:
    """Return the server, and the honest device."""
    with Cluster(SPEC) as cluster:
        yield Besieged(cluster)
