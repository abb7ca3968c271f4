"""`python -m marval`, and so `torchrun -m marval`."""

from marval.cli import main

if __name__ == "__main__":
    main()
