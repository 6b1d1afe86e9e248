"""python -m anybatch: the command line, as torchrun starts it."""

from anybatch.cli import main

if __name__ == "__main__":
    main()
