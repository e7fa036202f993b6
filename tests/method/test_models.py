from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import models
from models import FAMILIES, NORMS, PAPER_TABLE, NetSpec, Network, zoo
from tests.oracle import trained_networks
from utils.method.augment import Augment
from utils.method.images import ImageSet, Normalize
from utils.method.training import Recipe, fresh_network
from utils.numerics.compute import Compute
from utils.system.draws import Draws

ZOO = ("mobilenet_v3_small", "shufflenet_v2_x0_5")  # two small ones of torchvision, with and without dropout
STAGES = {"convnet": 3, "vgg": 5, "alexnet": 3}  # the others have 4
INSTANCE_FROM = {"convnet": 8, "vgg": 32, "alexnet": 8}  # the smallest side with instance norm; the others' is 16


def spec(name: str = "convnet", **changed: object) -> models.NetSpec:
    settings: dict[str, object] = {"channels": 3, "classes": 7, "side": 32}
    return models.resolve(name, **{**settings, **changed})  # type: ignore[arg-type]  # a mixed bag of test settings


@pytest.mark.parametrize("side", [8, 16, 28, 32, 50])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_gives_logits_embedding_and_features(name: str, norm: str, side: int) -> None:
    if norm == "instance" and side < INSTANCE_FROM.get(name, 16):
        with pytest.raises(ValueError, match="instance norm erases"):
            models.build(spec(name, norm=norm, side=side))
        return
    net = models.build(spec(name, norm=norm, side=side, channels=1, width=8)).eval()
    x = torch.randn(2, 1, side, side)
    assert net(x).shape == (2, 7)
    features = net.features(x)
    assert len(features) == STAGES.get(name, 4)
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


def test_vgg_and_alexnet_have_the_parameters_of_their_published_layouts() -> None:
    def parameters(name: str) -> int:
        return sum(p.numel() for p in models.build(spec(name, classes=10)).parameters())

    convolutions = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    # A bias, gamma and beta per channel; five pools leave 1 x 1.
    assert parameters("vgg11") == sum(9 * a * b + 3 * b for a, b in convolutions) + (512 + 1) * 10
    kernels = [(25, 3, 128), (25, 128, 192), (9, 192, 256), (9, 256, 192), (9, 192, 192)]
    assert parameters("alexnet") == sum(k * a * b + 3 * b for k, a, b in kernels) + (192 * 4**2 + 1) * 10


def test_resnets_of_small_images_have_the_published_parameters() -> None:
    for name, published, exact in (("resnet10", 1.23, 1_228_970), ("resnet18", 2.80, 2_797_610)):
        count = sum(p.numel() for p in models.build(spec(name, classes=10)).parameters())
        assert count == exact and round(count / 1e6, 2) == published


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet_ap10"])
def test_resnets_are_twice_as_wide_for_large_images_unless_a_width_is_given(name: str) -> None:
    assert [spec(name, side=side).width for side in (8, 32, 64, 95, 96, 128, 224)] == [32] * 4 + [64] * 3
    assert [spec(name, side=side, width=48).width for side in (32, 128)] == [48, 48]
    assert spec("convnet", side=128).width == spec("convnet").width


@pytest.mark.parametrize("width", [1, 4, 6, 100])
def test_a_width_scales_every_convolution_of_vgg_and_alexnet(width: int) -> None:
    def channels(name: str) -> list[int]:
        net = models.build(spec(name, width=width, norm="batch" if width % 4 else "group"))
        return [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]

    assert channels("vgg") == [times * width for times in (1, 2, 4, 4, 8, 8, 8, 8)]
    first, second, third, *rest = channels("alexnet")
    assert (first, third, rest) == (width, 2 * width, [second, second])
    assert second % 4 == 0 and 1.5 * width <= second < 1.5 * width + 4


def test_the_operations_of_a_forward_pass_are_those_of_its_convolutions_and_classifier() -> None:
    expected = 2 * (32**2 * 9 * 3 * 128 + 16**2 * 9 * 128**2 + 8**2 * 9 * 128**2 + 2048 * 10)
    assert models.forward_flop(spec(classes=10)) == expected


