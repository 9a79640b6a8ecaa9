class InferenceError(Exception):
    """What a command or the Python interface cannot do as asked; the message names the value and the remedy."""
