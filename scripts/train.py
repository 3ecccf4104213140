"""`accelerate launch scripts/train.py ...`: the same options as `lymph train`."""

import sys

from lymph_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
