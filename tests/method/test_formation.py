from __future__ import annotations

import pytest
import torch

from tests.oracle import decode_single
from utils.method.formation import BOUND, DECODE_TYPES, PACKS, Formation, cells_of, pack


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_decoding_equals_cropping_and_resizing_cell_by_cell(factor: int) -> None:
    stored = torch.rand(3, 2, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(Formation(factor).decode(stored), decode_single(stored, factor), rtol=1e-12, atol=1e-12)


def test_cells_come_out_in_reading_order_a_stored_image_at_a_time() -> None:
    stored = torch.zeros(2, 1, 4, 4)
    for n in range(2):
        for i in range(2):
            for j in range(2):
                stored[n, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = 4 * n + 2 * i + j
    decoded = Formation(2).decode(stored)
    assert torch.equal(decoded, torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 4))


@pytest.mark.parametrize(("side", "factor"), [(8, 2), (28, 2), (32, 4), (9, 2), (32, 3)])
def test_decode_inverts_pack_on_images_without_detail(side: int, factor: int) -> None:
    images = torch.rand(2, 3 * factor**2, 3, 1, 1).expand(-1, -1, -1, side, side)
    torch.testing.assert_close(Formation(factor).decode(pack(images, factor=factor)), images, rtol=1e-5, atol=1e-6)


def test_a_cell_holds_means_of_pixels_or_every_other_pixel() -> None:
    images = torch.rand(1, 4, 3, 8, 8)
    area, nearest = (pack(images, factor=2, mode=mode)[0, 0] for mode in PACKS)
    for i, (rows, columns) in enumerate(cells_of(8, 8, 2)):
        torch.testing.assert_close(area[:, rows, columns], images[0, i].unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)))
        assert torch.equal(nearest[:, rows, columns], images[0, i, :, ::2, ::2])


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pack_inverts_decode_on_flat_cells_when_the_factor_divides_the_side(factor: int) -> None:
    cells = torch.rand(2, 3, 3, factor, factor)
    stored = cells.repeat_interleave(16 // factor, 3).repeat_interleave(16 // factor, 4)
    torch.testing.assert_close(pack(Formation(factor).decode(stored), factor=factor), stored, rtol=1e-5, atol=1e-6)


def test_cells_cover_the_side_without_overlap_when_the_factor_does_not_divide_it() -> None:
    edges = (slice(0, 3), slice(3, 6), slice(6, 10))
    assert cells_of(10, 10, 3) == [(rows, columns) for rows in edges for columns in edges]


@pytest.mark.parametrize("decode_type", DECODE_TYPES)
@pytest.mark.parametrize(("ipc", "factor"), [(1, 1), (1, 2), (10, 2), (50, 2), (50, 3), (200, 2), (7, 5)])
def test_the_count_is_known_before_decoding(ipc: int, factor: int, decode_type: str) -> None:
    stored = torch.rand(2, ipc, 1, 8, 8)
    decoded = Formation(factor, decode_type).decode(stored)
    assert decoded.shape == (2, Formation(factor, decode_type).decoded_count(ipc), 1, 8, 8)
    torch.testing.assert_close(decoded[1], Formation(factor, decode_type).decode(stored[1]))


@pytest.mark.parametrize("decode_type", DECODE_TYPES)
@pytest.mark.parametrize(("ipc", "factor"), [(1, 1), (3, 2), (50, 2), (50, 3), (200, 2), (7, 5)])
def test_it_is_known_from_which_stored_image_a_decoded_one_comes(ipc: int, factor: int, decode_type: str) -> None:
    stored = torch.arange(float(ipc)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    decoded = Formation(factor, decode_type).decode(stored)
    sources = Formation(factor, decode_type).sources(ipc)
    assert decoded.mean((1, 2, 3)).tolist() == pytest.approx(sources)


def test_multi_decodes_with_every_factor() -> None:
    stored = torch.rand(2, 1, 12, 12)
    expected = torch.cat([decode_single(stored, f) for f in (3, 2, 1)])
    torch.testing.assert_close(Formation(3, "multi").decode(stored), expected)
    assert Formation(2, "multi").decoded_count(10) == 50


def test_bound_uses_every_stored_image_once_and_stays_within_the_bound() -> None:
    stored = torch.rand(50, 1, 8, 8)
    decoded = Formation(2, "bound").decode(stored)
    expected = torch.cat([decode_single(stored[:26], 2), stored[26:]])  # 26 * 4 + 24 = 128
    torch.testing.assert_close(decoded, expected)
    assert len(decoded) == BOUND
    assert Formation(2, "bound").decoded_count(10) == 40
    assert Formation(2, "bound").decoded_count(200) == 200  # stored images alone exceed it


def test_decoding_has_a_gradient_for_every_stored_pixel() -> None:
    stored = torch.rand(2, 1, 8, 8, requires_grad=True)
    Formation(3).decode(stored).square().sum().backward()
    assert stored.grad is not None and (stored.grad != 0).all()


def test_an_unknown_decode_type_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="single, multi, bound"):
        Formation(2, "double").decode(torch.rand(1, 1, 8, 8))
