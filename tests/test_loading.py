"""Weights of one model in another: every pair of resolutions, windows, class and channel counts; released names."""

import copy
import logging

import pytest
import torch
from conftest import SMALL, golden_values, make_config, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sizes import FAMILIES, NAMES, logits_of, small

import engine
import main
import utils
from checkpoint import (
    adapt_channels,
    pretrained_state,
    released_names,
    resize_bias_table,
    resize_bias_table_geometric,
    resize_position_embedding,
    strict_state,
    window_of,
)
from config import to_dict
from models import build_model
from models.layers import relative_position_index
from models.simmim import SimMIM, SwinTransformerV2ForSimMIM
from models.swin_mlp import SwinMLP
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2

LOGGER = logging.getLogger("test")
RESIZABLE = [family for family in FAMILIES if family is not SwinMLP]
sides = st.integers(2, 6)
pairs = st.tuples(sides, sides)


@pytest.mark.parametrize("family", RESIZABLE, ids=[n for n in NAMES if n != "swin_mlp"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.sampled_from([(16, 16), (32, 16)]), st.sampled_from([(16, 16), (16, 32), (32, 32)])),
    window=st.tuples(st.sampled_from([2, 4, (2, 4)]), st.sampled_from([2, 4, 8, (4, 2)])),
    classes=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ape=st.booleans(),
)
def test_every_pair_of_sizes_loads(family, size, window, classes, channels, ape):
    old, new = (
        small(family, img_size=size[i], window_size=window[i], num_classes=classes[i], in_chans=channels[i], ape=ape)
        for i in (0, 1)
    )
    grids = (tuple(model.patches_resolution) for model in (old, new))
    state, notes = pretrained_state(old.state_dict(), new.state_dict(), None, *grids)
    new.load_state_dict(state)
    resized_old = copy.deepcopy(old)  # the oracle: changing the sizes of the old model
    resized_old.set_input_size(size[1], window[1])
    for name, value in resized_old.named_parameters():
        if not name.startswith(("head", "patch_embed")):
            assert torch.equal(value, new.get_parameter(name)), name
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    changed = {name for name in after if before.get(name) is None or not torch.equal(before[name], after[name])}
    resized = {name for name in changed if name.endswith(("bias_table", "pos_embed"))}
    assert changed - resized <= {"patch_embed.proj.weight", "head.weight", "head.bias"}
    assert ("patch_embed.proj.weight" in changed) == (channels[0] != channels[1])
    assert bool({"head.weight", "head.bias"} & changed) == (classes[0] != classes[1] and classes[1] > 0)
    assert len([note for note in notes if "absolute_pos" not in note]) == len(resized - {"absolute_pos_embed"}) + (
        channels[0] != channels[1]
    ) + (classes[0] != classes[1])
    images = torch.randn(1, channels[1], *size[1])
    assert logits_of(new, images).isfinite().all()


def test_swin_mlp_loads_other_image_sizes_but_no_other_windows():
    state, _ = pretrained_state(small(SwinMLP).state_dict(), small(SwinMLP, img_size=64, num_classes=5).state_dict())
    assert not state["head.weight"].any()
    with pytest.raises(ValueError, match=r"8 of another shape \(layers.0.blocks.0.spatial_mlp.weight: 32x16x1 in"):
        pretrained_state(small(SwinMLP).state_dict(), small(SwinMLP, window_size=2).state_dict())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(window=pairs)
def test_the_index_tells_its_window(window):
    assert window_of(relative_position_index(window)) == window


