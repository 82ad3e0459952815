"""`denseclip convert release` from a clone; `--help` lists the options."""

import sys


if __name__ == "__main__":
    del sys.path[0]  # this folder, where `import evaluate` would find evaluate.py in place of the library
    from denseclip_hf.cli.convert import main

    main(["release", *sys.argv[1:]])
