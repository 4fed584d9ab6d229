"""What one GPU shows in a few minutes: `python benchmarks/gpu.py --out gpu.json`; see `benchmarks/on_gpu/`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose modules have common names
    from benchmarks.on_gpu.command import main

    sys.exit(main())
