"""Checkpoints: exact round trips, strict loading, official files, and files that must be refused."""

import collections
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import SMALL, golden, golden_values, make_config
from timm.data import ImageNetInfo
from yacs.config import CfgNode

import storage
import utils
from checkpoint import (
    compare,
    pretrained_state,
    resize_bias_table,
    resize_bias_table_geometric,
    resize_position_embedding,
)
from config import to_dict
from lr_scheduler import build_scheduler
from models import build_model
from optimizer import build_optimizer
from tools.make_22k_map import build_map

LOGGER = logging.getLogger("test")


@pytest.fixture
def parts(tmp_path):
    """A small model with everything that a checkpoint holds, after two steps."""
    config = make_config(None, *SMALL, "OUTPUT", str(tmp_path), "MODEL.NUM_CLASSES", 3)
    os.makedirs(config.OUTPUT)
    model = build_model(config)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, 10)
    scaler = utils.NativeScalerWithGradNormCount("cpu", enabled=False)
    for step in range(2):
        optimizer.zero_grad()
        scaler(model(torch.randn(2, 3, 16, 16)).square().sum(), optimizer, clip_grad=5.0)
        scheduler.step_update(step)
    return config, model, optimizer, scheduler, scaler


def save(parts, epoch: int = 0, **extra):
    config, model, optimizer, scheduler, scaler = parts
    return utils.save_checkpoint(config, epoch, model, 12.5, optimizer, scheduler, scaler, LOGGER, **extra)


def with_resume(config, path):
    config.defrost()
    config.MODEL.RESUME = str(path)
    config.freeze()
    return config


def test_round_trip_restores_everything(parts):
    config, model, optimizer, *_ = parts
    path = save(parts, epoch=3)
    saved = torch.load(path, weights_only=True)  # plain data needs no allow-list
    assert {"model", "optimizer", "lr_scheduler", "max_accuracy", "scaler", "epoch", "config"} <= set(saved)
    assert saved["config"] == to_dict(config)

    fresh = build_model(config)
    other = build_optimizer(config, fresh)
    schedule = build_scheduler(config, other, 10)
    resumed = with_resume(config.clone(), path)
    scaler = utils.NativeScalerWithGradNormCount("cpu", enabled=False)
    assert utils.load_checkpoint(resumed, fresh, other, schedule, scaler, LOGGER) == 12.5
    assert resumed.TRAIN.START_EPOCH == 4
    for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_official_files_with_a_pickled_config_load(parts, tmp_path):
    config, model, optimizer, scheduler, _ = parts
    official = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "max_accuracy": np.float64(81.2),
        "scaler": {},
        "epoch": 299,
        "config": CfgNode(to_dict(config)),
    }
    torch.save(official, tmp_path / "official.pth")
    resumed = with_resume(config.clone(), tmp_path / "official.pth")
    assert utils.load_checkpoint(resumed, build_model(config), optimizer, scheduler, None, LOGGER) == 81.2
    assert isinstance(storage.read_checkpoint(tmp_path / "official.pth")["config"], collections.OrderedDict)


def test_bare_state_dict_is_taken_as_a_model(parts, tmp_path):
    torch.save(parts[1].state_dict(), tmp_path / "bare.pth")
    assert set(storage.read_checkpoint(tmp_path / "bare.pth")) == {"model"}


