"""Graphs of models: nothing is lost, nothing free is kept, and no weights are needed."""

import resource
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec
from fedsplit.models.blocks import find_blocks
from fedsplit.models.graph import _pack, _vertices, layer_graph
from fedsplit.models.graph_trace import trace
from fedsplit.models.private import GROUPED_MM
from fedsplit.models.profile import profile_graph
from fedsplit.planning import CutSolver, CutSystem

TEXT = {"vocab_size": 64, "num_attention_heads": 4, "use_cache": False}


def gpt2(**changes: object) -> nn.Module:
    settings = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "use_cache": False}
    return GPT2LMHeadModel._from_config(
        GPT2Config(**{**settings, **changes}), attn_implementation="eager"
    )


def llama() -> nn.Module:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, **TEXT)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def mixtral() -> nn.Module:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_key_value_heads=4,
        num_local_experts=4,
        **TEXT,
    )
    return MixtralForCausalLM._from_config(config, attn_implementation="eager")


def resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck"
    )
    return ResNetForImageClassification(config)


def text(batch: int = 2) -> dict[str, Tensor]:
    ids = torch.zeros(batch, 10, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.long)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "gpt2": (gpt2, text),
    "llama": (llama, text),
    "resnet": (resnet, image),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts_on_a_real_step(name: str) -> None:
    build, inputs = MODELS[name]
    model = build().train()
    graph = layer_graph(model, inputs())
    with FlopCounterMode(display=False) as forward:
        loss = model(**inputs()).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert graph.forward_flops.sum() * 2 == forward.get_total_flops()
    assert graph.backward_flops.sum() * 2 == backward.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_folding_keeps_costs_and_the_best_cut(name: str) -> None:
    build, inputs = MODELS[name]
    traced = trace(build().train(), inputs())
    whole = _pack(_vertices(traced), traced, 2, name)
    folded = layer_graph(build().train(), inputs())
    assert folded.n < 0.7 * whole.n
    for cost in ("forward_flops", "backward_flops", "parameter_bytes", "activation_bytes"):
        assert getattr(folded, cost).sum() == pytest.approx(getattr(whole, cost).sum())
    rng = np.random.default_rng(0)
    for _ in range(40):
        rates = 10.0 ** rng.uniform([6, 6, 4, 4], [10, 10, 9, 9])
        names = ("device_flops_per_s", "server_flops_per_s", "uplink_bps", "downlink_bps")
        system = CutSystem(**dict(zip(names, rates.tolist(), strict=True)), steps=3, batch=4)
        best = CutSolver(whole).solve(system, method="general").objective
        assert CutSolver(folded).solve(system).objective == pytest.approx(best, rel=2e-6)


def test_a_view_joins_its_tensor_and_a_mask_is_no_vertex() -> None:
    graph = layer_graph(llama(), text())
    assert not {"view", "transpose", "unsqueeze", "arange", "cos", "le"} & set(graph.labels)
    assert graph.labels[:3] == ("input_ids", "attention_mask", "labels")
    assert graph.n_inputs == 3


class Overwriting(nn.Module):
    """Reads a tensor, then overwrites it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        read = self.second(hidden.detach())
        hidden.mul_(2.0)
        return (read @ hidden).sum()


def test_reads_come_before_an_overwrite_on_the_device_too() -> None:
    graph = layer_graph(Overwriting(), {"x": torch.zeros(4, 4)})
    (overwrite,) = (v for v in range(graph.n) if "mul_" in graph.members[v])
    assert graph.requires[:, 0].tolist() == [overwrite]
    (reader,) = graph.requires[:, 1]
    device = np.ones(graph.n, bool)
    device[reader:] = False
    device[overwrite] = True
    with pytest.raises(FedsplitError, match="mul_"):
        graph.check_device(device)


def test_a_tied_weight_stays_whole_if_it_is_trained_and_is_copied_if_not() -> None:
    trained = layer_graph(gpt2(), text())
    n_head = 64 * 32 * 4
    ties = {tuple(pair) for pair in trained.requires.tolist()}
    assert len(ties) == 2
    first, last = min(ties)
    assert (last, first) in ties
    assert trained.labels[first] == "embedding"
    frozen_model = gpt2()
    frozen_model.lm_head.requires_grad_(False)
    frozen = layer_graph(frozen_model, text())
    assert len(frozen.requires) == 0
    extra = frozen.parameter_bytes.sum() - trained.parameter_bytes.sum()
    assert extra == n_head


@pytest.mark.skipif(GROUPED_MM is None, reason="experts are counted from torch 2.8 on")
def test_experts_count_for_the_tokens_that_they_see() -> None:
    graph = layer_graph(mixtral(), text())
    tokens, chosen, per_token = 10, 2, 3 * 2 * 32 * 48
    experts = sum(
        graph.forward_flops[v] for v in range(graph.n) if "_grouped_mm" in graph.members[v]
    )
    assert experts == pytest.approx(2 * tokens * chosen * per_token, rel=0.02)


def test_vertices_know_their_block() -> None:
    model = gpt2()
    graph = layer_graph(model, text(), find_blocks(model))
    assert graph.n_blocks == 3
    assert set(graph.block.tolist()) == {-1, 0, 1, 2, 3}
    per_block = [graph.forward_flops[graph.block == index].sum() for index in range(3)]
    assert per_block[0] == per_block[1] == per_block[2] > 0


def test_a_model_of_seven_billion_parameters_takes_no_weight_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = profile_graph(ModelSpec(model_type="llama"), seq_len=64)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert graph.parameter_bytes.sum() > 4 * 6.7e9
    assert grown < 300e6
    assert 500 < graph.n < 1500


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


class NoLoss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_models_that_cannot_be_traced_are_refused() -> None:
    with pytest.raises(FedsplitError, match="depends on the data"):
        layer_graph(DataDependent(), {"x": torch.zeros(3)})
    with pytest.raises(FedsplitError, match="scalar loss"):
        layer_graph(NoLoss(), {"x": torch.zeros(3)})
