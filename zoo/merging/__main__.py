"""`python -m zoo.merging`: see `zoo.merging.command`."""

from zoo.merging.command import main

if __name__ == "__main__":
    main()