def test_pickle_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": Attack()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Attack()}, protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(ValueError, match="refused") as error:
            storage.read_checkpoint(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_truncated_and_missing_files_are_named(parts, tmp_path):
    path = save(parts)
    data = path.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"ckpt_epoch_0\.pth: ") as error:
            storage.read_checkpoint(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.read_checkpoint(tmp_path / "nowhere.pth")


def test_another_architecture_is_reported(parts):
    config = parts[0]
    path = save(parts)
    wider = make_config(None, *SMALL, "MODEL.SWIN.EMBED_DIM", 16, "MODEL.NUM_CLASSES", 3)
    with pytest.raises(ValueError) as error:
        utils.load_checkpoint(with_resume(wider, path), build_model(wider), None, None, None, LOGGER)
    assert "its model has MODEL.SWIN.EMBED_DIM=8, this one 16; give its own" in str(error.value)
    other_mlps = make_config(None, *SMALL, "MODEL.SWIN.MLP_RATIO", 2.0, "MODEL.NUM_CLASSES", 3)
    with pytest.raises(
        ValueError, match=r"of another shape \(layers\.0\.blocks\.0\.mlp\.fc1\.weight: 32x8 in the file, 16x8"
    ):
        utils.load_checkpoint(with_resume(other_mlps, path), build_model(other_mlps), None, None, None, LOGGER)
    deeper = make_config(None, *SMALL, "MODEL.SWIN.DEPTHS", [2, 3], "MODEL.NUM_CLASSES", 3)
    with pytest.raises(ValueError, match=r"its model has MODEL.SWIN.DEPTHS=\[2, 2\], this one \[2, 3\]"):
        utils.load_checkpoint(with_resume(deeper, path), build_model(deeper), None, None, None, LOGGER)
    assert compare(build_model(config).state_dict(), parts[1].state_dict()).missing == []


def test_a_failed_write_leaves_the_old_file(parts, monkeypatch):
    path = save(parts)
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save(parts)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_auto_resume_takes_the_furthest_that_loads(parts, caplog):
    folder = save(parts, epoch=0).parent
    for epoch in (9, 10):
        save(parts, epoch=epoch)
    (folder / "ckpt_epoch_11.pth").write_bytes(b"truncated")
    (folder / "best.pth").write_bytes(b"of somebody else")
    os.utime(folder / "ckpt_epoch_0.pth")  # the newest by time is not the furthest
    with caplog.at_level(logging.WARNING, "test"):
        assert utils.auto_resume_helper(folder, LOGGER) == str(folder / "ckpt_epoch_10.pth")
    assert "passed over" in caplog.text and "ckpt_epoch_11.pth" in caplog.text
    save(parts, epoch=11, step=3)
    (folder / "ckpt_epoch_11.pth").unlink()
    assert utils.auto_resume_helper(folder, LOGGER) == str(folder / "ckpt_epoch_11_step_3.pth")


def test_auto_resume_does_not_mistake_a_failing_disk_for_a_broken_file(parts, monkeypatch):
    folder = save(parts, epoch=0).parent
    save(parts, epoch=1)
    (folder / "ckpt_epoch_2.pth").symlink_to(folder / "gone")
    assert utils.auto_resume_helper(folder, LOGGER) == str(folder / "ckpt_epoch_1.pth")

    def fail(*args, **kwargs):
        raise OSError("stale file handle")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="stale"):
        utils.auto_resume_helper(folder, LOGGER)


def test_files_without_loss_scaling_suit_a_scaler(parts):
    scaler = torch.amp.GradScaler("cpu")
    before = scaler.state_dict()
    scaler.load_state_dict(torch.load(save(parts), weights_only=True)["scaler"])  # as the official code does
    assert scaler.state_dict() == before


def test_another_optimizer_is_named(parts):
    config, model, *_ = parts
    resumed = with_resume(config.clone(), save(parts))
    for name in ("sgd", "fused_lamb"):
        resumed.defrost()
        resumed.TRAIN.OPTIMIZER.NAME = name
        with pytest.raises(ValueError, match="its optimizer state is not that of"):
            utils.load_checkpoint(resumed, model, build_optimizer(resumed, model), None, None, LOGGER)


def test_evaluating_a_head_of_other_classes_is_an_error(parts, tmp_path):
    torch.save(parts[1].state_dict(), tmp_path / "three.pth")
    five = make_config(None, *SMALL, "MODEL.NUM_CLASSES", 5, eval=True, pretrained=str(tmp_path / "three.pth"))
    with pytest.raises(ValueError, match="3 classes in the file, 5 in the model"):
        utils.load_pretrained(five, build_model(five), LOGGER)


def test_auto_resume_does_not_begin_anew_over_broken_files(tmp_path):
    assert utils.auto_resume_helper(tmp_path) is None
    (tmp_path / "ckpt_epoch_0.pth").write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of its 1 checkpoint"):
        utils.auto_resume_helper(tmp_path)


def test_finished_epochs_replace_files_of_their_steps(parts):
    folder = save(parts, epoch=0).parent
    for step in (2, 4):
        path = save(parts, epoch=1, step=step)
        assert torch.load(path, weights_only=True)["epoch"] == 0  # the last finished one
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt_epoch_0.pth", "ckpt_epoch_1_step_4.pth"]
    save(parts, epoch=1)
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth"]


