import sys
from pathlib import Path

# The helper modules are shared with make_golden.py, which runs as a script.
sys.path.insert(0, str(Path(__file__).parent))
