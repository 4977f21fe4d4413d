"""The groups ``link`` and ``run``: how nodes reach servers, how long who waits, what is taken."""

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from fedsplit.errors import SettingsError, require
from fedsplit.mapping import from_mapping
from fedsplit.patience import Patience

from .values import plain, without

if TYPE_CHECKING:
    from fedsplit.flower import LinkSettings
    from fedsplit.transport import ServerLimits

RUN_LIMITS = ("connect_s", "start_s", "deadline_s", "last_words_s")
_LINK_LIMITS = ("reply_s", "backward_s", "ping_s")
_LINK_ROOM = ("streams", "streams_per_peer", "memory_bytes", "memory_per_peer_bytes", "held_bytes")


def link_settings(config: DictConfig) -> "LinkSettings":
    """Return the ``link`` group: how devices and edges reach the server."""
    from fedsplit.flower import LinkSettings

    settings = from_mapping(
        LinkSettings, without(plain(config.link), (*_LINK_LIMITS, *_LINK_ROOM)), "link"
    )
    secured = settings.certificate is not None
    require(settings.bind is not None or not secured, "link.bind", None, "given with a certificate")
    return settings


def patience(config: DictConfig) -> Patience:
    """Return how long who waits for whom: the time limits of the groups ``run`` and ``link``."""
    places = {
        name: f"{group}.{name}"
        for group, names in (("run", RUN_LIMITS), ("link", _LINK_LIMITS))
        for name in names
    }
    try:
        limits = {name: OmegaConf.select(config, place) for name, place in places.items()}
        return from_mapping(Patience, limits, "limits")
    except SettingsError as error:
        name = error.field.rpartition(".")[2]
        raise SettingsError(places[name], error.value, error.allowed) from error


def server_limits(config: DictConfig) -> "ServerLimits":
    """Return what servers take from their peers: the rest of the group ``link``.

    As many steps wait at a server as the modelled ones let wait, so that plans are of what runs.
    """
    from fedsplit.transport import ServerLimits

    values = plain(config.link)
    room = {name: values[name] for name in _LINK_ROOM}
    waiting = config.fleet.serving.waiting_steps
    if waiting is not None:
        room["waiting_steps"] = waiting
    return from_mapping(ServerLimits, room, "link")
