"""The configuration: official YACS defaults, YAML files with ``BASE`` inheritance, ``--opts``, flags. In that order.

Later sources override earlier ones; a flag counts only when it was given. An unknown key names the nearest known one.
"""

import ast
import difflib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

_C = CfgNode()
_C.BASE = [""]  # YAML files to start from, relative to the file that names them

_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # per process
_C.DATA.DATA_PATH = ""
_C.DATA.DATASET = "imagenet"
# The form of the data: auto (zip under ZIP_MODE, list for imagenet22K, else folder), folder, zip, list, shards, raw,
# tiny_imagenet.
_C.DATA.SOURCE = "auto"
_C.DATA.TRAIN_SHARDS = ""  # a folder, glob, brace pattern or pipe: command; DATA_PATH/train if empty
_C.DATA.VAL_SHARDS = ""
_C.DATA.TRAIN_INDEX = ""  # the index.json of shards that do not have it beside them, such as those of commands
_C.DATA.VAL_INDEX = ""
_C.DATA.SHUFFLE_BUFFER = 2000  # samples that a stream of shards is mixed over, per process
_C.DATA.CLASSES = ""  # a file that lists the classes to use, one per line, in the order of their numbers
# device: crop in uint8, augment and normalise on the device; official: timm's transforms on PIL images in the workers;
# auto: device on CUDA, where it knows the policy of AUG.AUTO_AUGMENT.
_C.DATA.PIPELINE = "auto"
_C.DATA.DECODER = "auto"  # pil, torchvision, cv2, simplejpeg; auto: cv2 for training in the device pipeline, else pil
_C.DATA.ON_ERROR = "raise"  # raise, or skip: count images that cannot be used, and list them at the epoch's end
_C.DATA.IMG_SIZE = 224
_C.DATA.INTERPOLATION = "bicubic"
_C.DATA.ZIP_MODE = False
_C.DATA.CACHE_MODE = "part"
_C.DATA.PIN_MEMORY = True
_C.DATA.NUM_WORKERS = 8  # per process; capped at its share of the machine's cores
_C.DATA.MASK_PATCH_SIZE = 32
_C.DATA.MASK_RATIO = 0.6
_C.DATA.WATCHED_IMAGES = 8  # of which SimMIM pre-training shows reconstructions

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "swin"
_C.MODEL.NAME = "swin_tiny_patch4_window7_224"
_C.MODEL.PRETRAINED = ""
_C.MODEL.RESUME = ""
_C.MODEL.NUM_CLASSES = 1000
# True: a run takes NUM_CLASSES from the data folder. Giving NUM_CLASSES in a file or in --opts turns it off.
_C.MODEL.NUM_CLASSES_FROM_DATA = True
_C.MODEL.DROP_RATE = 0.0
_C.MODEL.DROP_PATH_RATE = 0.1
_C.MODEL.LABEL_SMOOTHING = 0.1
_C.MODEL.ATTENTION_BACKEND = "auto"  # see models/attention.py
_C.MODEL.PAD_MAPS = False  # take any image size: maps are padded to whole windows, and padding is masked


def _swin_defaults(**extra: Any) -> CfgNode:
    return CfgNode(
        {
            "PATCH_SIZE": 4,
            "IN_CHANS": 3,
            "EMBED_DIM": 96,
            "DEPTHS": [2, 2, 6, 2],
            "NUM_HEADS": [3, 6, 12, 24],
            "WINDOW_SIZE": 7,
            "MLP_RATIO": 4.0,
            "APE": False,
            "PATCH_NORM": True,
            **extra,
        }
    )


_C.MODEL.SWIN = _swin_defaults(QKV_BIAS=True, QK_SCALE=None)
_C.MODEL.SWINV2 = _swin_defaults(QKV_BIAS=True, PRETRAINED_WINDOW_SIZES=[0, 0, 0, 0])
_C.MODEL.SWIN_MLP = _swin_defaults()
_C.MODEL.SWIN_MOE = _swin_defaults(
    QKV_BIAS=True,
    QK_SCALE=None,
    MLP_FC2_BIAS=True,
    INIT_STD=0.02,
    PRETRAINED_WINDOW_SIZES=[0, 0, 0, 0],
    MOE_BLOCKS=[[-1], [-1], [-1], [-1]],
    NUM_LOCAL_EXPERTS=1,
    TOP_VALUE=1,
    CAPACITY_FACTOR=1.25,
    COSINE_ROUTER=False,
    NORMALIZE_GATE=False,
    USE_BPR=True,
    IS_GSHARD_LOSS=False,
    GATE_NOISE=1.0,
    COSINE_ROUTER_DIM=256,
    COSINE_ROUTER_INIT_T=0.5,
    MOE_DROP=0.0,
    AUX_LOSS_WEIGHT=0.01,
    NUM_EXPERTS=0,  # in all; 0: as MODEL.NAME says (…_32expert_…), else NUM_LOCAL_EXPERTS times the processes
    EXPERT_PARALLEL=0,  # processes that share the experts; 0: all
    PATH="capacity",  # or dropless: every choice of every token is kept
    ROUTER="flat",  # or product, limited: by groups of experts
    GROUPS=1,
    TOP_GROUPS=1,
    BACKEND="native",  # or tutel
)
_C.MODEL.SIMMIM = CfgNode({"NORM_TARGET": {"ENABLE": False, "PATCH_SIZE": 47}})

