"""Images, windows and channels of any size: properties over drawn sizes, and oracles written out plainly."""

from functools import partial

import pytest
import torch
from conftest import BACKENDS, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from models import attention
from models.layers import (
    PatchMerging,
    fit_window,
    padded_resolution,
    relative_coords_table,
    relative_position_index,
    window_mask,
    window_partition,
    window_reverse,
)
from models.swin_mlp import SwinMLP
from models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from models.swin_transformer_moe import SwinTransformerMoE
from models.swin_transformer_v2 import SwinTransformerV2

FAMILIES = [SwinTransformer, SwinTransformerV2, SwinMLP, partial(SwinTransformerMoE, pretrained_window_sizes=(0, 0))]
NAMES = ["swin", "swinv2", "swin_mlp", "swin_moe"]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
quick = settings(max_examples=25, deadline=None, derandomize=True)
sides = st.integers(1, 5)
pairs = st.tuples(sides, sides)


def small(family, **changes):
    arguments = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
    model = family(**{**arguments, "window_size": 4, "num_classes": 3, **changes})
    return fill(model).eval()  # golden weights: SwinV2's own start as zeros, which would hide mistakes


def logits_of(model, images):
    with torch.no_grad():
        out = model(images)
    return out[0] if isinstance(out, tuple) else out


@quick
@given(window=pairs, count=pairs, shift=pairs, channels=sides)
def test_reverse_undoes_partition_and_shift(window, count, shift, channels):
    H, W = (side * n for side, n in zip(window, count, strict=True))
    x = torch.randn(2, H, W, channels)
    rolled = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    back = window_reverse(window_partition(rolled, window), window, H, W)
    assert torch.equal(torch.roll(back, shift, (1, 2)), x)


@quick
@given(resolution=st.tuples(st.integers(1, 9), st.integers(1, 9)), window=pairs, shifted=st.booleans())
def test_attention_on_padded_maps_is_that_of_real_neighbours(resolution, window, shifted):
    """Token by token in float64: who shares a window and lies on the same side of the map's edges, weighs in."""
    window, shift = fit_window(resolution, window, tuple(side // 2 for side in window) if shifted else 0)
    down, right = (shift, shift) if isinstance(shift, int) else shift
    torch.manual_seed(0)
    module = WindowAttention(8, window, num_heads=2).double()
    torch.nn.init.normal_(module.relative_position_bias_table)
    (h, w), (H, W) = window, resolution
    x = torch.randn(1, H, W, 8, dtype=torch.float64)
    q, k, v = module.qkv(x[0]).view(H, W, 3, 2, 4).unbind(2)  # H, W, nH, d
    tall, wide = padded_resolution(resolution, window)
    expected = torch.zeros(H, W, 2, 4, dtype=torch.float64)
    table = module.relative_position_bias_table

    def window_of(a, b):  # on the rolled map, with the side of the edge; a wrapped token lies beyond it
        row, column = (a - down) % tall, (b - right) % wide
        return row // h, column // w, row >= tall - down, column >= wide - right

    for a in range(H):
        for b in range(W):
            near = [(c, d) for c in range(H) for d in range(W) if window_of(c, d) == window_of(a, b)]
            place = [((a - c) + h - 1) * (2 * w - 1) + (b - d) + w - 1 for c, d in near]
            keys, values = (torch.stack([t[c, d] for c, d in near], 1) for t in (k, v))  # nH, near, d
            weights = (torch.einsum("hd,hnd->hn", q[a, b] * module.scale, keys) + table[place].T).softmax(-1)
            expected[a, b] = torch.einsum("hn,hnd->hd", weights, values)
    mask = window_mask(resolution, window, shift)
    mask = mask if mask is None else mask.double()
    for backend in BACKENDS:
        module.backend = backend
        got = module(x, mask, shift)[0]
        # a -100 of the shift leaves e^-100 of the others
        torch.testing.assert_close(got, module.proj(expected.flatten(2)), atol=1e-9, rtol=1e-9)


@every_family
@pytest.mark.parametrize("shape", [(32, 32), (30, 45), (17, 64), (13, 9), (5, 3), (1, 1)])
def test_any_image_size_gives_what_a_model_built_for_it_gives(family, shape):
    """Except where the window would shrink, which is decided at construction."""
    images = torch.randn(2, 3, *shape)
    anywhere = small(family, window_size=2, pad_maps=True)
    built = small(family, window_size=2, pad_maps=True, img_size=shape)
    assert logits_of(anywhere, images).shape == (2, 3)
    if anywhere.layers[-1].blocks[0].window_size == built.layers[-1].blocks[0].window_size:
        torch.testing.assert_close(logits_of(anywhere, images), logits_of(built, images), atol=1e-6, rtol=1e-5)


@every_family
def test_padding_changes_nothing_where_none_is_needed(family):
    images = torch.randn(2, 3, 32, 32)
    expected = logits_of(small(family), images)
    torch.testing.assert_close(logits_of(small(family, pad_maps=True), images), expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1], FAMILIES[3]], ids=[NAMES[0], NAMES[1], NAMES[3]])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    window=pairs,
    backend=st.sampled_from(["reference", "sdpa"]),
)
def test_logits_do_not_depend_on_what_is_in_the_padding(family, shape, window, backend):
    model = small(family, window_size=window, pad_maps=True)
    attention.set_attention_backend(model, backend)
    images, zeros = torch.randn(1, 3, *shape), attention.pad_map
    expected, padded = logits_of(model, images), []

    def noise(x, resolution):
        out = 100 * torch.randn(x.shape[0], *resolution, x.shape[3])
        out[:, : x.shape[1], : x.shape[2]] = x
        padded.append(resolution)
        return out

    attention.pad_map = noise
    try:
        got = logits_of(model, images)
    finally:
        attention.pad_map = zeros
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    resolution, needed = model.patch_embed.resolution_of(shape), False
    for stage in model.layers:
        needed = needed or padded_resolution(resolution, stage.blocks[0].window_size) != resolution
        resolution = stage.next_resolution(resolution)
    assert bool(padded) == needed  # the noise was really there


