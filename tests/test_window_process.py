"""kernels/window_process: PyTorch's version against roll and partition, the compiled one against that, bit for bit.

The extension that is installed is tested; where there is none, one is built in pytest's cache (seconds). The index
arithmetic of the CUDA kernels is a header that the CPU's loop shares, and that is also run here by itself.
"""

import ctypes
import importlib.util
import logging
import shutil
import subprocess
from pathlib import Path

import extensions
import pytest
import torch
from conftest import ROOT, make_config
from hypothesis import given, settings
from hypothesis import strategies as st

import launch
from kernels.window_process import WindowProcess, WindowProcessReverse, merge, partition, window_process
from models import build_model
from models.attention import AttentionBase, faster_on_windows, set_attention_backend
from models.layers import window_partition, window_reverse
from models.precision import LACKING
from models.swin_transformer import SwinTransformer

SOURCE = ROOT / "kernels" / "window_process"
HEADER = SOURCE / "csrc" / "layout.h"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)

# B, map, window, shift, parts, heads, channels of a head
SHAPES = [
    (2, (8, 12), (4, 3), (2, 1), 3, 2, 8),
    (1, (7, 7), (7, 7), (0, 0), 1, 1, 5),
    (3, (14, 21), (7, 7), (-3, 20), 3, 4, 32),
    (2, (6, 4), (1, 2), (5, -7), 2, 3, 3),
    (2, (5, 3), (5, 1), (0, 2), 1, 2, 1),
    (0, (4, 4), (2, 2), (1, 1), 3, 1, 4),
    (1, (4, 6), (4, 6), (1, 100), 1, 1, 16),
]


@pytest.fixture(scope="session")
def built(request):
    """The package ``swin_window_process``, for this machine's devices."""
    return extensions.load(request, SOURCE, SWIN_WINDOW_PROCESS_CUDA="auto" if torch.cuda.is_available() else "0")


@pytest.fixture
def extension(request, built, monkeypatch):
    """The operators; `partition` and `merge` use them."""
    if request.node.get_closest_marker("gpu") and "cuda" not in built.DEVICES:
        pytest.skip("the extension is built without CUDA")
    monkeypatch.setattr(window_process, "DEVICES", built.DEVICES)
    return torch.ops.swin


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(window_process, "DEVICES", ())
    window_process._say_once.cache_clear()


def numbers(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Different from each other, as far as the dtype can tell."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=device) % 251).view(shape).to(dtype)


def by_hand(x, window, shift, parts, heads):
    """`partition` by the official functions, and heads cut off afterwards."""
    x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    windows = window_partition(x, window).flatten(1, 2)  # B * nW, N, C
    windows = windows.unflatten(2, (parts, heads, -1)).unflatten(0, (x.shape[0], -1))
    return windows.permute(3, 0, 1, 4, 2, 5)


# PyTorch's version


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]])
def test_pytorchs_version_is_roll_and_partition(shape, no_extension):
    B, resolution, window, shift, parts, heads, d = shape
    x = torch.randn(B, *resolution, parts * heads * d)
    windows = partition(x, window, shift, parts, heads)
    assert windows.is_contiguous() and torch.equal(windows, by_hand(x, window, shift, parts, heads))
    assert torch.equal(merge(windows, resolution, window, shift), x)


def test_official_calls_roll_and_cut_and_back(no_extension):
    x = torch.randn(2, 8, 12, 6, requires_grad=True)
    windows = WindowProcess.apply(x, 2, 8, 12, 6, -2, 4)
    assert torch.equal(windows, window_partition(torch.roll(x, (-2, -2), (1, 2)), 4))
    weights = torch.randn_like(windows)
    (windows * weights).sum().backward()
    assert torch.equal(x.grad, torch.roll(window_reverse(weights, 4, 8, 12), (2, 2), (1, 2)))
    back = WindowProcessReverse.apply(weights, 2, 8, 12, 6, 2, 4)
    assert torch.equal(back, torch.roll(window_reverse(weights, 4, 8, 12), (2, 2), (1, 2)))


