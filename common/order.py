"""The order in which an epoch visits the images: shuffled, yet close to sequential for the disk and the codecs.

Random rows out of compressed chunks would decompress a chunk a row. So an epoch permutes blocks (= chunks of the target
store) and shuffles only inside windows of several blocks; the loader and the store read the same order.
"""

import numpy as np


def block_shuffled_order(
    num_images: int, block: int, window_blocks: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Image ids (S,) int64 in the order in which ``rank`` visits them in ``epoch``; S = ceil(num_images / world_size).

    The blocks of ``block`` consecutive ids are permuted; each rank takes a contiguous run of the permuted blocks, so
    that it decodes only its own chunks, and shuffles it inside windows of equal size, at most ``window_blocks`` blocks'
    worth of rows: where the images are sorted by class, a small window at the end would be steps of few classes. A window
    touches at most ``window_blocks + 3`` blocks: cut ends, the short last block, the wrap-around. Every image is
    visited once an epoch over all ranks; to give each rank the same number of steps, the fewer than ``world_size``
    images missing at the end are taken again from the epoch's beginning.

    A pure function of its arguments, resumed in mid-epoch by slicing. Only Philox's raw stream and a stable sort are
    used, which numpy keeps the same from version to version (NEP 19), unlike ``Generator.permutation``.
    """
    assert min(num_images, block, window_blocks) > 0, (num_images, block, window_blocks)
    assert 0 <= rank < world_size, (rank, world_size)
    num_blocks = -(-num_images // block)
    permuted = np.argsort(_random_keys(num_blocks, seed, epoch, stream=0), kind="stable")
    ids = (permuted[:, None] * block + np.arange(block)).ravel()
    ids = ids[ids < num_images]  # the last block may be short

    steps = -(-num_images // world_size)
    own = np.take(ids, np.arange(rank * steps, (rank + 1) * steps), mode="wrap")
    windows = -(-steps // (window_blocks * block))
    window = np.arange(steps) * windows // steps
    return own[np.lexsort((_random_keys(steps, seed, epoch, stream=1 + rank), window))].astype(np.int64)


def shuffled(count: int, seed: int = 0) -> np.ndarray:
    """(count,) int64, a permutation that is the same everywhere, for the same reasons."""
    return np.argsort(_random_keys(count, seed, epoch=0, stream=0), kind="stable").astype(np.int64)


def _random_keys(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """(count,) uint64, independent for each (seed, epoch, stream)."""
    # The stream is the counter's highest word: 2**192 blocks apart, streams never overlap.
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return philox.random_raw(count)
