"""``python -m epmoe`` and ``torchrun -m epmoe``."""

from epmoe.cli import main

if __name__ == "__main__":
    main()