@pytest.mark.parametrize("resize", [resize_bias_table, resize_bias_table_geometric])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(old=pairs, new=pairs)
def test_tables_of_oblong_windows_resize_alike_along_both_sides(resize, old, new):
    """Swapping rows and columns before is swapping them after; the offset 0 keeps its value in the middle."""
    new = tuple(max(pair) for pair in zip(old, new, strict=True))  # to larger windows, as in fine-tuning
    (h, w), (a, b) = ((2 * side - 1 for side in window) for window in (old, new))
    table = golden_values("relative_position_bias_table", (h * w, 2))
    resized = resize(table, old, new).unflatten(0, (a, b))
    swapped = resize(table.unflatten(0, (h, w)).transpose(0, 1).flatten(0, 1), old[::-1], new[::-1])
    torch.testing.assert_close(swapped.unflatten(0, (b, a)).transpose(0, 1), resized, atol=1e-5, rtol=1e-5)
    middle = table.unflatten(0, (h, w))[h // 2, w // 2]
    torch.testing.assert_close(resized[a // 2, b // 2], middle, atol=1e-4, rtol=1e-4)


def test_embeddings_resize_between_oblong_maps():
    rows = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 6, 2).flatten(1, 2)  # each token holds its row
    resized = resize_position_embedding(rows, (4, 6), (4, 3)).view(4, 3, 2)
    torch.testing.assert_close(resized, torch.arange(4.0).view(4, 1, 1).expand(4, 3, 2))


@pytest.mark.parametrize("old, new", [(3, 1), (1, 3), (3, 6), (1, 4), (2, 4)])
def test_adapted_channels_see_copies_of_an_image_as_before(old, new):
    """An image given to every channel gives the same patches with any number of channels."""
    weight, grey = torch.randn(8, old, 4, 4), torch.randn(2, 1, 8, 8)
    expected = torch.nn.functional.conv2d(grey.expand(-1, old, -1, -1), weight, stride=4)
    got = torch.nn.functional.conv2d(grey.expand(-1, new, -1, -1), adapt_channels(weight, new), stride=4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_adapted_channels_repeat_in_turn():
    weight = torch.randn(8, 3, 4, 4)
    four = adapt_channels(weight, 4)
    torch.testing.assert_close(four, weight[:, [0, 1, 2, 0]] * 3 / 4)
    assert torch.equal(adapt_channels(weight, 3), weight)


def test_released_names_are_understood():
    model = small(SwinTransformerV2)
    encoder = SwinTransformerV2ForSimMIM(
        img_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_classes=0
    )
    whole = SimMIM(None, encoder, encoder_stride=4, in_chans=3, patch_size=2)
    state = {name.replace("cpb_mlp", "rpe_mlp"): value for name, value in whole.state_dict().items()}
    fitted, notes = pretrained_state(state, model.state_dict())
    for name, value in encoder.state_dict().items():
        if name != "mask_token":
            assert torch.equal(fitted[name], value), name
    assert torch.equal(fitted["head.weight"], model.state_dict()["head.weight"])
    left_out = "left out: decoder.0.weight, decoder.0.bias, encoder.mask_token"
    assert left_out in notes[0] and notes[1] == "head: no classes in the file, 3 in the model; as initialised"
    plain, notes = released_names(model.state_dict(), model.state_dict())
    assert list(plain) == list(model.state_dict()) and not notes


def test_simmim_resumes_its_own_files():
    config = make_config(None, *SMALL, "MODEL.TYPE", "swinv2", "DATA.IMG_SIZE", 32, "MODEL.SWINV2.WINDOW_SIZE", 4)
    model = build_model(config, is_pretrain=True)
    state, notes = pretrained_state(model.state_dict(), model.state_dict())
    assert not notes and all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_windows_of_equal_area_are_not_taken_for_each_other():
    old, new = (small(SwinTransformer, window_size=window) for window in ((2, 8), (8, 2)))
    with pytest.raises(ValueError, match=r"bias_table: windows of 2x8 in the file, windows of 8x2 here"):
        strict_state(old.state_dict(), new.state_dict())


def test_an_embedding_takes_its_sides_from_the_files_configuration(tmp_path):
    oblong = ["DATA.IMG_SIZE", [32, 8], "MODEL.SWIN.APE", True, "MODEL.SWIN.WINDOW_SIZE", 2, "MODEL.NUM_CLASSES", 3]
    config = make_config(None, *SMALL, *oblong)
    source = build_model(config)  # a map of 16x4 tokens, as many as of 8x8
    torch.save({"model": source.state_dict(), "config": to_dict(config)}, tmp_path / "oblong.pth")
    square = make_config(None, *SMALL, *oblong, "DATA.IMG_SIZE", 16, pretrained=str(tmp_path / "oblong.pth"))
    model = build_model(square)
    utils.load_pretrained(square, model, LOGGER)
    source.set_input_size(16)
    assert torch.equal(model.absolute_pos_embed, source.absolute_pos_embed)


def test_v2_of_other_pretrained_windows_is_not_resumed_silently(tmp_path, caplog):
    small_v2 = [str(o).replace("SWIN.", "SWINV2.") if isinstance(o, str) else o for o in SMALL]
    small_v2 += ["MODEL.TYPE", "swinv2", "MODEL.NUM_CLASSES", 3]
    config = make_config(None, *small_v2, "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", [2, [2, 3]])
    torch.save(build_model(config).state_dict(), tmp_path / "v2.pth")
    for flags in ({}, {"eval": True}):
        other = make_config(None, *small_v2, **flags, resume=str(tmp_path / "v2.pth"))
        with pytest.raises(ValueError, match=r"are of other MODEL.SWINV2.PRETRAINED_WINDOW_SIZES"):
            utils.load_checkpoint(other, build_model(other), None, None, None, LOGGER)
    other = make_config(None, *small_v2, pretrained=str(tmp_path / "v2.pth"))
    with caplog.at_level(logging.INFO, "test"):
        utils.load_pretrained(other, build_model(other), LOGGER)
    assert "coordinates are those of MODEL.SWINV2.PRETRAINED_WINDOW_SIZES" in caplog.text


def test_a_head_of_zeros_can_be_evaluated(tmp_path):
    model, path = saved(tmp_path, "MODEL.NUM_CLASSES", 3, change=lambda s: {**s, "head.weight": 0 * s["head.weight"]})
    config = make_config(None, *SMALL, "MODEL.NUM_CLASSES", 3, eval=True, pretrained=path)
    utils.load_pretrained(config, model, LOGGER)
    assert not model.head.weight.any()


def test_every_key_that_does_not_fit_is_in_the_log(tmp_path, caplog):
    config = make_config(None, *SMALL, "MODEL.NUM_CLASSES", 3)
    model = build_model(config)
    state = {name.replace("norm2", "norm7"): value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    for flag in ("pretrained", "resume"):
        caplog.clear()
        chosen = make_config(None, *SMALL, "MODEL.NUM_CLASSES", 3, **{flag: str(tmp_path / "other.pth")})
        load = {"pretrained": utils.load_pretrained, "resume": utils.load_checkpoint}[flag]
        arguments = (chosen, model, LOGGER) if flag == "pretrained" else (chosen, model, None, None, None, LOGGER)
        with caplog.at_level(logging.WARNING, "test"), pytest.raises(ValueError, match=r"8 missing .*8 unexpected"):
            load(*arguments)
        lines = caplog.text.splitlines()
        assert (
            sum("missing: layers" in line for line in lines) == sum("unexpected: layers" in line for line in lines) == 8
        )


def saved(tmp_path, *opts, name: str = "weights.pth", change=None):
    """A file of `SMALL` under ``opts``, and its model."""
    config = make_config(None, *SMALL, *opts)
    torch.manual_seed(5)
    model = build_model(config)
    state = model.state_dict()
    if change is not None:
        state = change(state)
    torch.save({"model": state}, tmp_path / name)
    return model, str(tmp_path / name)


def test_evaluation_resumes_at_another_resolution_window_and_channel_count(tmp_path, caplog):
    _, path = saved(tmp_path, "MODEL.NUM_CLASSES", 3)
    opts = ["DATA.IMG_SIZE", 32, "MODEL.SWIN.WINDOW_SIZE", 8, "MODEL.SWIN.IN_CHANS", 1, "MODEL.NUM_CLASSES", 3]
    config = make_config(None, *SMALL, *opts, eval=True, resume=path)
    model = build_model(config)
    with caplog.at_level(logging.INFO, "test"):
        utils.load_checkpoint(config, model, None, None, None, LOGGER)
    assert "relative_position_bias_table: from 49x2 to 225x2" in caplog.text
    assert "patch_embed.proj.weight: from 8x3x2x2 to 8x1x2x2" in caplog.text
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    training = make_config(None, *SMALL, *opts, resume=path)
    with pytest.raises(ValueError, match="of another shape"):
        utils.load_checkpoint(training, model, None, None, None, LOGGER)
    other = make_config(None, *SMALL, "MODEL.NUM_CLASSES", 4, eval=True, resume=path)
    with pytest.raises(ValueError, match=r"3 classes in the file, 4 in the model.*nothing to evaluate"):
        utils.load_checkpoint(other, build_model(other), None, None, None, LOGGER)


def fine_tune(tmp_path, data, path, *opts):
    """main.py on a folder from given weights, in this process; the log, and the weights it began with."""
    began = {}

    def keep(run, compute_loss):
        began.update({name: value.clone() for name, value in run.model.state_dict().items()})
        return real(run, compute_loss)

    real, engine.fit = engine.fit, keep
    try:
        config = make_config(
            None, *SMALL, "TRAIN.EPOCHS", 1, "DATA.DATA_PATH", str(data), "OUTPUT", str(tmp_path / "output"), *opts,
            pretrained=path,
        )  # fmt: skip
        main.main(config)
    finally:
        engine.fit = real
    return began, (tmp_path / "output" / "small" / "default" / "log_rank0.txt").read_text()


def test_fine_tuning_at_a_higher_resolution_and_window(tmp_path, image_folder):
    source, path = saved(tmp_path, "MODEL.NUM_CLASSES", 3)
    began, log = fine_tune(tmp_path, image_folder, path, "DATA.IMG_SIZE", 48, "MODEL.SWIN.WINDOW_SIZE", 6)
    table = "layers.0.blocks.1.attn.relative_position_bias_table"
    expected = resize_bias_table(source.state_dict()[table], (4, 4), (6, 6))
    assert torch.equal(began[table], expected) and f"{table}: from 49x2 to 121x2" in log
    assert torch.equal(began["head.weight"], source.head.weight) and "Max accuracy" in log


def test_fine_tuning_from_22k_takes_the_mapped_rows(tmp_path, image_folder):
    source, path = saved(tmp_path, "MODEL.NUM_CLASSES", 21841)
    began, log = fine_tune(tmp_path, image_folder, path, "MODEL.NUM_CLASSES", 1000)
    rows = torch.tensor(utils.rows_22k_to_1k())
    assert torch.equal(began["head.weight"], source.head.weight[rows])
    assert torch.equal(began["head.bias"], source.head.bias[rows]) and "rows mapped to ImageNet-1K" in log


def test_fine_tuning_on_200_classes_resets_the_head(tmp_path):
    classes = [f"n{i:03d}" for i in range(200)]
    for split in ("train", "val"):
        write_images(tmp_path / "data" / split, classes, 1)
    source, path = saved(tmp_path, "MODEL.NUM_CLASSES", 1000)
    began, log = fine_tune(tmp_path, tmp_path / "data", path)
    assert began["head.weight"].shape == (200, 16) and not began["head.weight"].any() and not began["head.bias"].any()
    assert "head: 1000 classes in the file, 200 in the model; set to zero" in log
    assert torch.equal(began["patch_embed.proj.weight"], source.patch_embed.proj.weight)