@every_family
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    channels=st.integers(1, 5),
    patch=pairs,
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=3),
)
def test_every_feature_map_has_the_stated_shape(family, shape, channels, patch, depths):
    heads = [2, 2, 2][: len(depths)]
    extra = {"pretrained_window_sizes": (0,) * len(depths)} if "MoE" in str(family) or "V2" in str(family) else {}
    model = small(
        family.func if isinstance(family, partial) else family,
        **{"in_chans": channels, "patch_size": patch, "depths": depths, "num_heads": heads, "pad_maps": True, **extra},
    )
    maps = model.forward_intermediates(torch.randn(1, channels, *shape), intermediates_only=True)
    assert len(maps) == len(model.feature_info) == len(depths)
    H, W = (-(-side // p) for side, p in zip(shape, patch, strict=True))
    for i, (tokens, info) in enumerate(zip(maps, model.feature_info, strict=True)):
        assert tokens.shape == (1, info["num_chs"], H, W)
        down, right = (p * 2**i for p in patch)
        assert info["reduction"] == (down if down == right else (down, right))
        H, W = (H + 1) // 2, (W + 1) // 2


@every_family
def test_sizes_that_do_not_fit_name_padding(family):
    with pytest.raises(ValueError, match=r"img_size=30 .*15x15 map of stage 1 .*pad_maps=True \(MODEL.PAD_MAPS\)"):
        small(family, img_size=30)
    with pytest.raises(ValueError, match=r"images of 3x32x32, not of 3x32x30; .*set_input_size.*pad_maps=True"):
        small(family)(torch.zeros(1, 3, 32, 30))


def test_odd_maps_name_padding():
    with pytest.raises(ValueError, match=r"3x4 map cannot be merged .*pad_maps=True"):
        PatchMerging((3, 4), 2)(torch.zeros(1, 12, 2))


@pytest.mark.parametrize(
    "resolution, window, shift, expected",
    [
        ((8, 8), 4, 2, (4, 2)),
        ((4, 8), 4, 2, (4, 0)),  # officially both sides lose the shift
        ((3, 8), 4, 2, (3, 0)),  # and both take the shorter one
        ((4, 8), (4, 4), (2, 2), ((4, 4), (0, 2))),  # of a pair each is fitted alone
        ((3, 8), (4, 4), (2, 2), ((3, 4), (0, 2))),
        ((2, 2), (4, 4), (2, 2), ((2, 2), 0)),
    ],
)
def test_windows_are_fitted_to_maps(resolution, window, shift, expected):
    assert fit_window(resolution, window, shift) == expected


@every_family
@pytest.mark.parametrize("window", [(4, 2), (2, 8)])
def test_windows_may_be_pairs(family, window):
    model = small(family, img_size=(32, 64), window_size=window)
    assert logits_of(model, torch.randn(1, 3, 32, 64)).shape == (1, 3)
    assert {block.shift_size for block in model.layers[0].blocks} == {0, (window[0] // 2, window[1] // 2)}


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_pair_of_equal_sides_is_one_number(family):
    images = torch.randn(1, 3, 32, 32)
    expected = logits_of(small(family), images)
    torch.testing.assert_close(logits_of(small(family, window_size=(4, 4)), images), expected, atol=0, rtol=0)


@every_family
def test_set_input_size_gives_what_a_model_built_for_it_gives(family):
    """Another image size under the same windows needs no change of weights."""
    model, built = small(family), small(family, img_size=(64, 32))
    model.set_input_size((64, 32))
    images = torch.randn(1, 3, 64, 32)
    torch.testing.assert_close(logits_of(model, images), logits_of(built, images), atol=1e-6, rtol=1e-5)
    assert model.flops() == built.flops()
    assert {n: b.shape for n, b in model.named_buffers()} == {n: b.shape for n, b in built.named_buffers()}
    with pytest.raises(ValueError, match="images of 3x64x32"):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("window", [8, (8, 2), (2, 4)])
def test_set_input_size_resizes_tables_and_embeddings_as_loading_does(window):
    from checkpoint import pretrained_state

    model = small(SwinTransformer, ape=True)
    wanted = small(SwinTransformer, ape=True, img_size=64, window_size=window)
    state, notes = pretrained_state(model.state_dict(), wanted.state_dict())
    wanted.load_state_dict(state)
    model.set_input_size(64, window)
    assert len(notes) == 5  # four tables, one embedding
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name]), name
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(logits_of(model, images), logits_of(wanted, images))


def test_v2_keeps_the_scale_of_its_offsets_when_the_window_changes():
    model = small(SwinTransformerV2)
    model.set_input_size(64, 8)
    built = small(SwinTransformerV2, img_size=64, window_size=8, pretrained_window_sizes=[4, 4])
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(logits_of(model, images), logits_of(built, images), atol=1e-6, rtol=1e-5)
    model.set_input_size(32, 4)
    torch.testing.assert_close(
        logits_of(model, images[..., :32, :32]), logits_of(small(SwinTransformerV2), images[..., :32, :32])
    )


def test_swin_mlp_refuses_other_windows_and_stays_as_it_was():
    model = small(SwinMLP)
    with pytest.raises(ValueError, match=r"window_size=8: stage 1 would have windows of 8, .* for windows of 4"):
        model.set_input_size(64, 8)
    assert logits_of(model, torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_a_failed_change_of_size_changes_nothing():
    model, images = small(SwinTransformer), torch.randn(1, 3, 32, 32)
    before = logits_of(model, images)
    with pytest.raises(ValueError, match="img_size=30"):
        model.set_input_size(30)
    assert torch.equal(logits_of(model, images), before)


def test_embeddings_are_resized_for_images_of_other_sizes():
    model = small(SwinTransformer, ape=True, pad_maps=True)
    torch.nn.init.constant_(model.absolute_pos_embed, 3.0)
    tokens, resolution = model.embed(torch.zeros(1, 3, 20, 44))
    assert resolution == (10, 22)
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))


def test_a_window_of_one_token_has_finite_coordinates():
    assert torch.equal(relative_coords_table(1), torch.zeros(1, 1, 1, 2))
    assert relative_position_index(1).tolist() == [[0]]
    assert logits_of(small(SwinTransformerV2, window_size=1), torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_gradient_checkpointing_on_padded_maps_changes_nothing(family):
    images, gradients, calls = torch.randn(1, 3, 30, 22), [], []
    for thrifty in (False, True):
        model = small(family, pad_maps=True, use_checkpoint=thrifty)
        model.layers[0].blocks[0].register_forward_pre_hook(lambda *_, thrifty=thrifty: calls.append(thrifty))
        out = model(images)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert calls == [False, True, True]  # once more in the backward pass


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1], FAMILIES[3]], ids=[NAMES[0], NAMES[1], NAMES[3]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_models_in_half_precision_change_sizes(family, backend):
    model, images = small(family, pad_maps=True).bfloat16(), torch.randn(1, 3, 30, 45, dtype=torch.bfloat16)
    attention.set_attention_backend(model, backend)
    before = logits_of(model, images)
    model.set_input_size((30, 45), 4)
    assert before.dtype == torch.bfloat16 and before.isfinite().all()
    torch.testing.assert_close(logits_of(model, images), before, atol=0.05, rtol=0)


def test_windows_that_grow_again_are_shifted_again():
    model = small(SwinTransformer)
    model.set_input_size(32, 1)
    model.set_input_size(32, 4)
    assert [block.shift_size for block in model.layers[0].blocks] == [0, 2]
    shrunk = small(SwinTransformer, img_size=8, window_size=7, pad_maps=True)  # windows of 4, then of 2
    assert [block.shift_for((16, 16)) for block in shrunk.layers[0].blocks] == [0, 2]
    assert [block.shift_for((16, 16)) for block in shrunk.layers[1].blocks] == [0, 1]


def test_a_block_alone_pads_only_when_told():
    block = SwinTransformerBlock(8, (8, 8), 2, window_size=4)
    with pytest.raises(ValueError, match=r"5x5 map is not a whole number of 4x4 windows.*pad_maps=True"):
        block(torch.randn(1, 25, 8), (5, 5))
    assert block(torch.randn(1, 16 * 8, 8), (16, 8)).shape == (1, 128, 8)


@pytest.mark.parametrize("size", [[64, 64, 64], 4.0, "32", (4.0, 4)])
def test_sizes_that_are_no_sizes_are_named(size):
    with pytest.raises(ValueError, match="is neither a whole number nor"):
        small(SwinTransformer, img_size=size)
    with pytest.raises(ValueError, match="images of 3x32x32"):
        small(SwinTransformer)(torch.zeros(3, 32, 32))


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_stays_near_float32_on_padded_maps(family, dtype, backend):
    images = torch.randn(2, 3, 30, 45)
    expected, model = logits_of(small(family, pad_maps=True), images), small(family, pad_maps=True)
    attention.set_attention_backend(model, backend)
    with torch.autocast("cpu", dtype):
        out = model(images)
        out = out[0] if isinstance(out, tuple) else out
    out.float().square().sum().backward()
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@every_family
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", [(32, 32), (30, 45)])
def test_the_accelerator_agrees_with_the_cpu(family, backend, shape):
    """Maps that are padded and that are not, in float32, with gradients; half precision stays finite."""
    device = torch.accelerator.current_accelerator()
    ours, theirs = (small(family, pad_maps=True) for _ in range(2))
    theirs.to(device)
    attention.set_attention_backend(theirs, backend)
    images, results = torch.randn(2, 3, *shape), []
    for model in (ours, theirs):
        out = model(images.to(next(model.parameters()).device))
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        results.append([out.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        theirs.zero_grad()
        with torch.autocast(device.type, dtype):
            out = theirs(images.to(device))
            out = out[0] if isinstance(out, tuple) else out
        out.float().square().sum().backward()
        assert out.isfinite().all() and all(p.grad.isfinite().all() for p in theirs.parameters())
