"""`python -m modalloy.cli`."""

from modalloy.cli import main

if __name__ == "__main__":
    main()
