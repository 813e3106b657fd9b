import sys
from pathlib import Path

# For the helper modules of this folder.
sys.path.insert(0, str(Path(__file__).parent))