def test_the_lack_of_the_extension_is_said_once(no_extension, caplog):
    for _ in range(3):
        merge(partition(torch.zeros(1, 4, 4, 2), 2, 1), (4, 4), 2, 1)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["the extension is not built for cpu"]
    assert window_process.INSTALL in caplog.text


def test_the_wrapper_is_importable_alone():
    spec = importlib.util.spec_from_file_location("window_process", SOURCE / "window_process.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.WindowProcess.apply(torch.zeros(1, 4, 4, 2), 1, 4, 4, 2, -1, 2).shape == (4, 2, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition(torch.zeros(4, 4, 2), 2), r"x has shape \(4, 4, 2\); it must be \(B, H, W, C\)"),
        (lambda: partition(torch.zeros(1, 5, 4, 2), 2), r"a 5x4 map is not a whole number .* window_size=2x2"),
        (lambda: partition(torch.zeros(1, 4, 4, 2), 0), r"window_size=0x0"),
        (lambda: partition(torch.zeros(1, 4, 4, 2), (2, 2, 2)), r"\(2, 2, 2\) is neither a number nor a pair"),
        (lambda: partition(torch.zeros(1, 4, 4, 8), 2, 0, 3, 2), "C=8 is not divisible by parts=3 times heads=2"),
        (lambda: merge(torch.zeros(1, 4, 4, 2), (4, 4), 2), r"must be \(parts, B, nW, heads, N, d\)"),
        (lambda: merge(torch.zeros(1, 1, 3, 1, 4, 2), (4, 4), 2), "makes nW 4 and N 4"),
        (lambda: WindowProcess.apply(torch.zeros(1, 4, 4, 2), 1, 4, 4, 3, 0, 2), r"x has shape .* \(1, 4, 4, 3\)"),
        (lambda: WindowProcessReverse.apply(torch.zeros(4, 2, 2, 3), 1, 4, 4, 2, 0, 2), r"make it \(4, 2, 2, 2\)"),
    ],
)
def test_errors_name_the_argument_and_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The extension


@on_each_device
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.complex128])
def test_the_extension_is_pytorchs_version(extension, device, dtype):
    for B, resolution, window, shift, parts, heads, d in SHAPES:
        x = numbers(B, *resolution, parts * heads * d, dtype=dtype, device=device)
        windows = extension.window_partition(x, window, shift, parts, heads)
        assert torch.equal(windows, window_process.partition_reference(x, window, shift, parts, heads))
        back = extension.window_merge(windows, resolution, window, shift)
        assert torch.equal(back, x) and back.is_contiguous() and windows.is_contiguous()


sizes = st.integers(1, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, st.tuples(sizes, sizes), st.tuples(sizes, sizes), sizes, sizes, st.integers(1, 9), st.data())
def check_any_shape(device, dtype, B, counts, window, parts, heads, d, data):
    resolution = tuple(n * w for n, w in zip(counts, window, strict=True))
    shift = tuple(data.draw(st.integers(-2 * side, 2 * side)) for side in resolution)
    x = numbers(B, *resolution, parts * heads * d, dtype=dtype, device=device)
    windows = partition(x, window, shift, parts, heads)
    assert torch.equal(windows, window_process.partition_reference(x, window, shift, parts, heads))
    assert torch.equal(merge(windows, resolution, window, shift), x)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(extension, device, dtype):
    check_any_shape(device, dtype)


@on_each_device
def test_non_contiguous_and_unaligned_maps(extension, device):
    wide = numbers(2, 6, 8, 24, device=device)
    for x in (
        wide.transpose(1, 2),
        wide[..., 1:9],
        wide[..., ::2],
        wide.flatten()[3 : 3 + 2 * 6 * 8 * 4].view(2, 6, 8, 4),
    ):
        windows = partition(x, (2, 4) if x.shape[1] == 6 else (4, 2), 1)
        assert torch.equal(windows, window_process.partition_reference(x, (2, 4) if x.shape[1] == 6 else (4, 2), 1))
    windows = partition(wide, (3, 4), (1, 2), 1, 3)
    turned = windows.transpose(3, 4).contiguous().transpose(3, 4)
    assert not turned.is_contiguous() and torch.equal(merge(turned, (6, 8), (3, 4), (1, 2)), wide)
    expanded = torch.ones(1, 1, 1, 2, device=device).expand(2, 4, 4, 2)
    assert torch.equal(merge(partition(expanded, 2, 1), (4, 4), 2, 1), expanded)


