"""Compiled, exported and as ONNX, every family computes what it does eagerly, for batches that were not traced."""

import logging
import math
import re
import sys

import pytest
import torch
from conftest import EMPTY_CONFIG, ROOT, SMALL, fill, golden_images, make_config
from test_sizes import FAMILIES, every_family, small

from compilation import compile_in_place
from models import blocks, build_model
from tools import export_onnx

BATCHES = (1, 4)  # 2 is traced
IMAGES = golden_images(0, 4, 32)
TINY = [*SMALL, "MODEL.SWIN.DEPTHS", [1, 1]]  # for what does not depend on the model
PADDED_IMAGES = golden_images(1, 4, 48)[..., :30, :45]  # of another size than models are built for, padded twice


def of_family(family, **changes):
    """Four shifted windows in the first stage, one window in the last: exporters treat them differently."""
    return small(family, **{"window_size": 8, "depths": [2, 1], **changes})


def tensors(out) -> list[torch.Tensor]:
    """Logits, logits and auxiliary loss, or maps."""
    return list(out) if isinstance(out, (tuple, list)) else [out]


def results_and_gradients(call, model, images) -> list[torch.Tensor]:
    model.zero_grad()
    out = tensors(call(images))
    sum(value.square().sum() for value in out).backward()
    return [*(value.detach() for value in out), *(parameter.grad.clone() for parameter in model.parameters())]


def check_compiled(family, backend: str, padded: bool, **tolerances) -> None:
    """Compile in one graph with an empty cache; eager results before and after are the same bits."""
    model = of_family(family, pad_maps=padded)
    images = PADDED_IMAGES[:2] if padded else IMAGES[:2]
    eager = results_and_gradients(model, model, images)
    blocks._cached_mask.cache_clear()
    compiled = results_and_gradients(torch.compile(model, fullgraph=True, backend=backend), model, images)
    assert blocks._cached_mask.cache_info().currsize == 0  # a tracer's tensors would outlive it
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, **tolerances)
    for again, expected in zip(results_and_gradients(model, model, images), eager, strict=True):
        assert torch.equal(again, expected)


