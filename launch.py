"""Start-up, shared by the scripts: flags, process group, device, seeds, precision, log; and how a run ends in error."""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

import distributed
import utils
from config import CHOICES, get_config, nearest, to_dict
from kernels import window_process
from logger import CLEAR_LINE, create_logger
from models import memory
from models.precision import LACKING

# What users can cause and mend. It ends a run in one line; the traceback goes to the log file.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Stopped(Exception):  # noqa: N818 - not an error
    """Training was asked to stop by a signal and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


class TimeIsUp(Stopped):
    """Training ended, as ``TRAIN.TIME_LIMIT`` says; its state is saved."""

    def __init__(self, minutes: float):
        Exception.__init__(self, f"the time limit of {minutes} minute(s) is over")
        self.exit_code = 0


@dataclass
class Session:
    """What every part of a run needs: the settled configuration, where to compute and in which precision, the log.

    Args:
        amp_dtype: float32 means no autocast.
        files: the functions that read and write checkpoints: `utils`, `utils_simmim` or `utils_moe`.
    """

    config: Any
    device: torch.device
    amp_dtype: torch.dtype
    logger: logging.Logger
    files: ModuleType = utils

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32)


class _Parser(argparse.ArgumentParser):
    """Errors in one line; a mistyped flag names the nearest one."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}")
        return known

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(description: str) -> argparse.ArgumentParser:
    """The flags of all scripts. A flag that is not given stays None and overrides nothing."""
    parser = _Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", metavar="FILE", required=True, help="YAML configuration")
    add("--opts", metavar=("KEY", "VALUE"), nargs="+", help="keys to override, as KEY VALUE pairs")
    add("--batch-size", type=int, help="images per process and step")
    add("--data-path", metavar="DIR", help="folder with train/ and val/")
    add("--zip", action="store_const", const=True, help="read zip archives instead of folders")
    add("--source", choices=CHOICES["DATA.SOURCE"], help="form of the data; default: folder, or what --zip and 22K say")
    add("--cache-mode", choices=CHOICES["DATA.CACHE_MODE"], help="what of the zip archives to keep in memory")
    add("--pretrained", metavar="FILE", help="weights to fine-tune, resized to this model")
    add("--resume", metavar="FILE", help="checkpoint to continue from or to evaluate; wins over auto-resume")
    add("--accumulation-steps", type=int, help="batches per update")
    add("--use-checkpoint", action="store_const", const=True, help="gradient checkpointing: less memory, more time")
    add("--disable_amp", "--disable-amp", action="store_const", const=True, help="compute in float32")
    add(
        "--enable-amp",
        "--enable_amp",
        action="store_const",
        const=True,
        help="mixed precision, which is the default, whatever the YAML file says",
    )
    add("--amp-dtype", choices=CHOICES["AMP_DTYPE"], help="auto: bf16 or fp16 on accelerators, fp32 on CPU")
    add("--amp-opt-level", choices=CHOICES["AMP_OPT_LEVEL"][1:], help="of the times of apex; O0 turns AMP off")
    add("--output", metavar="DIR", help="results go to DIR/<model name>/<tag> (default: output)")
    add("--tag", help="name of this experiment")
    add("--eval", action="store_const", const=True, help="evaluate and stop")
    add("--throughput", action="store_const", const=True, help="time the model alone and stop")
    add(
        "--compile",
        nargs="?",
        const="default",
        choices=CHOICES["COMPILE"][1:],
        metavar="MODE",
        help="compile the model; a MODE of torch.compile, such as reduce-overhead, which evaluates with CUDA graphs",
    )
    add("--local_rank", "--local-rank", type=int, help="set by old launchers; LOCAL_RANK wins")
    for name, text in (
        ("window_process", "cut and merge windows by the extension in kernels/window_process, if it is installed"),
        ("layernorm", "accepted: PyTorch's layer norm is fused already"),
    ):
        add(f"--fused_{name}", f"--fused-{name.replace('_', '-')}", action="store_const", const=True, help=text)
    add("--optim", metavar="NAME", help="optimizer: adamw, sgd, fused_adam or fused_lamb")
    return parser


