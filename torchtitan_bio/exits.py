"""How a root script ends: 0, 2 for what its user can mend in configuration or data, 130 interrupted, 1 after any failure."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager

from torchtitan_bio.config import ConfigError

OWN_CODE = ("torchtitan_bio", "__main__", "train")


@contextmanager
def blaming_the_input():
    """Around what is built from a user's input: what our own code refuses can be mended; a library's complaint is a bug."""
    try:
        yield
    except ValueError as error:
        if is_of_the_input(error):
            raise ConfigError(error) from error
        raise


def is_of_the_input(error: BaseException) -> bool:
    """Whether our own code has raised this error, and as one that a user can mend."""
    if not isinstance(error, ValueError):
        return False
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals["__name__"].partition(".")[0] in OWN_CODE


@contextmanager
def collecting(problems: list[str], prefix: str = ""):
    """A ValueError of the body becomes lines among the problems."""
    try:
        yield
    except ValueError as error:
        problems += [f"{prefix}{line}" for line in str(error).split("\n")]


def run(main: Callable[[], int | None], what: str = "this run") -> int:
    """main's exit code, None being 0. A failure is told, and ends the process here and now.

    what: that which "cannot work", in the words to a user who can mend it.

    A rank that fails must not clean up first. That would wait for what the others have begun with it, a checkpoint for
    instance, while torchrun waits for this very process to end before it ends them.
    """
    try:
        return main() or 0
    except SystemExit:  # argparse's, of a script that reads its flags in main: --help, or a flag that it has refused
        raise
    except ConfigError as error:
        # A node may lack what the others have: the first rank of each speaks.
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", rank) == "0":
            where = "" if rank == "0" else f" (rank {rank} on {socket.gethostname()})"
            print(f"{what} cannot work{where}:", *error.problems, sep="\n  ", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is whole", file=sys.stderr)
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
