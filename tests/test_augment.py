from __future__ import annotations

import pytest
import torch

from tests.oracle import augment_one
from utils.augment import ALWAYS, ONE_OF, Augment, Draw, parse, without
from utils.runtime import Draws

EVERYTHING = "_".join(ALWAYS + ONE_OF)


@pytest.mark.parametrize("side", [8, 15, 28])
@pytest.mark.parametrize("geometry", [None, *ONE_OF])
def test_a_batch_is_augmented_as_each_image_alone(geometry: str | None, side: int) -> None:
    x = torch.randn(7, 3, side, side, dtype=torch.float64)
    u = torch.rand(7, 8)
    ours = Augment(EVERYTHING)(x, Draw(u, geometry))
    expected = torch.stack([augment_one(x[i], u[i], ALWAYS, geometry) for i in range(7)])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("geometry", ONE_OF)
def test_a_shared_draw_treats_both_halves_alike(geometry: str) -> None:
    half = torch.randn(3, 3, 12, 12)
    ours = Augment(EVERYTHING)(torch.cat([half, half]), Draw(torch.rand(1, 8), geometry))
    torch.testing.assert_close(ours[:3], ours[3:], rtol=0, atol=0)


def test_draws_per_image_differ_and_shared_draws_per_class_differ() -> None:
    augment = Augment("color_crop")
    assert len(augment.draw(5, Draws("cpu", 0)).u.unique(dim=0)) == 5
    shared = augment.draw_shared(4, Draws("cpu", 0))
    assert [draw.u.shape for draw in shared] == [(1, 8)] * 4
    assert len(torch.cat([draw.u for draw in shared]).unique(dim=0)) == 4


def test_one_geometric_operation_is_drawn_per_call_and_each_one_comes_up() -> None:
    augment = Augment("crop_scale_rotate")
    drawn = {augment.draw(2, Draws("cpu", i)).geometry for i in range(40)}
    assert drawn == {"crop", "scale", "rotate"}
    assert Augment("color_cutout").draw(2, Draws("cpu", 0)).geometry is None


def test_crop_shifts_by_an_eighth_of_the_side_at_most_and_brings_zeros_in() -> None:
    x = torch.ones(1000, 1, 32, 32)
    shown = Augment("crop")(x, Draw(torch.rand(1000, 8), "crop")).sum((1, 2, 3))
    assert shown.max() == 32 * 32 and shown.min() == 28 * 28


def test_cutout_hides_a_square_of_half_the_side_clipped_at_the_border() -> None:
    x = torch.ones(1000, 1, 32, 32)
    hidden = (Augment("cutout")(x, Draw(torch.rand(1000, 8), None)) == 0).sum((1, 2, 3))
    assert hidden.max() == 16 * 16 and hidden.min() >= 8 * 8


def test_augmentation_has_a_gradient_with_respect_to_the_pixels() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for geometry in ONE_OF:
        draw = Draw(torch.rand(1, 8, dtype=torch.float64), geometry)
        assert torch.autograd.gradcheck(lambda x, draw=draw: Augment(EVERYTHING)(x, draw), x)


def test_no_names_change_nothing() -> None:
    x = torch.randn(2, 3, 8, 8)
    for names in ("none", ""):
        augment = Augment(names)
        assert torch.equal(augment(x, augment.draw(2, Draws("cpu", 0))), x)


def test_an_unknown_operation_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown augmentation 'colour'.*flip, color, cutout"):
        Augment("colour_crop")


def test_without_drops_names_and_says_none_when_nothing_is_left() -> None:
    assert without("color_crop_cutout", "cutout") == "color_crop"
    assert without("flip", "flip") == "none"
    assert parse("none") == ()
