"""`python -m hf_lowrank`, also as a module of `accelerate launch` and `torchrun`: the command line."""

from hf_lowrank.cli import main

if __name__ == "__main__":
    main()
