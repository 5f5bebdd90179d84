"""Conversion against the libraries themselves: their models give the same logits with converted weights, both ways."""

from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import safetensors.torch
import timm.models.swin_transformer
import timm.models.swin_transformer_v2
import torch
import torchvision.models.swin_transformer as torchvision_swin
import transformers
from conftest import fill, golden_images
from torch import nn

from checkpoint import is_rebuilt, strict_state
from conversion import convert, detect, from_official, to_official
from models.layers import relative_coords_table
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from storage import read_checkpoint
from tools import convert_checkpoint

FAMILIES = ("swin", "swinv2")
LIBRARIES = ("timm", "torchvision", "transformers")
LAYOUTS = ("official", *LIBRARIES)
IMAGES = golden_images(0, 2, 32)

# Maps of 16x16 and 8x8 in windows of 4x4, shifted in the second block of each stage.
SIZES = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_classes": 5}


def official(family: str, **options) -> nn.Module:
    return {"swin": SwinTransformer, "swinv2": SwinTransformerV2}[family](img_size=32, **{**SIZES, **options})


def of_timm(family: str, **options) -> nn.Module:
    models = {
        "swin": timm.models.swin_transformer.SwinTransformer,
        "swinv2": timm.models.swin_transformer_v2.SwinTransformerV2,
    }
    return models[family](img_size=32, **{**SIZES, **options})


def of_torchvision(family: str, **options) -> nn.Module:
    sizes = {**SIZES, **options}
    for name in ("patch_size", "window_size"):
        sizes[name] = list(sizes[name]) if isinstance(sizes[name], tuple) else [sizes[name]] * 2
    if family == "swinv2":
        sizes["block"] = torchvision_swin.SwinTransformerBlockV2
        sizes["downsample_layer"] = torchvision_swin.PatchMergingV2
    return torchvision_swin.SwinTransformer(**sizes)


def of_transformers(family: str, num_classes: int = 5, **options) -> nn.Module:
    config, model = {
        "swin": (transformers.SwinConfig, transformers.SwinForImageClassification),
        "swinv2": (transformers.Swinv2Config, transformers.Swinv2ForImageClassification),
    }[family]
    sizes = {name: value for name, value in {**SIZES, **options}.items() if name != "num_classes"}
    return model(config(image_size=32, num_labels=num_classes, **sizes))


MODELS = {"official": official, "timm": of_timm, "torchvision": of_torchvision, "transformers": of_transformers}


def weights(layout: str, model: nn.Module, folder: Path) -> dict:
    """A model's state dict as its library writes it to a file."""
    if layout != "transformers":
        return dict(model.state_dict())
    model.save_pretrained(folder / "saved")
    return safetensors.torch.load_file(folder / "saved" / "model.safetensors")


def load(layout: str, model: nn.Module, state: dict, folder: Path) -> nn.Module:
    """The model with these weights, in evaluation mode; every name must fit."""
    if layout == "official":
        model.load_state_dict(strict_state(state, model.state_dict()))
    elif layout == "transformers":
        folder.mkdir(exist_ok=True)
        model.config.save_pretrained(folder)
        convert_checkpoint.write_weights(state, folder / "model.safetensors", layout)
        model, report = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
    else:
        model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    out = model.eval()(IMAGES)
    return out if isinstance(out, torch.Tensor) else out.logits


