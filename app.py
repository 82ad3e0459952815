"""`denseclip app` from a clone, or as a Space, which has the sources but nothing installed."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from denseclip_hf.cli.app import main


if __name__ == "__main__":
    main()
