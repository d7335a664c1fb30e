"""Attention over a sequence that is spread over ranks: Ulysses, ring, and their product.

Ulysses (https://arxiv.org/abs/2309.14509) trades tokens for heads by an all-to-all, so that each rank attends over
the whole sequence with some of the heads. Ring attention (https://arxiv.org/abs/2310.01889) keeps the queries and
passes keys and values around, and merges the partial results by their log-sum-exp. Together (USP,
https://arxiv.org/abs/2405.07719) the all-to-all comes first, inside each block of the ring.

Shapes: B batch, S tokens of the whole joint sequence, s tokens of one rank, T tokens of one ring block, H heads,
h heads of one rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .mesh import Axis

LocalAttention = Callable[..., torch.Tensor]
"""(query, key, value, scale=) -> out, all [B, T, h, D]: any kernel will do where no log-sum-exp is needed."""


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """PyTorch's own attention. [B, T, h, D]"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    sizes: Sequence[int],
    ulysses: Axis,
    ring: Axis,
    local: LocalAttention = sdpa,
) -> torch.Tensor:
    """[B, s, H, D] -> [B, s, H, D], as if every rank's tokens were attended over together.

    `sizes` are the tokens of all ranks, ring-major. `mask` [B, s] says which of this rank's keys count. `local` is
    used where this rank sees all keys at once and none is masked.
    """
    blocks = [list(sizes[i * ulysses.size : (i + 1) * ulysses.size]) for i in range(ring.size)]
    mine = blocks[ring.rank]
    heads = query.shape[2]
    if mask is not None:
        mask = ulysses.all_gather(mask.to(torch.uint8), 1, mine).bool()
    q, k, v = (_tokens_for_heads(x, mine, ulysses) for x in (query, key, value))
    if ring.size > 1:
        out = _ring(q, k, v, mask, scale, [sum(block) for block in blocks], ring)
    else:
        out = local(q, k, v, scale=scale) if mask is None else _attend_block(q, k, v, mask, scale)[0]
    return _heads_for_tokens(out, mine, heads, ulysses)


def _tokens_for_heads(x: torch.Tensor, sizes: Sequence[int], axis: Axis) -> torch.Tensor:
    """[B, s, H, D] -> [B, T, h, D]. Heads that the ranks do not divide are filled up with zeros."""
    if axis.size == 1:
        return x
    B, s, H, D = x.shape
    h = -(-H // axis.size)
    x = F.pad(x, (0, 0, 0, h * axis.size - H)).reshape(B, s, axis.size, h, D)
    rows = x.permute(2, 1, 0, 3, 4).reshape(axis.size * s, B, h, D)
    return axis.all_to_all(rows, [s] * axis.size, sizes).transpose(0, 1)


def _heads_for_tokens(x: torch.Tensor, sizes: Sequence[int], heads: int, axis: Axis) -> torch.Tensor:
    """[B, T, h, D] -> [B, s, H, D]: the way back; the filled-up heads are dropped."""
    if axis.size == 1:
        return x
    B, _, h, D = x.shape
    s = sizes[axis.rank]
    rows = axis.all_to_all(x.transpose(0, 1), sizes, [s] * axis.size)
    x = rows.reshape(axis.size, s, B, h, D).permute(2, 1, 0, 3, 4)
    return x.reshape(B, s, axis.size * h, D)[:, :, :heads]


def _ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    lengths: Sequence[int],
    axis: Axis,
) -> torch.Tensor:
    """[B, T, h, D]. While one block is attended over, the next one is already on its way; its mask goes with it."""
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=torch.float32)
    block = _pack(k, v, mask)
    for hop in range(axis.size):
        work, following = _pass_on(block, lengths, hop, axis)
        part, part_lse = _attend_block(q, block[0][0], block[0][1], block[1].bool() if len(block) > 1 else None, scale)
        out, lse = _merge(out, lse, part, part_lse)
        for transfer in work:
            transfer.wait()
        block = following
    return out.to(q.dtype)


def _pack(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """What travels: keys and values in one tensor [2, B, T, h, D], and the mask [B, T] as bytes."""
    return [torch.stack([k, v]), *([] if mask is None else [mask.to(torch.uint8).contiguous()])]


def _pass_on(
    block: list[torch.Tensor], lengths: Sequence[int], hop: int, axis: Axis
) -> tuple[list[torch.distributed.Work], list[torch.Tensor]]:
    """Start sending the block in hand to the next rank and receiving the one before it; nothing on the last hop."""
    if hop == axis.size - 1:
        return [], []
    length = lengths[(axis.rank - hop - 1) % axis.size]
    key_values = block[0].new_empty((*block[0].shape[:2], length, *block[0].shape[3:]))
    masks = [mask.new_empty((mask.shape[0], length)) for mask in block[1:]]
    following = [key_values, *masks]
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return axis.start_exchange([(x, to) for x in block], [(x, source) for x in following]), following


def _merge(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two partial softmax results. A block with no key that counts has lse -inf and weighs nothing."""
    merged = torch.logaddexp(lse, part_lse)
    weight, part_weight = (torch.exp(x - merged).nan_to_num(0.0) for x in (lse, part_lse))
    return out * weight + part.float() * part_weight, merged


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its log-sum-exp: [B, T, h, D] and [B, T, h, 1] in fp32. `mask` [B, keys] says which keys count.

    A row with no key at all gives 0 and -inf; the kernels disagree there, and some give a finite log-sum-exp.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _kernel(q, k, v, mask, scale)
    out, lse = out.transpose(1, 2), lse.transpose(1, 2).unsqueeze(-1)
    if mask is not None:
        empty = ~mask.any(1)[:, None, None, None]
        out, lse = out.masked_fill(empty, 0.0), lse.masked_fill(empty, float("-inf"))
    return out, lse.float()


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, h, T, D] -> the same and [B, h, T], by the kernel of the device that returns a log-sum-exp."""
    if q.shape[2] == 0 or k.shape[2] == 0:  # the kernels divide by both: the process would die
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    bias = None
    if mask is not None:
        row = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
        bias = _aligned(row)[:, None, None, :].expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        return out, lse
    if bias is None and q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
        return out, lse
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scale)
    return out, lse[:, :, : q.shape[2]]  # this kernel pads the rows of its log-sum-exp


def _aligned(row: torch.Tensor) -> torch.Tensor:
    """CUDA's memory-efficient kernel wants the rows of its bias to start at multiples of 16 elements. [B, keys]"""
    keys = row.shape[-1]
    return F.pad(row, (0, -keys % 16))[..., :keys]
