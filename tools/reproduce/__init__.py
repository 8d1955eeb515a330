"""The papers' comparisons on a made-up world, small enough for anyone to run."""