def filled(layout: str, family: str, **options) -> nn.Module:
    """A model of random weights, none of them zero but those that SwinV2 does not have."""
    model = fill(MODELS[layout](family, **options))
    if (layout, family) == ("torchvision", "swinv2"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("qkv.bias"):
                    parameter.chunk(3)[1].zero_()
    return model


def parameters(state: dict) -> dict:
    return {name: value for name, value in state.items() if not is_rebuilt(name)}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype, name


def buffers(state: dict) -> set:
    return {name.rsplit(".", 1)[-1] for name in state if is_rebuilt(name)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_official_weights_in_a_library_and_back(library, family, tmp_path):
    ours = filled("official", family)
    state = ours.state_dict()
    converted, notes = convert(state, "official", library)
    theirs = load(library, MODELS[library](family), converted, tmp_path / "converted")
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)
    assert logits(ours).std() > 0.05
    assert detect(converted) == library
    assert any("2 attn_mask" in note for note in notes)
    assert_equal(parameters(convert(converted, library, "official")[0]), parameters(state))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_librarys_weights_here_and_back(library, family, tmp_path):
    theirs = filled(library, family)
    state = weights(library, theirs, tmp_path)
    assert detect(state) == library
    converted, notes = convert(state, library, "official")
    ours = load("official", official(family), converted, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    assert notes == [] and detect(converted) == "official"
    back = convert(converted, "official", library)[0]
    if (library, family) == ("transformers", "swin"):  # transformers 4 has the index in its files, 5 has not
        assert buffers(back) == {"relative_position_index"}
        back = parameters(back)
    assert_equal(back, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_libraries_meet(family):
    state = filled("official", family).state_dict()
    direct = {layout: convert(state, "official", layout)[0] for layout in LAYOUTS}
    for source, target in permutations(LAYOUTS, 2):
        converted, _ = convert(direct[source], source, target, window_size=4)
        assert_equal(parameters(converted), parameters(direct[target]))
        if target != "official":
            assert_equal(converted, direct[target])  # buffers too


@pytest.mark.parametrize("family", FAMILIES)
def test_which_buffers_libraries_keep_in_their_files(family, tmp_path):
    index, coords = "relative_position_index", "relative_coords_table"
    expected = {"official": {index, "attn_mask"}, "timm": set(), "torchvision": {index}, "transformers": set()}
    for layout, names in expected.items():
        if family == "swinv2" and names:
            names = {*names, coords}
        assert buffers(weights(layout, MODELS[layout](family), tmp_path)) == names, layout


def test_the_window_size_is_asked_for_only_where_nothing_tells_it(tmp_path):
    state = filled("timm", "swinv2").state_dict()
    with pytest.raises(ValueError, match=r"size of windows; give it with --window-size$"):
        convert(state, "timm", "torchvision")
    converted, notes = convert(state, "timm", "torchvision", window_size=4)
    assert notes == [
        "added 4 relative_position_index, 4 relative_coords_table, for windows that never were of another size"
    ]
    theirs = of_torchvision("swinv2")
    for name, value in theirs.state_dict().items():
        if is_rebuilt(name):
            assert torch.equal(value, converted[name]), name
    load("torchvision", theirs, converted, tmp_path)
    for wrong, match in ((5, "--window-size 5: these weights are of windows of 4x4"), (0, "must be at least 1")):
        with pytest.raises(ValueError, match=match):
            convert(converted, "torchvision", "timm", window_size=wrong)
    convert(filled("timm", "swin").state_dict(), "timm", "torchvision")  # the bias table tells


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_that_shrink_to_the_map(family, tmp_path):
    sizes = {"depths": [2, 1, 1], "num_heads": [2, 4, 4], "window_size": 8}  # maps of 16, 8 and 4
    ours = filled("official", family, **sizes)
    fitting = {"swin": ("timm",), "swinv2": ("timm", "transformers")}[family]
    for library in fitting:
        converted, _ = convert(ours.state_dict(), "official", library)
        theirs = load(library, MODELS[library](family, **sizes), converted, tmp_path / library)
        torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)
    for library in set(LIBRARIES) - {*fitting}:
        with pytest.raises(ValueError, match=f"{family} models of {library} have one size for all"):
            convert(ours.state_dict(), "official", library)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_that_are_not_square(family, tmp_path):
    ours = filled("official", family, window_size=(4, 8))
    state = ours.state_dict()
    for library in ("timm", "torchvision"):
        converted, _ = convert(state, "official", library)
        theirs = load(library, MODELS[library](family, window_size=(4, 8)), converted, tmp_path)
        torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="4x8: those of models of transformers are square"):
        convert(state, "official", "transformers")
    message = {"swin": "relative_position_index is missing", "swinv2": "--window-size"}[family]
    with pytest.raises(ValueError, match=message):
        convert(parameters(state), "official", "torchvision")


def test_windows_that_grow_stay_in_timm():
    model = of_timm("swin", depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=(2, 2, 4))
    with pytest.raises(ValueError, match="windows grow from stage to stage"):
        convert(model.state_dict(), "timm", "official")


def test_windows_of_the_pretraining_are_kept_or_told(tmp_path):
    trained = {"pretrained_window_sizes": [6, 3]}
    ours = filled("official", "swinv2", **trained)
    state = ours.state_dict()
    for library in LIBRARIES:
        converted, notes = convert(state, "official", library)
        told = "the model needs pretrained_window_sizes=[6, 3]" in notes
        assert told == (library != "torchvision")
        theirs = MODELS[library]("swinv2", **(trained if told else {}))
        theirs = load(library, theirs, converted, tmp_path / library)
        torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)
    back, notes = convert(convert(state, "official", "torchvision")[0], "torchvision", "official")
    name = "layers.1.blocks.1.attn.relative_coords_table"
    assert torch.equal(back[name], relative_coords_table(4, 3)) and torch.equal(back[name], state[name])
    assert notes == ["the model needs pretrained_window_sizes=[6, 3]"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_bias_of_q_k_v(family, tmp_path):
    ours = filled("official", family, qkv_bias=False)
    for library in ("timm", "transformers"):
        converted, _ = convert(ours.state_dict(), "official", library)
        theirs = load(library, MODELS[library](family, qkv_bias=False), converted, tmp_path / library)
        torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)
        assert_equal(parameters(convert(converted, library, "official")[0]), parameters(ours.state_dict()))
    with pytest.raises(ValueError, match="qkv_bias=False"):
        convert(ours.state_dict(), "official", "torchvision")


