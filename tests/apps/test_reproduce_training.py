"""What ``fedsplit reproduce --train`` runs, and how it judges; the runs themselves take minutes."""

import numpy as np
import pytest
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import build_scenario
from fedsplit.apps.reproduce.accuracy import Accuracy
from fedsplit.apps.reproduce.common import Row
from fedsplit.apps.reproduce.papers import PAPERS
from fedsplit.apps.reproduce.training import COMMON, RUNS, Trained, accuracy_figure

from fedsplit.report import RoundRecord


def test_every_paper_is_trained():
    assert RUNS.keys() == PAPERS.keys()
    assert all(paper == list(runs)[-1] for paper, runs in RUNS.items())


@pytest.mark.parametrize("paper", RUNS)
def test_the_scheme_cuts_its_model_and_trains_what_its_baselines_do(paper):
    """A run in which every device keeps the whole model would show nothing of split learning."""
    samples = {}
    for name, overrides in RUNS[paper].items():
        config = load_config([*COMMON, *overrides])
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


def test_a_run_says_what_it_took():
    rounds = [
        RoundRecord(0, eval_loss=4.0, bytes_up={"device": 10**6}),
        RoundRecord(1, eval_loss=3.5, bytes_up={"device": 10**6}, modelled={"delay_s": 2.0}),
        RoundRecord(2, eval_loss=3.25, bytes_up={"device": 10**6}, modelled={"delay_s": 2.5}),
    ]
    text = str(Trained((*COMMON, "strategy=splitfed"), rounds))
    assert text == (
        "3.2500 (cuts 2, 2, 2, 2 at first; 2 rounds of 6 mini-batches a device, 3.0 MB up, "
        "4.5 s modelled)"
    )


@pytest.mark.parametrize(("lost", "passed"), [([2.0, 0.5, -1.0], True), ([2.0, 0.5, 1.0], False)])
def test_accuracy_is_judged_by_the_mean_over_seeds(lost, passed):
    uncompressed = np.array([0.94, 0.93, 0.92])
    found = Accuracy(uncompressed, uncompressed - np.array(lost) / 100, np.full(3, 0.064))
    figure = accuracy_figure(found)
    assert figure.ours == pytest.approx(np.mean(lost))
    assert Row.over([figure]).passed == passed
    assert f"({min(lost):.1f} to {max(lost):.1f}) points" in figure.name
    assert "3 seeds" in figure.name
