"""`python -m cli` is the `darkroom` command: what starts another process of it needs no script."""

from cli.main import main

if __name__ == "__main__":
    main()
