"""Latents as tokens of 2 x 2 of them, as some transformers see a picture."""

from torch import Tensor


def packed(latents: Tensor) -> Tensor:
    """Latents (batch, channels, height, width) as the transformer's tokens of 2 x 2 of them."""
    squares = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (batch, channels, rows, 2, columns, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `packed`, for a picture of so many rows and columns of tokens."""
    squares = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