_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.BASE_LR = 5e-4  # for 512 images per update; scaled linearly to the batch that is used
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 or None does not clip
_C.TRAIN.AUTO_RESUME = True
_C.TRAIN.ACCUMULATION_STEPS = 1
_C.TRAIN.USE_CHECKPOINT = False  # keep blocks' inputs alone, and compute each block again for its gradients
_C.TRAIN.RECOMPUTE_ACTIVATIONS = False  # compute GELU again only: a fifth less memory in nearly the same time
_C.TRAIN.EMA_DECAY = 0.0  # of a moving average of the weights, such as 0.9999; 0: none
_C.TRAIN.SHARDING = "ddp"  # or fsdp2: all but experts is sliced over processes; see docs/scaling.md
_C.TRAIN.CPU_OFFLOAD = False  # with fsdp2: slices, their gradients and optimizer state stay on the CPU
_C.TRAIN.TIME_LIMIT = 0.0  # minutes of training, after which it saves and ends, with exit code 0; 0: none
_C.TRAIN.MAX_NONFINITE_STEPS = 25  # in a row, then training stops with an error
_C.TRAIN.LAYER_DECAY = 1.0
_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = True
_C.TRAIN.LR_SCHEDULER.GAMMA = 0.1
_C.TRAIN.LR_SCHEDULER.MULTISTEPS = []
_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9
_C.TRAIN.MOE = CfgNode()
_C.TRAIN.MOE.SAVE_MASTER = False  # of the official form: one .global file instead of one for each process
_C.TRAIN.MOE.CHECKPOINT = "native"  # the form of checkpoints: native, for any number of processes, or official
_C.TRAIN.MOE.STATISTICS = False  # what the routers do, to the log and TensorBoard, after each epoch

_C.AUG = CfgNode()
_C.AUG.COLOR_JITTER = 0.4
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip; digits and text want 0
_C.AUG.REPROB = 0.25
_C.AUG.REMODE = "pixel"
_C.AUG.RECOUNT = 1
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
_C.AUG.CUTMIX_MINMAX = None
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5
_C.AUG.MIXUP_MODE = "batch"

_C.TEST = CfgNode()
_C.TEST.CROP = True
_C.TEST.SEQUENTIAL = False
_C.TEST.SHUFFLE = False
_C.TEST.EMA = False  # --eval: of a checkpoint's weights, those that TRAIN.EMA_DECAY averaged

_C.ENABLE_AMP = False  # True (--enable-amp) turns AMP_ENABLE on
_C.AMP_ENABLE = True
_C.AMP_OPT_LEVEL = ""  # of the times of apex; only O0 (no AMP) still has a meaning
_C.AMP_DTYPE = "auto"  # auto, bf16, fp16 or fp32
_C.OUTPUT = ""
_C.TAG = "default"
_C.SAVE_FREQ = 1  # epochs
_C.SAVE_BEST = False  # keep the weights of the best epoch as ckpt_best.pth
_C.SAVE_STEPS = 0  # also after this many batches within an epoch; 0: only at its end
_C.PRINT_FREQ = 10  # steps between reads of device values
_C.SEED = 0
_C.DETERMINISTIC = False
_C.EVAL_MODE = False
_C.THROUGHPUT_MODE = False
# torch.compile's mode: default, max-autotune-no-cudagraphs, or, to evaluate and time with CUDA graphs, reduce-overhead,
# max-autotune; nothing is compiled if empty.
_C.COMPILE = ""
_C.COMPILE_BACKEND = "inductor"  # or, to look for errors, eager, aot_eager
_C.LOCAL_RANK = 0
_C.DIST_TIMEOUT = 30.0  # minutes that a process waits for the others before it ends in error
_C.FUSED_WINDOW_PROCESS = False
_C.FUSED_LAYERNORM = False

