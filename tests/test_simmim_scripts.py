"""SimMIM's scripts as users run them: pre-train, look, fine-tune, evaluate, resume exactly; errors in one line."""

import logging
import signal
from pathlib import Path

import pytest
import torch
from conftest import (
    SMALL,
    assert_same_state,
    make_config,
    small_run,
    weights,
    write_images,
    write_stopping_script,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import engine
import launch
import main
import main_simmim_ft
import utils_simmim
from checkpoint import resize_bias_table_geometric
from config import to_dict
from models import build_model
from models.simmim import norm_targets
from reconstruction import reconstruct

PRETRAINING = ["DATA.MASK_PATCH_SIZE", 4, "DATA.WATCHED_IMAGES", 3]
STILL = ["TRAIN.BASE_LR", 0.0, "TRAIN.WARMUP_LR", 0.0, "TRAIN.MIN_LR", 0.0]
LOGGER = logging.getLogger("test")


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """20 images of 16x16 in one folder, without classes."""
    write_images(tmp_path, ["unlabelled"], 20)
    return tmp_path / "unlabelled"


@pytest.mark.parametrize("kind", ["swin", pytest.param("swinv2", marks=pytest.mark.slow)])
def test_pretrain_finetune_evaluate(unlabelled, image_folder, tmp_path, run_script, kind):
    model = [
        "MODEL.TYPE",
        kind,
        *(key.replace("SWIN.", f"{kind.upper()}.") if isinstance(key, str) else key for key in SMALL),
    ]
    result = run_script("main_simmim_pt.py", *small_run(unlabelled, *model, *PRETRAINING, "SAVE_FREQ", 2))
    folder = tmp_path / "output/small/default"
    checkpoint = folder / "ckpt_epoch_1.pth"
    assert result.stdout.count(" * Reconstruction loss ") == 2  # the first epoch and the last
    with Image.open(folder / "reconstruction_epoch_1.png") as picture:
        assert picture.size == (3 * 16 + 4 * 2, 3 * 16 + 4 * 2)
    events = EventAccumulator(str(folder)).Reload()
    assert {"val/loss", "reconstruction/image_2"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["reconstruction"]
    again = run_script(
        "main_simmim_pt.py", "--eval", *small_run(unlabelled, *model, *PRETRAINING), "--resume", checkpoint
    )
    lines = [
        next(line.split(" * ")[1] for line in reversed(r.stdout.splitlines()) if "Reconstruction" in line)
        for r in (result, again)
    ]
    assert lines[0] == lines[1]

    # With rates of zero the fine-tuned backbone is the one that was loaded.
    tuned = [*small_run(image_folder, *model, *STILL, "TRAIN.LAYER_DECAY", 0.8), "--tag", "tuned"]
    result = run_script("main_simmim_ft.py", *tuned, "--pretrained", checkpoint)
    before, after = weights(checkpoint), weights(tmp_path / "output/small/tuned/ckpt_epoch_1.pth")
    loaded = [name for name in after if not name.startswith("head.")]
    assert all(torch.equal(after[name], before[f"encoder.{name}"]) for name in loaded)
    assert after["head.weight"].any()  # as initialised
    assert "left out: decoder.0.weight, decoder.0.bias, encoder.mask_token" in result.stdout
    assert "weights: " in result.stdout and "2 changed or initialised" in result.stdout

    evaluated = run_script("main.py", "--eval", *tuned, "--resume", tmp_path / "output/small/tuned/ckpt_epoch_1.pth")
    accuracy = [
        [line for line in r.stdout.splitlines() if " * Acc@1" in line][-1].split("INFO")[1] for r in (result, evaluated)
    ]
    assert accuracy[0] == accuracy[1]


@pytest.mark.parametrize(
    "number, stop_at, processes, opts",
    [
        (signal.SIGKILL, 6, 1, []),
        pytest.param(
            *(signal.SIGTERM, 4, 1, ["TRAIN.ACCUMULATION_STEPS", 2, "DATA.NUM_WORKERS", 2]), marks=pytest.mark.slow
        ),
        (signal.SIGKILL, 4, 2, ["DATA.BATCH_SIZE", 2, "TRAIN.ACCUMULATION_STEPS", 2]),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(unlabelled, tmp_path, run_script, number, stop_at, processes, opts):
    """Masks included: other masks would give other weights."""
    torchrun = processes if processes > 1 else 0
    arguments = small_run(unlabelled, *PRETRAINING, "SAVE_STEPS", 2, *opts)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("main_simmim_pt.py", *arguments, "--output", whole, torchrun=torchrun)
    script = write_stopping_script(tmp_path, "main_simmim_pt", "main_simmim_pt", "reconstruction_loss")
    environment = {"SIGNAL": str(int(number)), "STOP_AT": str(stop_at), "GROUP": ""}
    stopped = run_script(script, *arguments, "--output", parts, torchrun=torchrun, check=False, env=environment)
    assert stopped.returncode != 0
    assert not (parts / "small/default/ckpt_epoch_1.pth").exists()
    workers = 0 if "DATA.NUM_WORKERS" in opts else 2
    resumed = [*arguments, "DATA.NUM_WORKERS", workers, "--output", parts]
    run_script("main_simmim_pt.py", *map(str, resumed), torchrun=torchrun)
    assert_same_state(*(root / "small/default/ckpt_epoch_1.pth" for root in (whole, parts)))


def small_model(*opts):
    config = make_config(None, *SMALL, *opts)
    return config, build_model(config, is_pretrain=True)


def in_session(tmp_path: Path, *opts):
    return launch.session(make_config(None, *SMALL, *opts, output=str(tmp_path)))


def test_reconstruction_shows_what_was_seen_and_reports_each_loss(tmp_path):
    _, model = small_model()
    images, masks = torch.randn(3, 3, 16, 16).clamp(-1.5, 1.5), (torch.rand(3, 4, 4) < 0.6).long()
    masks = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with in_session(tmp_path) as session:
        losses, grid = reconstruct(session, model, images, masks)
    assert model.training
    model.eval()  # without dropped paths
    for i, loss in enumerate(losses):
        assert loss.item() == pytest.approx(model(images[i : i + 1], masks[i : i + 1]).item(), rel=1e-3)
    assert grid.shape == (3, 3 * 18 + 2, 3 * 18 + 2)
    image, masked, completed = (grid[:, 2:18, 2 + 18 * i : 18 + 18 * i] for i in range(3))
    hidden = masks[0].repeat_interleave(2, 0).repeat_interleave(2, 1).bool()
    assert torch.equal(image[:, ~hidden], completed[:, ~hidden]) and torch.equal(image[:, ~hidden], masked[:, ~hidden])
    assert not torch.equal(image[:, hidden], completed[:, hidden])
    assert masked[:, hidden].std(1).max() < 1e-6  # one colour, the mean


def test_normalised_targets_are_undone_in_pictures(tmp_path):
    """A model that predicts its normalised targets exactly shows the image itself."""

    class Oracle(nn.Module):
        def forward(self, x, mask):
            return norm_targets(x, 7)

    _, model = small_model("MODEL.SIMMIM.NORM_TARGET.ENABLE", True, "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE", 7)
    model.encoder, model.decoder = Oracle(), nn.Identity()
    images, masks = torch.randn(2, 3, 16, 16), torch.ones(2, 8, 8, dtype=torch.long)
    losses, predicted = model.reconstruct(images, masks)
    assert losses.abs().max() < 1e-6
    torch.testing.assert_close(predicted, images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.TYPE", "swin_moe"], r"MODEL.TYPE='swin_moe' cannot be pre-trained"),
        (["MODEL.TYPE", "swin_mlp"], r"MODEL.TYPE='swin_mlp' cannot be pre-trained"),
        (
            ["MODEL.SIMMIM.NORM_TARGET.ENABLE", True, "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE", 46],
            r"patch_size=46 \(MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE\) must be odd",
        ),
    ],
)
def test_models_that_cannot_be_pretrained(opts, message):
    with pytest.raises(ValueError, match=message):
        small_model(*opts)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.SWIN.DEPTHS", [2, 4]], r"its model has MODEL.SWIN.DEPTHS=\[2, 2\], this one \[2, 4\]"),
        (["MODEL.SWIN.EMBED_DIM", 16], r"its model has MODEL.SWIN.EMBED_DIM=8, this one 16"),
    ],
)
def test_a_checkpoint_of_another_depth_or_width_is_refused(tmp_path, opts, message):
    _, model = small_model()
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pth")
    config = make_config(None, *SMALL, *opts, pretrained=str(tmp_path / "pretrained.pth"))
    with pytest.raises(ValueError, match=rf"pretrained.pth: {message}"):
        utils_simmim.load_pretrained(config, build_model(config), LOGGER)


def test_backbone_weights_that_are_missing_are_named(tmp_path):
    config, model = small_model()
    state = {name: value for name, value in model.state_dict().items() if "blocks.1.mlp.fc1" not in name}
    torch.save({"model": state}, tmp_path / "pretrained.pth")
    config = make_config(None, *SMALL, pretrained=str(tmp_path / "pretrained.pth"))
    with pytest.raises(ValueError, match=r"4 missing \(layers\.0\.blocks\.1\.mlp\.fc1\.weight"):
        utils_simmim.load_pretrained(config, build_model(config), LOGGER)


def test_pretraining_files_are_not_resumed_as_classifiers(tmp_path):
    _, model = small_model()
    torch.save({"model": model.state_dict()}, tmp_path / "pretraining.pth")
    config = make_config(None, *SMALL, resume=str(tmp_path / "pretraining.pth"))
    with pytest.raises(ValueError, match=r"pretraining.pth: a checkpoint of SimMIM's pre-training; .* --pretrained"):
        utils_simmim.load_checkpoint(config, build_model(config), None, None, None, LOGGER)


def test_fine_tuning_lowers_rates_and_resizes_tables(image_folder, tmp_path, monkeypatch):
    """In main_simmim_ft.py itself: the groups' rates, and the table that training begins with."""
    _, model = small_model("DATA.IMG_SIZE", 32)
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pth")
    opts = [*SMALL, "DATA.IMG_SIZE", 48, "MODEL.SWIN.WINDOW_SIZE", 6, "TRAIN.LAYER_DECAY", 0.5]
    flags = {"data_path": str(image_folder), "pretrained": str(tmp_path / "pretrained.pth"), "output": str(tmp_path)}
    kept = []
    monkeypatch.setattr(engine, "fit", lambda run, loss: kept.append(run))
    main_simmim_ft.main(make_config(None, *opts, **flags))
    groups = kept[0].optimizer.param_groups
    base = max(group["initial_lr"] for group in groups)
    assert [group["initial_lr"] / base for group in groups] == pytest.approx([group["lr_scale"] for group in groups])
    assert {round(group["lr_scale"], 6) for group in groups} == {0.5**k for k in range(6)}
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    expected = resize_bias_table_geometric(model.encoder.get_parameter(name).detach(), (4, 4), (6, 6))
    torch.testing.assert_close(kept[0].model.get_parameter(name), expected)


@pytest.mark.parametrize("script", [main, main_simmim_ft])
def test_experts_need_their_own_script(tmp_path, script):
    with pytest.raises(ValueError, match=r"MODEL.TYPE='swin_moe' has an auxiliary loss, .* use main_moe.py"):
        script.main(make_config(None, *SMALL, "MODEL.TYPE", "swin_moe", output=str(tmp_path)))


def test_position_embeddings_of_oblong_maps_are_evaluated(tmp_path):
    opts = [*SMALL, "DATA.IMG_SIZE", [16, 32], "MODEL.SWIN.APE", True]
    config = make_config(None, *opts)
    model = build_model(config, is_pretrain=True)
    torch.save({"model": model.state_dict(), "config": to_dict(config)}, tmp_path / "oblong.pth")
    config = make_config(None, *opts, resume=str(tmp_path / "oblong.pth"), eval=True)
    other = build_model(config, is_pretrain=True)
    utils_simmim.load_checkpoint(config, other, None, None, None, LOGGER)
    assert torch.equal(other.encoder.absolute_pos_embed, model.encoder.absolute_pos_embed)


def test_tables_are_resized_geometrically(tmp_path):
    """Another way than main.py's; the numbers of either are checked against the official ones elsewhere."""
    _, model = small_model("DATA.IMG_SIZE", 32, "MODEL.SWIN.WINDOW_SIZE", 4)
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pth")
    config = make_config(
        None, *SMALL, "DATA.IMG_SIZE", 48, "MODEL.SWIN.WINDOW_SIZE", 6, pretrained=str(tmp_path / "pretrained.pth")
    )
    tables = []
    for load in (utils_simmim.load_pretrained, utils_simmim.load_pretrained_bicubic):
        target = build_model(config)
        load(config, target, LOGGER)
        tables.append(target.layers[0].blocks[0].attn.relative_position_bias_table)
    assert tables[0].shape == tables[1].shape == (121, 2)
    assert not torch.allclose(*tables, atol=1e-4)


def test_mixed_precision_is_the_default_as_officially():
    device = torch.device("cpu")

    def chosen(**flags):
        return launch.pick_amp_dtype(make_config(None, "AMP_DTYPE", "bf16", **flags), device)

    assert chosen() == chosen(enable_amp=True) == torch.bfloat16
    assert chosen(disable_amp=True) == chosen(enable_amp=True, disable_amp=True) == torch.float32
    config = make_config(None, "AMP_DTYPE", "bf16", "AMP_ENABLE", False, enable_amp=True)
    assert launch.pick_amp_dtype(config, device) == torch.bfloat16