@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_compiles_in_one_graph_with_gradients(family, padded):
    check_compiled(family, "aot_eager", padded, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@every_family
def test_inductor_gives_the_same_results_and_gradients(family):
    check_compiled(family, "inductor", padded=False, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@every_family
def test_frozen_models_give_the_same_results(family):
    model = of_family(family)
    assert "frozen" in compile_in_place(model, IMAGES.device, "default")
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            expected = tensors(model.forward(IMAGES))
            for got, wanted in zip(tensors(model(IMAGES)), expected, strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def check_batches(call, model, images) -> None:
    """``call`` gives a list of tensors for images of any batch."""
    for batch in BATCHES:
        with torch.no_grad():
            expected = tensors(model(images[:batch]))
        got = call(images[:batch])
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), theirs, atol=1e-4, rtol=1e-4)


@every_family
@pytest.mark.parametrize("what", ["logits", "maps", "padded maps"])
def test_exports_with_a_dynamic_batch(family, what):
    model = of_family(family, pad_maps=what == "padded maps")
    if what != "logits":
        model.as_feature_backbone()
    images = PADDED_IMAGES if what == "padded maps" else IMAGES
    blocks._cached_mask.cache_clear()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    assert blocks._cached_mask.cache_info().currsize == 0
    exported = program.module()
    check_batches(lambda images: tensors(exported(images)), model, images)


def run_onnx(path):
    """A function from images to the file's outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def names_and_shapes(path) -> dict[str, list]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@every_family
def test_onnx_files_give_the_logits_for_every_batch(family, tmp_path, caplog):
    target = tmp_path / "model.onnx"
    with caplog.at_level(logging.INFO, "export_onnx"):
        assert export_onnx.export(of_family(family), target) < 1e-5
    assert ("auxiliary loss" in caplog.text) == (family is FAMILIES[3])
    assert names_and_shapes(target) == {"images": ["batch", 3, 32, 32], "logits": ["batch", 3]}
    run = run_onnx(target)
    check_batches(run, lambda images: tensors(of_family(family)(images))[0], IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert str(ROOT).encode() not in target.read_bytes()


def test_onnx_files_give_padded_maps(tmp_path):
    target = tmp_path / "maps.onnx"
    model = of_family(FAMILIES[1], pad_maps=True, img_size=(30, 45)).as_feature_backbone([0, 1])
    export_onnx.export(model, target)
    shapes = names_and_shapes(target)
    assert shapes == {"images": ["batch", 3, 30, 45], "map0": ["batch", 8, 15, 23], "map1": ["batch", 16, 8, 12]}
    check_batches(run_onnx(target), model, PADDED_IMAGES)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the tool in an empty folder, on the small Swin; returns nothing, or ends as the tool does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("export_onnx"), "level", logging.INFO)

    def call(*arguments, opts=()):
        options = ["--cfg", EMPTY_CONFIG, "--output", "model.onnx", *arguments, "--opts", *TINY, *opts]
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, options)])
        export_onnx.main()

    return call


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of the small Swin for five classes, which only the file knows of."""
    path = tmp_path / "weights.pth"
    model = fill(build_model(make_config(None, *TINY, "MODEL.NUM_CLASSES", 5))).eval()
    torch.save({"model": model.state_dict()}, path)
    return path, model


def test_command_line_takes_classes_from_the_weights(command, weights, tmp_path, caplog):
    path, model = weights
    command("--resume", path, "--opset", "18")
    line = r"model.onnx: [\d.]+ MB, opset 18, images \(batch, 3, 16, 16\) -> logits \(batch, 5\)"
    assert re.search(line, caplog.text)
    check_batches(run_onnx(tmp_path / "model.onnx"), model, IMAGES[..., :16, :16])


def test_both_flags_load_the_same_weights(weights):
    path, model = weights
    for flag in ("resume", "pretrained"):
        loaded = export_onnx.load_model(make_config(None, *TINY, eval=True, **{flag: str(path)}), False, False)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


def test_command_line_gives_feature_maps_whatever_the_head(command, weights, tmp_path):
    path, model = weights
    command("--resume", path, "--features", opts=["MODEL.NUM_CLASSES", 7, "DATA.IMG_SIZE", 32])
    model.set_input_size(32)
    check_batches(
        run_onnx(tmp_path / "model.onnx"),
        lambda images: model.forward_intermediates(images, intermediates_only=True),
        IMAGES,
    )


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_existing_files_are_kept(name, command, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(SystemExit, match=rf"error: {name} exists; choose another --output, or replace it with --force"):
        command("--random-weights")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


def test_force_replaces_files_and_large_weights_lie_beside_them(command, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "ONE_FILE", 0)
    names = ["model.onnx", "model.onnx.data"]
    for name in names:
        (tmp_path / name).write_text("old")
    command("--random-weights", "--force", opts=["SEED", 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    torch.manual_seed(3)
    check_batches(run_onnx(tmp_path / names[0]), build_model(make_config(None, *TINY)).eval(), IMAGES[..., :16, :16])


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_files_that_compute_something_else_are_not_written(difference, command, tmp_path, monkeypatch):
    target = tmp_path / "model.onnx"
    target.write_text("precious")
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: SavesNothing())
    monkeypatch.setattr(export_onnx, "largest_difference", lambda *_: difference)
    with pytest.raises(SystemExit, match=r"model.onnx is not written: its results would differ .* by (1.0e-03|nan)"):
        command("--random-weights", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"] and target.read_text() == "precious"


class SavesNothing:
    def save(self, path, external_data):
        path.write_text("")


def test_differences_are_found(tmp_path):
    """The check that guards every export, against models that are not the file's."""
    target = tmp_path / "model.onnx"
    export_onnx.export(of_family(FAMILIES[0], depths=[1, 1]), target)

    def difference(change=lambda model: None) -> float:
        model = of_family(FAMILIES[0], depths=[1, 1])
        with torch.no_grad():
            change(model)
        return export_onnx.largest_difference(target, export_onnx.OnlyTensors(model), (3, 32, 32))

    assert difference() < 1e-6
    assert difference(lambda model: model.layers[0].blocks[0].attn.relative_position_bias_table.mul_(1.01)) > 1e-4
    assert difference(lambda model: model.head.bias[2].add_(1e-3)) > 2e-4  # relative to logits of up to 4
    assert math.isnan(difference(lambda model: model.head.bias[2].fill_(torch.nan)))
    target.write_bytes(b"no ONNX")
    with pytest.raises(ValueError, match=r"onnxruntime \S+ refuses the file: .*; try another --opset"):
        difference()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"an export needs weights: give --resume FILE, --pretrained FILE or --random-weights"),
        (["--resume", "a.pth", "--random-weights"], r"--random-weights and the weights a.pth exclude each other"),
        (["--resume", "a.pth"], r"a.pth: no such checkpoint"),
        (["--random-weights", "--output", "model.pt"], r"--output model.pt: choose a name that ends in .onnx"),
        (["--random-weights", "--output", "no/model.onnx"], r"--output no/model.onnx: no is not a folder"),
        (["--random-weights", "--opset", "17"], r"--opset 17: torch writes operators from version 18 on"),
        (["--random-weights", "--opset", "99"], r"--opset 99: torch \S+ writes \d+ instead; choose a lower one"),
    ],
)
def test_errors_name_the_way_out_and_leave_nothing(arguments, message, command, tmp_path):
    with pytest.raises(SystemExit, match=rf"^export_onnx.py: error: {message}") as stop:
        command(*arguments)
    assert "\n" not in stop.value.code and list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command_that_installs_them(command, monkeypatch):
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"onnx, onnxruntime not installed; run: python -m pip install onnx onnxrun"):
        command("--random-weights")
