import sys
from pathlib import Path

# Helper modules: our own, and the tiny models of every family that the parity tests define.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parity")]
