"""lora_matmul on TMA descriptors, persistent: two designs of one kernel, for 16-bit operands on sm_90 and newer.

    serial        z comes from the middle kernel; each CTA walks the tiles with a fixed stride:
                      acc_mn = Σ_k x_mk · w_nkᵀ + z_mr · b_nrᵀ          one more trip of the same accumulator
                      y_mn   = acc_mn + bias_n
    one_launch    z is made inside. Tiles come from an atomic counter, column 0 of every row block first:
                      column 0:  acc_mr = Σ_k D(x_mk) · a_rkᵀ beside acc_mn
                                 z_mr = scale · acc_mr;  release flag[m]
                      others:    acc_mn = Σ_k x_mk · w_nkᵀ
                                 acquire flag[m]
                      all:       acc_mn += z_mr · b_nrᵀ;  y_mn = acc_mn + bias_n

Operands: x [M, K], w [N, K] or its transposed view, y [M, N] through TMA (rows a multiple of 16 bytes); a [R, K], b
[N, R] in the dtype of x or fp32, any strides, and z [M, R] through masked pointer loads (any rank). With the mask on
the product, the masked product starts the accumulator (serial) or is added to it in column quarters (one_launch).
Bytes: the frozen GEMM's, plus one read of x (serial) or none (one_launch). Used where ``refuses`` finds no reason
against it. Which of the two is kept is open until both have been measured: benchmarks/HARDWARE.md.

No deadlock in one_launch: a CTA waits only in a tile numbered after all producers, so every producer is then already
held by a running CTA, and a producer waits for nobody.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .indexing import load_tile, low_rank_product, tile_position
from .launch import Launch
from .philox import NO_MASK, Mask, keep_mask
from .tiles import GROUP_M, SCALAR_LOADS, TMA_CAPABILITIES, Tile, matmul_tile, padded_rank, rank_trip, tma_rows


@triton.jit
def _load_x_w(x_desc, w_desc, first_m, first_n, first_k, W_K_BY_N: tl.constexpr):
    """x_mk and w_kn of one trip; TMA fills with zeros past the edges."""
    x_mk = x_desc.load([first_m, first_k])
    w_kn = w_desc.load([first_k, first_n]) if W_K_BY_N else w_desc.load([first_n, first_k]).T
    return x_mk, w_kn


@triton.jit
def _split_columns(acc_mn):
    """The left and the right half of the columns."""
    halves: tl.constexpr = (acc_mn.shape[0], 2, acc_mn.shape[1] // 2)
    return tl.split(tl.permute(tl.reshape(acc_mn, halves), (0, 2, 1)))


@triton.jit
def _store_y(y_desc, bias_ptr, acc_mn, first_m, first_n, N):
    """y_mn = acc_mn + bias_n, in halves: y then takes half the shared memory on its way out."""
    left, right = _split_columns(acc_mn)
    _store_slice(y_desc, bias_ptr, left, first_m, first_n, N)
    _store_slice(y_desc, bias_ptr, right, first_m, first_n + left.shape[1], N)


@triton.jit
def _store_slice(y_desc, bias_ptr, acc_mn, first_m, first_n, N):
    if bias_ptr is not None:
        n = first_n + tl.arange(0, acc_mn.shape[1])
        acc_mn += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_desc.store([first_m, first_n], acc_mn.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M", "threshold"])
def _serial_kernel(
    x_desc,
    w_desc,
    y_desc,
    z_ptr,
    b_ptr,
    bias_ptr,
    seed_ptr,
    threshold,
    rescale,
    M,
    N,
    K,
    R,
    stride_bn,
    stride_br,
    MASK_PRODUCT: tl.constexpr,
    W_K_BY_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        block_m, block_n = tile_position(tile, blocks_m, blocks_n, GROUP_M)
        first_m = block_m * BLOCK_M
        first_n = block_n * BLOCK_N
        acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if MASK_PRODUCT:
            acc_mn = low_rank_product(
                acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_bn, stride_br, BLOCK_R, None
            )
            keep_mn = keep_mask(seed_ptr, first_m, first_n, threshold, BLOCK_M, BLOCK_N)
            acc_mn = tl.where(keep_mn, acc_mn * rescale, 0.0)
        for first_k in range(0, K, BLOCK_K):
            x_mk, w_kn = _load_x_w(x_desc, w_desc, first_m, first_n, first_k, W_K_BY_N)
            acc_mn = tl.dot(x_mk, w_kn, acc_mn)
        if not MASK_PRODUCT:
            acc_mn = low_rank_product(
                acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_bn, stride_br, BLOCK_R, None
            )
        _store_y(y_desc, bias_ptr, acc_mn, first_m, first_n, N)


@triton.jit
def _store_masked_sum(
    y_desc, bias_ptr, acc_mn, z_ptr, b_ptr, seed_ptr, threshold, rescale, first_m, first_n, M, N, R,
    stride_bn, stride_br, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y_mn = acc_mn + D'(z_mr · b_nrᵀ), a quarter of the columns at a time: the product is a second accumulator."""
    left, right = _split_columns(acc_mn)
    quarter_0, quarter_1 = _split_columns(left)
    quarter_2, quarter_3 = _split_columns(right)
    quarters = (quarter_0, quarter_1, quarter_2, quarter_3)
    for i in tl.static_range(4):
        quarter_mn = quarters[i]
        quarter_n = first_n + i * quarter_mn.shape[1]
        product_mn = tl.zeros(quarter_mn.shape, dtype=tl.float32)
        product_mn = low_rank_product(
            product_mn, z_ptr, b_ptr, first_m, quarter_n, M, N, R, stride_bn, stride_br, BLOCK_R, None
        )
        keep_mn = keep_mask(seed_ptr, first_m, quarter_n, threshold, quarter_mn.shape[0], quarter_mn.shape[1])
        quarter_mn += tl.where(keep_mn, product_mn * rescale, 0.0)
        _store_slice(y_desc, bias_ptr, quarter_mn, first_m, quarter_n, N)


