from __future__ import annotations

import pytest
import torch

from tests.oracle import augment_one
from utils.method.augment import COLUMNS, GEOMETRY, Augment, parse, without
from utils.system.draws import Draws

ONE_OF = ["crop", "scale", "rotate", "translate"]
EVERYTHING = "_".join(["flip", "color", "cutout", *ONE_OF])
SIX = "color_crop_cutout_flip_scale_rotate"


@pytest.mark.parametrize("side", [8, 15, 28])
@pytest.mark.parametrize("names", ["color_cutout_flip", *ONE_OF, EVERYTHING, "crop_rotate", f"one_{SIX}"])
def test_a_batch_is_augmented_as_each_image_alone(names: str, side: int) -> None:
    x = torch.randn(16, 3, side, side, dtype=torch.float64)
    augment, u = Augment(names), torch.rand(16, COLUMNS)
    expected = torch.stack([augment_one(x[i], u[i], augment) for i in range(16)])
    torch.testing.assert_close(augment(x, u), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [8, 11, 28])
def test_a_crop_among_other_operations_is_the_exact_one(side: int) -> None:
    x, u = torch.randn(9, 3, side, side, dtype=torch.float64), torch.rand(9, COLUMNS)
    u[:, GEOMETRY] = 0
    torch.testing.assert_close(Augment("crop_rotate")(x, u), Augment("crop")(x, u), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("geometry", range(len(ONE_OF)))
def test_a_shared_draw_treats_both_halves_alike(geometry: int) -> None:
    half, u = torch.randn(3, 3, 12, 12), torch.rand(1, COLUMNS)
    u[:, GEOMETRY] = geometry / len(ONE_OF)
    ours = Augment(EVERYTHING)(torch.cat([half, half]), u)
    torch.testing.assert_close(ours[:3], ours[3:], rtol=0, atol=0)
    torch.testing.assert_close(ours, Augment(EVERYTHING)(torch.cat([half, half]), u.expand(6, COLUMNS)), rtol=0, atol=0)


def test_draws_per_image_differ_and_shared_draws_per_class_differ() -> None:
    augment = Augment("color_crop")
    drawn = augment.draw(2, 5, Draws("cpu", 0))
    assert drawn.shape == (10, COLUMNS) and len(drawn[:, :GEOMETRY].unique(dim=0)) == 10
    shared = augment.draw_shared(4, Draws("cpu", 0))
    assert shared.shape == (4, COLUMNS) and len(shared.unique(dim=0)) == 4


def test_one_geometric_operation_is_drawn_per_call_and_each_one_comes_up() -> None:
    augment = Augment("crop_scale_rotate")
    assert augment.geometries == ["crop", "scale", "rotate"] and Augment("color_cutout").geometries == []
    drawn = augment.draw(40, 2, Draws("cpu", 0))[:, GEOMETRY].view(40, 2)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert (drawn[:, 0] * 3).long().unique().tolist() == [0, 1, 2]


def test_exactly_one_of_six_operations_is_applied_at_a_call_in_dsa() -> None:
    """Each of the six comes up, alone: the result is that of this operation by itself."""
    x, augment, found = torch.randn(5, 3, 16, 16), Augment(f"one_{SIX}"), []
    for seed in range(60):
        u = augment.draw_shared(1, Draws("cpu", seed))
        alone = u.clone()
        alone[:, GEOMETRY] = 0
        ours = augment(x, u)
        (name,) = (name for name in parse(SIX) if torch.allclose(ours, Augment(name)(x, alone), atol=1e-4))
        found.append(name)
    assert {*found} == {*parse(SIX)}


def test_crop_shifts_by_an_eighth_of_the_side_at_most_and_brings_zeros_in() -> None:
    x = torch.ones(1000, 1, 32, 32)
    shown = Augment("crop")(x, torch.rand(1000, COLUMNS)).sum((1, 2, 3))
    assert shown.max() == 32 * 32 and shown.min() == 28 * 28


def test_cutout_hides_a_square_of_half_the_side_clipped_at_the_border() -> None:
    x = torch.ones(1000, 1, 32, 32)
    hidden = (Augment("cutout")(x, torch.rand(1000, COLUMNS)) == 0).sum((1, 2, 3))
    assert hidden.max() == 16 * 16 and hidden.min() >= 8 * 8


def test_augmentation_has_a_gradient_with_respect_to_the_pixels() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for names in (*ONE_OF, EVERYTHING, f"one_{EVERYTHING}"):
        u = torch.rand(1, 9, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x, names=names, u=u: Augment(names)(x, u), x)


def test_no_names_change_nothing() -> None:
    x = torch.randn(2, 3, 8, 8)
    for names in ("none", ""):
        augment = Augment(names)
        assert torch.equal(augment(x, augment.draw(1, 2, Draws("cpu", 0))), x)


def test_an_unknown_operation_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown augmentation 'colour'.*color, flip, crop"):
        Augment("colour_crop")


def test_without_drops_names_and_says_none_when_nothing_is_left() -> None:
    assert without("color_crop_cutout", "cutout") == "color_crop"
    assert without("flip", "flip") == without("one_flip", "flip") == "none"
    assert without("one_color_crop", "crop") == "one_color"
    assert parse("none") == ()
