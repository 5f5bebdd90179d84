"""Windows, masks and merging against plain restatements."""

import pytest
import torch

from models.layers import PatchMerging, gather_neighbours, relative_position_index, shift_mask
from models.swin_transformer import window_partition, window_reverse


@pytest.mark.parametrize("window, H, W", [(4, 8, 8), (2, 6, 4), ((2, 3), 4, 9), (7, 14, 21)])
def test_reverse_undoes_partition(window, H, W):
    x = torch.randn(2, H, W, 3)
    assert torch.equal(window_reverse(window_partition(x, window), window, H, W), x)


def test_partition_goes_row_by_row():
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert window_partition(x, 2)[1].flatten().tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("h, w", [(2, 2), (3, 2), (1, 4), (7, 7)])
def test_position_index_numbers_offsets(h, w):
    index = relative_position_index((h, w))
    for a in range(h * w):
        for b in range(h * w):
            down, right = a // w - b // w, a % w - b % w
            assert index[a, b] == (down + h - 1) * (2 * w - 1) + right + w - 1


@pytest.mark.parametrize("resolution, window, shift", [((8, 8), 4, 2), ((6, 9), 3, 1), ((4, 8), (2, 4), (1, 2))])
def test_shift_mask_keeps_true_neighbours_together(resolution, window, shift):
    """Two tokens of a rolled window may see each other if rolling back leaves their distance as it is."""
    (H, W), (h, w) = resolution, window if isinstance(window, tuple) else (window, window)
    down, right = shift if isinstance(shift, tuple) else (shift, shift)
    place = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1)  # H, W, 2
    rolled = torch.roll(place, (-down, -right), (0, 1))
    windows = window_partition(rolled[None], (h, w)).view(-1, h * w, 2)
    inside = window_partition(place[None], (h, w)).view(-1, h * w, 2)
    true = windows[:, :, None] - windows[:, None]
    seen = inside[:, :, None] - inside[:, None]
    expected = torch.where((true == seen).all(-1), 0.0, -100.0)
    assert torch.equal(shift_mask(resolution, window, shift), expected)


def test_neighbours_come_in_the_official_order():
    x = torch.arange(8.0).view(1, 8, 1)  # a 2x4 map
    assert gather_neighbours(x, (2, 4)).tolist() == [[[0, 4, 1, 5], [2, 6, 3, 7]]]
    assert PatchMerging((2, 4), 1)(x).shape == (1, 2, 2)


def test_odd_maps_cannot_be_merged():
    with pytest.raises(ValueError, match="3x4 map cannot be merged"):
        gather_neighbours(torch.zeros(1, 12, 1), (3, 4))
