"""Running the metrics over trajectories: the parts behind `hf_lowrank.measure`."""
