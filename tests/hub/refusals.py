"""How the loopback Hub says no."""


class RefusedError(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