@triton.jit(do_not_specialize=["M", "threshold"])
def _one_launch_kernel(
    x_desc,
    w_desc,
    y_desc,
    a_ptr,
    b_ptr,
    z_ptr,
    bias_ptr,
    counter_ptr,
    flag_ptr,
    seed_ptr,
    threshold,
    rescale,
    scale,
    M,
    N,
    K,
    R,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    MASK_INPUT: tl.constexpr,
    MASK_PRODUCT: tl.constexpr,
    W_K_BY_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    tile = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while tile < blocks_m * blocks_n:
        acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if tile < blocks_m:
            block_m = tile
            first_m = block_m * BLOCK_M
            first_n = 0
            r = tl.arange(0, PADDED_R)
            k = tl.arange(0, BLOCK_K)
            m = first_m + tl.arange(0, BLOCK_M)
            if MASK_INPUT:
                acc_rm = tl.zeros((PADDED_R, BLOCK_M), dtype=tl.float32)
            else:
                acc_mr = tl.zeros((BLOCK_M, PADDED_R), dtype=tl.float32)
            for first_k in range(0, K, BLOCK_K):
                x_mk, w_kn = _load_x_w(x_desc, w_desc, first_m, first_n, first_k, W_K_BY_N)
                acc_mn = tl.dot(x_mk, w_kn, acc_mn)
                if MASK_INPUT:
                    # The masked x as operand B, which wgmma takes from shared memory: never from registers.
                    a_rk = load_tile(a_ptr, r, first_k + k, R, K, stride_ar, stride_ak)
                    keep_mk = keep_mask(seed_ptr, first_m, first_k, threshold, BLOCK_M, BLOCK_K)
                    kept_km = tl.where(keep_mk, x_mk, 0.0).T
                    acc_rm = tl.dot(a_rk.to(x_mk.dtype), kept_km, acc_rm)
                else:
                    a_kr = load_tile(a_ptr, first_k + k, r, K, R, stride_ak, stride_ar)
                    acc_mr = tl.dot(x_mk, a_kr.to(x_mk.dtype), acc_mr)
            if MASK_INPUT:
                acc_mr = acc_rm.T
            z_ptrs = z_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
            z_mr = (acc_mr * scale).to(z_ptr.dtype.element_ty)
            tl.store(z_ptrs, z_mr, mask=(m < M)[:, None] & (r < R)[None, :])
            # All threads' stores come before the one thread's release.
            tl.debug_barrier()
            tl.atomic_xchg(flag_ptr + block_m, 1, sem="release")
        else:
            block_m, block_n = tile_position(tile - blocks_m, blocks_m, blocks_n - 1, GROUP_M)
            first_m = block_m * BLOCK_M
            first_n = (block_n + 1) * BLOCK_N
            for first_k in range(0, K, BLOCK_K):
                x_mk, w_kn = _load_x_w(x_desc, w_desc, first_m, first_n, first_k, W_K_BY_N)
                acc_mn = tl.dot(x_mk, w_kn, acc_mn)
            while tl.atomic_add(flag_ptr + block_m, 0, sem="acquire") == 0:
                pass
        if MASK_PRODUCT:
            _store_masked_sum(
                y_desc, bias_ptr, acc_mn, z_ptr, b_ptr, seed_ptr, threshold, rescale, first_m, first_n, M, N, R,
                stride_bn, stride_br, BLOCK_R,
            )  # fmt: skip
        else:
            acc_mn = low_rank_product(
                acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_bn, stride_br, BLOCK_R, None
            )
            _store_y(y_desc, bias_ptr, acc_mn, first_m, first_n, N)
        tile = tl.atomic_add(counter_ptr, 1, sem="relaxed")


def refuses(x: Tensor, w: Tensor, capability: int) -> str | None:
    """Why the TMA designs cannot run on these operands, or None."""
    if capability not in TMA_CAPABILITIES:
        return f"the TMA designs are for {', '.join(f'sm_{c}' for c in TMA_CAPABILITIES)}, this is sm_{capability}"
    if x.element_size() != 2:
        return f"TMA designs are for 16-bit operands, x is {x.dtype}"
    # w may also come as the transposed view of such a matrix: its columns are then the rows.
    for name, rows in (("x", x), ("w", w if w.stride(1) == 1 else w.T)):
        stride, step = rows.stride()
        if step != 1 or stride < rows.shape[1] or stride * 2 % 16 or rows.data_ptr() % 16:
            return f"{name} has strides {rows.stride()}: TMA needs rows that are contiguous and start on 16 bytes"
    if w.shape[0] * 2 % 16:
        return f"N = {w.shape[0]}: TMA needs rows of y to be a multiple of 16 bytes"
    return None


def refuses_one_launch(a: Tensor, capability: int, masked: bool) -> str | None:
    """Why, beyond :func:`refuses`, one_launch cannot make z from a, or None; ``masked`` says that the mask is on x."""
    padded_r = padded_rank(a.shape[0])
    if capability != 90:
        return f"one_launch is for sm_90: on sm_{capability} it spills"
    if padded_r > 128:
        return f"rank {a.shape[0]}: z would crowd y out of the registers; at most 128"
    if a.element_size() == 4 and (masked or padded_r > 16):
        return f"fp32 adapters of rank {a.shape[0]}: casting them in the loop spills registers"
    return None


def serial(
    x: Tensor, w: Tensor, z: Tensor, b: Tensor, *, bias: Tensor | None, dropout: Mask | None
) -> tuple[Tensor, Launch]:
    """y's memory and the launch that fills it from a finished z; ``dropout`` is on the product z bᵀ."""
    scalar_z = SCALAR_LOADS if dropout is not None and b.shape[1] % 16 else 0
    tile = matmul_tile(tma_rows(scalar_z), x.shape[0], w.shape[0])
    y, common = _common(tile, 2, x, w, b, bias)
    seed, threshold, rescale = dropout or NO_MASK
    arguments = dict(
        z_ptr=z,
        seed_ptr=seed,
        threshold=threshold,
        rescale=rescale,
        MASK_PRODUCT=dropout is not None,
        BLOCK_R=rank_trip(b.shape[1], b.element_size()),
    )
    tiles = triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(w.shape[0], tile.columns)
    return y, Launch(_serial_kernel, (min(tiles, _sms(x.device)),), common | arguments, tile.options)


def one_launch(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    on_x: Mask | None,
    on_low_rank: Mask | None,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """The memory of y and z and the one launch that fills both; the mask is on x or on the product z bᵀ."""
    r = b.shape[1]
    # Under a mask z's product must be a wgmma: beside an mma.sync, Triton refills x's shared memory while y's wgmma may
    # still read it (triton issue 6691); the compile gate looks for that.
    padded_r = padded_rank(r) if on_x is None else max(64, padded_rank(r))
    scalar_z = SCALAR_LOADS if (on_x or on_low_rank) and r % 16 else 0
    tile = matmul_tile(tma_rows(padded_r + scalar_z), x.shape[0], w.shape[0])
    y, common = _common(tile, 2 if on_low_rank is None else 4, x, w, b, bias)
    z = torch.empty(x.shape[0], r, dtype=x.dtype, device=x.device)
    blocks_m = triton.cdiv(x.shape[0], tile.rows)
    sync = torch.zeros(1 + blocks_m, dtype=torch.int32, device=x.device)
    seed, threshold, rescale = on_x or on_low_rank or NO_MASK
    arguments = dict(
        a_ptr=a,
        z_ptr=z,
        counter_ptr=sync,
        flag_ptr=sync[1:],
        seed_ptr=seed,
        threshold=threshold,
        rescale=rescale,
        scale=scale * (1.0 if on_x is None else rescale),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        MASK_INPUT=on_x is not None,
        MASK_PRODUCT=on_low_rank is not None,
        BLOCK_R=rank_trip(r, b.element_size()),
        PADDED_R=padded_r,
    )
    tiles = blocks_m * triton.cdiv(w.shape[0], tile.columns)
    launch = Launch(_one_launch_kernel, (min(tiles, _sms(x.device)),), common | arguments, tile.options)
    return y, z, [launch]


def _common(
    tile: Tile, slices: int, x: Tensor, w: Tensor, b: Tensor, bias: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """y's memory and the arguments of both designs; y leaves in ``slices`` of a tile's columns."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    w_k_by_n = w.stride(1) != 1
    common = dict(
        x_desc=TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        w_desc=TensorDescriptor.from_tensor(w.T, [tile.depth, tile.columns])
        if w_k_by_n
        else TensorDescriptor.from_tensor(w, [tile.columns, tile.depth]),
        y_desc=TensorDescriptor.from_tensor(y, [tile.rows, tile.columns // slices]),
        b_ptr=b,
        bias_ptr=bias,
        M=m,
        N=n,
        K=k,
        R=b.shape[1],
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        W_K_BY_N=w_k_by_n,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        GROUP_M=GROUP_M,
    )
    return y, common


def _sms(device: torch.device) -> int:
    """Streaming multiprocessors: the CTAs of a persistent grid. In the interpreter any number will do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
