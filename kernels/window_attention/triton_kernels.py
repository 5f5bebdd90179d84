"""The kernels of fused window attention. N = h * w tokens a window, nH heads of D channels, C = nH * D.

Maps are (B, H, W, 3C) or (B, H, W, C) in image order; `_locate` finds a window's tokens in them, so shift, partition,
padding and their inverses are addresses alone. Windows of up to 64 tokens are one tile: a program keeps its head's bias
on chip and goes through many windows. Larger ones are cut into tiles of queries and keys.

Logits are kept in base 2: multiplied by log2 e, so that exp2 serves. ``lse``, (windows, nH, N), is the base-2 logarithm
of each query's sum of exponentials; with it the backward pass computes the weights anew. Where its rows are keys, a
tile is the transpose of the usual one, and so laid out already for the products that follow.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ("windows", "programs", "H", "W")  # their values are not compiled in: one kernel serves every batch
BETWEEN_REGIONS = tl.constexpr(-100.0 * 1.4426950408889634)  # models.layers.MASKED in base 2


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter multiplies bfloat16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _locate(
    window, token, H, W, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr
):
    """Of tokens of a window: their index in (B, H, W), whether they exist, and their region in the shift mask."""
    rows, columns = tl.cdiv(H, WINDOW_H), tl.cdiv(W, WINDOW_W)
    image, window = window // (rows * columns), window % (rows * columns)
    y = window // columns * WINDOW_H + token // WINDOW_W  # in the map that is padded and rolled
    x = window % columns * WINDOW_W + token % WINDOW_W
    tall, wide = rows * WINDOW_H, columns * WINDOW_W
    region_y = (y >= tall - WINDOW_H).to(tl.int32) + (y >= tall - SHIFT_H).to(tl.int32)
    region_x = (x >= wide - WINDOW_W).to(tl.int32) + (x >= wide - SHIFT_W).to(tl.int32)
    y = tl.where(y >= tall - SHIFT_H, y + SHIFT_H - tall, y + SHIFT_H)
    x = tl.where(x >= wide - SHIFT_W, x + SHIFT_W - wide, x + SHIFT_W)
    exists = (token < WINDOW_H * WINDOW_W) & (y < H) & (x < W)
    return (image * H + y).to(tl.int64) * W + x, exists, 3 * region_y + region_x


@triton.jit
def _pointers(tensor, place, exists, first, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of ``D`` channels from ``first`` on, of tokens of a map with ``WIDTH`` channels; and which of them exist."""
    channel = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if BLOCK_D != D:
        mask = mask & (channel < D)[None, :]
    return tensor + place[:, None] * WIDTH + (first + channel)[None, :], mask