@pytest.mark.parametrize("name", ZOO)
def test_the_operations_of_a_network_of_torchvision_are_counted_once(name: str) -> None:
    net, count = models.build(spec(name)), 0

    def add(module: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        nonlocal count
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        count += 2 * y.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    net.eval()(torch.zeros(1, 3, 32, 32))
    assert models.forward_flop(spec(name)) == count


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


@pytest.mark.parametrize("side", [32, 128])
@pytest.mark.parametrize("name", ["resnet18", "resnet_ap10"])
def test_convolutions_of_resnets_begin_as_normal_numbers_scaled_by_their_outputs(name: str, side: int) -> None:
    torch.manual_seed(0)
    net = models.build(spec(name, side=side))
    scaled = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            scaled.append(module.weight.detach().flatten() * (fan_out / 2) ** 0.5)
            assert abs(scaled[-1].std() - 1) < 4 / (2 * scaled[-1].numel()) ** 0.5  # four standard errors
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    every = torch.cat(scaled)
    assert abs((every.abs() < 1).float().mean() - 0.6827) < 0.002 and every.abs().max() > 4  # of a normal distribution
    assert net.classifier.weight.abs().max() <= net.classifier.in_features**-0.5  # PyTorch's own, which is uniform


@pytest.mark.parametrize("side", [32, 128])
def test_the_average_pools_of_a_resnet_ap_stand_before_the_norms(side: int) -> None:
    net, sides = models.build(spec("resnet_ap10", side=side, width=8)), []

    def note(norm: nn.Module, x: tuple[Tensor]) -> None:
        sides.append(x[0].shape[-1])

    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(note)
    net(torch.zeros(1, 3, side, side))
    # The stem's norm, two of every block, and one of every shortcut that changes the side.
    assert sides == [32, 32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4]


def test_large_images_are_shrunk_by_the_stem() -> None:
    for name in ("resnet18", "resnet_ap10"):
        features = models.build(spec(name, side=128, width=8)).features(torch.zeros(1, 3, 128, 128))
        assert [f.shape[-1] for f in features] == [32, 16, 8, 4]


def test_a_name_may_carry_the_depth_and_must_not_contradict_it() -> None:
    assert spec("resnet18").depth == spec("resnet", depth=18).depth == 18
    assert spec("convnet").name == "convnet3" and spec("resnet_ap").name == "resnet_ap10"
    with pytest.raises(ValueError, match="contradicts depth 10"):
        spec("resnet18", depth=10)


def test_our_networks_come_before_those_of_torchvision_where_they_have_the_depth() -> None:
    for name in ("resnet18", "densenet121", "vgg11", "alexnet", "convnet3"):
        assert spec(name).family in FAMILIES
    for name in ("resnet50", "densenet161", "vgg13", "vgg11_bn", *ZOO):
        assert models.split_name(name) == (name, None)
        assert (spec(name).depth, spec(name).width, spec(name).norm) == (0, 0, "")


@pytest.mark.parametrize("name", [*FAMILIES, *PAPER_TABLE, *ZOO, "resnet50"])
def test_a_specification_survives_its_name_and_json(name: str) -> None:
    found = spec(name)
    assert spec(found.name) == found and found.name.startswith(name)
    assert NetSpec(**json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("lenet", {}, "unknown network 'lenet': choose one of convnet, resnet, resnet_ap, densenet, vgg, alexnet"),
        ("lenet", {}, r"or a classification network of torchvision.models.list_models\(\)"),
        ("mobilenet_v3_smal", {}, r"did you mean mobilenet_v3_small\?"),
        ("raft_small", {}, "unknown network"),  # of torchvision, but no classifier
        ("convnet", {"depth": 6}, "depth 6 does not fit images of 32 x 32.*from 1 to 5"),
        ("convnet", {"depth": 4, "side": 8}, "from 1 to 3"),
        ("resnet12", {}, r"use one of \[10, 18\]"),
        ("densenet", {"depth": 40}, r"use one of \[121\]"),
        ("convnet0", {}, "depth 0 does not fit"),
        ("vgg12", {}, r"use one of \[11\]"),
        ("alexnet", {"depth": 8}, r"use one of \[5\]"),
        ("convnet", {"norm": "group", "width": 6}, "width that 4 divides"),
        (ZOO[0], {"depth": 3}, "fixed depth, width and norm"),
        (ZOO[0], {"width": 3}, "fixed depth, width and norm"),
        (ZOO[0], {"norm": "batch"}, "fixed depth, width and norm"),
        (ZOO[0], {"channels": 2}, "1 or 3 channels, not 2"),
        ("squeezenet1_1", {}, "torchvision's squeezenet1_1 has no linear classifier"),
        ("vit_b_16", {"side": 28}, r"vit_b_16 cannot be built for images of 28 x 28 \(.*patch size"),
        ("googlenet", {"side": 8}, r"googlenet cannot be built for images of 8 x 8 \(.*too small"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_choices(name: str, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(spec(name, **changed))


# --- torchvision's networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32)])
@pytest.mark.parametrize("name", ZOO)
def test_a_network_of_torchvision_gives_logits_and_an_embedding(name: str, channels: int, side: int) -> None:
    net = models.build(spec(name, channels=channels, side=side))
    assert all(module.training for module in net.modules())
    x = torch.randn(2, channels, side, side)
    net.eval()
    assert net(x).shape == (2, 7) and net.embed(x).shape == (2, net.classifier.in_features)
    torch.testing.assert_close(net.classifier(net.features(x)[-1]), net(x))
    if channels == 1:
        torch.testing.assert_close(net.embed(x), net.stages[0](x.repeat(1, 3, 1, 1)))


def test_a_network_of_torchvision_computes_what_torchvision_computes() -> None:
    torch.manual_seed(0)
    published = zoo.published(ZOO[0], 7, 32).eval()
    torch.manual_seed(0)
    net = models.build(spec(ZOO[0])).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), published(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*ZOO, "efficientnet_b0", "vgg", "alexnet"])  # the third has stochastic depth
def test_a_training_step_is_determined_by_its_draws(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 8, 8, generator=generator)
    real = ImageSet(images, torch.arange(6) % 2, classes=2, normalize=Normalize((0.5,), (0.5,)))
    recipe = Recipe(batch_size=6, augment=Augment("color_crop_cutout"), mixup="cut")
    width = 4 if name in FAMILIES else None
    small = spec(name, channels=1, classes=2, side=8, width=width)

    def weights(net: Network) -> Tensor:
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    def trained(key: int) -> Tensor:
        torch.rand(1)  # moves the global generator, which must not matter
        return weights(trained_networks(small, [real], recipe, [Draws("cpu", key)], Compute(torch.device("cpu")))[0])

    first = trained(0)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))
    assert not torch.equal(first, weights(fresh_network(small, Draws("cpu", 0))))


@pytest.mark.parametrize(("name", "smallest"), [(ZOO[0], 2), (ZOO[1], 2), ("vgg", 2), ("alexnet", 1), ("convnet", 1)])
def test_batch_norm_on_a_single_pixel_needs_two_images(name: str, smallest: int) -> None:
    assert models.smallest_batch(spec(name, channels=1, side=8)) == smallest