def run(main: Callable[[Any], Any], description: str) -> NoReturn:
    """Parse the command line, call ``main(config)``, and turn what users can mend into one line and exit code 1."""
    args = build_parser(description).parse_args()
    code = 0
    try:
        main(get_config(args))
    except Stopped as stop:
        code = stop.exit_code
    except USER_ERRORS as err:
        # An error from a loader's worker carries the worker's traceback; its last line is the message.
        lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [type(err).__name__]
        _fail(lines[-1])
    except Exception as err:
        if distributed.others_are_lost(err):
            _fail(f"another process {distributed.has_ended(err)}")
        traceback.print_exc()
        distributed.leave(1, at_once=True)
    distributed.leave(code)


def _fail(message: str) -> NoReturn:
    bar = CLEAR_LINE if sys.stderr.isatty() else ""
    sys.stderr.write(f"{bar}{Path(sys.argv[0]).name}: error: {message}\n")
    distributed.leave(1, at_once=True)


@contextmanager
def session(config: Any, files: ModuleType = utils) -> Iterator[Session]:
    """Device, process group, seeds, scaled learning rates, output folder and log for ``config``, itself unchanged.

    Args:
        files: as of `Session`.
    """
    device = distributed.pick_device()
    distributed.start(device, config.DIST_TIMEOUT)
    config = settle(config)
    distributed.seed_everything(config.SEED, config.DETERMINISTIC)
    os.makedirs(config.OUTPUT, exist_ok=True)
    logger = create_logger(config.OUTPUT, distributed.rank(), config.MODEL.NAME)
    try:
        amp_dtype = pick_amp_dtype(config, device)
        logger.info(
            f"{distributed.world_size()} process(es), {device}, {str(amp_dtype).removeprefix('torch.')}, "
            f"torch {torch.__version__}"
        )
        if device.type == "cpu":
            memory.keep_all()
        if device.type == "cpu" and amp_dtype in LACKING:
            logger.info(f"this CPU computes {str(amp_dtype).removeprefix('torch.')} slowly: models use float32")
        _say_once(config, device, logger)
        logger.info(json.dumps(to_dict(config)))
        yield Session(config, device, amp_dtype, logger, files)
    except Exception as err:
        level = logging.INFO if isinstance(err, Stopped) else logging.ERROR
        handlers = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        record = logger.makeRecord(logger.name, level, __file__, 0, str(err), (), sys.exc_info())
        for handler in handlers:  # the terminal gets the line that `run` prints
            handler.handle(record)
        raise


def settle(config: Any) -> Any:
    """A copy with learning rates scaled linearly to the images per update, 512 being the unit."""
    config = config.clone()
    images = config.DATA.BATCH_SIZE * distributed.world_size() * config.TRAIN.ACCUMULATION_STEPS
    config.defrost()
    for key in ("BASE_LR", "WARMUP_LR", "MIN_LR"):
        config.TRAIN[key] = config.TRAIN[key] * images / 512.0
    config.freeze()
    return config


def pick_amp_dtype(config: Any, device: torch.device) -> torch.dtype:
    """``AMP_DTYPE``; for auto bfloat16 where the accelerator has it, else float16, and float32 on a CPU."""
    if not config.AMP_ENABLE:
        return torch.float32
    if config.AMP_DTYPE != "auto":
        return AMP_DTYPES[config.AMP_DTYPE]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if _has_bf16(device) else torch.float16


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(2, 2, device=device, dtype=torch.bfloat16)
        return bool((ones @ ones).isfinite().all())
    except (RuntimeError, TypeError):
        return False


def _say_once(config: Any, device: torch.device, logger: logging.Logger) -> None:
    """What official flags mean here, where they do not mean what they did."""
    if config.FUSED_LAYERNORM:
        logger.info("--fused_layernorm: PyTorch's layer norm is already fused; nothing to change")
    if config.FUSED_WINDOW_PROCESS:
        _say_window_process(config, device, logger)
    if config.AMP_OPT_LEVEL:
        logger.warning("--amp-opt-level is of the times of apex; use --amp-dtype or --disable_amp")


def _say_window_process(config: Any, device: torch.device, logger: logging.Logger) -> None:
    flag, backend = "--fused_window_process", config.MODEL.ATTENTION_BACKEND
    if config.MODEL.TYPE == "swin_mlp":
        logger.warning(f"{flag}: Swin-MLP has no attention to choose a backend for; nothing to change")
    elif backend != "window_process":
        logger.warning(f"{flag}: MODEL.ATTENTION_BACKEND={backend} wins; leave it at auto")
    elif not window_process.is_built_for(device):
        logger.warning(f"{flag}: {window_process.why_not_built(device)}; PyTorch's operations take its place")
