"""How scripts read their own flags: as argparse does, and with a question where one is mistyped."""

import argparse
import difflib
import re
import sys
from itertools import takewhile


class Parser(argparse.ArgumentParser):
    """Refuses a flag that is spelt nearly as one of its own with the one that was probably meant, whatever else is missing.

    `--section.key` is left to whoever reads configuration, and so is a flag that resembles none.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        own = re.findall(r"--[\w-]+", self.format_usage())
        for word in takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name and name not in own:
                near = difflib.get_close_matches(name[2:], [flag[2:] for flag in own], n=1)
                if near:
                    self.error(f"{name} is no flag; did you mean --{near[0]}?")
        return super().parse_known_args(args, namespace)
