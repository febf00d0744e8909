"""The one owner of the run directory: its file names, its checkpoints, and a reader and a writer for each file."""
