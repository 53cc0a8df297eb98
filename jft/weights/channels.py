"""The first convolution on images of another number of channels."""

import numpy as np


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel for images of another number of channels.

    A grey image, repeated over however many channels, gives the response that it gave before: more
    channels take the source's in turn, each divided by how often it was taken; fewer take the sums
    of those that fall together, so that a single channel takes the sum of all. (timm's rule scales
    all copies by old / new instead, which keeps that response only for multiples.)

    Args:
      kernel: [h, w, C, features], floating.
      channels: wanted.

    Returns:
      [h, w, channels, features], float32; computed in float64.
    """
    have = kernel.shape[2]
    matrix = np.zeros((channels, have))
    for index in range(max(channels, have)):
        matrix[index % channels, index % have] = 1
    matrix /= matrix.sum(axis=0)  # of the copies of one channel, each has its share
    moved = np.einsum("nc,hwco->hwno", matrix, kernel.astype(np.float64))
    return moved.astype(np.float32)


def adaptation_note(have: int, channels: int) -> str:
    """What `adapt_channels` did, in a few words."""
    how = "tiled" if channels > have else "summed"
    return f"{have} -> {channels} input channels, {how}"
