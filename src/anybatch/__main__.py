"""python -m anybatch: the command line, as torchrun starts it."""

import os
import sys

if sys.path and sys.path[0] in ("", os.getcwd()):
    # Python puts the current folder first. A file there, such as typer.py of somebody's archive,
    # would run in place of the package. Code that a recipe may name is still found there.
    del sys.path[0]

from anybatch.cli import main

if __name__ == "__main__":
    main()
