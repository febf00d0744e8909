"""Several processes of one command: their launch, where they place models, how they split work and merge results."""