BIAS_TABLES = [
    pytest.param(resize, case, id=f"{kind}-{case['src_window']}to{case['dst_window']}")
    for kind, resize in (("bicubic", resize_bias_table), ("simmim_geometric", resize_bias_table_geometric))
    for case in golden("pretrained")[kind]
]


@pytest.mark.parametrize("resize, case", BIAS_TABLES)
def test_resized_bias_tables_are_the_official_ones(resize, case):
    source = golden_values(case["param_name"], ((2 * case["src_window"] - 1) ** 2, case["heads"]))
    old, new = ((case[key], case[key]) for key in ("src_window", "dst_window"))
    check_resized(resize(source, old, new), case)


@pytest.mark.parametrize("case", golden("pretrained")["ape"], ids=lambda c: f"{c['src_grid']}to{c['dst_grid']}")
def test_resized_position_embeddings_are_the_official_ones(case):
    source = golden_values(case["param_name"], (1, case["src_grid"] ** 2, case["channels"]))
    old, new = ((case[key], case[key]) for key in ("src_grid", "dst_grid"))
    check_resized(resize_position_embedding(source, old, new), case)


def check_resized(table: torch.Tensor, case: dict) -> None:
    assert list(table.shape) == case["shape"]
    assert table.norm().item() == pytest.approx(case["norm"], rel=1e-5)
    assert table.sum().item() == pytest.approx(case["sum"], abs=1e-3)
    assert table.flatten()[:16].tolist() == pytest.approx(case["first16"], abs=1e-5)


def test_pretrained_weights_move_to_another_window_and_class_count(tmp_path):
    config = make_config(None, *SMALL, "MODEL.NUM_CLASSES", 3)
    source = build_model(config)
    torch.save({"model": source.state_dict()}, tmp_path / "source.pth")
    larger = make_config(
        None, *SMALL, "DATA.IMG_SIZE", 32, "MODEL.SWIN.WINDOW_SIZE", 8, "MODEL.NUM_CLASSES", 5,
        "MODEL.PRETRAINED", str(tmp_path / "source.pth"),
    )  # fmt: skip
    model = build_model(larger)
    utils.load_pretrained(larger, model, LOGGER)
    state = model.state_dict()
    assert torch.equal(state["layers.0.blocks.0.mlp.fc1.weight"], source.layers[0].blocks[0].mlp.fc1.weight)
    assert not state["head.weight"].any() and not state["head.bias"].any()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_22k_head_becomes_a_1k_head_by_the_map():
    rows = utils.rows_22k_to_1k()
    state = {"head.weight": torch.randn(21841, 4), "head.bias": torch.randn(21841)}
    expected = {"head.weight": torch.zeros(1000, 4), "head.bias": torch.zeros(1000)}
    mapped, notes = pretrained_state(state, expected, rows)
    assert torch.equal(mapped["head.weight"], state["head.weight"][rows]) and len(notes) == 1
    assert torch.equal(mapped["head.bias"], state["head.bias"][rows])


def test_22k_map_is_that_of_the_synset_lists():
    rows = utils.rows_22k_to_1k()
    assert rows == build_map() and len(set(rows)) == 1000
    names_1k, names_22k = (ImageNetInfo(name).label_names() for name in ("imagenet1k", "imagenet21k_goog"))
    differing = [name for name, row in zip(names_1k, rows, strict=True) if names_22k[row] != name]
    assert differing == ["n04399382"]


def test_download_checks_the_digest(tmp_path, monkeypatch):
    import hashlib

    data = b"weights"
    digest = hashlib.sha256(data).hexdigest()
    fetched = []

    def fetch(url, file, progress):
        fetched.append(url)
        with open(file, "wb") as target:
            target.write(data)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert storage.download(f"https://host/a.pth#sha256={digest}").read_bytes() == data
    assert storage.download(f"https://host/a.pth#sha256={digest}").read_bytes() == data
    assert fetched == ["https://host/a.pth"]  # once
    assert storage.download("https://host/run2/a.pth") != storage.download("https://host/a.pth")
    storage.download("https://host/model-20210401.pth")  # a date is no digest
    storage.download(f"https://host/b-{digest[:8]}.pth")
    for url in ("https://host/a.pth#sha256=00", "https://host/c-0000000a.pth"):
        with pytest.raises(ValueError, match="its sha256 does not begin with"):
            storage.download(url)
