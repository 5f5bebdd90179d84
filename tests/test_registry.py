"""Models by timm's names: official sizes, maps and arguments as timm has them, released weights, the list of models."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import golden, make_config
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import models.registry
import storage
from data.transforms import build_transform
from models.registry import CATALOGUE, REGISTERED
from tools import list_models

OFFICIAL = {Path(name).stem: numbers for name, numbers in golden("models").items() if "simmim_pretrain" not in name}
RELEASES = "https://github.com/SwinTransformer/storage/releases/download/"
TINY = "official_swin_tiny_patch4_window7_224"
DENSE_MOE = "official_swin_moe_small_patch4_window12_192_densebaseline_22k"
VARIANTS = [
    TINY,
    "official_swinv2_tiny_patch4_window8_256",
    "official_swin_mlp_tiny_c24_patch4_window8_256",
    DENSE_MOE,
]
# Arguments of a model of any variant that takes milliseconds: maps of 16, 8, 4 and 2 tokens a side.
SMALL = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
    "num_classes": 5,
}


def small(name: str = TINY, seed: int = 0, **arguments) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **arguments}).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def on_meta(name: str, **arguments) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def test_every_official_classifier_has_a_name():
    assert {name.removeprefix("official_") for name in REGISTERED} == set(CATALOGUE)
    assert set(timm.list_models("official_*")) == set(REGISTERED)
    assert all("expert" in name for name in set(CATALOGUE) - set(OFFICIAL))  # the others have golden numbers
    assert sorted(timm.list_models("official_*", pretrained=True)) == sorted(
        name for name, entry in REGISTERED.items() if entry.weights
    )
    assert timm.model_entrypoint("swin_tiny_patch4_window7_224").__module__.startswith("timm.")  # still its own


@pytest.mark.parametrize("name", OFFICIAL)
def test_models_are_the_official_ones(name):
    model = on_meta(f"official_{name}")
    assert sum(parameter.numel() for parameter in model.parameters()) == OFFICIAL[name]["n_parameters"]
    assert model.flops() == OFFICIAL[name]["flops"]
    assert model.num_classes == model.pretrained_cfg["num_classes"] == OFFICIAL[name]["num_classes"]
    assert model.pretrained_cfg["architecture"] == f"official_{name}"


def test_each_file_names_its_own_released_weights():
    for entry in CATALOGUE.values():
        assert entry.path.read_text().count("# Weights:") == bool(entry.weights)
        if entry.weights:
            version, file = entry.weights.removeprefix(RELEASES).split("/")
            assert re.fullmatch(r"v\d\.\d\.\d", version)
            assert file in (f"{entry.name}.pth", f"{entry.name.removesuffix('_finetune')}.pth")
    assert len({entry.weights for entry in CATALOGUE.values() if entry.weights}) == 31


def test_maps_of_a_whole_model_are_those_of_its_stages():
    torch.manual_seed(0)
    backbone = timm.create_model(TINY, features_only=True).eval()
    torch.manual_seed(0)
    model = timm.create_model(TINY).eval()
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        maps, expected = backbone(x), model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    assert all(map(torch.equal, maps, expected))
    assert backbone.feature_info.channels() == [96, 192, 384, 768]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2), (-1,), (0,)])
@pytest.mark.parametrize("name", VARIANTS)
def test_maps_of_some_stages(name, out_indices):
    backbone = small(name, features_only=True, out_indices=out_indices)
    stages = [i % 4 for i in out_indices]
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        maps, expected = backbone(x), small(name).forward_intermediates(x, stages, intermediates_only=True)
    assert backbone.feature_info.reduction() == [4 * 2**i for i in stages]
    assert backbone.feature_info.channels() == [16 * 2**i for i in stages] == [m.shape[1] for m in maps]
    assert len(maps) == len(stages) and all(map(torch.equal, maps, expected))


@pytest.mark.parametrize("name", VARIANTS)
def test_arguments_override_the_file(name):
    model = small(name, in_chans=1, num_classes=3, img_size=(64, 128), drop_path_rate=0.5)
    output = model(images(2, 1, 64, 128))
    logits = output[0] if name == DENSE_MOE else output
    assert logits.shape == (2, 3) and model.in_chans == 1 and model.patch_embed.img_size == (64, 128)
    assert model.layers[-1].blocks[-1].drop_path.drop_prob == 0.5
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    assert isinstance(small(name, num_classes=0).head, torch.nn.Identity)


def test_padded_models_take_any_size():
    assert small(pad_maps=True)(images(1, 3, 50, 70)).shape == (1, 5)


@pytest.mark.parametrize(
    "name", ["configs/swin/swin_tiny_patch4_window7_224", "configs/swin/swin_base_patch4_window12_384_finetune"]
)
def test_timm_prepares_images_as_official_evaluation_does(name):
    """One file with a crop of the middle, one without."""
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (375, 500, 3), dtype=np.uint8))
    expected = build_transform(False, make_config(f"{name}.yaml"))(photo)
    settings = resolve_model_data_config(on_meta(f"official_{Path(name).name}"))
    torch.testing.assert_close(create_transform(**settings)(photo), expected)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """The weights of ``small(seed=1)`` at every address; gives the list of addresses asked for."""
    file = tmp_path / "released.pth"
    torch.save({"model": small(seed=1).state_dict(), "epoch": 299}, file)
    addresses = []
    monkeypatch.setattr(storage, "download", lambda address: addresses.append(address) or file)
    return addresses


def test_pretrained_models_have_the_released_weights(released):
    model, x = small(pretrained=True), images(2, 3, 64, 64)
    assert released == [f"{RELEASES}v1.0.0/swin_tiny_patch4_window7_224.pth"]
    assert torch.equal(model(x), small(seed=1)(x)) and not torch.equal(model(x), small()(x))
    backbone = small(pretrained=True, features_only=True, out_indices=(2,))
    assert torch.equal(backbone(x)[0], small(seed=1).forward_intermediates(x, [2], intermediates_only=True)[0])


def test_pretrained_weights_are_fitted_and_it_is_said(released, caplog):
    caplog.set_level(logging.INFO, models.registry.__name__)
    model, source = small(pretrained=True, num_classes=7, in_chans=1, window_size=2), small(seed=1)
    assert not model.head.weight.any() and not model.head.bias.any() and model.num_classes == 7
    grey = source.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, grey)
    assert "head: 5 classes in the file, 7 in the model; set to zero" in caplog.messages
    assert "patch_embed.proj.weight: from 16x3x4x4 to 16x1x4x4" in caplog.messages
    assert any("relative_position_bias_table: from 49x1 to 9x1" in message for message in caplog.messages)


def test_pretrained_weights_of_another_file(released, tmp_path):
    file = tmp_path / "mine.pth"
    torch.save(small(seed=2).state_dict(), file)
    model = small(pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert torch.equal(model.head.weight, small(seed=2).head.weight) and released == []


@pytest.mark.parametrize("name", [DENSE_MOE, "official_simmim_finetune__swin_base__img224_window7__800ep"])
def test_models_without_released_weights_say_so(name):
    with pytest.raises(ValueError, match=f"{name}: .*names no released weights") as error:
        small(name, pretrained=True)
    assert "\n" not in str(error.value)


def test_wrong_calls_name_the_way_out(released):
    with pytest.raises(ValueError, match=r"window7_224\.pth: its model has MODEL\.SWIN\.EMBED_DIM=16, this one 32"):
        small(pretrained=True, embed_dim=32)
    with pytest.raises(ValueError, match="TORCH_HOME"):
        small(pretrained=True, cache_dir="elsewhere")
    with pytest.raises(ValueError, match="window"):
        small(img_size=72)
    with pytest.raises(ValueError, match="choose from 0 to 3"):
        small(features_only=True, out_indices=(4,))
    with pytest.raises(ValueError, match=r"MODEL\.SWIN_MOE\.TOP_VALUE=9: .* 8 expert"):
        timm.create_model("official_swin_moe_small_patch4_window12_192_8expert_32gpu_22k", top_value=9)


def list_of(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["list_models.py", *arguments])
    list_models.main()
    return capsys.readouterr().out


def test_the_list_has_the_official_numbers(monkeypatch, capsys):
    rows = json.loads(list_of(monkeypatch, capsys, "swin_*_patch4_window7_224_22kto1k_finetune", "--json"))
    assert [row["name"].split("_")[1] for row in rows] == ["base", "large", "small", "tiny"]
    for row in rows:
        expected = OFFICIAL[row["name"]]
        assert (row["parameters"], row["flops"]) == (expected["n_parameters"], expected["flops"])
        assert row["weights"] == CATALOGUE[row["name"]].weights and row["image_size"] == [224, 224]
    assert [row["top1"] for row in rows] == [85.2, 86.3, 83.2, 80.9]


def test_the_table_counts_all_experts(monkeypatch, capsys):
    lines = list_of(monkeypatch, capsys, "official_swin_moe_base_*").splitlines()
    by_name = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert by_name.keys() == {name for name in CATALOGUE if name.startswith("swin_moe_base")}
    dense, experts = "densebaseline_22k", "8expert_32gpu_22k"
    of = {key: by_name[f"swin_moe_base_patch4_window12_192_{key}"] for key in (dense, experts)}
    assert of[dense] == ["swinmoe", "192x192", "21841", "109.3", "11.8", "37.2", "no"]
    # Whole models have the published 300.3M parameters; the FLOPs are those of the official count, with capacity 1.25.
    assert of[experts] == ["swinmoe", "192x192", "21841", "300.3", "12.5", "38.1", "no"]


def test_the_list_names_what_it_cannot_find(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        list_of(monkeypatch, capsys, "swin_tiny_patch4_window7_22")
    assert re.fullmatch(r"list_models\.py: error: no model .*; did you mean swin_tiny_patch4_\S+\?.*", stop.value.code)


def test_published_accuracy_is_that_of_the_released_weights():
    assert list_models.published("83.0 % top-1 (paper), 83.2 % (released weights).") == 83.2
    assert list_models.published("87.7 % top-1 (paper); 99.9 % elsewhere.") == 87.7
    assert list_models.published("published only after fine-tuning; see others.") is None
    without = {name for name, entry in CATALOGUE.items() if list_models.published(entry.expected) is None}
    assert without == {name for name in CATALOGUE if name.endswith("_22k") and "_moe_" not in name}


def test_each_file_is_parsed_once(monkeypatch):
    parsed = []
    monkeypatch.setattr(models.registry, "get_config", lambda args: parsed.append(args.cfg))
    models.registry.read_catalogue()
    assert parsed == [entry.path for entry in CATALOGUE.values()]
