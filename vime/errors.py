"""The errors vime raises on purpose. Each is also the standard library's kind of that mistake."""


class ConfigError(ValueError):
    """A user's setting cannot work. Says the flag, its value and the remedy; exits with code 2."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self):
        return type(self), self.problems


class PluginError(TypeError):
    """A user's function could not be loaded, has the wrong signature or broke its contract."""


class ReturnError(PluginError):
    """A user's function returned what its hook does not allow."""


class EngineError(RuntimeError):
    """A vLLM engine or the router died, refused or did not answer in time."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing a part, is damaged or does not fit the model. Names the file."""
