"""Which examples are seen when, in which batch, and by which process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Key = tuple[int, int]


@dataclass(frozen=True)
class MicroBatch:
    """What one process passes through the model at once.

    Attributes:
        keys: `(epoch, index)` of each example.
        share: of the optimizer step's examples, in [0, 1]; 0 when the process only keeps the others company.
        last: the optimizer steps after this one.
    """

    keys: tuple[Key, ...]
    share: float
    last: bool


@dataclass(frozen=True)
class EpochPlan:
    """The order of the examples, as a function of seed and epoch alone.

    An optimizer step takes `batch_size` examples over all processes; the last one of an epoch takes what is left.
    Each example has the same weight in its step, whatever the number of processes and the size of the
    micro-batches, so both change the memory and not the result. Nothing has to be stored to continue in the
    middle of an epoch.

    Attributes:
        examples: their number.
        batch_size: examples per optimizer step, over all processes.
        micro_batch: most examples per forward pass of one process.
        seed: of the order.
        weights: chance of each example to be drawn (balanced sampling); `None` sees each exactly once.
        processes, process: how many there are, and which one this is.
    """

    examples: int
    batch_size: int
    micro_batch: int = 1
    seed: int = 0
    weights: Sequence[float] | None = None
    processes: int = 1
    process: int = 0

    def __post_init__(self):
        for name in ("examples", "batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.examples // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Indices (examples,) in the order in which they are seen."""
        generator = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            return generator.permutation(self.examples)
        chances = np.asarray(self.weights, dtype=np.float64)
        return generator.choice(self.examples, size=self.examples, p=chances / chances.sum())

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of this process in an epoch, from an optimizer step on; equally many in every process."""
        order = self.order(epoch).tolist()
        for start in range(first_step * self.batch_size, self.examples, self.batch_size):
            yield from self._step(epoch, order[start : start + self.batch_size])

    def _step(self, epoch: int, group: list[int]) -> Iterator[MicroBatch]:
        mine = group[self.process :: self.processes]
        most = -(-len(group) // self.processes)  # examples of the busiest process
        for start in range(0, most, self.micro_batch):
            indices = mine[start : start + self.micro_batch]
            # All processes meet in every backward pass; one without an example repeats another with weight zero.
            keys = tuple((epoch, index) for index in indices or group[:1])
            yield MicroBatch(keys, share=len(indices) / len(group), last=start + self.micro_batch >= most)


def balanced_weights(labels: Sequence[int]) -> list[float]:
    """Chance of each example so that every class is drawn equally often."""
    counts = np.bincount(labels)
    return [1.0 / counts[label] for label in labels]


def class_weights(labels: Sequence[int], num_labels: int) -> list[float]:
    """Loss weight per class, inverse to its frequency, with mean 1 over the examples.

    Raises:
        ValueError: a class without an example.
    """
    counts = np.bincount(labels, minlength=num_labels)
    if (counts == 0).any():
        raise ValueError(f"Examples per class: {counts.tolist()}; every class needs at least one to train.")
    return (len(labels) / (num_labels * counts)).tolist()
