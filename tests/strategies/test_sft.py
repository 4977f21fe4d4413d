"""SFT: SplitFed whose cut and compression are planned once, and its spectrum every round."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from fedsplit.strategies.sft import Sft
from fedsplit.strategies.splitfed import SplitFed
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.assets import default_codec_table
from fedsplit.codec import make_codec
from fedsplit.errors import FedsplitError
from fedsplit.plan import CodecPlan, RoundPlan, Turn
from fedsplit.planning import CodecTable, InfeasibleError
from fedsplit.schemes import Scene
from tests.flower.conftest import Federation
from tests.flower.test_strategy import assert_equal
from tests.strategies.scenes import cost, make_scene, scenes

PLAIN = {"codec_table": None, "bandwidth": "equal"}


def turns_of(plan: RoundPlan) -> list[Turn]:
    return [turn for branch in plan.branches for turn in branch.turns]


def table_file(folder: Path, rows: Iterable[tuple[float, float]]) -> str:
    """Write a table whose settings are top-k with the ratio as the part that is kept."""
    lines = [f'{ratio},{loss},topk,"{{""keep"": {ratio}}}"' for ratio, loss in rows]
    file = folder / "table.csv"
    file.write_text("\n".join(["ratio,loss_increase,name,settings", *lines]) + "\n")
    return str(file)


@pytest.mark.parametrize("options", [{}, {"bandwidth": "exact"}])
def test_without_codec_and_with_a_fixed_cut_it_trains_as_splitfed(
    federation: Federation, fedavg: Strategy, options: dict[str, str]
) -> None:
    found, _ = federation.run(Sft(cut=2, **{**PLAIN, **options}), fedavg, rounds=2)
    splitfed, _ = federation.run(SplitFed(cut=2), fedavg, rounds=2)
    assert_equal(found, splitfed, tolerance=0)


def test_planned_compression_is_what_travels(federation: Federation, fedavg: Strategy) -> None:
    plain, before = federation.run(Sft(cut=2, **PLAIN), fedavg)
    found, after = federation.run(Sft(cut=2, max_loss_increase=0.1), fedavg)
    for raw, small in zip(before[1].turns, after[1].turns, strict=True):
        assert small.turn.codec.uplink["name"] != "identity"
        assert small.link_bytes["up"] < 0.7 * raw.link_bytes["up"]
        assert small.link_bytes["down"] == pytest.approx(raw.link_bytes["down"], rel=0.05)
    assert found.keys() == plain.keys()
    assert any(not found[name].equal(plain[name]) for name in plain)


@pytest.mark.parametrize("kind", [FedAdam, FedMedian, Krum])
def test_any_flower_strategy_averages_the_devices(
    federation: Federation, kind: type[FedAvg]
) -> None:
    def inner() -> Strategy:
        return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

    found, _ = federation.run(Sft(cut=2, **PLAIN), inner())
    splitfed, _ = federation.run(SplitFed(cut=2), inner())
    assert_equal(found, splitfed, tolerance=0)


def test_it_classifies_images(digits: Federation, fedavg: Strategy) -> None:
    _, outcomes = digits.run(Sft(max_loss_increase=0.1), fedavg, rounds=2, steps=3)
    assert not any(outcome.failures for outcome in outcomes)
    assert all(turn.turn.codec.uplink["name"] != "identity" for turn in outcomes[2].turns)
    assert outcomes[2].evaluation[0].n_correct is not None


@settings(max_examples=25, deadline=None)
@given(
    scene=scenes(),
    bandwidth=st.sampled_from(["exact", "sqp", "equal"]),
    gradients=st.booleans(),
)
def test_a_plan_keeps_to_band_memory_and_loss(
    scene: Scene, bandwidth: str, gradients: bool
) -> None:
    scheme = Sft(bandwidth=bandwidth, compress_gradients=gradients, max_loss_increase=0.03)
    turns = turns_of(scheme.plan_round(scene))
    assert [turn.device for turn in turns] == list(scene.devices)
    assert len({str(turn.route) for turn in turns}) == 1
    assert 1 <= turns[0].route.cuts[0] < scene.n_blocks
    if bandwidth != "equal":
        assert sum(turn.uplink_hz or 0 for turn in turns) <= scene.channel.uplink_hz * (1 + 1e-9)
    needed = cost(RoundPlan.parallel(turns), scene).device_memory_bytes
    assert (needed <= scene.fleet.devices.memory_bytes).all()
    large = scheme.plan_frame(scene)
    rise = np.average(large.table.loss_increase[large.setting], weights=scene.fleet.samples)
    assert rise <= 0.03 + 1e-9


@pytest.mark.parametrize("period", [None, 4])
def test_a_frame_has_one_plan_whoever_takes_part(period: int | None) -> None:
    """Devices that say how much data they have must not change what was planned before."""
    scheme = Sft(large_period=period)
    everyone = make_scene(4)
    plans = []
    for number, present in enumerate(([0, 1, 2, 3], [0, 3], [0], [1, 2]), start=1):
        # What takes part reports other counts than the configuration has for plans without data.
        samples = {device: 7 * (device + 1) for device in present}
        scene = replace(everyone, server_round=number, samples=samples)
        plans.append(scheme.plan_frame(scene))
    for plan in plans[1:]:
        assert plan.cut == plans[0].cut
        assert plan.ratio.tolist() == plans[0].ratio.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_cut_and_settings_are_the_best_of_all(seed: int, tmp_path: Path) -> None:
    """Every cut with every setting of every device, on the mean channel at equal shares."""
    rows = [(1.0, 0.0), (0.3, 0.02), (0.05, 0.1)]
    scheme = Sft(codec_table=table_file(tmp_path, rows), max_loss_increase=0.05, bandwidth="equal")
    scene = make_scene(3, seed=seed)
    scene = replace(
        scene,
        channel=scene.mean_channel(1),
        codec_ratio=lambda codec: float(str(codec.get("keep", 1.0))),
    )
    weights = np.array(list(scene.samples.values())) / sum(scene.samples.values())
    base = turns_of(SplitFed().plan_round(scene))
    best = np.inf
    for cut, chosen in product(range(1, scene.n_blocks), product(rows, repeat=3)):
        if weights @ [loss for _, loss in chosen] <= 0.05:
            route = SplitFed(cut).plan_round(scene).branches[0].turns[0].route
            plan = RoundPlan.parallel(
                replace(turn, route=route, codec=CodecPlan({"name": "topk", "keep": ratio}))
                for turn, (ratio, _) in zip(base, chosen, strict=True)
            )
            best = min(best, partition_s(plan, scene))
    assert partition_s(scheme.plan_round(scene), scene) == pytest.approx(best, rel=1e-6)


def partition_s(plan: RoundPlan, scene: Scene) -> float:
    """Return the delay on a server that is divided among devices, without averaging."""
    fleet = replace(scene.fleet, serving=replace(scene.fleet.serving, discipline="partition"))
    return cost(plan, replace(scene, fleet=fleet)).delay_s


def test_the_alm_plans_as_the_exact_method_for_equal_blocks() -> None:
    for seed in range(3):
        scene = make_scene(5, seed=seed)
        exact, alm = (
            Sft(solver=solver, max_loss_increase=0.03).plan_frame(scene)
            for solver in ("exact", "alm")
        )
        assert alm.cut == exact.cut
        assert alm.round_s == pytest.approx(exact.round_s, rel=1e-6)


def test_the_large_plan_holds_for_its_frame_and_the_band_moves_every_round() -> None:
    scheme = Sft(large_period=3, max_loss_increase=0.03)
    rounds = [make_scene(6, server_round=round_, walking=True) for round_ in range(1, 8)]
    frames = [scheme.plan_frame(scene) for scene in rounds]
    for first, later in ((0, 1), (0, 2), (3, 4), (3, 5)):
        assert frames[later].round_s == frames[first].round_s
        assert frames[later].setting.tolist() == frames[first].setting.tolist()
    assert len({frame.round_s for frame in (frames[0], frames[3], frames[6])}) == 3
    shares = [tuple(turn.uplink_hz for turn in turns_of(scheme.plan_round(s))) for s in rounds]
    assert len(set(shares)) == len(shares)


def test_a_run_that_is_resumed_plans_the_same() -> None:
    """A plan depends on its scene alone, not on what was planned before; nor on who is away."""
    used, fresh = Sft(large_period=2), Sft(large_period=2)
    for round_ in (1, 2, 3):
        used.plan_round(make_scene(5, server_round=round_, walking=True))
    scene = make_scene(5, server_round=4, walking=True)
    assert used.plan_round(scene) == fresh.plan_round(scene)
    some = make_scene(5, server_round=4, walking=True, present=[1, 3])
    routes = {str(turn.route) for s in (scene, some) for turn in turns_of(fresh.plan_round(s))}
    assert len(routes) == 1


@pytest.mark.parametrize("seed", range(3))
def test_dividing_the_band_by_need_beats_equal_shares(seed: int) -> None:
    table = CodecTable.read_csv(default_codec_table())

    def ratio(codec: Mapping[str, object]) -> float:
        return float(table.ratio[table.settings.index(dict(codec))])

    scene = replace(make_scene(6, seed=seed), codec_ratio=ratio)
    delay = {
        how: partition_s(Sft(cut=2, bandwidth=how).plan_round(scene), scene)
        for how in ("exact", "sqp", "equal")
    }
    assert delay["exact"] < delay["equal"]
    assert delay["sqp"] == pytest.approx(delay["exact"], rel=1e-3)


def test_the_table_that_ships_names_codecs_that_exist() -> None:
    table = CodecTable.read_csv(default_codec_table())
    for settings_ in table.settings:
        make_codec(settings_, seed=0)
    best = table.envelope()
    assert best.ratio[0] < 0.1 < best.ratio[-1]
    assert best.loss_increase[-1] <= 0 < best.loss_increase[0]


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"solver": "guess"}, r"strategy\.solver='guess'.*exact, alm"),
        ({"bandwidth": "free"}, r"strategy\.bandwidth='free'"),
        ({"large_period": 0}, r"strategy\.large_period=0: must be null or at least 1"),
        ({"codec_table": str(tmp_path / "none.csv")}, r"none\.csv"),
    ):
        with pytest.raises(FedsplitError, match=message):
            Sft(**options)  # type: ignore[arg-type]
    harsh = table_file(tmp_path, [(0.1, 0.5)])
    with pytest.raises(InfeasibleError, match="loss increase"):
        Sft(codec_table=harsh, max_loss_increase=0.1).plan_round(make_scene(3))
