"""Several trainings one after another in the same processes, which start up but once: a JSON list of main.py's flags.

torchrun … run_trainings.py FILE
"""
import json
import os
import sys

from main import get_args_parser, main

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        for i, flags in enumerate(json.load(file)):
            # A place of its own to meet: the launcher's still knows the processes of the training before.
            meet = ["--dist_url", f"file://{os.path.abspath(sys.argv[1])}.{i}"]
            main(get_args_parser().parse_args([*flags, *meet]))
