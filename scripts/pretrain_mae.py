"""`accelerate launch scripts/pretrain_mae.py ...`: the same options as `lymph pretrain`."""

import sys

from lymph_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
