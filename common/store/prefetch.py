"""Targets ahead of the training step: threads read, check and decompress the chunks that the order needs next, and each
batch's targets are gathered from them before the step asks, and for a GPU put there and decoded.

Chunks live in slots of one preallocated buffer, so memory is bounded by the window whatever the order. A slot is taken in
the order of first use and given back after the last batch that uses its chunk.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..cores import usable_memory
from ..errors import MisuseError
from ..run import concrete, use_device
from .reader import TargetStore

READY_BATCHES = 3
"""Batches kept gathered ahead of the consumer: one being copied to the device, one waiting, one being gathered."""


@dataclass(frozen=True)
class TargetBatch:
    """``targets`` as `TargetStore.decode` gives them, each (B, G, ...) on the device: row i is of image ``image_ids[i]``."""

    image_ids: np.ndarray
    targets: dict[str, Tensor]


def window_blocks(store: TargetStore, window_mib: float) -> int:
    """The widest shuffling window, in chunks, that a prefetcher of ``window_mib`` can serve while it reads the next one
    ahead (the ``window_blocks`` of `block_shuffled_order`). At least 1.
    """
    return max(1, (_slots(store, window_mib) - 3) // 2)


def _slots(store: TargetStore, window_mib: float) -> int:
    return int(window_mib * 2**20) // store.chunk_bytes


class TargetPrefetcher:
    """Hands out the targets of `batch_size` images at a time, in any order that is near-sequential within the window.

    - ``columns``: which cached views a batch needs, as positions (G,) along the store's views. None: all of them. May be set
      anew from one epoch to the next.
    - ``threads`` read chunks side by side; None: as many as are worth while where the store lies, many from a bucket.
    - ``window_mib``: the most memory that decompressed chunks take. Ignored with ``cache_in_memory``, which keeps every
      chunk from one epoch to the next; MisuseError when the machine's memory cannot hold the store.

    Use as a context manager, or `close`.
    """

    def __init__(
        self,
        store: TargetStore,
        batch_size: int,
        *,
        columns: np.ndarray | None = None,
        window_mib: float = 256,
        threads: int | None = None,
        device: torch.device | str = "cpu",
        cache_in_memory: bool = False,
    ) -> None:
        self.store, self.batch_size, self.threads = store, batch_size, threads or store.place.at_once
        self.columns = columns
        self.device, self.cache_in_memory = concrete(torch.device(device)), cache_in_memory
        slots = min(_slots(store, window_mib), store.manifest.num_chunks)
        if cache_in_memory:
            slots = store.manifest.num_chunks
            memory = usable_memory()
            if slots * store.chunk_bytes > 0.8 * memory:
                raise MisuseError(
                    f"{store.place} takes {slots * store.chunk_bytes / 2**30:.1f} GiB in memory, and this process has "
                    f"{memory / 2**30:.1f}: leave out `cache_in_memory`"
                )
        self.buffer = store.empty(slots)  # the system commits its pages as chunks arrive
        self.slot_of = np.full(store.manifest.num_chunks, -1)  # chunk -> its slot, or -1
        self.free = list(range(slots))
        self._epoch: _Epoch | None = None

    def epoch(self, order: np.ndarray) -> Iterator[TargetBatch]:
        """Start reading for the image ids ``order`` (S,); gives its batches, the last one short if need be.

        One epoch at a time: starting one ends the one before. MisuseError at once when the order needs more chunks at a
        time than the window holds; FailureError while iterating, before the batch that a damaged chunk belongs to.
        """
        self.close()
        self._epoch = _Epoch(self, np.asarray(order))
        return self._batches(self._epoch)

    def _batches(self, epoch: "_Epoch") -> Iterator[TargetBatch]:
        try:
            for _ in range(epoch.num_batches):
                yield epoch.take()
        finally:
            epoch.stop()

    def close(self) -> None:
        """Stop the threads of the epoch under way, if any."""
        if self._epoch is not None:
            self._epoch.stop()
            self._epoch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def gather(self, image_ids: np.ndarray) -> dict[str, Tensor]:
        """The stored arrays (B, G, ...) of images whose chunks are in the buffer; in pinned memory for a CUDA device."""
        chunk_rows, num_views = self.store.manifest.chunk_rows, len(self.store.manifest.view_ids)
        entries = self.slot_of[image_ids // chunk_rows] * chunk_rows + image_ids % chunk_rows
        if self.columns is not None:  # single views instead of an image's views in one piece
            entries = entries[:, None] * num_views + self.columns
        gathered = {}
        for name, values in self.buffer.items():
            source = values.reshape(-1, *values.shape[2 if self.columns is None else 3 :])
            dtype, pinned = torch.from_numpy(source).dtype, self.device.type == "cuda"
            gathered[name] = torch.empty((*entries.shape, *source.shape[1:]), dtype=dtype, pin_memory=pinned)
            np.take(source, entries, axis=0, out=gathered[name].numpy(), mode="clip")  # the mode that needs no buffer
        return gathered


class _Epoch:
    """One epoch's threads: readers fill slots, one gatherer makes batches. One lock; each side has its own condition."""

    def __init__(self, owner: TargetPrefetcher, order: np.ndarray) -> None:
        self.owner = owner
        self.batches = [order[start : start + owner.batch_size] for start in range(0, len(order), owner.batch_size)]
        self.num_batches = len(self.batches)
        self._plan()
        self.lock = threading.Lock()
        self.slot_freed, self.gatherable, self.batch_ready = (threading.Condition(self.lock) for _ in range(3))
        self.started = 0  # chunks of the plan that a reader has taken up
        self.arrived = np.zeros(len(self.chunks), bool)
        self.ready: deque[Any] = deque()
        self.error: BaseException | None = None
        self.stopped = False
        self.stream = torch.cuda.Stream(owner.device) if owner.device.type == "cuda" else None
        targets = [self._read] * owner.threads + [self._gather]
        self.threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in targets]
        for thread in self.threads:
            thread.start()

    def take(self) -> TargetBatch:
        """The next batch, waiting for it."""
        with self.lock:
            self.batch_ready.wait_for(lambda: self.ready or self.error or self.stopped)
            if self.ready:
                image_ids, arrays, copied = self.ready.popleft()
                self.gatherable.notify()
            elif self.error:
                raise self.error
            else:
                raise RuntimeError("the prefetcher was closed in the middle of an epoch")
        if copied is None:
            # Not by the gathering thread. Its operations would have OpenMP threads of their own, and with more of them than
            # cores none waits actively any more: every operation of the training step would have to wake some.
            decoded = self.owner.store.decode(arrays)
            return TargetBatch(image_ids, {name: values.to(self.owner.device) for name, values in decoded.items()})
        here = torch.cuda.current_stream(self.owner.device)
        here.wait_event(copied)
        for values in arrays.values():
            values.record_stream(here)  # allocated on the copying stream
        return TargetBatch(image_ids, arrays)

    def stop(self) -> None:
        """End the threads; chunks that the epoch still held are forgotten, unless they are cached."""
        with self.lock:
            if self.stopped:
                return
            self.stopped = True
            self._wake_all()
        for thread in self.threads:
            thread.join()
        owner = self.owner
        kept = self.chunks[self.arrived] if owner.cache_in_memory else []
        lost = np.setdiff1d(self.chunks, kept)
        lost = lost[owner.slot_of[lost] >= 0]
        owner.free.extend(owner.slot_of[lost].tolist())
        owner.slot_of[lost] = -1

    def _plan(self) -> None:
        """Which chunks to read, in order of first use; how many of them each batch needs; which ones it is the last to
        use."""
        owner = self.owner
        needed = np.concatenate([ids // owner.store.manifest.chunk_rows for ids in self.batches] or [np.empty(0, int)])
        batch_of = np.arange(len(needed)) // owner.batch_size
        chunks, first = np.unique(needed, return_index=True)
        last = len(needed) - 1 - np.unique(needed[::-1], return_index=True)[1]
        absent = owner.slot_of[chunks] < 0
        chunks, first, last = chunks[absent], batch_of[first[absent]], batch_of[last[absent]]
        by_use = np.argsort(first, kind="stable")
        self.chunks, first, last = chunks[by_use], first[by_use], last[by_use]
        number = np.arange(self.num_batches)
        self.chunks_needed = np.searchsorted(first, number, side="right")
        self.done_after: list[list[int]] = [[] for _ in number]
        if owner.cache_in_memory:
            return
        for chunk, batch in zip(self.chunks.tolist(), last.tolist(), strict=True):
            self.done_after[batch].append(chunk)
        in_use = int((self.chunks_needed - np.searchsorted(np.sort(last), number, side="left")).max(initial=0))
        if in_use > len(owner.free):
            # A wider window also shuffles wider (`window_blocks`): with so many slots, two windows always fit.
            slots = min(2 * in_use + 3, owner.store.manifest.num_chunks)
            mib = owner.store.chunk_bytes / 2**20
            raise MisuseError(
                f"`window_mib` holds {len(owner.free)} chunks of {owner.store.place} ({mib:,.1f} MiB each), and the order of "
                f"training needs {in_use} at once: give `window_mib` {int(np.ceil(slots * mib))}, smaller batches, or "
                "`cache_in_memory`"
            )

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            use_device(self.owner.device)
            work()
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
                self._wake_all()

    def _wake_all(self) -> None:
        for condition in (self.slot_freed, self.gatherable, self.batch_ready):
            condition.notify_all()

    def _read(self) -> None:
        owner = self.owner
        while True:
            with self.lock:
                self.slot_freed.wait_for(lambda: self.stopped or self.started == len(self.chunks) or owner.free)
                if self.stopped or self.started == len(self.chunks):
                    return
                number, slot = self.started, owner.free.pop()
                self.started += 1
                chunk = int(self.chunks[number])
                owner.slot_of[chunk] = slot
                if self.started == len(self.chunks):
                    self.slot_freed.notify_all()  # none left to read: the other readers may go
            owner.store.read_chunk(chunk, {name: values[slot] for name, values in owner.buffer.items()})
            with self.lock:
                self.arrived[number] = True
                self.gatherable.notify()

    def _gather(self) -> None:
        owner = self.owner
        for number, image_ids in enumerate(self.batches):
            with self.lock:
                self.gatherable.wait_for(lambda: self.stopped or self.error or self._can_gather(number))  # noqa: B023
                if self.stopped or not self._can_gather(number):
                    return
            stored = owner.gather(image_ids)
            if done := self.done_after[number]:
                with self.lock:
                    owner.free.extend(owner.slot_of[done].tolist())
                    owner.slot_of[done] = -1
                    self.slot_freed.notify(len(done))
            arrays, copied = (stored, None) if self.stream is None else self._on_gpu(stored, self.stream)
            with self.lock:
                self.ready.append((image_ids, arrays, copied))
                self.batch_ready.notify()

    def _can_gather(self, number: int) -> bool:
        return len(self.ready) < READY_BATCHES and bool(self.arrived[: self.chunks_needed[number]].all())

    def _on_gpu(self, stored: dict[str, Tensor], stream: torch.cuda.Stream) -> tuple[dict[str, Tensor], torch.Event]:
        """Decoded, in ``stream``, and the event behind that."""
        with torch.cuda.stream(stream):  # compact bytes cross the bus, and are widened on the device
            moved = {name: values.to(self.owner.device, non_blocking=True) for name, values in stored.items()}
            return self.owner.store.decode(moved), stream.record_event()