@on_each_device
def test_gradients_by_finite_differences(extension, device):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, device=device, requires_grad=True)
    windows = torch.randn(3, 2, 4, 2, 6, 1, dtype=torch.float64, device=device, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: partition(x, (2, 3), (1, -1), 3, 2), x)
        assert check(lambda x: merge(x, (4, 6), (2, 3), (1, -1)), windows)


@on_each_device
def test_gradients_are_those_of_roll_and_partition(extension, device):
    x = torch.randn(2, 8, 12, 12, device=device, requires_grad=True)
    ours, theirs = partition(x, (4, 3), (1, 2), 3, 2), by_hand(x, (4, 3), (1, 2), 3, 2)
    weights = torch.randn_like(ours)
    (mine,), (their,) = (torch.autograd.grad((y * weights).sum(), x) for y in (ours, theirs))
    assert torch.equal(mine, their) and mine.abs().sum() > 0
    windows = weights.requires_grad_()
    factor = torch.randn_like(x)
    ours = merge(windows, (8, 12), (4, 3), (1, 2))
    (mine,) = torch.autograd.grad((ours * factor).sum(), windows)
    assert torch.equal(mine, by_hand(factor, (4, 3), (1, 2), 3, 2))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(extension, device, dtype):
    x = torch.randn(2, 4, 6, 6, dtype=dtype, device=device, requires_grad=True)
    torch.library.opcheck(extension.window_partition.default, (x, [2, 3], [1, -1], 3, 2))
    windows = torch.randn(3, 2, 4, 2, 6, 1, dtype=dtype, device=device, requires_grad=True)
    torch.library.opcheck(extension.window_merge.default, (windows, [4, 6], [2, 3], [1, -1]))


