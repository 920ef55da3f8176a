"""What both entry scripts share: options, data, training, evaluation, run folders."""


class UserError(Exception):
    """A mistake of the user's. The entry scripts print it as one line and exit with code 2."""

    exit_code = 2


class RunFailed(UserError):
    """A run that cannot go on though the command was right: printed as one line, exit code 1."""

    exit_code = 1
