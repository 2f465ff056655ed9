"""`python -m flashcore_ops` is the `flashcore` command."""

from flashcore_ops.cli import app

app(prog_name="flashcore")
