"""`accelerate launch scripts/evaluate.py ...`: the same options as `lymph evaluate`."""

import sys

from lymph_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
