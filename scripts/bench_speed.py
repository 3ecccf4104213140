"""Prediction and training of a patient beside the plain way: `lymph bench`, with the same options."""

import sys

from lymph_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
