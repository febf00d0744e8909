"""Atomic file writes, locks, checksums, parsing and tables of rows, without knowledge of runs or models."""
