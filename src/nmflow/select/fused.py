"""Fused projections of attention: which of their rows are queries, keys and values."""

from __future__ import annotations

# The rows of q, k and v are interleaved head by head. The name says so (GPT-NeoX, Bloom, Falcon,
# Persimmon), or the class of the owner, if the name alone misleads.
_INTERLEAVED = {"query_key_value"}
_LATENT = {"kv_a_proj_with_mqa", "kv_b_proj"}  # DeepSeek's: a latent; keys and values by head
_INTERLEAVED_OWNERS = ("CodeGen", "GPTBigCode", "MiniMax")


def cut(
    path: str,
    role: str,
    out: int,
    length: int,
    owner: str = "",
    heads: tuple[int, int, int] = (0, 0, 0),
) -> list[tuple[str, int, int]]:
    """Cut a weight's output rows into parts `(role, start, stop)`.

    Fused projections are cut into q, k and v where their rows lie one after the other: thirds
    (`out == 3 * in`, or `out == 2 * in` for key and value), or by the number of heads where the
    owner has it. Interleaved projections stay whole.

    Args:
        path: as in `role_of`.
        role: the role from `role_of`.
        out: number of output rows.
        length: number of inputs.
        owner: class name of the module that owns the projection, for families that interleave.
        heads: the owner's query heads, key heads and size of a head; 0 if unknown.
    """
    last = path.split(".")[-1]
    mixed = last in _INTERLEAVED or owner.startswith(_INTERLEAVED_OWNERS)
    if role in ("qkv", "kv") and not mixed:
        queries, keys, size = heads
        if role == "qkv" and keys and out == (queries + 2 * keys) * size:
            q, k = queries * size, keys * size
            return [("q", 0, q), ("k", q, q + k), ("v", q + k, out)]
        if role == "qkv" and out == 3 * length:
            return [(part, i * length, (i + 1) * length) for i, part in enumerate("qkv")]
        if role == "kv" and last not in _LATENT and keys and out == 2 * keys * size:
            return [("k", 0, out // 2), ("v", out // 2, out)]
        # GPT-2's cross attention calls its fused key and value c_attn too.
        if out == 2 * length and (last == "c_attn" or (role == "kv" and last not in _LATENT)):
            return [(part, i * length, (i + 1) * length) for i, part in enumerate("kv")]
    return [(role, 0, out)]
