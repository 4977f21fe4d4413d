"""What a round should look like: cuts, bands, clocks, codecs and groups; arrays in, plans out."""

from fedsplit.planning.association import (
    Association,
    associate_by_channel,
    associate_by_load,
    select_users,
)
from fedsplit.planning.bandwidth import (
    Allocation,
    equal_shares,
    evaluate_shares,
    minmax_shares,
)
from fedsplit.planning.card import CardPlan, ServerClock, plan_card
from fedsplit.planning.codec_table import CodecTable
from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.cut import CutResult, CutSolver
from fedsplit.planning.cut_cost import CutCost, CutLimits, CutSystem
from fedsplit.planning.errors import InfeasibleError
from fedsplit.planning.exact import ExactSplit, SplitProblem, split_exactly
from fedsplit.planning.fedsllm import FedsllmPlan, FedsllmProblem, LearningCurve, plan_fedsllm
from fedsplit.planning.grouping import Grouping, balanced_groups, exact_groups, random_groups
from fedsplit.planning.joint import JointPlan, plan_joint
from fedsplit.planning.pools import LinearPool, Pool, ShannonPool, shannon_bps
from fedsplit.planning.scan import fastest_cuts
from fedsplit.planning.sft import SftPlan, SftProblem, plan_large_timescale, plan_small_timescale
from fedsplit.planning.sft_alm import AlmResult, plan_large_timescale_alm
from fedsplit.planning.sqp import minmax_shares_sqp
from fedsplit.planning.system import devices_of, downlink_efficiency, server_of, uplink_snr_hz
from fedsplit.planning.ways import Way, ways_to_train
from fedsplit.planning.weighted import plan_weighted
from fedsplit.planning.weighted_problem import WeightedPlan, WeightedProblem

__all__ = [
    "Allocation",
    "AlmResult",
    "Association",
    "CardPlan",
    "CodecTable",
    "CutCost",
    "CutCosts",
    "CutLimits",
    "CutResult",
    "CutSolver",
    "CutSystem",
    "Devices",
    "ExactSplit",
    "FedsllmPlan",
    "FedsllmProblem",
    "Grouping",
    "InfeasibleError",
    "JointPlan",
    "LearningCurve",
    "LinearPool",
    "Pool",
    "ServerClock",
    "SftPlan",
    "SftProblem",
    "ShannonPool",
    "SplitProblem",
    "Way",
    "WeightedPlan",
    "WeightedProblem",
    "associate_by_channel",
    "associate_by_load",
    "balanced_groups",
    "devices_of",
    "downlink_efficiency",
    "equal_shares",
    "evaluate_shares",
    "exact_groups",
    "fastest_cuts",
    "minmax_shares",
    "minmax_shares_sqp",
    "plan_card",
    "plan_fedsllm",
    "plan_joint",
    "plan_large_timescale",
    "plan_large_timescale_alm",
    "plan_small_timescale",
    "plan_weighted",
    "random_groups",
    "select_users",
    "server_of",
    "shannon_bps",
    "split_exactly",
    "uplink_snr_hz",
    "ways_to_train",
]
