"""Cuts that run: wherever a graph is cut, both parts together train as the whole model does."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

from fedsplit.errors import FedsplitError
from fedsplit.layergraph import LayerGraph
from fedsplit.models.graph_export import export


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        use_cache=False,
        tie_word_embeddings=False,
    )
    ids = torch.randint(0, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return GPT2LMHeadModel(config), {"input_ids": ids, "attention_mask": mask, "labels": ids}


def resnet50() -> tuple[nn.Module, dict[str, Tensor]]:
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    model = ResNetForImageClassification(ResNetConfig(num_labels=10))
    return model, {"pixel_values": images, "labels": labels}


class Branches(nn.Module):
    """Two branches, the tensor that both read overwritten in one, and joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        stem = self.norm(self.stem(x)).relu_()
        left = self.left(stem)
        right = self.right(stem).relu_()
        joined = torch.cat([left, right, left * right], dim=1)
        return nn.functional.cross_entropy(joined.relu_(), labels)


def branches() -> tuple[nn.Module, dict[str, Tensor]]:
    return Branches(), {"x": torch.randn(5, 6), "labels": torch.arange(5)}


def some_cuts(graph: LayerGraph, count: int, seed: int = 0) -> list[np.ndarray]:
    """Return device parts: the inputs, everything, and the ancestors of random vertices."""
    rng = np.random.default_rng(seed)
    needs = np.concatenate([graph.edges[:, ::-1], graph.requires])
    cuts = [np.arange(graph.n) < graph.n_inputs, np.ones(graph.n, bool)]
    for _ in range(count):
        device = np.arange(graph.n) < graph.n_inputs
        device[rng.integers(0, graph.n, size=rng.integers(1, 4))] = True
        while (missing := needs[device[needs[:, 0]] & ~device[needs[:, 1]], 1]).size:
            device[missing] = True
        cuts.append(device)
    return cuts


def check(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]], count: int) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    # In double precision, so that nothing but the order of sums may differ.
    model.double().train()
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    whole = copy.deepcopy(model)
    result = whole(**inputs)
    loss = getattr(result, "loss", result)
    loss.backward()
    start = copy.deepcopy(model.state_dict())
    exported = export(model, inputs)
    n_boundary = set()
    for device in some_cuts(exported.graph, count):
        model.load_state_dict(start)
        model.zero_grad()
        parts = exported.split(device)
        assert torch.equal(parts.step(*inputs.values()), loss.detach())
        for (name, expected), parameter in zip(
            whole.named_parameters(), model.parameters(), strict=True
        ):
            assert expected.grad is not None
            assert parameter.grad is not None, name
            scale = float(expected.grad.abs().max())
            close = torch.allclose(parameter.grad, expected.grad, rtol=1e-9, atol=1e-9 * scale)
            assert close, f"{name} at {parts.boundary}"
        for (name, expected), buffer in zip(whole.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(buffer, expected), f"{name} at {parts.boundary}"
        n_boundary.add(len(parts.boundary))
    assert max(n_boundary) > 2


def test_branches_with_overwritten_tensors() -> None:
    check(branches, 20)


def test_gpt2() -> None:
    check(gpt2, 6)


def test_resnet50() -> None:
    check(resnet50, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "googlenet", "inception_v3"])
def test_torchvision(name: str, torchvision_models: object) -> None:
    size = 96 if name == "inception_v3" else 64

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            changes = {} if name == "densenet121" else {"aux_logits": False, "init_weights": False}
            self.model = getattr(torchvision_models, name)(num_classes=10, **changes)
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.model(x), labels)

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        return WithLoss(), {"x": torch.randn(2, 3, size, size), "labels": torch.tensor([1, 2])}

    check(build, 3)


@pytest.fixture(scope="module")
def torchvision_models() -> object:
    """Return torchvision's models, though its wheel may be made for another build of torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("torchvision").models


def test_what_crosses_is_what_the_graph_says() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2])
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 0])}
    exported = export(ResNetForImageClassification(config).train(), inputs)
    graph = exported.graph
    for device in some_cuts(graph, 4)[2:]:
        sent = exported.split(device).device(*inputs.values())
        raw = sum(tensor.numel() * tensor.element_size() for tensor in sent)
        assert raw == 2 * graph.output_bytes[graph.crossing(device)].sum()


def test_a_device_without_what_it_needs_is_refused() -> None:
    model, inputs = branches()
    exported = export(model, inputs)
    device = np.ones(exported.graph.n, bool)
    device[exported.graph.n_inputs] = False
    with pytest.raises(FedsplitError, match="not inside"):
        exported.split(device)
