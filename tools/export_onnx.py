"""Write a model as an ONNX file for batches of any size, and check that the file computes what the model does.

python tools/export_onnx.py --cfg configs/swin/swin_tiny_patch4_window7_224.yaml --resume FILE.pth --output swin.onnx
python tools/export_onnx.py --cfg … --pretrained FILE.pth --output maps.onnx --features --opts DATA.IMG_SIZE 448

Its input is "images" (batch, C, height, width), normalised as for training, of the sides DATA.IMG_SIZE; its output is
"logits" (batch, classes) or, with --features, for each stage the map of its last block (batch, C, H, W), "map0",
"map1", … Unless MODEL.NUM_CLASSES is given, the weights say how many classes there are.
"""

import argparse
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import storage
import utils
from config import OFFICIAL_CLASSES, get_config
from launch import USER_ERRORS
from models import build_model
from models.attention import set_attention_backend
from models.swin_transformer_moe import SwinTransformerMoE

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of the file's results, relative to their largest value where that is above 1
BATCHES = (1, 3, 4)  # to check; not the one that is traced, which could have been written into the file
TRACED_BATCH = 2  # a batch of one would look like a dimension that is always 1
LEAST_OPSET = 18  # for which torch writes operators
ONE_FILE = 1.5e9  # bytes of weights; an ONNX file ends at 2 GB, so those of larger models lie beside it
STACK_TRACE = "pkg.torch.onnx.stack_trace"

logger = logging.getLogger("export_onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", metavar="FILE", required=True, help="YAML configuration")
    add("--opts", metavar=("KEY", "VALUE"), nargs="+", help="keys to override, as KEY VALUE pairs")
    add("--resume", metavar="FILE", help="checkpoint with the weights, resized to this model")
    add("--pretrained", metavar="FILE", help="the same; --resume wins")
    add("--random-weights", action="store_true", help="weights as before training, drawn from SEED")
    add("--output", metavar="FILE", dest="target", type=Path, required=True, help="the file to write, FILE.onnx")
    add("--opset", type=int, help=f"version of ONNX's operators, from {LEAST_OPSET}; by default torch chooses it")
    add("--features", action="store_true", help="give the maps of all stages, not logits")
    add("--force", action="store_true", help="replace an existing file")
    parser.set_defaults(eval=True)  # weights are fitted to the model as for evaluation
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        require_packages()
        check_target(args.target, args.force)
        model = load_model(get_config(args), args.features, args.random_weights)
        export(model, args.target, args.opset)
    except USER_ERRORS as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")


def require_packages() -> None:
    """Raise ``ImportError``, naming the command that installs them, where ONNX's packages are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; run: python -m pip install {' '.join(missing)}")


def check_target(target: Path, force: bool) -> None:
    """Raise ``ValueError`` or ``OSError`` where ``target`` is no place to write to."""
    if target.suffix != ".onnx":
        raise ValueError(f"--output {target}: choose a name that ends in .onnx")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--output {target}: {target.parent} is not a folder")
    for path in (target, beside(target)):
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; choose another --output, or replace it with --force")


def beside(target: Path) -> Path:
    """The file of the weights that one ONNX file cannot hold, as torch names it."""
    return target.with_name(f"{target.name}.data")


def load_model(config: Any, features: bool, random_weights: bool) -> nn.Module:
    """The model of ``config`` with the weights of its ``MODEL.RESUME`` or ``MODEL.PRETRAINED``.

    Args:
        features: make it a backbone that gives the maps of all stages; weights of any head will do.
        random_weights: leave it as before training.

    Raises ``ValueError`` or ``OSError`` where there are no weights, or where they do not fit.
    """
    path = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if not path and not random_weights:
        raise ValueError("an export needs weights: give --resume FILE, --pretrained FILE or --random-weights")
    if path and random_weights:
        raise ValueError(f"--random-weights and the weights {path} exclude each other; leave one out")
    torch.manual_seed(config.SEED)
    model = build_model(with_classes(config, path))
    if features:
        model.reset_classifier(0)
    if config.MODEL.RESUME:
        utils.resume(config, model, None, None, None, logger)
    elif path:
        utils.load_pretrained(config, model, logger)
    return model.as_feature_backbone(norms=False) if features else model


def with_classes(config: Any, path: str) -> Any:
    """A copy with ``MODEL.NUM_CLASSES``, unless it was given, that of the weights' head, or else of the dataset."""
    config = config.clone()
    if config.MODEL.NUM_CLASSES_FROM_DATA:
        classes = OFFICIAL_CLASSES.get(config.DATA.DATASET, config.MODEL.NUM_CLASSES)
        head = storage.read_checkpoint(path)["model"].get("head.bias") if path else None
        config.defrost()
        config.MODEL.NUM_CLASSES = classes if head is None else len(head)
        config.freeze()
    return config