def test_absolute_position_embedding(tmp_path):
    ours = filled("official", "swin", ape=True)
    converted, _ = convert(ours.state_dict(), "official", "transformers")
    theirs = load("transformers", of_transformers("swin", use_absolute_embeddings=True), converted, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)
    back = convert(converted, "transformers", "official")[0]
    assert torch.equal(back["absolute_pos_embed"], ours.absolute_pos_embed)
    for library in ("timm", "torchvision"):
        with pytest.raises(ValueError, match="absolute_pos_embed has no place"):
            convert(ours.state_dict(), "official", library)
    with pytest.raises(ValueError, match="transformers' SwinV2 fails"):
        convert(official("swinv2", ape=True).state_dict(), "official", "transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_head(family, tmp_path):
    ours = fill(official(family, num_classes=0))
    for library in LIBRARIES:
        converted, notes = convert(ours.state_dict(), "official", library)
        assert notes[0] == "it has no head" and detect(converted) == library
        assert_equal(parameters(convert(converted, library, "official")[0]), parameters(ours.state_dict()))
        if library != "torchvision":  # its models always have one
            load(library, MODELS[library](family, num_classes=0), converted, tmp_path / library)


def test_other_names_of_the_same_weights(tmp_path):
    plain = parameters(filled("official", "swinv2").state_dict())
    early = {f"encoder.{name.replace('cpb_mlp', 'rpe_mlp')}": value for name, value in plain.items()}
    assert detect(early) == "official"
    assert_equal(convert(early, "official", "official")[0], plain)

    model = filled("transformers", "swin")
    expected = convert(weights("transformers", model, tmp_path), "transformers", "official")[0]
    assert_equal(convert(model.state_dict(), "transformers", "official")[0], expected)  # as named in memory
    model.swin.save_pretrained(tmp_path / "backbone")
    backbone = safetensors.torch.load_file(tmp_path / "backbone" / "model.safetensors")
    headless = {name: value for name, value in expected.items() if not name.startswith("head.")}
    assert detect(backbone) == "transformers"
    assert_equal(convert(backbone, "transformers", "official")[0], headless)


def test_layouts_of_a_single_stage_are_told_apart_by_the_head():
    state = official("swin", depths=[2], num_heads=[2]).state_dict()
    for layout in LAYOUTS:
        assert detect(convert(state, "official", layout)[0]) == layout


def test_converting_leaves_the_source_alone_and_shares_no_memory_between_tensors():
    state = filled("official", "swin").state_dict()
    before = {name: value.clone() for name, value in state.items()}
    converted, _ = convert(state, "official", "transformers")
    assert_equal(state, before)
    places = [value.untyped_storage().data_ptr() for name, value in parameters(converted).items()]
    assert len(set(places)) == len(places)


def renamed(state: dict, old: str, new: str) -> dict:
    return {name.replace(old, new): value for name, value in state.items()}


REFUSED = {
    "SwinMLP": ("swin", partial(renamed, old="attn.qkv", new="spatial_mlp"), "official", "SwinMLP"),
    "Swin-MoE": ("swin", partial(renamed, old="mlp.fc1", new="mlp._moe_layer.experts"), "official", "Swin-MoE"),
    "SimMIM": (
        "swinv2",
        lambda state: {"encoder.mask_token": torch.zeros(1, 1, 8), **state},
        "official",
        "encoder.mask_token is of SimMIM",
    ),
    "decoder": ("swin", lambda state: {**state, "decoder.0.bias": torch.zeros(2)}, "official", "of SimMIM"),
    "unknown name": (
        "swin",
        lambda state: {**state, "layers.0.blocks.1.attn.gamma": torch.zeros(2)},
        "official",
        r"not the weights of a swin classification model: 1 unexpected \(layers.0.blocks.1.attn.gamma\)$",
    ),
    "other family": (
        "swin",
        lambda state: {**state, "layers.0.blocks.1.attn.logit_scale": torch.zeros(2)},
        "official",
        "layers.0.blocks.1.attn.logit_scale",
    ),
    "missing": (
        "swin",
        lambda state: {name: value for name, value in state.items() if name != "layers.1.blocks.0.mlp.fc2.bias"},
        "official",
        r": 1 missing \(layers.1.blocks.0.mlp.fc2.bias\)$",
    ),
    "other layout": ("swin", dict, "timm", "not in the layout of timm: layers.0.downsample.reduction.weight, .* more"),
    "twice": (
        "swinv2",
        lambda state: {**state, **{f"encoder.{name}": state[name] for name in list(state)[:1]}},
        "official",
        "names of the same weight",
    ),
    "no attention": (
        "swin",
        lambda state: {name: value for name, value in state.items() if "attn" not in name},
        "official",
        "neither Swin nor SwinV2",
    ),
}


@pytest.mark.parametrize("family, change, layout, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_swin_classifier_is_refused(family, change, layout, message):
    state = change(official(family).state_dict())
    with pytest.raises(ValueError, match=message):
        to_official(state, layout)


def test_what_a_library_cannot_hold_is_refused():
    for library in LIBRARIES:
        with pytest.raises(ValueError, match=rf"patch_norm=False\); models of {library}"):
            convert(official("swin", patch_norm=False).state_dict(), "official", library)
    with pytest.raises(ValueError, match="for 1 channels"):
        convert(official("swin", in_chans=1).state_dict(), "official", "torchvision")
    state = from_official(parameters(official("swinv2").state_dict()), "transformers")[0]
    state["swinv2.encoder.layers.0.blocks.0.attention.self.key.bias"] = torch.zeros(8)
    with pytest.raises(ValueError, match=r"1 unexpected \(\S+\.self\.key\.bias\)$"):
        convert(state, "transformers", "official")
    with pytest.raises(ValueError, match="no weights of a Swin model"):
        detect(timm.create_model("resnet18", num_classes=2).state_dict())


def test_torchvision_bias_of_k_must_be_zero():
    model = fill(of_torchvision("swinv2"))
    with pytest.raises(ValueError, match=r"features\.1\.0\.attn\.qkv\.bias is not zero for k"):
        convert(model.state_dict(), "torchvision", "official")
    before = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.chunk(3)[1].zero_()
    assert torch.equal(logits(model), before)  # as the message says


# Files.


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
    convert_checkpoint.main()


def test_files_of_either_format_hold_the_same(tmp_path, monkeypatch):
    state = filled("official", "swinv2").state_dict()
    torch.save({"model": state, "epoch": 3}, tmp_path / "source.pth")
    for layout in LAYOUTS:
        expected = convert(state, "official", layout)[0]
        for suffix in ("pth", "pt", "bin", "safetensors"):
            command(monkeypatch, tmp_path / "source.pth", tmp_path / f"{layout}.{suffix}", "--to", layout)
            assert_equal(convert_checkpoint.read_weights(tmp_path / f"{layout}.{suffix}")[0], expected)
            command(monkeypatch, tmp_path / f"{layout}.{suffix}", tmp_path / "back.pth", "--to", "official", "--force")
            assert_equal(parameters(read_checkpoint(tmp_path / "back.pth")["model"]), parameters(state))
    assert list(torch.load(tmp_path / "official.pth")) == ["model"]
    assert next(iter(torch.load(tmp_path / "timm.pth"))) == "patch_embed.proj.weight"
    assert not list(tmp_path.glob(".*"))


def test_as_a_command_it_says_what_it_did(tmp_path, run_script):
    torch.save({"model": official("swin", num_classes=0).state_dict(), "epoch": 3}, tmp_path / "a.pth")
    result = run_script("tools/convert_checkpoint.py", "a.pth", "b.safetensors", "--to", "timm")
    assert result.stdout == (
        "a.pth (official) -> b.safetensors (timm): 61 tensors; it has no head; left out 4 relative_position_index, "
        "2 attn_mask, which the model computes; left out epoch, which is no weight\n"
    )


def test_what_goes_wrong_with_files_is_said_in_one_line(tmp_path, monkeypatch):
    def fails(message, *arguments):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *arguments)
        assert message in stop.value.code and "\n" not in stop.value.code
        assert stop.value.code.startswith("convert_checkpoint.py: error: ")

    good, bad, target = tmp_path / "good.pth", tmp_path / "bad.pth", tmp_path / "target.pth"
    torch.save(official("swin").state_dict(), good)
    torch.save({"model": [1, 2]}, bad)
    (tmp_path / "bad.safetensors").write_bytes(b"damaged")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fails("no such checkpoint", tmp_path / "absent.pth", target, "--to", "timm")
    fails("no such file", tmp_path / "absent.safetensors", target, "--to", "timm")
    fails("'model' does not hold tensors", bad, target, "--to", "timm")
    fails("not a .safetensors file", tmp_path / "bad.safetensors", target, "--to", "timm")
    fails("ends in one of .pth", good, tmp_path / "target.onnx", "--to", "timm")
    fails("exists; choose another name, or replace it with --force", good, bad, "--to", "timm")
    fails("no such folder", good, tmp_path / "absent" / "target.pth", "--to", "timm")
    fails(f"{good}: not in the layout of torchvision", good, target, "--to", "timm", "--from", "torchvision")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_target_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    source, target = tmp_path / "a.pth", tmp_path / "b.safetensors"
    torch.save(official("swin").state_dict(), source)
    target.write_bytes(b"precious")

    def fill_the_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="no space left"):
        patch.setattr(convert_checkpoint, "save_file", fill_the_disk)
        command(monkeypatch, source, target, "--to", "timm", "--force")
    assert target.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 2
    command(monkeypatch, source, target, "--to", "timm", "--force")
    assert detect(convert_checkpoint.read_weights(target)[0]) == "timm"
