"""Memory told before it is spent: an itemised estimate of a recipe's training, and the measured peak beside it."""

from hf_lowrank.memory.estimates import MemoryEstimate, estimate
from hf_lowrank.memory.recorder import MemoryRecorder, memory_recorder

__all__ = ["MemoryEstimate", "MemoryRecorder", "estimate", "memory_recorder"]
