"""kernels/window_attention: outputs and gradients against float64, on a GPU or in Triton's interpreter.

The interpreter must be asked for before anything imports Triton, so the tests marked [cpu] run in a process of their
own: `test_the_kernels_in_triton_s_interpreter` starts it. By hand:

TRITON_INTERPRET=1 pytest -m "not slow and not gpu" tests/test_window_attention.py
"""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, fill, golden, golden_images, make_config
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernels import SHAPES
from kernels.window_attention import attend, geometry, operators, reference
from kernels.window_attention.geometry import Geometry, is_whole
from models import attention, build_model
from models.attention import AttentionBase, set_attention_backend
from models.layers import window_mask
from models.swin_transformer import SwinTransformer, WindowAttention
from models.swin_transformer_moe import SwinTransformerMoE
from models.swin_transformer_v2 import SwinTransformerV2

in_interpreter = pytest.mark.skipif(not geometry.INTERPRETED, reason="runs in Triton's interpreter")
outside = pytest.mark.skipif(geometry.INTERPRETED, reason="runs outside of Triton's interpreter")
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=in_interpreter), pytest.param("cuda", marks=[pytest.mark.gpu, outside])]
)

# What float32 is asked to reach, and a few roundings of the others.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)


def draw(B, H, W, num_heads, D, window, cosine, dtype, device="cpu", seed=0) -> list[torch.Tensor | None]:
    """qkv, bias and logit scale."""
    generator, N = torch.Generator().manual_seed(seed), window[0] * window[1]
    qkv = torch.randn(B, H, W, 3 * num_heads * D, generator=generator).to(dtype)
    bias = torch.randn(num_heads, N, N, generator=generator)
    scale = 5 + 10 * torch.rand(num_heads, 1, 1, generator=generator) if cosine else None
    return [None if x is None else x.to(device) for x in (qkv, bias, scale)]


