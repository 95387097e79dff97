"""Text as bytes, and bytes as tokens that fit into a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PAD, UNKNOWN, END = 0, 1, 2
# UTF-8 never uses the bytes above 0xF4, so the three special tokens cost nothing.
FIRST_BYTE = 3
N_BYTE_TOKENS = 256


def byte_tokens(text: bytes) -> Tensor:
    """Tokens (len(text),), uint8: every byte plus `FIRST_BYTE`, or `UNKNOWN` above 252.

    Example:
        >>> byte_tokens(b"ab").tolist(), byte_tokens(bytes([255])).tolist()
        ([100, 101], [1])
    """
    values = np.frombuffer(text, dtype=np.uint8).astype(np.int16) + FIRST_BYTE
    values[values >= N_BYTE_TOKENS] = UNKNOWN
    return torch.from_numpy(values.astype(np.uint8))


def padded_bytes(text: bytes, length: int) -> Tensor:
    """Tokens (length,), uint8: the text's beginning, the end mark, padding.

    Args:
        text: Longer ones are cut off, so that the end mark still fits in.
        length: Of the result, at least 1.

    Example:
        >>> padded_bytes(b"ab", 5).tolist()
        [100, 101, 2, 0, 0]
    """
    kept = byte_tokens(text[: length - 1])
    tokens = torch.full((length,), PAD, dtype=torch.uint8)
    tokens[: len(kept)] = kept
    tokens[len(kept)] = END
    return tokens
