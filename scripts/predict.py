"""`accelerate launch scripts/predict.py ...`: the same options as `lymph predict`."""

import sys

from lymph_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
