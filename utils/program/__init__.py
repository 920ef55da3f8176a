"""What every program needs: its command line, how it ends, signals, files, environment."""

from utils.program.errors import OneLineError, RunFailed, Stopped, UserError, one_line_errors

__all__ = ["OneLineError", "RunFailed", "Stopped", "UserError", "one_line_errors"]
