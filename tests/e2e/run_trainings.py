"""Several trainings one after another in the same processes, which start up but once: a JSON list of main.py's flags.

python run_trainings.py FILE, alone or under torchrun.
"""
import json
import sys

from main import get_args_parser, main

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        for flags in json.load(file):
            main(get_args_parser().parse_args(flags))
