"""lm-eval's command line with this package's models, tasks and checkpoints registered."""

import sys
import traceback
from collections.abc import Sequence

from hf_lowrank.downstream.catalogue import TASK_FOLDER, register_models
from hf_lowrank.errors import UserError

# The modules of lm-eval that check its arguments.
ARGUMENT_MODULES = ("lm_eval._cli", "lm_eval.config")


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Runs `lm-eval ARGUMENTS…`; every flag is lm-eval's. The model defaults to `hf-lowrank`.

    Raises:
        UserError: a checkpoint, tokenizer or task of this package is unusable.
        SystemExit: raised by lm-eval's parser.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import hf_lowrank.adapters  # noqa: F401  (registers adapted models, for `--model hf`)

    register_models()
    setup_logging()
    given, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        # The parser reads sys.argv itself, since `run` may be left out.
        parser = HarnessCLI()
        parsed = parser.parse_args()
    finally:
        sys.argv = given
    if hasattr(parsed, "include_path"):
        own = str(TASK_FOLDER)
        parsed.include_path = [own, parsed.include_path] if parsed.include_path else own
    if getattr(parsed, "command", None) == "run" and not parsed.model and not parsed.config:
        parsed.model = "hf-lowrank"
    try:
        parser.execute(parsed)
    except (ValueError, FileNotFoundError) as error:
        # Errors of its argument checks become one line; errors of what it runs keep their traceback.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, UserError) or not frame.f_globals.get("__name__", "").startswith(ARGUMENT_MODULES):
            raise
        raise UserError(str(error)) from None