# A flag's attribute on ``args``: the key that it sets. The scripts' parsers and `get_config` share this table.
FLAG_KEYS = {
    "batch_size": "DATA.BATCH_SIZE",
    "data_path": "DATA.DATA_PATH",
    "zip": "DATA.ZIP_MODE",
    "cache_mode": "DATA.CACHE_MODE",
    "source": "DATA.SOURCE",
    "pretrained": "MODEL.PRETRAINED",
    "resume": "MODEL.RESUME",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "amp_opt_level": "AMP_OPT_LEVEL",
    "amp_dtype": "AMP_DTYPE",
    "output": "OUTPUT",
    "tag": "TAG",
    "eval": "EVAL_MODE",
    "throughput": "THROUGHPUT_MODE",
    "compile": "COMPILE",
    "enable_amp": "ENABLE_AMP",
    "fused_window_process": "FUSED_WINDOW_PROCESS",
    "fused_layernorm": "FUSED_LAYERNORM",
    "optim": "TRAIN.OPTIMIZER.NAME",
    "local_rank": "LOCAL_RANK",
}

CHOICES = {
    "DATA.DATASET": ("imagenet", "imagenet22K"),
    "DATA.SOURCE": ("auto", "folder", "zip", "list", "shards", "raw", "tiny_imagenet"),
    "DATA.PIPELINE": ("auto", "device", "official"),
    "DATA.DECODER": ("auto", "pil", "torchvision", "cv2", "simplejpeg"),
    "DATA.ON_ERROR": ("raise", "skip"),
    "DATA.CACHE_MODE": ("no", "full", "part"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "hamming", "lanczos", "nearest", "random"),
    "MODEL.SWIN_MOE.PATH": ("capacity", "dropless"),
    "MODEL.SWIN_MOE.ROUTER": ("flat", "product", "limited"),
    "MODEL.SWIN_MOE.BACKEND": ("native", "tutel"),
    "TRAIN.SHARDING": ("ddp", "fsdp2"),
    "TRAIN.MOE.CHECKPOINT": ("native", "official"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AMP_DTYPE": ("auto", "bf16", "fp16", "fp32"),
    "AMP_OPT_LEVEL": ("", "O0", "O1", "O2"),
    "COMPILE": ("", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "COMPILE_BACKEND": ("inductor", "aot_eager", "eager"),
}

# DATA.DATASET: classes of a model whose data is not at hand, as under --throughput. Others have MODEL.NUM_CLASSES.
OFFICIAL_CLASSES = {"imagenet22K": 21841}

# Keys that take one number for both sides, or [height, width].
KINDS = ("SWIN", "SWINV2", "SWIN_MLP", "SWIN_MOE")
PAIRS = {"DATA.IMG_SIZE", *(f"MODEL.{kind}.{key}" for kind in KINDS for key in ("PATCH_SIZE", "WINDOW_SIZE"))}

# Smallest and largest allowed values; everything else is checked by the part that uses it.
RANGES = {
    "DATA.BATCH_SIZE": (1, None),
    "DATA.IMG_SIZE": (1, None),
    "DATA.NUM_WORKERS": (0, None),
    "DATA.WATCHED_IMAGES": (1, None),
    "MODEL.NUM_CLASSES": (1, None),
    "MODEL.DROP_RATE": (0, 1),
    "MODEL.DROP_PATH_RATE": (0, 1),
    "MODEL.LABEL_SMOOTHING": (0, 1),
    **{
        f"MODEL.{kind}.{key}": (1, None)
        for kind in KINDS
        for key in ("PATCH_SIZE", "WINDOW_SIZE", "IN_CHANS", "EMBED_DIM")
    },
    "TRAIN.EPOCHS": (1, None),
    "TRAIN.WARMUP_EPOCHS": (0, None),
    "TRAIN.ACCUMULATION_STEPS": (1, None),
    "TRAIN.CLIP_GRAD": (0, None),
    "TRAIN.MAX_NONFINITE_STEPS": (1, None),
    "TRAIN.TIME_LIMIT": (0, None),
    "TRAIN.EMA_DECAY": (0, 1),
    "DATA.SHUFFLE_BUFFER": (0, None),
    "DIST_TIMEOUT": (0.01, None),
    "AUG.HFLIP": (0, 1),
    "AUG.REPROB": (0, 1),
    "SAVE_FREQ": (1, None),
    "SAVE_STEPS": (0, None),
    "PRINT_FREQ": (1, None),
}


def nearest(name: str, known: Any) -> str:
    """`` (did you mean …?)``, or nothing where no known name is near."""
    lower = {key.lower(): key for key in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def get_config(args: Any) -> CfgNode:
    """The frozen configuration of ``args``: any object with ``cfg`` and, optionally, the scripts' flags as attributes.

    Raises ``ValueError`` for an unknown key, a value of another type or out of range, ``FileNotFoundError`` for a
    missing file (official ``config.get_config``).
    """
    config = _C.clone()
    config.defrost()
    if getattr(args, "cfg", None):
        merge_file(config, Path(args.cfg))
    merge_opts(config, getattr(args, "opts", None) or [])
    for flag, key in FLAG_KEYS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False and value != "":
            set_key(config, key, value, f"--{flag.replace('_', '-')}")
    if config.ENABLE_AMP:
        config.AMP_ENABLE = True
    if getattr(args, "disable_amp", False) or config.AMP_OPT_LEVEL == "O0":
        config.AMP_ENABLE = False
    if config.FUSED_WINDOW_PROCESS and config.MODEL.ATTENTION_BACKEND == "auto":
        config.MODEL.ATTENTION_BACKEND = "window_process"
    config.LOCAL_RANK = int(os.environ.get("LOCAL_RANK", config.LOCAL_RANK))
    config.OUTPUT = os.path.join(config.OUTPUT or "output", config.MODEL.NAME, config.TAG)
    _check(config)
    config.freeze()
    return config


def merge_file(config: CfgNode, path: Path, seen: tuple[Path, ...] = ()) -> None:
    """Merge a YAML file into ``config``, the files of its ``BASE`` first."""
    named = f"BASE of {seen[-1]}: " if seen else "--cfg "
    if path.resolve() in seen:
        raise ValueError(f"{path}: BASE leads back to this file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{named}{path}: no such file; official configs are under configs/") from err
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as err:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(err).split())}") from err
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected KEY: value lines, found {type(values).__name__}")
    base = values.pop("BASE", None) or []
    base = [base] if isinstance(base, str) else base
    if not isinstance(base, list) or not all(isinstance(name, str) for name in base):
        raise ValueError(f"{path}: BASE={base!r} must be a list of files")
    for name in filter(None, base):
        merge_file(config, path.parent / name, (*seen, path.resolve()))
    for key, value in _leaves(values):
        if value is not None or not isinstance(config.get(key), dict):  # a section may be empty
            set_key(config, key, value, str(path))


def merge_opts(config: CfgNode, opts: list[str]) -> None:
    """Merge ``KEY VALUE`` pairs; values are Python literals or plain strings."""
    if len(opts) % 2:
        raise ValueError(f"--opts takes KEY VALUE pairs, but {opts[-1]!r} has no partner")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        set_key(config, key, value, "--opts")


def set_key(config: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one dotted key to a value of the default's type, naming ``source`` in errors."""
    known = dict(_leaves(_C))
    if key not in known:
        raise ValueError(f"{source}: unknown key {key}{nearest(key, known)}")
    *parents, leaf = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[leaf] = _coerce(value, known[key], f"{source}: {key}", key in PAIRS)
    if key == "MODEL.NUM_CLASSES":
        config.MODEL.NUM_CLASSES_FROM_DATA = False


def _leaves(node: dict, prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in node.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return leaves


def _coerce(value: Any, default: Any, where: str, may_be_pair: bool = False) -> Any:
    """``value`` as the type of ``default``: strings are read as literals, whole numbers serve as floats.

    A None empties a string, and turns clipping off, as officially. Two whole numbers may stand for one of ``PAIRS``.
    """
    if isinstance(value, str) and not isinstance(default, str):
        with suppress(ValueError, SyntaxError):  # a plain string stays one; the check below decides
            value = ast.literal_eval(value)
    if may_be_pair and isinstance(value, (list, tuple)) and [type(side) for side in value] == [int, int]:
        return list(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if value is None and (isinstance(default, str) or where.endswith(".CLIP_GRAD")):
        return "" if isinstance(default, str) else None
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        pairs = where.endswith("PRETRAINED_WINDOW_SIZES")
        return type(default)(_coerce(item, default[0], where, pairs) if default else item for item in value)
    if isinstance(default, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # TAG 1 is a fine tag
    if default is None or type(value) is type(default):
        return value
    expected = "int or [height, width]" if may_be_pair else type(default).__name__
    raise ValueError(f"{where}={value!r} is of type {type(value).__name__}, expected {expected}")


def _check(config: CfgNode) -> None:
    values = dict(_leaves(config))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ValueError(f"{key}={values[key]!r}; choose from {list(choices)}")
    for key, (least, most) in RANGES.items():
        if values[key] is None:
            continue
        numbers = values[key] if isinstance(values[key], list) else [values[key]]
        if min(numbers) < least:
            raise ValueError(f"{key}={values[key]}; the smallest allowed value is {least}")
        if most is not None and max(numbers) > most:
            raise ValueError(f"{key}={values[key]}; the largest allowed value is {most}")


def to_dict(node: CfgNode) -> dict:
    """The configuration as plain data, ready for JSON and for checkpoints."""
    return {k: to_dict(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v for k, v in node.items()}