@on_each_device
def test_compile_and_export_keep_the_operators(extension, device):
    def twice(x):
        return merge(2 * partition(x, 2, 1, 1, 2), x.shape[1:3], 2, 1)

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    for side in (4, 6):
        x = torch.randn(side, side, 2 * side, 4, device=device, requires_grad=True)
        out = compiled(x)
        out.sum().backward()
        assert torch.equal(out, 2 * x) and torch.equal(x.grad, torch.full_like(x, 2))

    class Twice(torch.nn.Module):
        def forward(self, x):
            return twice(x)

    x = torch.randn(2, 4, 8, 4, device=device)
    program = torch.export.export(Twice(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "swin.window_partition.default" in called and "swin.window_merge.default" in called
    x = torch.randn(3, 4, 8, 4, device=device)
    assert torch.equal(program.module()(x), 2 * x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_records_pytorchs_operations(extension):
    def same(x):
        return merge(partition(x, 2, 1), x.shape[1:3], 2, 1)

    traced = torch.jit.trace(same, torch.zeros(1, 4, 4, 2), check_trace=False)
    x = torch.randn(1, 4, 4, 2)
    assert torch.equal(traced(x), x) and "swin::" not in str(traced.graph)


@on_each_device
def test_operators_refuse_what_would_leave_the_memory(extension, device):
    x, windows = torch.zeros(1, 4, 4, 8, device=device), torch.zeros(1, 1, 4, 1, 4, 8, device=device)
    for arguments, message in [
        ((x[0], [2, 2], [0, 0], 1, 1), r"x has shape \(4, 4, 8\)"),
        ((x, [3, 2], [0, 0], 1, 1), r"a map of \(4, 4\) .* window_size=\(3, 2\)"),
        ((x, [0, 2], [0, 0], 1, 1), r"window_size=\(0, 2\)"),
        ((x, [2], [0, 0], 1, 1), r"window_size=\(2\)"),
        ((x, [2, 2], [], 1, 1), r"shift_size=\(\)"),
        ((x, [2, 2], [0, 0], 3, 1), r"C=8 .* parts=3"),
        ((x, [2, 2], [0, 0], 1, -1), r"heads=-1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            extension.window_partition(*arguments)
    for arguments, message in [
        ((windows[0], [4, 4], [2, 2], [0, 0]), r"windows has shape \(1, 4, 1, 4, 8\)"),
        ((windows, [4, 4], [2, 1], [0, 0]), r"make nW 8 and N 2"),
        ((windows, [8, 4], [2, 2], [0, 0]), r"make nW 8 and N 4"),
        ((windows, [4], [2, 2], [0, 0]), r"resolution=\(4\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            extension.window_merge(*arguments)


def test_threads_share_the_work(extension):
    x = numbers(4, 56, 56, 96)
    expected, before = window_process.partition_reference(x, 7, 3, 3, 4), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        windows = partition(x, 7, 3, 3, 4)
        assert torch.equal(windows, expected) and torch.equal(merge(windows, (56, 56), 7, 3), x)
    finally:
        torch.set_num_threads(before)


# The flag


@on_each_device
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_models_with_the_flag_give_the_same_bits(extension, device, amp, family):
    """Logits and gradients, on maps that are padded too, are those of the backend that rolls and cuts."""
    dtype = torch.bfloat16 if amp else torch.float32
    if device == "cpu" and dtype in LACKING:
        dtype = torch.float32  # models compute in it then
    same_arithmetic = faster_on_windows(torch.device(device), dtype, True, grid=1)  # on a CPU sdpa, then reference
    section = f"MODEL.{family.upper()}"
    small = {"PATCH_SIZE": 2, "EMBED_DIM": 16, "DEPTHS": [2, 2], "NUM_HEADS": [2, 4], "WINDOW_SIZE": 4}
    options = [item for key, value in small.items() for item in (f"{section}.{key}", value)]
    options += ["MODEL.TYPE", family, "DATA.IMG_SIZE", 36, "MODEL.PAD_MAPS", True, "MODEL.NUM_CLASSES", 5]
    if family == "swin_moe":
        options += ["MODEL.SWIN_MOE.MOE_BLOCKS", [[-1], [-1]]]
    results = {}
    for flag in (None, True):
        torch.manual_seed(0)
        model = build_model(make_config(None, *options, fused_window_process=flag)).to(device).eval()
        backends = {m.backend for m in model.modules() if isinstance(m, AttentionBase)}
        assert backends == {"window_process" if flag else "auto"}
        if not flag:
            set_attention_backend(model, same_arithmetic)
        images = torch.randn(2, 3, 36, 36, generator=torch.Generator().manual_seed(1)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            out = model(images)
        out = out[0] if isinstance(out, tuple) else out
        out.float().square().sum().backward()
        results[flag] = [out, *(p.grad for p in model.parameters() if p.grad is not None)]
    for plain, fused in zip(*results.values(), strict=True):
        if device == "cpu":
            assert torch.equal(plain, fused)
        else:  # PyTorch's own gradients differ from run to run
            torch.testing.assert_close(plain, fused, rtol=1e-2, atol=1e-3)


def test_the_models_of_the_flag_call_the_operators(extension, monkeypatch):
    calls = []
    for name in ("partition", "merge"):
        function = getattr(window_process, name)
        monkeypatch.setattr(
            f"kernels.window_process.{name}", lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k)
        )
    small = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
    SwinTransformer(**small, fused_window_process=True)(torch.zeros(1, 3, 16, 16))
    assert calls == ["partition", "merge"] * 2
    SwinTransformer(**small)(torch.zeros(1, 3, 16, 16))
    assert len(calls) == 4


def test_an_explicit_backend_wins_over_the_flag():
    config = make_config(None, "MODEL.ATTENTION_BACKEND", "sdpa", fused_window_process=True)
    assert config.FUSED_WINDOW_PROCESS and config.MODEL.ATTENTION_BACKEND == "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "extension is not built for cpu"),
        (["MODEL.TYPE", "swin_mlp"], "Swin-MLP has no attention"),
        (["MODEL.ATTENTION_BACKEND", "sdpa"], "MODEL.ATTENTION_BACKEND=sdpa wins"),
    ],
)
def test_a_flag_without_effect_says_why(options, message, no_extension, caplog):
    config = make_config(None, *options, fused_window_process=True)
    launch._say_once(config, torch.device("cpu"), logging.getLogger())
    assert [message in record.getMessage() for record in caplog.records] == [True]


# The arithmetic of the kernels, and their compilation

HARNESS = """
#include "layout.h"
template <typename Index>
void map_units(const int64_t* g, int64_t first, int64_t count, int64_t* out) {
  const swin::Layout<Index> layout(swin::Geometry{g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]});
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(layout.map_unit(static_cast<Index>(first + i)));
}
extern "C" {
void map_units_32(const int64_t* g, int64_t first, int64_t count, int64_t* out) {
  map_units<uint32_t>(g, first, count, out);
}
void map_units_64(const int64_t* g, int64_t first, int64_t count, int64_t* out) {
  map_units<uint64_t>(g, first, count, out);
}
int64_t quotient(int64_t n, int64_t by) { return swin::Divisor<uint32_t>(by).divide(n).quotient; }
int64_t unit(int64_t from, int64_t to, int64_t bytes) {
  return swin::widest_unit(reinterpret_cast<void*>(from), reinterpret_cast<void*>(to), bytes);
}
}
"""


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    if shutil.which(extensions.COMPILER) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("layout")
    (folder / "harness.cpp").write_text(HARNESS)
    library = folder / "harness.so"
    subprocess.run(
        [
            extensions.COMPILER,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-I",
            HEADER.parent,
            folder / "harness.cpp",
            "-o",
            library,
        ],
        check=True,
    )
    functions = ctypes.CDLL(str(library))
    for name in ("quotient", "unit"):
        getattr(functions, name).restype = ctypes.c_int64
    return functions


def map_units(arithmetic, bits: int, geometry: list[int], first: int, count: int) -> torch.Tensor:
    out = torch.empty(count, dtype=torch.int64)
    call = getattr(arithmetic, f"map_units_{bits}")
    call(
        (ctypes.c_int64 * 10)(*geometry),
        ctypes.c_int64(first),
        ctypes.c_int64(count),
        ctypes.cast(out.data_ptr(), ctypes.POINTER(ctypes.c_int64)),
    )
    return out


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("vectors", [1, 3, 4])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]])
def test_units_of_the_kernels_are_where_pytorch_puts_them(arithmetic, shape, vectors, bits):
    """Every thread's address, with as many units to a head's channels as vectors of some width would be."""
    B, (H, W), (h, w), (down, right), parts, heads, _ = shape
    x = torch.arange(B * H * W * parts * heads * vectors).view(B, H, W, -1)
    expected = window_process.partition_reference(x, (h, w), (down, right), parts, heads).flatten()
    geometry = [parts, B, H // h, W // w, heads, h, w, vectors, down % H, right % W]
    assert torch.equal(map_units(arithmetic, bits, geometry, 0, x.numel()), expected)


def by_python(geometry: list[int], i: int) -> int:
    parts, B, rows, columns, heads, h, w, vectors, top, left = geometry
    places = []
    for size in (vectors, w, h, heads, columns, rows, B):
        i, place = divmod(i, size)
        places.append(place)
    v, x, y, head, column, row, b = places
    y, x = (row * h + y + top) % (rows * h), (column * w + x + left) % (columns * w)
    return ((((b * rows * h + y) * columns * w + x) * parts + i) * heads + head) * vectors + v


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def check_large(arithmetic, data):
    """Up to 2^31 units for 32 bits, and far beyond for 64."""
    sides = [data.draw(st.integers(1, 2**n)) for n in (2, 12, 6, 6, 5, 5, 5, 6)]
    geometry = [*sides, data.draw(st.integers(0, sides[2] * sides[5] - 1))]
    geometry.append(data.draw(st.integers(0, sides[3] * sides[6] - 1)))
    units = torch.Size(sides).numel()
    for i in (0, units - 1, data.draw(st.integers(0, units - 1))):
        for bits in (32, 64) if units < 2**31 else (64,):
            assert map_units(arithmetic, bits, geometry, i, 1).item() == by_python(geometry, i)


def test_units_of_large_tensors(arithmetic):
    check_large(arithmetic)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1), st.sampled_from([-1, 0, 1]))
def check_quotients(arithmetic, n, by, nudge):
    near = max(0, min(n // by * by + nudge, 2**31 - 1))  # where a wrong rounding would show
    for number in (n, near, 2**31 - 1):
        assert arithmetic.quotient(ctypes.c_int64(number), ctypes.c_int64(by)) == number // by


def test_division_by_multiplication(arithmetic):
    check_quotients(arithmetic)
    for by in (1, 2, 3, 5, 7, 49, 2**30, 2**31 - 1):
        for n in (0, 1, by - 1, by, by + 1, 2 * by - 1, 2**31 - 1):
            assert arithmetic.quotient(ctypes.c_int64(n), ctypes.c_int64(by)) == n // by


def test_units_are_as_wide_as_channels_and_pointers_allow(arithmetic):
    for arguments, width in [((4096, 8192, 64), 16), ((4096, 8192, 24), 8), ((4096, 8196, 64), 4), ((4098, 0, 64), 2)]:
        assert arithmetic.unit(*map(ctypes.c_int64, arguments)) == width
    assert arithmetic.unit(*map(ctypes.c_int64, (4096, 4096, 5))) == 1
    assert arithmetic.unit(*map(ctypes.c_int64, (4096, 4096, 32))) == 16


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_kernels_compile_without_warnings(tmp_path):
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Werror", "all-warnings"]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    files = ["-isystem", include, "-c", SOURCE / "csrc" / "move.cu", "-o", tmp_path / "move.o"]
    result = subprocess.run(["nvcc", *flags, *targets, *files], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvcc") is None or torch.version.cuda is None, reason="no nvcc or PyTorch without CUDA"
)
def test_both_parts_are_built_where_nvcc_is(tmp_path):
    result = extensions.build(SOURCE, tmp_path, SWIN_WINDOW_PROCESS_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert result.returncode == 0 and "for the CPU and CUDA" in result.stderr, result.stderr
    assert len(list(tmp_path.glob("lib/*/_C*.so"))) == 2


def test_a_build_without_what_it_needs_says_so_in_a_line(tmp_path):
    result = extensions.build(SOURCE, tmp_path, SWIN_WINDOW_PROCESS_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "error: SWIN_WINDOW_PROCESS_CUDA=1, but" in result.stderr.splitlines()[-1]


# On a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_2_to_the_31_elements(extension, channels):
    """uint8 in units of one byte: indices need more than 32 bits."""
    B = 2**31 // (64 * 64 * channels) + 1
    x = torch.randint(0, 255, (B, 64, 64, channels), dtype=torch.uint8, device="cuda")
    assert x.numel() > 2**31
    windows = partition(x, 8, 3)
    for b in (0, B // 2, B - 1):
        assert torch.equal(windows[:, b : b + 1], window_process.partition_reference(x[b : b + 1], 8, 3))
    assert torch.equal(merge(windows, (64, 64), 8, 3), x)


@pytest.mark.gpu
def test_more_than_65535_windows(extension):
    x = numbers(70000, 4, 4, 8, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(partition(x, 2, 1), window_process.partition_reference(x, 2, 1))


@pytest.mark.gpu
def test_the_current_stream_is_used(extension):
    x, stream = torch.zeros(64, 56, 56, 96, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        x.add_(1)  # a kernel on another stream would be earlier
        windows = partition(x, 7, 3)
    stream.synchronize()
    assert windows.min() == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensor_is_used(extension):
    x = numbers(2, 8, 8, 8, device="cuda:1")
    assert torch.equal(partition(x, 4, 1), window_process.partition_reference(x, 4, 1))
