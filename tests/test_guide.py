"""The frozen guide."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from scale_guide import Guidance
from scale_guide.guide import Guide, fingerprint


def test_nothing_flips_it_and_nothing_trains_it() -> None:
    guide = Guide(resnet18(num_classes=4))
    holder = nn.ModuleList([guide]).train()
    assert not any(module.training for module in holder[0].modules())
    output = guide(torch.randn(2, 3, 32, 32, requires_grad=True))
    assert not output.requires_grad
    assert not any(p.requires_grad for p in guide.parameters())
    before = guide.model.bn1.running_mean.clone()
    guide(torch.randn(2, 3, 32, 32))
    assert torch.equal(before, guide.model.bn1.running_mean)


def test_dtype() -> None:
    assert Guide(nn.Linear(2, 2)).dtype == torch.float32
    assert Guide(nn.Linear(2, 2), dtype="bf16")(torch.ones(1, 2)).dtype == torch.bfloat16
    embedding = Guide(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), dtype="bf16")
    assert embedding(torch.tensor([1, 2])).dtype == torch.bfloat16


def test_fingerprint() -> None:
    torch.manual_seed(3)
    first = nn.Linear(3, 3)
    torch.manual_seed(3)
    same = nn.Linear(3, 3)
    assert fingerprint(first) == fingerprint(same) == Guide(same, dtype="bf16").fingerprint()
    with torch.no_grad():
        first.weight[0, 0] += 1e-6
    assert fingerprint(first) != fingerprint(same)


def test_batch_norm_modes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(50, 3) * 4 + 7
    assert torch.allclose(Guide(model)(x), x / (1 + 1e-5) ** 0.5, atol=1e-4)
    own = Guide(nn.Sequential(nn.BatchNorm1d(3)), batch_norm="batch")(x)
    assert torch.allclose(own.mean(0), torch.zeros(3), atol=1e-5)
    calibrated = Guide(nn.Sequential(nn.BatchNorm1d(3)), batch_norm="calibrate")
    with pytest.raises(ValueError, match=r"guide\.calibrate"):
        calibrated(x)
    calibrated.calibrate(x)
    assert torch.allclose(calibrated(x).mean(0), torch.zeros(3), atol=1e-5)
    assert not torch.allclose(calibrated(x + 3).mean(0), torch.zeros(3), atol=1e-2)


def test_an_overflowing_guide_is_an_error_that_names_the_layer_and_the_way_out() -> None:
    guide = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(guide[0].weight, 1.0)
    nn.init.constant_(guide[1].weight, 3e4)
    target = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.ones(8, 4)
    guidance = Guidance(target, Guide(guide, dtype="fp16"), guide_layers=["0", "1"], target_layers=["0", "1"])
    with guidance.record():
        guidance.run_guide(x)
        target(x)
    with pytest.raises(ValueError, match=r"guide.dtype=fp16.*layer '1' hold inf or NaN. Use bf16"):
        guidance.loss()
