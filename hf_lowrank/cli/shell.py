"""The command that prints a shell's completion script."""

from typing import Annotated, Literal

import typer
from typer import Argument

from hf_lowrank.cli.app import NAME, command

# The variable by which a completion script asks for completions.
COMPLETION = f"_{NAME.replace('-', '_').upper()}_COMPLETE"


@command(
    'eval "$(hf-lowrank completion bash)"                                       # this session',
    "hf-lowrank completion bash >> ~/.bashrc",
    "hf-lowrank completion zsh > ~/.zfunc/_hf-lowrank                           # a folder of fpath",
    "hf-lowrank completion fish > ~/.config/fish/completions/hf-lowrank.fish",
)
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish", "powershell"], Argument(help="The shell.")],
) -> None:
    """Print a script that completes commands, options and names in a shell."""
    from typer.completion import get_completion_script

    typer.echo(get_completion_script(prog_name=NAME, complete_var=COMPLETION, shell=shell))


def register_shells() -> None:
    """Lets the completion scripts of all shells ask for completions."""
    from typer.completion import completion_init

    completion_init()
