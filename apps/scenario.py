"""The modelled system that a configuration describes."""

import json
from dataclasses import replace
from functools import cache

from omegaconf import DictConfig

from fedsplit.codec import make_codec
from fedsplit.data.spec import LONGEST
from fedsplit.errors import FedsplitError, SettingsError, require, within
from fedsplit.fleet import measured_fleet
from fedsplit.flower.system import System, make_system
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.measured import MeasuredProfile
from fedsplit.models import ModelSpec, check_model
from fedsplit.models.names import IMAGES
from fedsplit.models.profile import profile_model
from fedsplit.plan import SERVER, RoundPlan
from fedsplit.profiles import ModelProfile
from fedsplit.schemes import Scheme, planned_evaluation
from fedsplit.schemes.turnout import CARRY, DROP, Waiting, turn_out
from fedsplit.wireless import ChannelSpec

from .audited import within_audit
from .config import codec_plan, fleet_spec, model_spec, optimizer_spec
from .values import plain
from .work import local_work


def build_system(config: DictConfig) -> System:
    """Return the system that the configuration describes.

    Raises
    ------
    FedsplitError
        If a part of the configuration is wrong; names the group, the field and what is allowed.
    """
    spec = model_spec(config)
    # What a model costs does not depend on its weights.
    model = json.dumps(to_mapping(replace(spec, seed=0)), sort_keys=True)
    system = make_system(
        spec,
        fleet=fleet_spec(config),
        channel=from_mapping(ChannelSpec, plain(config.channel), "channel"),
        work=local_work(config),
        optimizer=optimizer_spec(config),
        codec=codec_plan(config),
        seed=config.seed,
        profile=_profile(model, config.data.get("seq_len", 1)),
    )
    return within_audit(_measured(system, config), config)


def _measured(system: System, config: DictConfig) -> System:
    """Return `system` with the server that ``fleet.server_profile`` measured, if it names one."""
    file = config.fleet.get("server_profile")
    if file is None:
        return system
    profile = system.profile
    try:
        found = MeasuredProfile.read(file)
    except FedsplitError as error:
        allowed = f"a file of `fedsplit measure` ({error})"
        raise SettingsError("fleet.server_profile", file, allowed) from error
    allowed = (
        f"of {profile.name}, {profile.n_blocks} blocks, with {profile.seq_len} tokens a sample"
    )
    require(found.fits(profile), "fleet.server_profile", file, allowed)
    fleet = measured_fleet(system.fleet, system.profile, {(SERVER, 0): found})
    return replace(system, fleet=fleet)


def check_first_round(scheme: Scheme, system: System, waiting: Waiting | None = None) -> RoundPlan:
    """Return what of a scheme's first round is in time; refuse one that cannot be carried out.

    Raises
    ------
    PlanError
        Naming the device and what is wrong.
    SettingsError
        If late devices are to be carried where all train one after the other.
    """
    everyone = dict(enumerate(system.fleet.samples.tolist()))
    scene = system.scene(1, everyone)
    with within("strategy"):
        turnout = turn_out(scheme, scene, waiting)
        planned_evaluation(scheme, scene)
    branches = turnout.plan.branches
    if waiting is not None and waiting.late == CARRY:
        side_by_side = len(branches) > 1 or len(everyone) == 1
        allowed = f"{DROP} where all devices train in one branch, which is never late"
        require(side_by_side, "run.late", CARRY, allowed)
    return RoundPlan(tuple(branches[place] for place in turnout.in_time))


def require_frozen(config: DictConfig, plan: RoundPlan) -> None:
    """Refuse what does not go with boundaries that are sent once, if a turn of `plan` has them."""
    if not any(turn.frozen for branch in plan.branches for turn in branch.turns):
        return
    where = "with devices that only infer (train.device_adapters=false, or by the scheme)"
    padding, uplink = config.data.get("padding"), codec_plan(config).uplink
    require(padding != LONGEST, "data.padding", padding, f"fixed {where}")
    remembers = make_codec(uplink, 0).remembers
    require(not remembers, "codec.uplink.name", uplink["name"], f"one without memory {where}")
    require(not config.run.edge_nodes, "run.edge_nodes", True, f"false {where}")
    for name in ("correlation_weight", "reader_weight"):
        weight = plain(config.privacy).get(name, 0)
        require(weight == 0, f"privacy.{name}", weight, f"0 {where}")


@cache
def _profile(model: str, seq_len: int) -> ModelProfile:
    """Check and profile a model once, however many scenarios sweep over something else."""
    spec = from_mapping(ModelSpec, json.loads(model), "model")
    check_model(spec, None if spec.task == IMAGES else seq_len)
    return profile_model(spec, seq_len)
