"""Training memory: an itemised estimate before you train, and the measured peak to compare it with."""

from hf_lowrank.memory.estimates import MemoryEstimate, estimate
from hf_lowrank.memory.recorder import MemoryRecorder, memory_recorder

__all__ = ["MemoryEstimate", "MemoryRecorder", "estimate", "memory_recorder"]
