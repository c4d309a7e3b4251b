"""The errors that vime raises on purpose. Each is also an error of the standard library."""


class ConfigError(ValueError):
    """A setting cannot work. The message names flag, value and remedy; the exit code is 2."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self):
        return type(self), self.problems


class PluginError(TypeError):
    """A user's function could not be loaded, has the wrong signature or broke its contract."""


class ReturnError(PluginError):
    """A user's function returned a value that its hook does not allow."""


class EngineError(RuntimeError):
    """A vLLM engine or the router died, refused a request or did not answer in time."""


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged or of another model. The message names the file."""