def run(attend, inputs, grad, arguments) -> list[torch.Tensor]:
    """The output, and the gradients of the inputs that there are. Without ``grad``, the output stands for it."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves, *arguments)
    out.backward(out.detach() if grad is None else grad)
    return [out.detach(), *(x.grad for x in leaves if x is not None)]


def compare(B, H, W, num_heads, D, window, shift, masked, cosine, dtype, device="cpu", seed=0) -> list[torch.Tensor]:
    """The kernels' results, after a check that they are the reference's in float64."""
    inputs = draw(B, H, W, num_heads, D, window, cosine, dtype, device, seed)
    arguments = (num_heads, window, shift, masked, 1.0 if cosine else D**-0.5)
    exact = [x if x is None else x.double() for x in inputs]
    expected = run(reference.attend, exact, None, arguments)
    results = run(attend, inputs, expected[0].to(dtype), arguments)
    dtypes = [dtype, *(x.dtype for x in inputs if x is not None)]
    assert [x.dtype for x in results] == dtypes
    for name, ours, theirs in zip(("out", "qkv", "bias", "scale"), results, expected, strict=False):
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < TOLERANCE[dtype], (name, error.item())
    return results


@st.composite
def shapes(draw) -> dict:
    """Maps of a few windows, whole or not."""
    window = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda window: window[0] * window[1] > 3))
    counts = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1)]))
    padding = draw(st.tuples(*(st.integers(0, side // 2) for side in window))) if draw(st.booleans()) else (0, 0)
    shift = draw(st.tuples(*(st.integers(0, side - 1) for side in window)))
    H, W = (count * side - pad for count, side, pad in zip(counts, window, padding, strict=True))
    return {
        **{"B": draw(st.integers(1, 2)), "H": H, "W": W, "window": window, "shift": shift},
        **{"num_heads": draw(st.integers(1, 2)), "D": draw(st.sampled_from([8, 12, 32, 40]))},
        **{"masked": draw(st.booleans()), "cosine": draw(st.booleans()), "dtype": draw(st.sampled_from(DTYPES))},
    }


@on_each_device
@settings(max_examples=12, deadline=None, derandomize=True)
@given(shape=shapes(), seed=st.integers(0, 99))
def test_outputs_and_gradients_are_those_of_float64(device, shape, seed):
    compare(**shape, device=device, seed=seed)


# B, map, heads, their width, window, shift. Of one tile, of several, of one and padded, of several and padded twice.
TINY = [
    (1, (8, 8), 2, 8, (4, 4), (2, 2)),
    (1, (11, 9), 1, 8, (11, 9), (0, 0)),
    (1, (7, 7), 1, 32, (7, 7), (0, 0)),
    (1, (5, 6), 1, 12, (4, 6), (2, 0)),
    (1, (15, 8), 1, 8, (9, 8), (4, 0)),
    (1, (2, 6), 1, 128, (2, 3), (0, 1)),
]
tiny = pytest.mark.parametrize("shape", TINY, ids=lambda shape: f"{shape[4][0]}x{shape[4][1]}of{shape[3]}")


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@tiny
def test_small_shapes_in_every_precision(device, shape, dtype):
    B, (H, W), num_heads, D, window, shift = shape
    compare(B, H, W, num_heads, D, window, shift, any(shift), D % 16 == 0, dtype, device)


@on_each_device
@pytest.mark.parametrize("D", [8, 40])  # a window is a tile, or cut into tiles of queries and keys
def test_programs_that_go_through_many_windows_add_up_what_they_find(device, D, monkeypatch):
    from kernels.window_attention import launch

    shape = {"B": 2, "H": 4, "W": 6, "num_heads": 1, "D": D, "window": (2, 3), "shift": (1, 1)}
    shape |= {"masked": True, "cosine": True, "dtype": torch.float32, "device": device}
    monkeypatch.setattr(launch, "FORWARD_PROGRAMS", 3)
    monkeypatch.setattr(launch, "BACKWARD_PROGRAMS", 3)  # for 8 windows
    few = compare(**shape)
    monkeypatch.setattr(launch, "BACKWARD_PROGRAMS", 1000)
    for ours, theirs in zip(few, compare(**shape), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@on_each_device
@pytest.mark.parametrize("D", [8, 40])
def test_gradients_are_the_same_bits_in_every_run(device, D):
    B, H = (512, 8) if device == "cuda" else (1, 4)
    inputs = draw(B, H, 3, 2, D, (2, 3), True, torch.float32, device)
    first, *others = (run(attend, inputs, None, (2, (2, 3), (1, 2), True, 1.0)) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@on_each_device
def test_inputs_need_not_be_contiguous(device):
    qkv, bias, _ = draw(1, 4, 6, 2, 8, (2, 3), False, torch.float32, device)
    arguments = (2, (2, 3), (1, 1), True, 0.3)
    expected = run(attend, [qkv, bias, None], qkv[..., :16], arguments)
    qkv, bias = qkv.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), bias.mT.contiguous().mT
    results = run(lambda *inputs: attend(*inputs), [qkv, bias, None], qkv[..., :16], arguments)
    assert not qkv.is_contiguous() and not bias.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@on_each_device
@pytest.mark.parametrize("cosine, D", [(True, 8), (False, 40)])
def test_opcheck(device, cosine, D):
    inputs = draw(1, 2, 3, 1, D, (2, 3), cosine, torch.float32, device)
    inputs = [x if x is None else x.requires_grad_() for x in inputs]
    arguments = (1, [2, 3], [1, 1], True, 0.3)
    torch.library.opcheck(operators.forward, (*inputs, *arguments))
    with torch.no_grad():
        out, lse = operators.forward(*inputs, *arguments)
    torch.library.opcheck(operators.backward, (out, *inputs, out, lse, *arguments), test_utils="test_faketensor")


@on_each_device
def test_empty_batches(device):
    results = run(attend, draw(0, 4, 4, 2, 8, (2, 2), True, torch.float32, device), None, (2, (2, 2), (1, 1), True, 1))
    assert results[0].shape == (0, 4, 4, 16) and results[1].shape == (0, 4, 4, 48)
    assert not results[2].any() and not results[3].any()


# --- Models -----------------------------------------------------------------------------------------------------------

MODELS = {
    "v1": partial(SwinTransformer, pad_maps=True),
    "v2": SwinTransformerV2,
    "moe": SwinTransformerMoE,
}


def logits_and_gradients(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    torch.nn.functional.cross_entropy(logits, torch.arange(len(images), device=images.device)).backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


def check_same(results: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm().clamp_min(0.1)


@on_each_device
@pytest.mark.parametrize("kind", MODELS)
def test_models_give_the_same_logits_and_gradients(kind, device):
    size = 22 if kind == "v1" else 24  # 22: maps of 11, padded to 12
    shape = {"img_size": size, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
    shape |= {"window_size": 4 if kind == "v1" else 6, "num_classes": 5, "drop_path_rate": 0.0}
    model = fill(MODELS[kind](**shape)).to(device).eval()
    images = golden_images(3, 1, size).to(device)
    expected = logits_and_gradients(model, images)
    set_attention_backend(model, "fused")
    check_same(logits_and_gradients(model, images), expected, 1e-4)  # sdpa itself is within 3e-5 of float64


@on_each_device
def test_models_under_compilers_and_autocast(device):
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [1], "window_size": 2}
    model = fill(SwinTransformer(**shape, num_classes=5, drop_path_rate=0.0)).to(device).eval()
    images = golden_images(3, 2, 8).to(device)
    expected = logits_and_gradients(model, images)
    set_attention_backend(model, "fused")
    with torch.autocast(device, torch.bfloat16):
        check_same(logits_and_gradients(model, images), expected, 0.1)
    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    check_same(logits_and_gradients(compiled, images), expected, 1e-4)
    exported = torch.export.export(model, (images,))
    assert str(exported.graph).count("swin.window_attention.default") == 2
    check_same([exported.module()(images)], expected[:1], 1e-4)


@pytest.mark.gpu
@outside
@pytest.mark.parametrize("kind", ["swin/swin_tiny_patch4_window7_224", "swinv2/swinv2_tiny_patch4_window8_256"])
def test_golden_models(kind):
    name = f"configs/{kind}.yaml"
    expected = golden("models")[name]
    config = make_config(name, "MODEL.NUM_CLASSES", expected["num_classes"], "MODEL.ATTENTION_BACKEND", "fused")
    model = fill(build_model(config)).cuda().eval()
    images = golden_images(expected["input_seed"], expected["batch"], expected["img_size"]).cuda()
    logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(expected["batch"]).cuda() % expected["num_classes"])
    loss.backward()
    first = torch.tensor(expected["logits_first10"], device="cuda")
    torch.testing.assert_close(logits[:, :10], first, atol=2e-4, rtol=1e-4)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4, rel=1e-5)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert {name: norms[name] for name in expected["grad_norms"]} == pytest.approx(expected["grad_norms"], rel=1e-3)


# --- Real sizes, on a GPU ---------------------------------------------------------------------------------------------

# B, map, heads, their width, window, shift: stages of Swin and SwinV2, and the limits.
REAL = [
    (8, (56, 56), 3, 32, (7, 7), (3, 3)),
    (8, (7, 7), 24, 32, (7, 7), (0, 0)),
    (4, (64, 64), 4, 32, (8, 8), (4, 4)),
    (2, (96, 96), 4, 32, (12, 12), (6, 6)),
    (2, (64, 64), 4, 32, (16, 16), (8, 8)),
    (1, (48, 48), 6, 32, (24, 24), (12, 12)),
    (2, (50, 70), 2, 24, (7, 14), (3, 7)),
    (2, (32, 32), 2, 64, (8, 8), (4, 4)),
    (2, (24, 24), 2, 128, (12, 12), (6, 6)),
    (2, (16, 16), 2, 8, (2, 2), (1, 1)),
]


@pytest.mark.gpu
@outside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shape", REAL, ids=lambda shape: f"{shape[4][0]}x{shape[4][1]}of{shape[3]}")
def test_real_sizes(shape, cosine, dtype):
    B, (H, W), num_heads, D, window, shift = shape
    first = compare(B, H, W, num_heads, D, window, shift, any(shift), cosine, dtype, "cuda")
    again = compare(B, H, W, num_heads, D, window, shift, any(shift), cosine, dtype, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@outside
def test_training_takes_less_memory_than_with_copies():
    peaks = {}
    for backend in ("sdpa", "fused"):
        module = WindowAttention(96, 7, 3).cuda()
        module.backend = backend
        x = torch.randn(64, 56, 56, 96, device="cuda", requires_grad=True)
        mask = window_mask((56, 56), 7, 3).cuda()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            module(x, mask, 3).sum().backward()
        peaks[backend] = torch.cuda.max_memory_allocated()
        del module, x
    assert peaks["fused"] < peaks["sdpa"]


@pytest.mark.gpu
@outside
@pytest.mark.parametrize("window, heads, D", [((7, 7), 3, 32), ((8, 8), 2, 48)])  # whole windows, and tiles of them
def test_maps_of_more_numbers_than_32_bits_count(window, heads, D):
    """The last maps of 2^31 numbers and more get the results that they get alone."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    shift = (3, 3)
    few, bias, _ = draw(4, 56, 56, heads, D, window, False, torch.bfloat16, "cuda")
    arguments = (heads, window, shift, True, D**-0.5)
    expected = run(attend, [few, bias, None], None, arguments)
    many = few.repeat(2**31 // few.numel() + 1, 1, 1, 1)
    results = run(attend, [many, bias, None], None, arguments)
    assert many.numel() > 2**31
    assert all(torch.equal(a[-4:], b) for a, b in zip(results[:2], expected[:2], strict=True))


# --- Without a GPU ----------------------------------------------------------------------------------------------------


@outside
def test_the_kernels_in_triton_s_interpreter():
    command = [sys.executable, "-m", "pytest", "-m", "not slow and not gpu", "-p", "no:cacheprovider", __file__]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 30


@outside
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "resolution, window, shift",
    [((6, 8), (3, 4), (1, 2)), ((6, 8), (3, 4), (0, 0)), ((7, 5), (3, 4), (1, 0)), ((2, 3), (3, 4), (2, 3))],
)
def test_the_reference_is_that_of_the_models(resolution, window, shift, cosine):
    inputs = draw(2, *resolution, 2, 4, window, cosine, torch.float64)
    mask = window_mask(resolution, window, shift)
    mask = mask if mask is None else mask.double()

    def theirs(qkv, bias, logit_scale, num_heads, window, shift, masked, scale):
        geometry = {"num_heads": num_heads, "window_size": window, "shift_size": shift, "scale": scale}
        backend = "reference"
        return attention.window_attention(qkv, bias, mask, **geometry, logit_scale=logit_scale, backend=backend)

    arguments = (2, window, shift, any(shift), 0.7)
    inputs = [x if x is None else x.double() for x in inputs]
    for ours, expected in zip(*(run(f, inputs, None, arguments) for f in (reference.attend, theirs)), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_for(kernel, shape: Geometry, capability: int):
    """A kernel, compiled without a GPU as `launch` has it compiled on one."""
    import triton
    from triton.backends.compiler import GPUTarget

    from kernels.window_attention import triton_kernels

    constants = shape.constants()
    if not shape.cosine:
        constants["logit_scale"] = None
    types = {**dict.fromkeys(triton_kernels.SIZES, "i32"), "scale": "fp32"}
    types |= dict.fromkeys(("qkv", "out", "grad", "grad_qkv"), f"*{ELEMENTS[shape.dtype]}")
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=shape.options())


