"""FedsLLM: split federated learning whose local accuracy and bandwidth minimise training time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.plan import RoundPlan, Turn
from fedsplit.planning import (
    CutCosts,
    FedsllmProblem,
    LearningCurve,
    plan_fedsllm,
    uplink_snr_hz,
)
from fedsplit.planning.fedsllm import SMASHED_PER
from fedsplit.schemes import Cut, CutRule, Scene, Scheme

THEORY = {"smoothness": 1.0, "convexity": 1.0, "step": 0.1, "xi": 0.1, "target": 1e-3}
"""L, gamma, delta, xi and epsilon of the convergence proof."""


class FedsLlm(Scheme):
    """N branches of one client each; the plan says how long they train and who gets which band.

    A client sends smashed data to the main server and its adapters to the federated server, each
    over a band of its own; here both are parts of the uplink, and a client holds its two shares
    all the time. A round has ``v log2(1 / eta)`` mini-batches, rounded up, in place of the
    configured ones.

    Parameters
    ----------
    cut : int, str or mapping
        Blocks on the client, or the scheme whose cuts are taken (`fedsplit.schemes.CutRule`).
    accuracy : float, optional
        Local accuracy eta, above 0 and below 1; by default the one of least total delay.
    equal_bandwidth : bool
        Give every client the same band, as the unoptimised scheme does.
    learning : mapping, optional
        Either ``smoothness, convexity, step, xi, target`` of the proof, or ``iterations, rounds``
        (v and a) as fitted to runs; `THEORY` by default.
    smashed_per : str
        "round" plans with one mini-batch of smashed data a round, as the paper does; "iteration"
        with what is really sent.
    fed_share : float
        Part of the uplink that is for adapters, above 0 and below 1.
    server_time : bool
        Whether the plan counts the main server's computing, shared equally among the clients.

    Notes
    -----
    K. Zhao et al., "FedsLLM: Federated Split Learning for Large Language Models over Communication
    Networks", arXiv 2407.09250, 2024.
    """

    def __init__(
        self,
        cut: Cut = 2,
        *,
        accuracy: float | None = None,
        equal_bandwidth: bool = False,
        learning: Mapping[str, float] | None = None,
        smashed_per: str = "round",
        fed_share: float = 0.5,
        server_time: bool = False,
    ) -> None:
        allowed = "above 0 and below 1"
        require(accuracy is None or 0 < accuracy < 1, "strategy.accuracy", accuracy, allowed)
        require(0 < fed_share < 1, "strategy.fed_share", fed_share, allowed)
        require_choice("strategy.smashed_per", smashed_per, SMASHED_PER)
        self.cuts = CutRule(cut)
        self.accuracy = accuracy
        self.equal_bandwidth = equal_bandwidth
        self.learning = _learning_curve(THEORY if learning is None else learning)
        self.smashed_per = smashed_per
        self.fed_share = fed_share
        self.server_time = server_time

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Choose local accuracy, hence steps, and divide the uplink."""
        turns = self.cuts.turns(scene, at_once=len(scene.devices))
        plan = plan_fedsllm(
            self._problem(scene, turns), self.accuracy, equal_bandwidth=self.equal_bandwidth
        )
        # Rounding first: 3 steps must not become 4 by the last digit of a logarithm.
        steps = max(math.ceil(round(plan.local_iterations, 9)), 1)
        return RoundPlan.parallel(
            replace(turn, steps=steps, uplink_hz=float(band_hz))
            for turn, band_hz in zip(turns, plan.main_hz + plan.fed_hz, strict=True)
        )

    def _problem(self, scene: Scene, turns: Sequence[Turn]) -> FedsllmProblem:
        fleet, devices, band_hz = scene.fleet, np.array(scene.devices), scene.channel.uplink_hz
        alone = any(len(turn.route.segments) == 1 for turn in turns)
        costs = CutCosts.from_profile(scene.profile, scene.work.batch_size, device_only=alone)
        cut = np.array([turn.route.segments[0].stop for turn in turns])
        snr_hz = uplink_snr_hz(scene.channel)[devices]
        shared_flops_per_s = float(fleet.servers.flops[0]) / len(devices)
        return FedsllmProblem(
            device_s=costs.device_flops[cut] / fleet.devices.flops[devices],
            server_s=costs.server_flops[cut] / shared_flops_per_s if self.server_time else 0.0,
            smashed_bits=costs.uplink_bits[cut] * scene.codec_ratio(scene.codec.uplink),
            adapter_bits=costs.adapter_bits[cut],
            main_snr_hz=snr_hz,
            fed_snr_hz=snr_hz,
            main_hz=(1 - self.fed_share) * band_hz,
            fed_hz=self.fed_share * band_hz,
            learning=self.learning,
            smashed_per=self.smashed_per,
        )


def _learning_curve(settings: Mapping[str, float]) -> LearningCurve:
    if settings.keys() == THEORY.keys():
        return LearningCurve.from_constants(**settings)
    if settings.keys() == {"iterations", "rounds"}:
        return LearningCurve(**settings)
    raise FedsplitError(
        f"strategy.learning={dict(settings)}: must have either {', '.join(THEORY)} or "
        "iterations, rounds"
    )
