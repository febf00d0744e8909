"""Several processes of one command: launch, placement of models and work, faults."""