def stack_bytes(compiled, folder) -> int:
    """Of a thread's stack, where registers spill to."""
    import triton

    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def kernels_for(window: tuple[int, int], D: int) -> list[str]:
    if is_whole(window, D):
        return ["forward_whole", "backward_whole"]
    return ["forward_tiled", "backward_queries", "backward_keys", "backward_bias"]


# Capability, window, width of a head, cosine, dtype, precision of float32.
QUICK_TARGETS = [
    (80, (7, 7), 32, False, torch.bfloat16, "ieee"),
    (90, (12, 12), 32, True, torch.bfloat16, "ieee"),
]
TARGETS = [
    (capability, *rest)
    for capability in (80, 90)
    for rest in [
        ((7, 7), 32, False, torch.bfloat16, "ieee"),
        ((8, 8), 32, True, torch.float16, "ieee"),
        ((7, 7), 32, True, torch.float32, "ieee"),
        ((7, 7), 32, False, torch.float32, "tf32"),
        ((2, 2), 8, False, torch.bfloat16, "ieee"),
        ((5, 5), 16, True, torch.float32, "ieee"),
        ((12, 12), 32, True, torch.bfloat16, "ieee"),
        ((24, 24), 32, False, torch.float32, "ieee"),
        ((24, 24), 32, False, torch.float32, "tf32"),
        ((16, 16), 64, True, torch.bfloat16, "ieee"),
        ((12, 12), 128, True, torch.float16, "ieee"),
        ((7, 7), 128, True, torch.float32, "ieee"),
    ]
]


