from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from models import FAMILIES, NORMS


def spec(name: str = "convnet", **changed: object) -> models.NetSpec:
    settings: dict[str, object] = {"channels": 3, "classes": 7, "side": 32}
    return models.resolve(name, **{**settings, **changed})  # type: ignore[arg-type]  # a mixed bag of test settings


@pytest.mark.parametrize("side", [8, 16, 28, 32, 50])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_gives_logits_embedding_and_features(name: str, norm: str, side: int) -> None:
    if norm == "instance" and name != "convnet" and side == 8:
        with pytest.raises(ValueError, match="instance norm erases"):
            models.build(spec(name, norm=norm, side=side))
        return
    net = models.build(spec(name, norm=norm, side=side, channels=1, width=8)).eval()
    x = torch.randn(2, 1, side, side)
    assert net(x).shape == (2, 7)
    features = net.features(x)
    assert len(features) == {"convnet": 3}.get(name, 4)
    assert all(f.dim() == 4 and len(f) == 2 for f in features)
    assert net.embed(x).shape == (2, net.classifier.in_features)
    torch.testing.assert_close(net.classifier(net.embed(x)), net(x))
    assert features[-1].std() > 0


def test_the_convnet_is_the_published_one() -> None:
    net = models.build(spec(classes=10))
    assert net.classifier.in_features == 2048
    assert sum(p.numel() for p in net.parameters()) == 320_010
    mnist = models.build(spec(channels=1, side=28))
    assert mnist.classifier.in_features == 2048
    assert mnist.features(torch.zeros(1, 1, 28, 28))[0].shape == (1, 128, 16, 16)


def test_the_operations_of_a_forward_pass_are_those_of_its_convolutions_and_classifier() -> None:
    expected = 2 * (32**2 * 9 * 3 * 128 + 16**2 * 9 * 128**2 + 8**2 * 9 * 128**2 + 2048 * 10)
    assert models.forward_flop(spec(classes=10)) == expected


def test_instance_norm_makes_images_independent_of_their_batch() -> None:
    net = models.build(spec(width=8)).train()
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_resnets_have_their_depth_and_the_average_pooled_one_never_strides() -> None:
    def convolutions(name: str) -> list[nn.Conv2d]:
        return [m for m in models.build(spec(name)).modules() if isinstance(m, nn.Conv2d)]

    assert [len([c for c in convolutions(n) if c.kernel_size == (3, 3)]) for n in ("resnet10", "resnet18")] == [9, 17]
    assert {c.stride for c in convolutions("resnet10")} == {(1, 1), (2, 2)}
    assert {c.stride for c in convolutions("resnet_ap10")} == {(1, 1)}


def test_large_images_are_shrunk_by_the_stem() -> None:
    for name in ("resnet18", "resnet_ap10"):
        features = models.build(spec(name, side=128, width=8)).features(torch.zeros(1, 3, 128, 128))
        assert [f.shape[-1] for f in features] == [32, 16, 8, 4]


def test_a_name_may_carry_the_depth_and_must_not_contradict_it() -> None:
    assert spec("resnet18").depth == spec("resnet", depth=18).depth == 18
    assert spec("convnet").name == "convnet3" and spec("resnet_ap").name == "resnet_ap10"
    with pytest.raises(ValueError, match="contradicts depth 10"):
        spec("resnet18", depth=10)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("lenet", {}, "unknown network 'lenet': choose one of convnet, resnet, resnet_ap, densenet"),
        ("convnet", {"depth": 6}, "depth 6 does not fit images of 32 x 32.*from 1 to 5"),
        ("convnet", {"depth": 4, "side": 8}, "from 1 to 3"),
        ("resnet12", {}, r"use one of \[10, 18\]"),
        ("densenet", {"depth": 40}, r"use one of \[121\]"),
        ("convnet", {"norm": "group", "width": 6}, "width that 4 divides"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_choices(name: str, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(spec(name, **changed))