@triton.jit
def _load(tensor, place, exists, first, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _pointers(tensor, place, exists, first, WIDTH, D, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(tensor, values, place, exists, first, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _pointers(tensor, place, exists, first, WIDTH, D, BLOCK_D)
    tl.store(pointers, values.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _load_bias(bias, head, query, key, N: tl.constexpr):
    """The bias in base 2, -inf for keys beyond the window. ``query`` and ``key`` say the tile's layout."""
    inside = (query < N) & (key < N)
    values = tl.load(bias + head * N * N + query * N + key, mask=inside, other=0.0).to(tl.float32)
    return tl.where(key < N, values * LOG2_E, -float("inf"))


@triton.jit
def _inverse_norm(x, EPS: tl.constexpr):
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS)


@triton.jit
def _logits(
    left,
    right,
    added,
    factor,
    left_region,
    right_region,
    key_exists,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Of queries and keys, one of them ``left``, in base 2. ``key_exists`` has the tile's layout."""
    logits = _product(left, tl.trans(right), PRECISION, UPCAST) * (factor * LOG2_E)
    if COSINE:
        logits = logits * _inverse_norm(left, EPS)[:, None] * _inverse_norm(right, EPS)[None, :]
    logits += added
    if SHIFTED:
        logits += tl.where(left_region[:, None] != right_region[None, :], BETWEEN_REGIONS, 0.0)
    if PADDED:
        logits = tl.where(key_exists, logits, -float("inf"))
    return logits


@triton.jit
def _factor(logit_scale, head, scale, COSINE: tl.constexpr):
    """What products of q and k are multiplied by, in base e."""
    return tl.load(logit_scale + head).to(tl.float32) * scale if COSINE else scale


@triton.jit
def _unit(x, COSINE: tl.constexpr, EPS: tl.constexpr):
    """What was multiplied: x, or for cosine attention x of unit length, rounded as x is."""
    return (x * _inverse_norm(x, EPS)[:, None]).to(x.dtype) if COSINE else x


@triton.jit
def _through_norm(grad, x, COSINE: tl.constexpr, EPS: tl.constexpr):
    """The gradient of x from that of `_unit` x, and the rows' products of unit x and its gradient."""
    if COSINE:
        inverse = _inverse_norm(x, EPS)
        unit = x * inverse[:, None]
        along = tl.sum(grad * unit, 1)
        return (grad - unit * along[:, None]) * inverse[:, None], along
    return grad, tl.zeros([x.shape[0]], tl.float32)


@triton.jit(do_not_specialize=SIZES)
def forward_whole(
    qkv,
    bias,
    logit_scale,
    out,
    lse,
    windows,
    programs,
    H,
    W,
    scale,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse of every ``programs``-th window, for one head; a window is one tile."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C: tl.constexpr = NUM_HEADS * D
    head = tl.program_id(0) % NUM_HEADS
    token = tl.arange(0, BLOCK_M)
    added = _load_bias(bias, head, token[:, None], token[None, :], N)
    factor = _factor(logit_scale, head, scale, COSINE)
    for window in range(tl.program_id(0) // NUM_HEADS, windows, programs):
        place, exists, region = _locate(window, token, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        q = _load(qkv, place, exists, head * D, 3 * C, D, BLOCK_D)
        k = _load(qkv, place, exists, head * D + C, 3 * C, D, BLOCK_D)
        v = _load(qkv, place, exists, head * D + 2 * C, 3 * C, D, BLOCK_D)
        logits = _logits(
            q, k, added, factor, region, region, exists[None, :], SHIFTED, PADDED, COSINE, EPS, PRECISION, UPCAST
        )
        highest = tl.max(logits, 1)
        weights = tl.exp2(logits - highest[:, None])
        total = tl.sum(weights, 1)
        mixed = _product(weights.to(v.dtype), v, PRECISION, UPCAST) / total[:, None]
        _store(out, mixed, place, exists, head * D, C, D, BLOCK_D)
        row = (window * NUM_HEADS + head).to(tl.int64) * N + token
        tl.store(lse + row, highest + tl.log2(total), mask=token < N)


@triton.jit(do_not_specialize=SIZES)
def backward_whole(
    qkv,
    bias,
    logit_scale,
    lse,
    grad,
    grad_qkv,
    grad_bias,
    grad_scale,
    windows,
    programs,
    H,
    W,
    scale,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of every ``programs``-th window, for one head; those of bias and scale summed over the windows.

    grad_bias is (programs, nH, N, N), grad_scale (programs, nH): a sum over the programs is left to the caller.
    Rows are keys.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C: tl.constexpr = NUM_HEADS * D
    head = tl.program_id(0) % NUM_HEADS
    token = tl.arange(0, BLOCK_M)
    added = _load_bias(bias, head, token[None, :], token[:, None], N)
    factor = _factor(logit_scale, head, scale, COSINE)
    bias_sum = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    scale_sum = tl.zeros([BLOCK_M], tl.float32)
    for window in range(tl.program_id(0) // NUM_HEADS, windows, programs):
        place, exists, region = _locate(window, token, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        q = _load(qkv, place, exists, head * D, 3 * C, D, BLOCK_D)
        k = _load(qkv, place, exists, head * D + C, 3 * C, D, BLOCK_D)
        v = _load(qkv, place, exists, head * D + 2 * C, 3 * C, D, BLOCK_D)
        g = _load(grad, place, exists, head * D, C, D, BLOCK_D)
        row = (window * NUM_HEADS + head).to(tl.int64) * N + token
        total = tl.load(lse + row, mask=exists, other=float("inf"))  # no weights for queries that do not exist
        logits = _logits(
            k, q, added, factor, region, region, exists[:, None], SHIFTED, PADDED, COSINE, EPS, PRECISION, UPCAST
        )
        weights = tl.exp2(logits - total[None, :])
        grad_v = _product(weights.to(g.dtype), g, PRECISION, UPCAST)
        _store(grad_qkv, grad_v, place, exists, head * D + 2 * C, 3 * C, D, BLOCK_D)
        grad_weights = _product(v, tl.trans(g), PRECISION, UPCAST)
        delta = tl.sum(weights * grad_weights, 0)
        grad_logits = weights * (grad_weights - delta[None, :])
        bias_sum += grad_logits
        grad_logits = grad_logits.to(q.dtype)
        grad_k = _product(grad_logits, _unit(q, COSINE, EPS), PRECISION, UPCAST)
        grad_k, _ = _through_norm(grad_k, k, COSINE, EPS)
        _store(grad_qkv, grad_k * factor, place, exists, head * D + C, 3 * C, D, BLOCK_D)
        grad_q = _product(tl.trans(grad_logits), _unit(k, COSINE, EPS), PRECISION, UPCAST)
        grad_q, along = _through_norm(grad_q, q, COSINE, EPS)
        scale_sum += along
        _store(grad_qkv, grad_q * factor, place, exists, head * D, 3 * C, D, BLOCK_D)
    row = tl.program_id(0) * N * N + token[None, :] * N + token[:, None]
    tl.store(grad_bias + row, bias_sum, mask=(token < N)[None, :] & (token < N)[:, None])
    if COSINE:
        tl.store(grad_scale + tl.program_id(0), tl.sum(scale_sum, 0) * scale)


@triton.jit(do_not_specialize=SIZES)
def forward_tiled(
    qkv,
    bias,
    logit_scale,
    out,
    lse,
    H,
    W,
    scale,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse of BLOCK_M queries of one window and head, by the online softmax of flash attention."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C: tl.constexpr = NUM_HEADS * D
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % NUM_HEADS
    window = tl.program_id(0) // (NUM_HEADS * TILES)
    query = tl.program_id(0) // NUM_HEADS % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = _factor(logit_scale, head, scale, COSINE)
    place, exists, region = _locate(window, query, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
    q = _load(qkv, place, exists, head * D, 3 * C, D, BLOCK_D)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        at, there, key_region = _locate(window, key, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        k = _load(qkv, at, there, head * D + C, 3 * C, D, BLOCK_D)
        v = _load(qkv, at, there, head * D + 2 * C, 3 * C, D, BLOCK_D)
        added = _load_bias(bias, head, query[:, None], key[None, :], N)
        logits = _logits(
            q, k, added, factor, region, key_region, there[None, :], SHIFTED, PADDED, COSINE, EPS, PRECISION, UPCAST
        )
        new = tl.maximum(highest, tl.max(logits, 1))
        if PADDED:  # so far there may have been padding alone
            new = tl.where(new == -float("inf"), 0.0, new)
        fade = tl.exp2(highest - new)
        weights = tl.exp2(logits - new[:, None])
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + _product(weights.to(v.dtype), v, PRECISION, UPCAST)
        highest = new
    _store(out, mixed / total[:, None], place, exists, head * D, C, D, BLOCK_D)
    row = (window * NUM_HEADS + head).to(tl.int64) * N + query
    tl.store(lse + row, highest + tl.log2(total), mask=query < N)


@triton.jit(do_not_specialize=SIZES)
def backward_queries(
    qkv,
    bias,
    logit_scale,
    out,
    lse,
    grad,
    delta,
    grad_qkv,
    grad_scale,
    H,
    W,
    scale,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of BLOCK_M queries of one window and head; theirs of the scale, (programs, nH); delta, as ``lse``.

    delta is each query's sum of weights times their gradients, which is that of its output times the output's. The
    output is rounded; as gradients of logits add up to 0, what their sum here is instead makes delta exact again.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C: tl.constexpr = NUM_HEADS * D
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % NUM_HEADS
    window = tl.program_id(0) // (NUM_HEADS * TILES)
    query = tl.program_id(0) // NUM_HEADS % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = _factor(logit_scale, head, scale, COSINE)
    place, exists, region = _locate(window, query, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
    q = _load(qkv, place, exists, head * D, 3 * C, D, BLOCK_D)
    g = _load(grad, place, exists, head * D, C, D, BLOCK_D)
    o = _load(out, place, exists, head * D, C, D, BLOCK_D)
    along = tl.sum(o.to(tl.float32) * g, 1)
    rest = tl.zeros([BLOCK_M], tl.float32)
    row = (window * NUM_HEADS + head).to(tl.int64) * N + query
    total = tl.load(lse + row, mask=exists, other=float("inf"))
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        at, there, key_region = _locate(window, key, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        k = _load(qkv, at, there, head * D + C, 3 * C, D, BLOCK_D)
        v = _load(qkv, at, there, head * D + 2 * C, 3 * C, D, BLOCK_D)
        added = _load_bias(bias, head, query[:, None], key[None, :], N)
        logits = _logits(
            q, k, added, factor, region, key_region, there[None, :], SHIFTED, PADDED, COSINE, EPS, PRECISION, UPCAST
        )
        weights = tl.exp2(logits - total[:, None])
        grad_logits = weights * (_product(g, tl.trans(v), PRECISION, UPCAST) - along[:, None])
        rest += tl.sum(grad_logits, 1)
        grad_q += _product(grad_logits.to(k.dtype), _unit(k, COSINE, EPS), PRECISION, UPCAST)
    tl.store(delta + row, along + rest, mask=query < N)
    grad_q, cosines = _through_norm(grad_q, q, COSINE, EPS)
    _store(grad_qkv, grad_q * factor, place, exists, head * D, 3 * C, D, BLOCK_D)
    if COSINE:
        tl.store(grad_scale + tl.program_id(0), tl.sum(cosines, 0) * scale)


@triton.jit(do_not_specialize=SIZES)
def backward_keys(
    qkv,
    bias,
    logit_scale,
    lse,
    grad,
    delta,
    grad_qkv,
    H,
    W,
    scale,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of BLOCK_M keys and their values, of one window and head. Rows are keys."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C: tl.constexpr = NUM_HEADS * D
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % NUM_HEADS
    window = tl.program_id(0) // (NUM_HEADS * TILES)
    key = tl.program_id(0) // NUM_HEADS % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = _factor(logit_scale, head, scale, COSINE)
    place, exists, region = _locate(window, key, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
    k = _load(qkv, place, exists, head * D + C, 3 * C, D, BLOCK_D)
    v = _load(qkv, place, exists, head * D + 2 * C, 3 * C, D, BLOCK_D)
    grad_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        query = first + tl.arange(0, BLOCK_N)
        at, there, query_region = _locate(window, query, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        q = _load(qkv, at, there, head * D, 3 * C, D, BLOCK_D)
        g = _load(grad, at, there, head * D, C, D, BLOCK_D)
        row = (window * NUM_HEADS + head).to(tl.int64) * N + query
        total = tl.load(lse + row, mask=there, other=float("inf"))
        along = tl.load(delta + row, mask=there, other=0.0)
        added = _load_bias(bias, head, query[None, :], key[:, None], N)
        logits = _logits(
            k, q, added, factor, region, query_region, exists[:, None], SHIFTED, PADDED, COSINE, EPS, PRECISION, UPCAST
        )
        weights = tl.exp2(logits - total[None, :])
        grad_v += _product(weights.to(g.dtype), g, PRECISION, UPCAST)
        grad_logits = weights * (_product(v, tl.trans(g), PRECISION, UPCAST) - along[None, :])
        grad_k += _product(grad_logits.to(q.dtype), _unit(q, COSINE, EPS), PRECISION, UPCAST)
    grad_k, _ = _through_norm(grad_k, k, COSINE, EPS)
    _store(grad_qkv, grad_k * factor, place, exists, head * D + C, 3 * C, D, BLOCK_D)
    _store(grad_qkv, grad_v, place, exists, head * D + 2 * C, 3 * C, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_bias(
    qkv,
    bias,
    logit_scale,
    lse,
    grad,
    delta,
    grad_bias,
    windows,
    programs,
    H,
    W,
    scale,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    COSINE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of the bias's gradient, summed over every ``programs``-th window: grad_bias is (programs, nH, N, N).

    The weights are computed once more: cheaper than to read and write N * N sums for every window.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    C: tl.constexpr = NUM_HEADS * D
    ROWS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // NUM_HEADS % (ROWS * COLUMNS)
    program = tl.program_id(0) // (NUM_HEADS * ROWS * COLUMNS)
    head = tl.program_id(0) % NUM_HEADS
    query = tile // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    added = _load_bias(bias, head, query[:, None], key[None, :], N)
    factor = _factor(logit_scale, head, scale, COSINE)
    bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in range(program, windows, programs):
        place, exists, region = _locate(window, query, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        at, there, key_region = _locate(window, key, H, W, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        q = _load(qkv, place, exists, head * D, 3 * C, D, BLOCK_D)
        g = _load(grad, place, exists, head * D, C, D, BLOCK_D)
        k = _load(qkv, at, there, head * D + C, 3 * C, D, BLOCK_D)
        v = _load(qkv, at, there, head * D + 2 * C, 3 * C, D, BLOCK_D)
        row = (window * NUM_HEADS + head).to(tl.int64) * N + query
        total = tl.load(lse + row, mask=exists, other=float("inf"))
        along = tl.load(delta + row, mask=exists, other=0.0)
        logits = _logits(
            q, k, added, factor, region, key_region, there[None, :], SHIFTED, PADDED, COSINE, EPS, PRECISION, UPCAST
        )
        weights = tl.exp2(logits - total[:, None])
        bias_sum += weights * (_product(g, tl.trans(v), PRECISION, UPCAST) - along[:, None])
    row = (program * NUM_HEADS + head).to(tl.int64) * N * N + query[:, None] * N + key[None, :]
    tl.store(grad_bias + row, bias_sum, mask=(query < N)[:, None] & (key < N)[None, :])