@outside
@pytest.mark.parametrize(
    "capability, window, D, cosine, dtype, precision",
    [*QUICK_TARGETS, *(pytest.param(*target, marks=pytest.mark.slow) for target in TARGETS)],
)
def test_kernels_compile_within_a_gpu_s_limits(capability, window, D, cosine, dtype, precision, tmp_path):
    """Shared memory of the smallest of these GPUs (sm_86); some registers may spill, whole tiles may not."""
    pytest.importorskip("triton")
    from kernels.window_attention import triton_kernels

    half = (window[0] // 2, window[1] // 2)
    shape = Geometry(4, D, window, half, True, padded=D == 64, cosine=cosine, dtype=dtype, precision=precision)
    for name in kernels_for(window, D):
        compiled = compile_for(getattr(triton_kernels, name), shape, capability)
        assert compiled.metadata.shared <= 99 * 1024, name
        assert stack_bytes(compiled, tmp_path) < 640, name


@outside
@pytest.mark.parametrize(
    "window, cosine",
    [
        pytest.param(shape.window, shape.cosine, marks=[] if shape.window == 7 else pytest.mark.slow)
        for shape in {shape.window: shape for shape in SHAPES}.values()
    ],
)
def test_stages_of_swin_keep_to_registers_and_move_16_bytes_at_once(window, cosine, tmp_path):
    """On sm_90 in bfloat16: the next tile is copied while one is worked on, and hardly a register spills."""
    pytest.importorskip("triton")
    from kernels.window_attention import triton_kernels

    window, half = (window, window), (window // 2, window // 2)
    shape = Geometry(4, 32, window, half, True, False, cosine, torch.bfloat16, "ieee")
    for name in kernels_for(window, 32):
        compiled = compile_for(getattr(triton_kernels, name), shape, 90)
        assert stack_bytes(compiled, tmp_path) <= 64, name
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", compiled.asm["ptx"])
        assert "cp.async.wait_group" in compiled.asm["ptx"] and "0x10" in copies, name
        assert "forward" not in name or set(copies) == {"0x10"}, (
            name
        )  # backward passes also read a number of each query


@outside
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dropout_p": 0.1}, "no dropout of attention"),
        ({"qkv": torch.empty(1, 3, 4, 24)}, "need their window_mask"),
        ({"mask": torch.zeros(4, 4, 4)}, "makes its masks itself"),
        ({"qkv": torch.empty(1, 4, 4, 24, dtype=torch.float64)}, "torch.float64 is not one of torch.float32"),
        ({"window": (1, 25), "qkv": torch.empty(1, 4, 25, 24)}, "windows of 1x25 are larger than 24x24"),
        ({"shift": (2, 0), "mask": torch.zeros(4, 4, 4)}, "a shift of 2x0 is not within the window"),
        ({"qkv": torch.empty(1, 4, 4, 3 * 136)}, "heads of 136 channels are wider than 128"),
        ({"qkv": torch.empty(1, 4, 4, 24, device="meta")}, "it needs a CUDA device, not meta"),
    ],
)
def test_asked_for_by_name_it_says_why_it_cannot(change, reason):
    call = {"mask": None, "num_heads": 1, "window": (2, 2), "shift": (0, 0), "dropout_p": 0.0}
    call |= {"qkv": torch.empty(1, 4, 4, 24)} | change
    with pytest.raises(ValueError, match=rf"^MODEL.ATTENTION_BACKEND='fused': .*{reason}.*; choose auto$"):
        attention.takes_fused("fused", **call)


@outside
def test_windows_that_are_cut_already_are_refused():
    module = WindowAttention(8, 2, 1)
    set_attention_backend(module, "fused")
    assert isinstance(module, AttentionBase) and module.backend == "fused"
    with pytest.raises(ValueError, match=r"^MODEL.ATTENTION_BACKEND='fused': it takes maps, not windows that are cut"):
        module(torch.randn(4, 4, 8))