def export(model: nn.Module, target: Path, opset: int | None = None) -> float:
    """Write ``target``, complete and checked or not at all, and log what it holds.

    Args:
        model: on the CPU. It is left in evaluation mode, with the attention backend ``reference``.
        opset: version of ONNX's operators; torch chooses it if None.

    Returns:
        The largest difference between results of the file and of the model, as `largest_difference` gives it.

    Raises:
        ValueError: for an ``opset`` that cannot be written or run.
        FloatingPointError: where results differ by more than ``TOLERANCE``.
    """
    if isinstance(model, SwinTransformerMoE) and not model.out_indices:
        logger.info("Swin-MoE: the file gives logits alone; the auxiliary loss, which training needs, is left out")
    # Taken apart for ONNX, SDPA lays out its result in another way, and torch fails where a map is one window.
    set_attention_backend(model, "reference")
    traced = OnlyTensors(model).eval()
    shape = (model.patch_embed.in_chans, *model.patch_embed.img_size)
    program = to_onnx(traced, shape, opset)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        program.save(draft, external_data=size > ONE_FILE)
        difference = largest_difference(draft, traced, shape)
        if not difference <= TOLERANCE:  # NaN is no small difference
            raise FloatingPointError(
                f"{target} is not written: its results would differ from the model's by {difference:.1e}, more than "
                f"{TOLERANCE:g}; try another --opset, or other versions of torch and onnxscript"
            )
        megabytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        publish(draft, target)
    graph, version = program.model.graph, program.model.opset_imports[""]
    inputs, outputs = (
        ", ".join(f"{value.name} ({', '.join(map(str, value.shape))})" for value in values)
        for values in (graph.inputs, graph.outputs)
    )
    logger.info(f"{target}: {megabytes:.1f} MB, opset {version}, {inputs} -> {outputs}")
    logger.info(f"largest difference from the model: {difference:.1e}, in batches of {', '.join(map(str, BATCHES))}")
    return difference


class OnlyTensors(nn.Module):
    """A model whose results are a tuple of logits, or of maps; Swin-MoE's auxiliary loss is dropped."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.model(images)
        if isinstance(out, list):
            return tuple(out)
        return out[:1] if isinstance(out, tuple) else (out,)

    def names(self) -> list[str]:
        return [f"map{i}" for i in self.model.out_indices] or ["logits"]


def to_onnx(model: OnlyTensors, shape: tuple[int, ...], opset: int | None) -> torch.onnx.ONNXProgram:
    """``model`` for images of ``shape``, and batches of any size, as ONNX.

    Raises ``ValueError`` where torch cannot write this ``opset``.
    """
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(f"--opset {opset}: torch writes operators from version {LEAST_OPSET} on")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs tracebacks where the check below gives a line
    program = torch.onnx.export(
        model,
        (torch.zeros(TRACED_BATCH, *shape),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=model.names(),
        opset_version=opset,
        verbose=False,
    )
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise ValueError(f"--opset {opset}: torch {torch.__version__} writes {written} instead; choose a lower one")
    for node in program.model.graph:  # this machine's paths are nobody's business, and a third of a small file
        node.metadata_props.pop(STACK_TRACE, None)
    return program


@torch.no_grad()
def largest_difference(path: Path, model: nn.Module, shape: tuple[int, ...]) -> float:
    """Compare the ONNX file with the model on drawn images of ``shape``, in batches of several sizes.

    Returns:
        The largest absolute difference from the model's results, divided by their largest value where that is above 1.

    Raises ``ValueError`` where the file is not valid, or where onnxruntime cannot run it.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, *shape, generator=generator) for batch in BATCHES]
    differences = []
    for images, results in zip(batches, run_file(path, batches), strict=True):
        for result, expected in zip(results, model(images), strict=True):
            assert result.shape == expected.shape
            scale = expected.abs().max().clamp(min=1.0)
            differences.append((result - expected).abs().max() / scale)
    return torch.stack(differences).max().item()


def run_file(path: Path, batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """Check the ONNX file and run it with onnxruntime on the CPU: for each batch of images its outputs.

    Raises ``ValueError`` where the file is not valid or does not run.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        results = [session.run(None, {"images": images.numpy()}) for images in batches]
    except Exception as err:  # both packages raise classes of their own that share no base
        reason = next(iter(str(err).splitlines()), type(err).__name__)
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} refuses the file: {reason}; try another --opset"
        ) from err
    return [[torch.from_numpy(output) for output in outputs] for outputs in results]


def publish(draft: Path, target: Path) -> None:
    """Move a complete file, and the weights beside it, to their place: the weights first, since the file names them."""
    for source, place in ((beside(draft), beside(target)), (draft, target)):
        if source.exists():
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            os.replace(source, place)


if __name__ == "__main__":
    main()
