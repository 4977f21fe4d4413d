"""What ``fedsplit reproduce --train`` runs, and how it judges; the runs themselves take minutes."""

import numpy as np
import pytest
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import build_scenario
from fedsplit.apps.reproduce.accuracy import judged
from fedsplit.apps.reproduce.papers import PAPERS
from fedsplit.apps.reproduce.study import Row, read
from fedsplit.apps.reproduce.training import COMMON
from fedsplit.apps.sweep import named_members


@pytest.mark.parametrize("paper", PAPERS)
def test_the_scheme_cuts_its_model_and_trains_what_its_baselines_do(paper):
    """A run in which every device keeps the whole model would show nothing of split learning."""
    samples = {}
    train = read(paper).train
    assert list(train)[-1] == paper
    for member in named_members(COMMON, train):
        name, config = member.swept["member"], load_config(member.overrides)
        scenario = build_scenario(config)
        turns = [
            turn
            for server_round in range(1, config.rounds + 1)
            for branch in scenario.plan_round(server_round).branches
            for turn in branch.turns
        ]
        if name == paper:
            assert any(len(turn.route.segments) > 1 for turn in turns)
        samples[name] = sorted((turn.device, turn.steps) for turn in turns)
    # FedsLLM's plan says how long its clients train.
    assert len(set(map(str, samples.values()))) == (2 if paper == "fedsllm" else 1)


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_measured_is_of_members_that_are_trained(paper):
    study = read(paper)
    extra = {"splitllm": {"few copies", "copies"}, "sft": {"lost"}}.get(paper, set())
    for figure in study.measured:
        assert set(figure.ours.split(" / ")) <= study.train.keys() | extra


@pytest.mark.parametrize(("lost", "passed"), [([2.0, 0.5, -1.0], True), ([2.0, 0.5, 1.0], False)])
def test_accuracy_is_judged_by_the_mean_over_seeds(lost, passed):
    uncompressed = np.array([94.0, 93.0, 92.0])
    numbers = {}
    words = judged(numbers, np.array([uncompressed, uncompressed - lost, np.full(3, 6.4)]).T)
    row = Row.over(read("sft").measured[-1], [numbers], words)
    assert row.ours.mean() == pytest.approx(np.mean(lost))
    assert row.passed == passed
    assert f"({min(lost):.1f} to {max(lost):.1f}) points" in row.words.what
    assert "at -93.6 % traffic, mean of 3 seeds" in row.words.what
