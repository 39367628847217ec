"""The `darkroom` command as a module, whatever is installed: `python -m tests.tasks.command worker`."""

from cli.main import app

if __name__ == "__main__":
    app()
