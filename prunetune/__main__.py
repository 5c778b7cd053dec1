"""``python -m prunetune``: the command line."""

from prunetune.cli import main

if __name__ == "__main__":
    main()
